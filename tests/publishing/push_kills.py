"""Pushes that are killed at one point, and are then resumed.

Run as a module to do so at many points, from the repository's root:

    python -m tests.publishing.push_kills --points 20

Half of the points are requests to the Hub, before they take effect or after; the others are
operations on files of the output folder, while GGUF files are cut into parts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.child import MOST_SECONDS, Child, end_in_time, lines_for_forks
from tests.loopback_hub.repository import Content
from tests.loopback_hub.server import Hub
from tests.loopback_hub.uploads import TOKEN, Uploads
from tests.tiny import TinyQwen3Moe, child_environment
from tests.tokens import FULL_VOCAB

REPO = "me/thing"
_MAX_FILE = "900000B"
_LARGE = 300_000
TEXT = "".join(f"Line {i} says that {i} times {i} is {i * i}, and no more.\n" for i in range(60))


def tiny_bundle(folder: Path) -> Path:
    """A finished build of a random checkpoint of two shards; its safetensors folder."""
    from reap2gguf.building.pipeline import build
    from reap2gguf.building.plan import make_plan
    from reap2gguf.options import BuildOptions, CalibrationOptions, ComputeOptions
    from reap2gguf.progress import Silent

    source = TinyQwen3Moe(n_shards=2, vocab=FULL_VOCAB).write(folder / "source")
    text = folder / "text.txt"
    text.write_text(TEXT)
    options = BuildOptions(
        recipes=("bf16", "q8_0"), model=str(source), output=folder / "out", name="model",
        calibration=CalibrationOptions(str(text), samples=4, max_length=64), chunk=64,
        compute=ComputeOptions(device="cpu", threads=1),
    )  # fmt: skip
    return build(make_plan(options), Silent()).hf_folder


@dataclass
class Runner:
    """A process that has loaded the program and forks one that pushes, for each line it is sent."""

    environment: dict[str, str]
    folder: Path
    pid: int = 0
    _known: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Runner:
        name = "tests.publishing.push_kills"
        self._process = Child(name, "--serve", environment=self.environment)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.close()

    def run(self, *arguments: str, fault: dict[str, Any] | None = None) -> tuple[int, str]:
        """Exit code, or minus the signal, and what it printed."""
        self._known.clear()
        path = self.folder / "printed"
        request = {"arguments": arguments, "fault": fault, "printed": str(path)}
        self._process.send(request)
        self.pid = int(self._process.receive())
        self._known.set()
        return int(self._process.receive()), path.read_text()

    def kill(self) -> None:
        """Kill the push that is under way."""
        self._known.wait(MOST_SECONDS)
        os.kill(self.pid, signal.SIGKILL)


class Rig:
    """A bundle, a Hub, and pushes of one to the other."""

    def __init__(self, bundle: Path, hub: Hub, runner: Runner) -> None:
        self.bundle, self.hub, self.runner = bundle, hub, runner
        self.reset()

    def reset(self) -> None:
        """A Hub without anything."""
        self.hub.repositories.clear()
        self.hub.writes = self.uploads = Uploads(part_bytes=400_000)
        self.uploads.strike = self.runner.kill

    def push(self, fault: dict[str, Any] | None = None) -> tuple[int, str]:
        arguments = ("push", str(self.bundle), REPO, "--max-file-size", _MAX_FILE, "--threads", "1")
        return self.runner.run(*arguments, fault=fault)

    def tree(self) -> dict[str, dict[str, Content]]:
        return {repo.name: dict(repo.files) for repo in self.hub.repositories}

    def resume(self, whole: dict[str, dict[str, Content]]) -> None:
        """Resume, and see that everything is there, once."""
        self.uploads.strike_at = -1
        code, printed = self.push()
        assert code == 0, printed
        assert self.tree() == whole
        assert self.uploads.put_twice() == []
        for name in whole:
            assert self.uploads.added_twice(name) == []
            assert self.uploads.history[name][-1].message == "Upload card, hashes and manifest"
        assert not list((self.bundle.parent / ".work").glob(".model.push"))

    def killed_at_request(self, at: int, after: bool, whole: dict[str, Any]) -> None:
        """Kill a push at one of its requests and resume it."""
        self.reset()
        self.uploads.strike_at, self.uploads.strike_after = at, after
        code, printed = self.push()
        assert code == -signal.SIGKILL, printed
        self.resume(whole)

    def killed_at_operation(self, at: int, whole: dict[str, Any]) -> None:
        """Kill a push at one of its operations on files and resume it."""
        self.reset()
        code, printed = self.push({"folder": str(self.bundle.parent / ".work"), "at": at})
        assert code == -signal.SIGKILL, printed
        self.resume(whole)

    def reference(self) -> tuple[dict[str, dict[str, Content]], int, int]:
        """What a push that nothing stops leaves, its requests and its operations on files."""
        self.reset()
        log = self.runner.folder / "log"
        fault = {"folder": str(self.bundle.parent / ".work"), "log": str(log)}
        code, printed = self.push(fault)
        assert code == 0, printed
        return self.tree(), self.uploads.n_asked, len(log.read_text().splitlines())


def spread(total: int, wanted: int) -> list[int]:
    """`wanted` numbers below `total`, evenly spread."""
    return sorted({round(i * (total - 1) / max(wanted - 1, 1)) for i in range(wanted)})


def _child(request: dict[str, Any]) -> None:
    from reap2gguf import cli
    from reap2gguf.publishing import upload
    from tests.faults.fault_layer import Fault

    end_in_time()
    descriptor = os.open(request["printed"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    upload.LARGE_BYTES = _LARGE  # so that there are commits of one file
    sys.argv = ["reap2gguf", *request["arguments"]]
    wanted = dict(request["fault"] or {"folder": "\0"})
    log = wanted.pop("log", None)
    fault = Fault(kinds=("write", "rename", "fsync"), **wanted)
    code = 0
    try:
        with fault.installed():
            cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001, whatever escapes the program is the finding
        traceback.print_exc()
        code = 70
    if log:
        Path(log).write_text("\n".join(fault.log))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve() -> None:
    import huggingface_hub
    from huggingface_hub import HfApi, ModelCard, RepoFile  # noqa: F401

    import reap2gguf.publishing.push  # noqa: F401

    huggingface_hub.close_session()
    for line in lines_for_forks():
        child = os.fork()
        if not child:
            _child(json.loads(line))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """Variables of a process that is logged in to a Hub."""
    variables = {**hub.environment(home), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    return child_environment(variables)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        _serve()
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, Hub() as hub:
        folder = Path(scratch)
        bundle = tiny_bundle(folder)
        with Runner(environment(hub, folder / "home"), folder) as runner:
            rig = Rig(bundle, hub, runner)
            whole, n_requests, n_operations = rig.reference()
            print(f"{n_requests} requests, {n_operations} operations on files")
            half = -(-arguments.points // 2)
            for number, at in enumerate(spread(n_requests, half)):
                rig.killed_at_request(at, bool(number % 2), whole)
                print(f"killed at request {at}, {'after' if number % 2 else 'before'}: complete")
            for at in spread(n_operations, arguments.points - half):
                rig.killed_at_operation(at, whole)
                print(f"killed at operation {at}: complete")
            shutil.rmtree(folder / "out")
    print(f"every push complete, nothing twice, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
