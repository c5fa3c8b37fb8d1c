"""Compiled kernels are kept, and only what this user alone could have written is loaded."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from reap2gguf.quantizing.kernels import nvrtc

CODE = b"\x7fELF machine code"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = nvrtc.cache_file("sm_90", ["QUANTIZER=Q8"], 128, (13, 0, 13000))
    assert nvrtc.read_cached(path) is None
    nvrtc.keep(path, CODE)
    return path


def test_what_is_kept_is_read(cached: Path) -> None:
    assert nvrtc.read_cached(cached) == CODE
    assert cached.parent.stat().st_mode & 0o777 == 0o700
    assert cached.stat().st_mode & 0o777 == 0o600


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _changed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _linked(path: Path) -> None:
    other = path.with_name("other")
    path.rename(other)
    path.symlink_to(other)


def _too_large(path: Path) -> None:
    os.truncate(path, 2**24 + 1)


@pytest.mark.parametrize(
    "damage",
    [
        _cut, _changed, _linked, _too_large, Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.chmod(0o622),
        lambda path: path.parent.chmod(0o770),
    ],
)  # fmt: skip
def test_what_another_could_have_written_is_not(
    damage: Callable[[Path], object], cached: Path
) -> None:
    damage(cached)
    assert nvrtc.read_cached(cached) is None
    nvrtc.keep(cached, CODE)
    assert nvrtc.read_cached(cached) == CODE


def test_another_user_s_file_is_not(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 10**6)
    assert nvrtc.read_cached(cached) is None


def test_the_name_says_all_that_it_is_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(nvrtc.SOURCE, tmp_path / "source")
    monkeypatch.setattr(nvrtc, "SOURCE", tmp_path / "source")
    names = {
        nvrtc.cache_file(*request)
        for request in (
            ("sm_90", ["A"], 128, (13, 0)),
            ("sm_89", ["A"], 128, (13, 0)),
            ("sm_90", ["B"], 128, (13, 0)),
            ("sm_90", ["A"], 255, (13, 0)),
            ("sm_90", ["A"], 128, (13, 1)),
        )
    }
    for name in ("gpu.cu", "lanes.h"):
        with (tmp_path / "source" / name).open("a") as file:
            file.write("// changed\n")
        names.add(nvrtc.cache_file("sm_90", ["A"], 128, (13, 0)))
    assert len(names) == 7


def test_the_oldest_files_go(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_MOST_FILES", 3)
    other = cached.with_name("speed.json")
    other.write_text("{}")
    for number in range(5):
        path = cached.with_name(f"{number}.cubin")
        nvrtc.keep(path, CODE)
        os.utime(path, (number, number))
    nvrtc.keep(cached, CODE)
    left = sorted(file.name for file in cached.parent.iterdir())
    assert left == sorted(["3.cubin", "4.cubin", cached.name, "speed.json"])


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reap2gguf").write_text("a file in its place")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = nvrtc.cache_file("sm_90", [], 64, ())
    nvrtc.keep(path, CODE)
    assert nvrtc.read_cached(path) is None


def test_without_nvrtc_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(["/nowhere/libnvrtc.so.13"]))
    monkeypatch.setattr(ctypes, "CDLL", _refused)
    with pytest.raises(nvrtc.CompileError, match="NVRTC was not found"):
        nvrtc.load_compiler()


def _refused(path: str) -> ctypes.CDLL:
    raise OSError(path)


def test_nvrtc_is_looked_for_where_torch_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("nvidia/cu13/lib/libnvrtc.so.13", "nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
             "torch/lib/libnvrtc-672ee683.so.11.2", "toolkit/lib64/libnvrtc.so")  # fmt: skip
    ignored = ("nvidia/cu13/lib/libnvrtc-builtins.so.13.0", "nvidia/cu13/lib/libnvrtc.alt.so.13")
    for name in (*names, *ignored, "torch/__init__.py", "nvidia/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name: type("Spec", (), {"submodule_search_locations": [str(tmp_path / name)]}),
    )
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert list(nvrtc._candidates()) == [str(tmp_path / name) for name in names]


class FakeNvrtc:
    """An NVRTC that refuses what it is given."""

    log = b"gpu.cu(3): warning: odd\ngpu.cu(7): error: no such type\n\0"

    def nvrtcCreateProgram(self, program: object, *rest: object) -> int:
        return 0

    def nvrtcCompileProgram(self, program: object, count: int, options: list[bytes]) -> int:
        self.options = list(options)
        return 6

    def nvrtcGetProgramLogSize(self, program: object, size: ctypes._Pointer) -> int:
        size._obj.value = len(self.log)
        return 0

    def nvrtcGetProgramLog(self, program: object, buffer: ctypes.Array) -> int:
        ctypes.memmove(buffer, self.log, len(self.log))
        return 0

    def nvrtcDestroyProgram(self, program: object) -> int:
        return 0


def test_a_compiler_s_words_are_in_the_error() -> None:
    fake = FakeNvrtc()
    compiler = nvrtc.Compiler("libnvrtc.so", (13, 0), fake)  # type: ignore[arg-type]
    with pytest.raises(nvrtc.CompileError) as error:
        compiler.compile("sm_90", ["QUANTIZER=Q8"], 96)
    assert str(error.value) == "libnvrtc.so: gpu.cu(7): error: no such type"
    assert b"--fmad=false" in fake.options
    assert b"--gpu-architecture=sm_90" in fake.options
    assert b"-DQUANTIZER=Q8" in fake.options
