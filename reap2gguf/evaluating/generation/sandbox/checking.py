"""Run a program that a model wrote, and judge it: two processes in a jail, and their end.

The candidate's process has the program; the judge's process has the tests and calls it. Both give
up their rights before they begin (`jail.py`), and this one kills them at their limits.
"""

from __future__ import annotations

import json
import os
import select
import signal
import site
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import reap2gguf
from reap2gguf.disk.temporary import temporary_folder
from reap2gguf.errors import DependencyError, UsageError
from reap2gguf.evaluating.generation.sandbox.jail import GUARDS
from reap2gguf.evaluating.generation.sandbox.judge import PASSED, TIMED_OUT
from reap2gguf.messages import size

ENDED = "ended"
_START_SECONDS = 60.0  # for our own code alone, on a machine that may be busy
_POLL = 0.05
_MOST_BYTES = 2**16  # of a verdict
_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo")
_FILES = ("/etc/ld.so.cache", "/etc/localtime")
_BOOT = (
    "import sys; sys.path.append(sys.argv.pop(1)); "
    "from reap2gguf.evaluating.generation.sandbox.{} import main; main()"
)


@dataclass(frozen=True)
class Limits:
    """What a program may use; beyond one of these it fails or is killed."""

    memory_bytes: int = 2 * 2**30  # of address space
    file_bytes: int = 4 * 2**20  # of one file
    folder_bytes: int = 64 * 2**20  # of all files
    folder_files: int = 4096
    open_files: int = 64

    def __str__(self) -> str:
        return (
            f"{size(self.memory_bytes)} of memory, {size(self.folder_bytes)} of files in a folder "
            f"that is removed, {self.open_files} open files"
        )


@dataclass(frozen=True)
class Judging:
    """How to judge a program: what `judge.py` reads, see there."""

    way: str  # "tests" or "reference"
    entry_point: str
    details: Mapping[str, Any]
    seconds: float  # of the candidate's processor time in all


@dataclass(frozen=True)
class Verdict:
    """Whether a program passed the tests, and why not."""

    passed: bool
    reason: str


def guards_here(limits: Limits) -> list[str]:
    """Which of GUARDS hold on this machine, tried with a program that does nothing."""
    nothing = Judging("tests", "", {}, seconds=10.0)
    with _started(limits, "", nothing, required=()) as candidate:
        return candidate.guards


def require_guards(limits: Limits, is_unsandboxed_allowed: bool) -> tuple[str, ...]:
    """The guards that every process must have.

    Raises UsageError if this machine cannot isolate a program, unless that is allowed; then those
    that it has are required.
    """
    found = guards_here(limits)
    missing = [name for name in GUARDS if name not in found]
    if missing and not is_unsandboxed_allowed:
        raise UsageError(
            "--run-code runs programs that the model wrote, and this machine cannot keep them from "
            f"{_listed(missing)} (needed: Linux 5.13 or later on x86-64 or arm64, with Landlock "
            "and seccomp); run it on such a machine, pass --allow-unsandboxed to run them all the "
            "same, or leave out --run-code and evaluate the written answers elsewhere"
        )
    return tuple(found)


def _listed(guards: Sequence[str]) -> str:
    words = {
        "network": "the network",
        "files": "other files",
        "processes": "starting processes",
        "signals": "ending other processes",
    }
    return ", ".join(words[one] for one in guards)


def check(code: str, test: Judging, limits: Limits, required: Sequence[str] = GUARDS) -> Verdict:
    """Run a program and judge it.

    `required` are the guards without which nothing is run. Raises DependencyError if the processes
    do not start.
    """
    with _started(limits, code, test, required) as candidate:
        if not set(required) <= set(candidate.guards):
            raise DependencyError(
                f"the process for programs of models holds {candidate.guards}, expected "
                f"{list(required)}; run the command again, and report it if it fails again"
            )
        reason = candidate.judged(test)
    return Verdict(reason == PASSED, reason)


@contextmanager
def _started(
    limits: Limits, code: str, test: Judging, required: Sequence[str]
) -> Iterator[_Candidate]:
    with temporary_folder() as folder:
        candidate = _Candidate(folder, limits, tuple(required))
        try:
            candidate.start(code, test)
            yield candidate
        finally:
            candidate.close()


