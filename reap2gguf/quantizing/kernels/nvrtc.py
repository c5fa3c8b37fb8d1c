"""Compiles the quantizers for a GPU with NVRTC, which CUDA builds of torch bring.

What was compiled is kept in a folder of the user's, `~/.cache/reap2gguf/kernels`: a file for each
kernel, named by everything it was made from. A file that another user could have written, or whose
bytes are not those that were written, is not loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from reap2gguf.atomic import make_folder, write_whole
from reap2gguf.errors import OutputError
from reap2gguf.files import read_entry

SOURCE = Path(__file__).with_name("source")
MAIN = "gpu.cu"
# Fused multiplications and additions would round once where ggml rounds twice.
FLAGS = (
    "--std=c++17",
    "--fmad=false",
    "--ftz=false",
    "--prec-div=true",
    "--prec-sqrt=true",
)
# as NVIDIA's packages call it, and as torch does
_LIBRARY = re.compile(r"libnvrtc(-[0-9a-f]+)?\.so(\.\d+)*")
_MOST_BYTES = 2**24  # of a compiled kernel
_MOST_FILES = 200  # in the cache: all types for some cards and versions
_SUFFIX = ".cubin"


class CompileError(Exception):
    """A kernel cannot be compiled on this machine."""


@dataclass(frozen=True)
class Compiler:
    """A loaded NVRTC. Threads may share one."""

    path: str
    version: tuple[int, int]
    _library: ctypes.CDLL

    def compile(self, arch: str, definitions: Sequence[str], registers: int) -> bytes:
        """The machine code of `gpu.cu` for a card such as sm_90, with so many registers at most.

        Raises CompileError.
        """
        headers = {file.name: file.read_bytes() for file in sorted(SOURCE.glob("*.h"))}
        text, program = (SOURCE / MAIN).read_bytes(), ctypes.c_void_p()
        array = ctypes.c_char_p * len(headers)
        self._call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            text,
            MAIN.encode(),
            len(headers),
            array(*headers.values()),
            array(*(name.encode() for name in headers)),
        )
        try:
            options = [option.encode() for option in _options(arch, definitions, registers)]
            given = (ctypes.c_char_p * len(options))(*options)
            if code := self._library.nvrtcCompileProgram(program, len(options), given):
                log = self._bytes_of("nvrtcGetProgramLog", program).decode(errors="replace")
                lines = [line for line in log.splitlines() if "error" in line] or [f"code {code}"]
                raise CompileError(f"{self.path}: {lines[0].strip()}")
            return self._bytes_of("nvrtcGetCUBIN", program)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _bytes_of(self, name: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"{name}Size", program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        self._call(name, program, data)
        return data.raw

    def _call(self, name: str, *arguments: object) -> None:
        if code := getattr(self._library, name)(*arguments):
            raise CompileError(f"{self.path}: {name} failed with code {code}")


def _options(arch: str, definitions: Sequence[str], registers: int) -> list[str]:
    card = (f"--gpu-architecture={arch}", f"--maxrregcount={registers}")
    return [*FLAGS, *card, *(f"-D{text}" for text in definitions)]


def load_compiler() -> Compiler:
    """The NVRTC that came with torch, else one of a CUDA toolkit. Raises CompileError."""
    problems: list[str] = []
    for path in [*_candidates(), "libnvrtc.so"]:
        try:
            for builtins in Path(path).parent.glob("libnvrtc-builtins.so*"):
                ctypes.CDLL(str(builtins))  # or it would look for them in the system's folders
            library = ctypes.CDLL(path)
            library.nvrtcGetErrorString.restype = ctypes.c_char_p
            major, minor = ctypes.c_int(), ctypes.c_int()
            if library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)) == 0:
                return Compiler(path, (major.value, minor.value), library)
            problems.append(f"{path}: does not tell its version")
        except (OSError, AttributeError) as error:  # not there, not complete, of another system
            problems.append(str(error))
    raise CompileError(f"NVRTC was not found ({problems[0]}): it comes with CUDA builds of torch")


def _candidates() -> Iterator[str]:
    """Paths of NVRTC: NVIDIA's packages, what torch brings itself, a toolkit."""
    folders: list[Path] = []
    for package, pattern in (("nvidia", "*/lib"), ("torch", "lib")):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            folders += sorted(Path(root).glob(pattern))
    folders.append(Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "lib64")
    for folder in folders:
        for path in sorted(folder.glob("libnvrtc*"), reverse=True):
            if _LIBRARY.fullmatch(path.name):
                yield str(path)


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(root)) / "reap2gguf" / "kernels"


def cache_file(
    arch: str, definitions: Sequence[str], registers: int, versions: Sequence[object]
) -> Path:
    """The file of one kernel; its name depends on all that it is made from."""
    digest = hashlib.sha256(repr((_options(arch, definitions, registers), *versions)).encode())
    for file in sorted(SOURCE.iterdir()):
        if file.suffix in (".h", ".cu"):
            digest.update(f"{file.name}\n".encode() + file.read_bytes())
    return cache_folder() / f"{digest.hexdigest()[:32]}{_SUFFIX}"


def read_cached(path: Path) -> bytes | None:
    """The machine code in a file of the cache; None if it is not there, or not as it was written.

    It will run as this user, so the file and its folder must be this user's alone.
    """
    try:
        for place in (path.parent, path):
            status = place.lstat()
            if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return None
        data = read_entry(path, _MOST_BYTES)
    except OSError:
        return None  # it is compiled again
    digest, code = data[:32], data[32:]
    return code if digest == hashlib.sha256(code).digest() else None


def keep(path: Path, code: bytes) -> None:
    """Put machine code in the cache, if it can be written, and drop the oldest files of many."""
    with suppress(OutputError, OSError):  # it is compiled again next time
        make_folder(path.parent)
        path.parent.chmod(0o700)
        write_whole(path, hashlib.sha256(code).digest() + code)
        path.chmod(0o600)
        files = [file for file in path.parent.iterdir() if file.suffix == _SUFFIX]
        files.sort(key=lambda file: file.lstat().st_mtime, reverse=True)
        for file in files[_MOST_FILES:]:
            file.unlink(missing_ok=True)
