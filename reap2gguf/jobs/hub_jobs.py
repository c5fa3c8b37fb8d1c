"""Hugging Face Jobs through huggingface_hub: start, look, follow, cancel; and what errors mean."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from reap2gguf.errors import DependencyError, JobError
from reap2gguf.hub.errors import (
    Problem,
    causes,
    is_busy,
    problem_of,
    reason_of,
    request_errors,
    status_of,
)
from reap2gguf.hub.retry import Note, Retry, Sleep
from reap2gguf.jobs.flavors import Flavor, from_api
from reap2gguf.jobs.request import MOUNT, TOKEN, JobRequest
from reap2gguf.messages import shown

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
ENDED = ("COMPLETED", "CANCELED", "ERROR", "DELETED")
_NEEDED = "1.8"  # of huggingface_hub: the first with volumes
_MOST_MESSAGE = 300
_MOST_JOBS = 1000
_NOT_LOGGED_IN = "not logged in to the Hub: run `hf auth login`"


@dataclass(frozen=True)
class Job:
    """A job as the Hub describes it."""

    id: str
    stage: str  # SCHEDULING, RUNNING, or one of ENDED
    message: str
    name: str
    flavor: str
    created: str  # ISO 8601, or empty
    seconds: int | None  # how long it has run
    url: str

    @property
    def has_ended(self) -> bool:
        return self.stage in ENDED

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class HubJobs:
    """Jobs of one account or organization."""

    def __init__(self, namespace: str | None, note: Note, sleep: Sleep = time.sleep) -> None:
        self._note = note
        self._sleep = sleep
        self._token = _token()
        self._api = _api()
        self.namespace = namespace or str(self._ask("the Hub", self._api.whoami)["name"])

    @property
    def endpoint(self) -> str:
        return self._api.endpoint

    def flavors(self) -> list[Flavor] | None:
        """The machines that the Hub has; None if it does not list them."""
        found = from_api(self._ask("the list of machines", self._api.list_jobs_hardware))
        return found or None

    def make_bucket(self, bucket: str) -> None:
        """Create a private bucket if it is not there. Raises JobError if it is public."""
        self._ask(bucket, lambda: self._api.create_bucket(bucket, private=True, exist_ok=True))
        if not self._ask(bucket, lambda: self._api.bucket_info(bucket)).private:
            raise JobError(
                f"{bucket}: a public bucket, which would show unfinished work to everyone; make it "
                "private, or pass another --storage"
            )

    def start(self, request: JobRequest) -> Job:
        """Start a job. It is asked for once: a repeated request could start, and cost, two."""
        from huggingface_hub import Volume

        bucket = request.storage
        volumes = [Volume(type="bucket", source=bucket, mount_path=MOUNT)] if bucket else None
        # a huggingface_hub that cannot repeat jobs does not know the argument
        more: dict[str, Any] = {"attempts": request.attempts} if request.attempts > 1 else {}
        try:
            info = self._api.run_job(
                image=request.image,
                command=request.command,
                env=dict(request.environment),
                secrets={TOKEN: self._token},
                flavor=request.flavor,
                timeout=request.timeout_seconds,
                labels=request.labels,
                volumes=volumes,
                namespace=self.namespace,
                **more,
            )
        except request_errors() as error:
            if refused := self._refusal(error, request.name):
                raise refused from error
            raise JobError(
                f"{request.name}: the Hub did not answer ({reason_of(error)}); the job may have "
                "started: see `reap2gguf jobs list` before you run it again"
            ) from error
        return _job(info)

    def look(self, job_id: str) -> Job:
        """What has become of a job."""
        return _job(
            self._ask(
                job_id, lambda: self._api.inspect_job(job_id=job_id, namespace=self.namespace)
            )
        )

    def all(self) -> list[Job]:
        """Jobs of this program, the newest first."""
        found = self._ask(
            "the list of jobs", lambda: list(self._api.list_jobs(namespace=self.namespace))
        )
        return [_job(info) for info in found[:_MOST_JOBS] if "reap2gguf" in (info.labels or {})]

    def cancel(self, job_id: str) -> None:
        """End a job."""
        self._ask(job_id, lambda: self._api.cancel_job(job_id=job_id, namespace=self.namespace))

    def logs(self, job_id: str, follow: bool) -> Iterator[str]:
        """Lines that a job has printed; with `follow` also those that it will print."""
        try:
            yield from self._api.fetch_job_logs(
                job_id=job_id, namespace=self.namespace, follow=follow
            )
        except request_errors() as error:
            if refused := self._refusal(error, job_id):
                raise refused from error
            raise JobError(
                f"{job_id}: its log cannot be read now ({reason_of(error)}); the job is not "
                f"affected, follow it again with `reap2gguf jobs logs {job_id}`"
            ) from error

    def wait(self, job_id: str, seconds: float = 60.0) -> Job:
        """A job after its log has ended; its stage may follow a little later."""
        job = self.look(job_id)
        end = time.monotonic() + seconds
        while not job.has_ended and time.monotonic() < end:
            self._sleep(2.0)
            job = self.look(job_id)
        return job

    def _ask(self, subject: str, request: Callable[[], T]) -> T:
        advice = "check the network, and HF_ENDPOINT if it is set"
        retry = Retry(
            subject,
            lambda error: self._refusal(error, subject),
            advice,
            self._note,
            self._sleep,
            error_class=JobError,
        )
        return retry.call(request)

    def _refusal(self, error: BaseException, subject: str) -> JobError | None:
        """What to report if another try would fail as well; None if it may succeed."""
        for cause in causes(error):
            problem = problem_of(cause)
            if problem is Problem.NO_TOKEN:
                return JobError(_NOT_LOGGED_IN)
            if problem is Problem.OFFLINE:
                return JobError("HF_HUB_OFFLINE is set; unset it to rent machines")
            status = status_of(cause)
            if status is not None and (status == 402 or not is_busy(status)):
                message = " ".join(str(getattr(cause, "server_message", None) or "").split())
                return JobError(self._words(status, subject, message[:_MOST_MESSAGE]))
        if isinstance(error, ValueError | LookupError | TypeError):
            return JobError(
                f"{subject}: the Hub's answer is not understood; check HF_ENDPOINT, and update "
                "with `pip install -U huggingface_hub`"
            )
        return None

    def _words(self, status: int, subject: str, message: str) -> str:
        detail = f"HTTP {status}{', ' + message if message else ''}"
        if status == 401:
            return f"the Hub does not accept the token ({detail}); run `hf auth login` again"
        if status == 402:
            return (
                f"{subject}: the account has no credits for it ({detail}); add credits in its "
                "billing settings, or pass another --namespace"
            )
        if status == 403:
            return (
                f"{subject}: the token may not do this ({detail}); log in with one that may write "
                "and start jobs, or pass another --namespace"
            )
        if status == 404:
            return (
                f"{subject}: not found on the Hub ({detail}); see `reap2gguf jobs list`, and pass "
                "--namespace if it belongs to an organization"
            )
        return f"{subject}: the Hub refuses it ({detail})"


def _job(info: Any) -> Job:
    status, durations = info.status, info.durations
    return Job(
        str(info.id),
        str(getattr(status.stage, "value", status.stage)),
        str(status.message or ""),
        str((info.labels or {}).get("name", "")),
        str(getattr(info.flavor, "value", info.flavor) or ""),
        info.created_at.isoformat() if info.created_at else "",
        durations.running_secs if durations else None,
        str(info.url),
    )


def _token() -> str:
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise JobError(_NOT_LOGGED_IN)
    return token


def _api() -> HfApi:
    """huggingface_hub's client. Raises DependencyError if it is too old for jobs with volumes."""
    import huggingface_hub
    from huggingface_hub import HfApi

    if not hasattr(huggingface_hub, "Volume") or not hasattr(HfApi, "create_bucket"):
        raise DependencyError(
            f"huggingface_hub {huggingface_hub.__version__} has no volumes for jobs, expected "
            f"{_NEEDED} or newer; run `pip install -U huggingface_hub`"
        )
    return HfApi(library_name="reap2gguf")


def checked_bucket(text: str) -> str:
    """A bucket's name as owner/name. Raises JobError for anything else."""
    owner, slash, name = text.removeprefix("hf://buckets/").partition("/")
    if not (owner and slash and name) or "/" in name or not text.isprintable():
        raise JobError(f"--storage {shown(text)}: expected a bucket, such as owner/name")
    return f"{owner}/{name}"
