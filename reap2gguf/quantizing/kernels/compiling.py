"""Compiles the quantizers of `source/` for the processors that a wheel serves.

    python -m reap2gguf.quantizing.kernels.compiling

puts the objects for this kind of machine beside this file; installing the package from a checkout
does the same. Without a C++ compiler there are none, and libggml does the work.

Only the standard library is used here, and nothing else of this package: the build hook runs it
where nothing is installed yet.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).with_name("source")
OBJECTS = Path(__file__).with_name("objects")
_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
# By kind of machine: what its objects are called and compiled for, best first.
TARGETS = {
    "x86_64": ("x86-64-v4", "x86-64-v3"),
    "arm64": ("armv8-a",),
}
_MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "arm64": "arm64", "aarch64": "arm64"}
# Fused multiplications and additions would round once where ggml rounds twice.
_FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-fno-exceptions", "-fno-rtti")
OF_A_LIBRARY = ("-fPIC", "-shared", "-fvisibility=hidden")


def machine() -> str:
    """This kind of machine, as in TARGETS; as the system calls it if it is not there."""
    found = platform.machine().lower()
    return _MACHINES.get(found, found)


def object_file(target: str) -> Path:
    """Where the object of a target lies."""
    return OBJECTS / f"{target}{_SUFFIX}"


def source_hash() -> str:
    """SHA-256 of all source files: an object of another source is not used."""
    digest = hashlib.sha256()
    for file in sorted(SOURCE.iterdir()):
        if file.suffix in (".h", ".cpp"):
            digest.update(f"{file.name}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def compiler() -> list[str] | None:
    """The C++ compiler that CXX names, or the first one on the path; None if there is none."""
    if asked := shlex.split(os.environ.get("CXX", "")):
        return asked if shutil.which(asked[0]) else None
    return next(([name] for name in ("g++", "clang++", "c++") if shutil.which(name)), None)


def command(compile_with: Sequence[str], target: str, output: Path) -> list[str]:
    """What compiles the object of a target."""
    flags = [*_FLAGS, *OF_A_LIBRARY, f"-march={target}", f'-DSOURCE_HASH="{source_hash()}"']
    return [*compile_with, *flags, "-o", str(output), str(SOURCE / "cpu.cpp")]


def compile_objects() -> list[Path]:
    """Compile all objects for this kind of machine; those that were made, whole or not at all.

    None are made for another kind of machine or without a compiler. Raises
    subprocess.CalledProcessError, with the compiler's words in `stderr`, if it fails.
    """
    compile_with = compiler()
    if compile_with is None:
        return []
    OBJECTS.mkdir(exist_ok=True)
    targets = TARGETS.get(machine(), ())
    with ThreadPoolExecutor(max(1, len(targets))) as pool:  # each waits for its compiler
        return list(pool.map(lambda target: _compile(compile_with, target), targets))


def _compile(compile_with: Sequence[str], target: str) -> Path:
    final = object_file(target)
    part = final.with_name(f"{final.name}.{os.getpid()}")
    try:
        subprocess.run(
            command(compile_with, target, part), check=True, capture_output=True, text=True
        )
        part.replace(final)
    finally:
        part.unlink(missing_ok=True)
    return final


if __name__ == "__main__":
    try:
        files = compile_objects()
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.stderr}\n{shlex.join(error.cmd)} failed")
    if not files:
        sys.exit(f"no C++ compiler, or no kernels for {machine()}: libggml will do the work")
    print("\n".join(map(str, files)))