class _Candidate:
    """A running program of a model, and the pipes to it."""

    def __init__(self, folder: Path, limits: Limits, required: tuple[str, ...]) -> None:
        self._limits, self._required = limits, required
        self._home, self._judges = folder / "home", folder / "judge"
        for one in (self._home, self._judges):
            one.mkdir()
        self._to_candidate, self._from_candidate = os.pipe(), os.pipe()
        self._open = [*self._to_candidate, *self._from_candidate]
        self._process: subprocess.Popen[bytes] | None = None
        self.guards: list[str] = []

    def start(self, code: str, test: Judging) -> None:
        """Start its process, which enters its jail and says which guards hold."""
        mine = (self._to_candidate[0], self._from_candidate[1])
        self._process = _spawn("candidate", self._home, [*map(str, mine)], mine)
        packages = _packages()
        setup = {
            **self._setup(self._home, [*_python(), *packages], test.seconds),
            "code": code,
            "entry_point": test.entry_point,
            "packages": packages,
        }
        _give(self._process, setup)
        self._close(*mine)
        line = _read(self._process, time.monotonic() + _START_SECONDS, lambda: True, until=b"\n")
        if not line.endswith(b"\n"):
            raise DependencyError(
                "the process for programs of models does not start; run `reap2gguf doctor`"
            )
        self.guards = [str(name) for name in json.loads(line)]

    def judged(self, test: Judging) -> str:
        """The judge's verdict in words; the program's own fault if there is none."""
        assert self._process is not None
        mine = (self._to_candidate[1], self._from_candidate[0])
        arguments = [*map(str, mine), str(self._process.pid)]
        judge = _spawn("judge", self._judges, arguments, mine)
        self._close(*mine)
        try:
            # the judge runs the data set's own programs, too
            setup = self._setup(self._judges, _python(), 10 * test.seconds + 60)
            more = {"way": test.way, "entry_point": test.entry_point, "seconds": test.seconds}
            _give(judge, {**setup, **more, **test.details})
            deadline = time.monotonic() + 10 * test.seconds + _START_SECONDS
            written = _read(judge, deadline, self._is_within_its_folder)
        finally:
            _end(judge)
        if not self._is_within_its_folder():
            most = f"{size(self._limits.folder_bytes)} in {self._limits.folder_files:,} files"
            return f"failed: its folder holds more than {most}, or a part that cannot be read"
        try:
            reason = str(json.loads(written)["verdict"])
        except (ValueError, LookupError, TypeError):
            return TIMED_OUT if time.monotonic() > deadline else "failed: it has no verdict"
        return self._how_it_ended() if reason == ENDED else reason

    def _how_it_ended(self) -> str:
        assert self._process is not None
        try:
            status = self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            return "failed: it closed its pipes"
        if status == -signal.SIGKILL or status == -signal.SIGXCPU:
            return TIMED_OUT  # the limit of processor time
        how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
        return f"failed: it ended ({how})"

    def _setup(self, folder: Path, readable: Sequence[str], seconds: float) -> dict[str, Any]:
        limits = {**asdict(self._limits), "cpu_seconds": seconds}
        setup = {"folder": str(folder), "readable": list(readable), "parent": os.getpid()}
        return {**limits, **setup, "required": self._required}

    def _is_within_its_folder(self) -> bool:
        """Whether all its files can be seen, and are within their limits."""
        n_bytes = n_files = 0
        waiting = [str(self._home)]
        while waiting:
            try:
                with os.scandir(waiting.pop()) as entries:
                    for entry in entries:
                        n_files += 1
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append(entry.path)
                        else:
                            n_bytes += entry.stat(follow_symlinks=False).st_blocks * 512
                        if n_files > self._limits.folder_files:
                            return False
            except FileNotFoundError:  # removed meanwhile
                continue
            except OSError:
                return False
        return n_bytes <= self._limits.folder_bytes

    def _close(self, *descriptors: int) -> None:
        for one in descriptors:
            self._open.remove(one)
            os.close(one)

    def close(self) -> None:
        self._close(*list(self._open))
        if self._process is not None:
            _end(self._process)


def _spawn(
    module: str, folder: Path, arguments: Sequence[str], pipes: tuple[int, ...]
) -> subprocess.Popen[bytes]:
    """Python, isolated: no variables of this process, no current folder, no packages."""
    keep = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
    home = str(folder)
    environment = {name: os.environ[name] for name in keep if name in os.environ}
    environment |= {"HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    root = str(Path(str(reap2gguf.__file__)).absolute().parents[1])
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-c", _BOOT.format(module), root, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env=environment,
        pass_fds=pipes,
        start_new_session=True,
    )


def _python() -> list[str]:
    """Where Python and the libraries that it loads are."""
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    return [*paths, os.path.join(sys.base_prefix, "lib"), *_LIBRARIES, *_FILES]


def _packages() -> list[str]:
    """Where installed packages are."""
    found = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    if site.ENABLE_USER_SITE:
        found.append(site.getusersitepackages())
    return list(dict.fromkeys(found))


def _give(process: subprocess.Popen[bytes], setup: Mapping[str, Any]) -> None:
    assert process.stdin is not None
    # it may have ended, which shows when its answer is read
    with suppress(BrokenPipeError), process.stdin:
        process.stdin.write(json.dumps(setup).encode())


def _read(
    process: subprocess.Popen[bytes],
    deadline: float,
    may_continue: Callable[[], bool],
    until: bytes | None = None,
) -> bytes:
    """What a process writes until it ends, or to the end of a line; within bounds."""
    assert process.stdout is not None
    data = b""
    while time.monotonic() < deadline and len(data) < _MOST_BYTES and may_continue():
        if select.select([process.stdout], [], [], _POLL)[0]:
            if not (piece := os.read(process.stdout.fileno(), _MOST_BYTES)):
                break
            data += piece
            if until is not None and until in data:
                break
    return data


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process, and those that it started where nothing kept it from that."""
    # the group has ended; macOS says EPERM of one that nobody has waited for
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
