"""Finds a llama.cpp that the user has built: its programs and its libggml.

Nothing here needs one. A folder is asked for by `--llama-cpp DIR` or `LLAMA_CPP_DIR`; programs are
also looked for in `vendor/llama.cpp/build` of a checkout and on PATH. The only file that knows how
llama.cpp lays out what it builds.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from reap2gguf.errors import DependencyError
from reap2gguf.messages import shown

VARIABLE = "LLAMA_CPP_DIR"
SUBMODULE = Path(__file__).resolve().parent.parent / "vendor" / "llama.cpp"
PROGRAMS = (
    "llama-server", "llama-cli", "llama-quantize", "llama-imatrix", "llama-perplexity",
    "llama-gguf-split",
)  # fmt: skip
# Below a source tree, a build folder, an installation, or nothing.
_BELOW = ("build/bin", "build/bin/Release", "bin", "lib", "")
_LIBRARIES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll", "libggml.so")
_SECONDS = 10.0
_VERSION = re.compile(r"version: *(\d+)(?: *\((\w{1,40})\))?")


@dataclass(frozen=True)
class LlamaCpp:
    """Programs of one llama.cpp, by name, and how it was found."""

    where: str
    programs: Mapping[str, Path]


def asked_folder() -> Path | None:
    """The folder that LLAMA_CPP_DIR names; None if it is unset or empty."""
    text = os.environ.get(VARIABLE, "")
    return Path(text).expanduser() if text else None


def find_llama_cpp() -> LlamaCpp | None:
    """The llama.cpp that was asked for; or the submodule's, or the one on PATH, if there is one.

    Raises DependencyError if the folder that was asked for has no program in it.
    """
    if folder := asked_folder():
        if programs := _programs_in(folder):
            return LlamaCpp(f"{VARIABLE}={folder}", programs)
        raise DependencyError(
            f"{folder}: has no program of llama.cpp ({PROGRAMS[0]}, {PROGRAMS[1]}, ...) in it, in "
            f"bin or in build/bin; build llama.cpp there, or pass another --llama-cpp or {VARIABLE}"
        )
    if programs := _programs_in(SUBMODULE):
        return LlamaCpp("vendor/llama.cpp", programs)
    on_path = {name: Path(path) for name in PROGRAMS if (path := shutil.which(name))}
    return LlamaCpp("PATH", on_path) if on_path else None


def find_libggml(folder: Path) -> Path:
    """The libggml that was built in a folder. Raises DependencyError if there is none."""
    for place in _places(folder):
        for name in _LIBRARIES:
            if (place / name).is_file():
                return place / name
    raise DependencyError(
        f"{folder}: has no {_LIBRARIES[0]} in it, in lib, bin or build/bin; build llama.cpp there "
        f"with -DBUILD_SHARED_LIBS=ON, or leave out --llama-cpp and {VARIABLE}"
    )


def library_names() -> tuple[str, ...]:
    """What libggml's file may be called, the part that quantizes first."""
    return _LIBRARIES


def program_version(program: Path) -> str:
    """What a program says its version is, such as "b11434 (2bbcf7fc)".

    Raises DependencyError if it cannot be run, says none, or does not end within ten seconds.
    """
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, timeout=_SECONDS, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except OSError as error:
        raise DependencyError(f"{program}: cannot be run ({error.strerror})") from error
    except subprocess.TimeoutExpired as error:
        raise DependencyError(
            f"{program}: --version takes over {_SECONDS:.0f} s; is this llama.cpp's?"
        ) from error
    said = (done.stderr + done.stdout)[:10_000].decode("utf-8", "replace")
    if (match := _VERSION.search(said)) is None:
        first = said.strip().splitlines()[:1]
        raise DependencyError(
            f"{program}: --version says {shown(first[0] if first else '')} (exit "
            f"{done.returncode}), expected llama.cpp's `version: NUMBER (COMMIT)`"
        )
    return f"b{match[1]}" + (f" ({match[2]})" if match[2] else "")


def submodule_state() -> str | None:
    """Whether the submodule of a checkout is there and built; None outside a checkout."""
    if not SUBMODULE.is_dir():
        return None
    if not (SUBMODULE / "CMakeLists.txt").is_file():
        return "not checked out"
    return "built" if _programs_in(SUBMODULE) else "checked out, not built"


def _programs_in(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for place in _places(folder):
        for name in PROGRAMS:
            path = shutil.which(name, path=str(place))
            if path and name not in found:
                found[name] = Path(path)
    return found


def _places(folder: Path) -> list[Path]:
    return [folder / below for below in _BELOW]
