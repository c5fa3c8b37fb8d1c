"""Find a llama.cpp that the user built or installed. Only this file knows its paths.

A build does not need it: libggml comes from a wheel. If the user names a llama.cpp, its libggml
quantizes. If its programs are found, they run `chat` and `serve`.
"""

from __future__ import annotations

import os
import re
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from reap2gguf.errors import DependencyError
from reap2gguf.messages import shown

VARIABLE = "LLAMA_CPP_DIR"
PROGRAMS = ("llama-server", "llama-cli", "llama-quantize")
LIBRARIES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll", "libggml.so")
# places of programs and libraries in a source tree, a build folder, an install prefix or a release
_PROGRAM_FOLDERS = ("build/bin", "bin", ".")
_LIBRARY_FOLDERS = (*_PROGRAM_FOLDERS, "build/ggml/src", "ggml/src", "lib", "lib64")
_PACKAGE = Path(__file__).resolve().parent
# "version: 6123 (79c1160b)", and newer "version: 0.5.0 (build 8123, commit 79c1160b)"
_VERSION = re.compile(
    r"version: *(?:(?P<name>\d[\w.+-]{0,40}) *\()?(?:build )?(?P<build>\d{1,9})"
    r"(?:, commit | *\()(?P<commit>\w{1,40})\)"
)
_VERSION_SECONDS = 20.0  # a CUDA build searches for devices first
_MAX_OUTPUT = 2**16


@dataclass(frozen=True)
class LlamaCpp:
    """A llama.cpp that was found; `where` says how."""

    folder: Path
    programs: Mapping[str, Path]
    libggml: Path | None
    version: str | None  # such as "b6123 (79c1160b)"; None if no program prints it
    where: str
    problem: str = ""  # why an existing program does not run


def requested_folder() -> Path | None:
    """The folder that LLAMA_CPP_DIR names, which `--llama-cpp` sets for one command."""
    value = os.environ.get(VARIABLE, "")
    return Path(value).expanduser() if value else None


def checkout_folder() -> Path | None:
    """`vendor/llama.cpp` of the checkout that this package is run from; None in a wheel."""
    root = _PACKAGE.parent
    if not (root / "pyproject.toml").is_file():
        return None
    return root / "vendor" / "llama.cpp"


def find_llama_cpp() -> LlamaCpp | None:
    """The requested llama.cpp, else that of the checkout, else that on PATH.

    Raises DependencyError if the requested folder holds neither programs nor a library.
    """
    if (requested := requested_folder()) is not None:
        return _examined(
            requested, requested_programs(requested), find_libggml(requested), VARIABLE
        )
    own = checkout_folder()
    if own is not None and (programs := _programs_below(own)):
        return _examined(own, programs, _library_below(own), "vendor/llama.cpp")
    on_path = {name: Path(found) for name in PROGRAMS if (found := shutil.which(name))}
    if not on_path:
        return None
    folder = next(iter(on_path.values())).parent
    return _examined(folder, on_path, None, "PATH")


def requested_programs(folder: Path) -> Mapping[str, Path]:
    """The programs of a requested folder.

    Raises DependencyError if it holds neither programs nor a library.
    """
    programs = _programs_below(folder)
    if not programs and _library_below(folder) is None:
        raise DependencyError(_holds_none(folder, f"{PROGRAMS[0]}, {PROGRAMS[1]} or a libggml"))
    return programs


def find_libggml(folder: Path) -> Path | None:
    """The libggml of a llama.cpp in `folder`, if it was built with shared libraries."""
    return _library_below(folder)


def requested_libggml(folder: Path) -> Path:
    """The libggml of a requested folder.

    Raises DependencyError, with the names that were looked for, if there is none.
    """
    found = _library_below(folder)
    if found is None:
        raise DependencyError(_holds_none(folder, " or ".join(LIBRARIES[:2])))
    return found


def _holds_none(folder: Path, wanted: str) -> str:
    if not folder.is_dir():
        return f"{VARIABLE} or --llama-cpp: {folder}: no such folder"
    looked = ", ".join(dict.fromkeys(("build/bin", "bin", "lib", "the folder itself")))
    return (
        f"{VARIABLE} or --llama-cpp: {folder}: holds no {wanted} (looked in {looked}); name "
        "llama.cpp's source tree, its build folder or its bin folder, and build it with shared "
        "libraries: cmake -B build && cmake --build build"
    )


def _programs_below(folder: Path) -> Mapping[str, Path]:
    found: dict[str, Path] = {}
    for name in PROGRAMS:
        for below in _PROGRAM_FOLDERS:
            path = folder / below / name
            if name not in found and path.is_file():
                found[name] = path.resolve()
    return found


def _library_below(folder: Path) -> Path | None:
    paths = (folder / below / name for below in _LIBRARY_FOLDERS for name in LIBRARIES)
    return next((path.resolve() for path in paths if path.is_file()), None)


def _examined(
    folder: Path, programs: Mapping[str, Path], libggml: Path | None, where: str
) -> LlamaCpp:
    version, problem = None, ""
    for name in PROGRAMS:
        if name in programs:
            try:
                version = program_version(programs[name])
            except DependencyError as error:
                problem = str(error)
            break
    return LlamaCpp(folder, programs, libggml, version, where, problem)


def program_version(program: Path, seconds: float | None = None) -> str:
    """The version that `PROGRAM --version` prints: "b6123 (79c1160b)", "0.5.0 b8123 (79c1160b)".

    Raises DependencyError if it cannot be run, hangs, fails, or prints nothing.
    """
    seconds = _VERSION_SECONDS if seconds is None else seconds
    try:
        output, status = _run(program, seconds)
    except OSError as error:
        raise DependencyError(
            f"{program}: cannot be run ({error.strerror or error}); is it executable and "
            "built for this machine?"
        ) from error
    if status is None:
        raise DependencyError(
            f"{program} --version: printed nothing in {seconds:g} seconds; killed it"
        )
    text = output.decode("utf-8", errors="replace")
    if status:
        last = (text.strip().splitlines() or ["it printed nothing"])[-1]
        raise DependencyError(f"{program} --version: failed with {status} ({shown(last)})")
    if match := _VERSION.search(text):
        name = f"{match['name']} " if match["name"] else ""
        return f"{name}b{match['build']} ({match['commit']})"
    for line in text.splitlines():
        if line.strip():
            return shown(line.strip())
    raise DependencyError(f"{program} --version: printed nothing; is it llama.cpp's?")


def _run(program: Path, seconds: float) -> tuple[bytes, int | None]:
    """Output of a program, cut if it is long, and its status; None if it had to be killed."""
    process = subprocess.Popen(
        [program, "--version"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    with process:
        try:
            deadline = time.monotonic() + seconds
            output = _read(process, deadline)
            status = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return b"", None
        finally:
            with suppress(ProcessLookupError, PermissionError):  # children hold the pipe
                os.killpg(process.pid, signal.SIGKILL)
    return output, status


def _read(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    output = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while len(output) < _MAX_OUTPUT and (left := deadline - time.monotonic()) > 0:
            if selector.select(left):
                piece = os.read(descriptor, _MAX_OUTPUT)
                if not piece:
                    break
                output += piece
    return output
