"""What Hugging Face Jobs and buckets answer, on the loopback Hub; jobs are kept, not run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from tests.loopback_hub.repository import Answer, Request
from tests.loopback_hub.server import Hub
from tests.loopback_hub.uploads import TOKEN, Uploads

NOW = "2026-11-26T12:00:00.000Z"


def machine(name: str, gpu: str | None, vram: int, ram: int, disk: int, usd: float) -> Any:
    """A kind of machine as the Hub lists it; gigabytes, and dollars per hour."""
    accelerator = None
    if gpu is not None:
        accelerator = {
            "type": "gpu", "model": gpu, "quantity": "1", "vram": f"{vram} GB",
            "manufacturer": "Nvidia",
        }  # fmt: skip
    return {
        "name": name, "prettyName": name, "cpu": "8 vCPU", "ram": f"{ram} GB",
        "ephemeralStorage": f"{disk} GB", "accelerator": accelerator, "unitLabel": "minute",
        "unitCostMicroUSD": round(usd / 60 * 1e6), "unitCostUSD": usd / 60,
    }  # fmt: skip


HARDWARE = [
    machine("cpu-basic", None, 0, 16, 50, 0.01),
    machine("t4-small", "T4", 16, 15, 50, 0.40),
    machine("l4x1", "L4", 24, 30, 400, 0.70),
    machine("h200", "H200", 141, 256, 3000, 5.00),
]


@dataclass
class Jobs:
    """Jobs and buckets of the account `me`; use as a Hub's `writes`. Everything else is Uploads'.

    A job is RUNNING; its log has ended when it is read, and then its stage is `ends_as`.
    """

    uploads: Uploads = field(default_factory=Uploads)
    hardware: list[Any] = field(default_factory=lambda: list(HARDWARE))
    specs: list[dict[str, Any]] = field(default_factory=list)  # what was posted
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    buckets: dict[str, bool] = field(default_factory=dict)  # by name: whether it is private
    log: list[str] = field(default_factory=lambda: ["one", "two"])
    ends_as: str = "COMPLETED"
    message: str | None = None

    def __call__(self, hub: Hub, request: Request) -> Answer | None:
        kind, _, rest = request.path.removeprefix("/api/").partition("/")
        if kind == "jobs" and rest == "hardware":
            return _answer(self.hardware)
        if not request.path.startswith("/api/") or kind not in ("jobs", "buckets"):
            reads = request.method == "HEAD" or "/paths-info/" in request.path
            return None if reads else self.uploads(hub, request)
        headers = {name.lower(): value for name, value in request.headers.items()}
        if headers.get("authorization") != f"Bearer {TOKEN}":
            return _answer({"error": "Invalid username or password."}, 401)
        parts = rest.split("/")
        if parts[0] != "me":
            return _answer({"error": f"no write access to {parts[0]}"}, 403)
        if kind == "buckets":
            return self._bucket(hub, request, rest)
        return self._job(request, parts[1:])

    def _bucket(self, hub: Hub, request: Request, name: str) -> Answer:
        if request.method == "POST":
            if name in self.buckets:
                return _answer({"error": "exists", "url": f"{hub.endpoint}/buckets/{name}"}, 409)
            self.buckets[name] = json.loads(request.body).get("visibility") == "private"
            return _answer({"url": f"{hub.endpoint}/buckets/{name}"})
        facts = {"createdAt": NOW, "size": 0, "totalFiles": 0}
        return _answer({"id": name, "private": self.buckets[name], **facts})

    def _job(self, request: Request, parts: list[str]) -> Answer:
        if not parts:
            if request.method == "GET":
                return _answer(list(self.jobs.values())[::-1])
            return self._start(json.loads(request.body))
        job = self.jobs.get(parts[0])
        if job is None:
            return _answer({"error": "Job not found"}, 404)
        if parts[1:] == ["logs"]:
            job["status"] = {"stage": self.ends_as, "message": self.message}
            lines = [json.dumps({"data": line, "timestamp": NOW}) for line in self.log]
            body = "".join(f"data: {line}\n\n" for line in lines).encode()
            return Answer(200, {"Content-Type": "text/event-stream"}, body)
        if parts[1:] == ["cancel"]:
            job["status"] = {"stage": "CANCELED", "message": None}
        return _answer(job)

    def _start(self, spec: dict[str, Any]) -> Answer:
        self.specs.append(spec)
        name = f"{len(self.specs):024x}"
        public = {key: value for key, value in spec.items() if key != "secrets"}
        self.jobs[name] = {
            **public, "id": name, "createdAt": NOW, "startedAt": NOW, "finishedAt": None,
            "status": {"stage": "RUNNING", "message": None},
            "durations": {"schedulingSecs": 1, "runningSecs": 120, "totalSecs": 121},
            "owner": {"id": "1", "name": "me", "type": "user"},
        }  # fmt: skip
        return _answer(self.jobs[name])


def _answer(values: Any, status: int = 200) -> Answer:
    headers = {"Content-Type": "application/json"}
    if isinstance(values, dict) and "error" in values:
        headers["X-Error-Message"] = values["error"]
    return Answer(status, headers, json.dumps(values).encode())
