"""A llama.cpp of the user's own: found, asked for its version, and used to quantize."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType

from reap2gguf import ggml, vendor
from reap2gguf.building import keys
from reap2gguf.cli import cli
from reap2gguf.errors import DependencyError

LIBRARIES = Path(llama_cpp.__file__).parent / "lib"
VERSION = 'echo "version: 6123 (79c1160b)" >&2; echo "built with cc" >&2'


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def built_here(tmp_path: Path) -> Path:
    """A source tree whose build holds the libraries of the llama_cpp wheel, and a program."""
    binaries = tmp_path / "llama.cpp" / "build" / "bin"
    binaries.mkdir(parents=True)
    for library in LIBRARIES.glob("libggml*"):
        (binaries / library.name).symlink_to(library)
    script(binaries / "llama-server", VERSION)
    return tmp_path / "llama.cpp"


@pytest.fixture(autouse=True)
def nothing_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(vendor.VARIABLE, raising=False)


@pytest.mark.parametrize("below", ["", "build", "build/bin"])
def test_a_tree_a_build_and_a_bin_folder_are_found(
    built_here: Path, below: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(vendor.VARIABLE, str(built_here / below))
    found = vendor.find_llama_cpp()
    assert found is not None
    assert found.version == "b6123 (79c1160b)"
    assert found.programs == {"llama-server": built_here / "build/bin/llama-server"}
    assert found.libggml is not None
    assert found.libggml.samefile(LIBRARIES / "libggml-base.so")


def test_the_requested_one_comes_before_the_checkouts_and_that_before_path(
    tmp_path: Path, built_here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vendor, "_PACKAGE", tmp_path / "repository" / "reap2gguf")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert vendor.find_llama_cpp() is None
    script(tmp_path / "path" / "llama-cli", VERSION)
    found = vendor.find_llama_cpp()
    assert found is not None
    assert (found.where, list(found.programs)) == ("PATH", ["llama-cli"])
    script(tmp_path / "repository/vendor/llama.cpp/build/bin/llama-server", VERSION)
    still = vendor.find_llama_cpp()
    assert still is not None
    assert still.where == "PATH", "a wheel has no vendor folder"
    (tmp_path / "repository" / "pyproject.toml").write_text("")
    found = vendor.find_llama_cpp()
    assert found is not None
    assert found.where == "vendor/llama.cpp"
    monkeypatch.setenv(vendor.VARIABLE, str(built_here))
    found = vendor.find_llama_cpp()
    assert found is not None
    assert found.where == vendor.VARIABLE


@pytest.mark.parametrize(
    ("body", "seconds", "message"),
    [
        ("sleep 600", 0.5, "printed nothing in 0.5 seconds"),
        ("sleep 600 & exit 0", 1, "printed nothing; is it llama.cpp's"),
        ("yes", 0.5, "printed nothing in 0.5 seconds"),
        ("echo libcudart.so: cannot open >&2; exit 127", 60, "failed with 127 ('libcudart.so"),
        ("exit 0", 60, "printed nothing; is it llama.cpp's"),
    ],
)
def test_a_program_that_hangs_or_fails_is_reported(
    tmp_path: Path, body: str, seconds: float, message: str
) -> None:
    program = script(tmp_path / "llama-server", body)
    begun = time.monotonic()
    with pytest.raises(DependencyError) as raised:
        vendor.program_version(program, seconds)
    assert message in str(raised.value)
    assert time.monotonic() - begun < 300, "waited for the end of the sleep"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("version: 6123 (79c1160b)", "b6123 (79c1160b)"),
        ("version: 0.5.0-dev (build 8123, commit 0c1e570)", "0.5.0-dev b8123 (0c1e570)"),
        ("something else", "'something else'"),
    ],
)
def test_versions_are_read_as_programs_write_them(said: str, expected: str, tmp_path: Path) -> None:
    assert vendor.program_version(script(tmp_path / "llama-cli", f"echo '{said}'")) == expected


def test_a_program_of_another_machine_is_reported(tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    program.write_bytes(b"\x7fELF" + b"\0" * 60)
    for mode in (0o755, 0o644):
        program.chmod(mode)
        with pytest.raises(DependencyError, match=r"cannot be run .*for this machine"):
            vendor.program_version(program)


def test_its_libggml_quantizes_to_the_same_bytes(
    built_here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = ggml.load_ggml()
    usual_key = keys.export_key("x")
    monkeypatch.setenv(vendor.VARIABLE, str(built_here))
    own = ggml.load_ggml()
    assert (own.is_own, usual.is_own) == (True, False)
    assert own.path != usual.path
    rows = np.random.default_rng(5).normal(0, 1, (4, 512)).astype(np.float32)
    importance = np.random.default_rng(6).random(512, np.float32)
    for kind in (GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q8_0, GGMLQuantizationType.IQ3_S):
        mine = own.quantize(rows, kind, importance)
        assert mine.tobytes() == usual.quantize(rows, kind, importance).tobytes()
    assert keys.export_key("x") != usual_key, "another library is other work"


def test_quantize_with_it_writes_the_same_file(
    built_here: Path, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, own = tmp_path / "usual.gguf", tmp_path / "own.gguf"
    command = ["quantize", str(wide), "--recipe", "q4km", "-o"]
    assert CliRunner().invoke(cli, [*command, str(usual)]).exit_code == 0
    result = CliRunner().invoke(cli, [*command, str(own), "--llama-cpp", str(built_here)])
    assert result.exit_code == 0, result.output
    assert own.read_bytes() == usual.read_bytes()
    assert vendor.requested_folder() is None, "the option holds for one command"


def no_folder(folder: Path) -> None:
    folder.rmdir()


def nothing_built(folder: Path) -> None:
    (folder / "CMakeLists.txt").write_text("")


def not_a_library(folder: Path) -> None:
    (folder / "libggml-base.so").write_text("text")


def another_library(folder: Path) -> None:
    import _ctypes

    (folder / "libggml-base.so").symlink_to(_ctypes.__file__)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_folder, "no such folder"),
        (nothing_built, "holds no libggml-base.so or libggml-base.dylib (looked in build/bin"),
        (not_a_library, "is not a usable libggml"),
        (another_library, "is not a usable libggml"),
    ],
)
def test_a_broken_one_is_one_line_and_no_other_takes_its_place(
    spoil: object, message: str, tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    assert callable(spoil)
    spoil(folder)
    output = tmp_path / "x.gguf"
    arguments = ["quantize", str(tiny), "--recipe", "q8_0", "--llama-cpp", str(folder)]
    result = CliRunner().invoke(cli, [*arguments, "-o", str(output)])
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert not output.exists()
