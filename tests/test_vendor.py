from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType

import reap2gguf.ggml as ggml_module
from reap2gguf import vendor
from reap2gguf.cli import cli
from reap2gguf.errors import DependencyError
from reap2gguf.vendor import VARIABLE, find_libggml, find_llama_cpp, program_version

BANNER = "#!/bin/sh\necho 'version: 11434 (2bbcf7fc9)' >&2\necho 'built with cc' >&2\n"


@pytest.fixture(autouse=True)
def nothing_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setattr(vendor, "SUBMODULE", tmp_path / "checkout" / "vendor" / "llama.cpp")


def program(folder: Path, name: str = "llama-server", text: str = BANNER) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_nothing_is_found_where_nothing_is() -> None:
    assert find_llama_cpp() is None


@pytest.mark.parametrize("below", ["", "bin", "build/bin"])
def test_a_folder_that_is_asked_for(
    below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = program(tmp_path / "llama.cpp" / below)
    program(tmp_path / "path")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "llama.cpp"))
    found = find_llama_cpp()
    assert found is not None
    assert found.programs == {"llama-server": path}
    assert found.where == f"{VARIABLE}={tmp_path / 'llama.cpp'}"


def test_what_was_asked_for_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "path")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "empty"))
    with pytest.raises(DependencyError, match=r"has no program of llama\.cpp"):
        find_llama_cpp()


def test_the_submodule_comes_before_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_path = program(tmp_path / "path", "llama-cli")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    found = find_llama_cpp()
    assert found is not None
    assert (found.where, found.programs) == ("PATH", {"llama-cli": on_path})
    built = program(vendor.SUBMODULE / "build" / "bin")
    found = find_llama_cpp()
    assert found is not None
    assert (found.where, found.programs) == ("vendor/llama.cpp", {"llama-server": built})


def test_a_file_that_cannot_be_run_is_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "path").chmod(0o644)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert find_llama_cpp() is None


def test_the_state_of_the_submodule() -> None:
    folder = vendor.SUBMODULE
    assert vendor.submodule_state() is None
    folder.mkdir(parents=True)
    assert vendor.submodule_state() == "not checked out"
    (folder / "CMakeLists.txt").write_text("")
    assert vendor.submodule_state() == "checked out, not built"
    program(folder / "build" / "bin")
    assert vendor.submodule_state() == "built"


def test_this_checkout_pins_a_commit() -> None:
    root = Path(__file__).resolve().parent.parent
    text = (root / ".gitmodules").read_text()
    assert "path = vendor/llama.cpp" in text
    assert "https://github.com/ggml-org/llama.cpp" in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BANNER, "b11434 (2bbcf7fc9)"),
        ("#!/bin/sh\necho version: 5\n", "b5"),
    ],
)
def test_versions(text: str, said: str, tmp_path: Path) -> None:
    assert program_version(program(tmp_path, text=text)) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("#!/bin/sh\nexit 3\n", r"says '' \(exit 3\)"),
        ("#!/bin/sh\necho 'hello\nworld'\n", r"says 'hello' \(exit 0\)"),
        ("#!/no/such/shell\n", r"cannot be run \(No such file"),
        ("\x7fELF nonsense", r"cannot be run \(Exec format"),
        ("#!/bin/sh\nexec /bin/sleep 60\n", "takes over"),
    ],
    ids=["silent", "another", "no shell", "no program", "hangs"],
)
def test_programs_that_say_no_version(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vendor, "_SECONDS", 0.2)
    with pytest.raises(DependencyError, match=said) as caught:
        program_version(program(tmp_path, text=text))
    assert "\n" not in str(caught.value)


def llama_cpp_libraries() -> Path:
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "lib"


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A llama.cpp as if it were built here: the libraries of llama-cpp-python."""
    folder = tmp_path / "llama.cpp"
    (folder / "build" / "bin").mkdir(parents=True)
    for library in llama_cpp_libraries().glob("libggml*"):
        (folder / "build" / "bin" / library.name).symlink_to(library)
    return folder


def test_the_libggml_that_is_asked_for_quantizes(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(1).standard_normal((4, 512)).astype(np.float32)
    kind = GGMLQuantizationType.Q4_K
    usual = ggml_module.load_ggml()
    monkeypatch.setenv(VARIABLE, str(built))
    asked = ggml_module.load_ggml()
    assert asked.path.parent == built / "build" / "bin"
    assert asked.path != usual.path
    np.testing.assert_array_equal(asked.quantize(rows, kind), usual.quantize(rows, kind))
    monkeypatch.delenv(VARIABLE)
    assert ggml_module.load_ggml() is usual


def test_a_folder_without_libggml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DependencyError, match="DBUILD_SHARED_LIBS=ON"):
        find_libggml(tmp_path)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(DependencyError, match="has no libggml-base"):
        ggml_module.load_ggml()


def test_a_libggml_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libggml-base.so").write_bytes(b"nothing")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(DependencyError, match="is no libggml that can be loaded"):
        ggml_module.load_ggml()


def test_the_option_holds_for_one_command(tmp_path: Path) -> None:
    command = ["plan", "--recipe", "q8_0", "--llama-cpp", str(tmp_path)]
    assert CliRunner().invoke(cli, command).exit_code == 0
    assert VARIABLE not in os.environ
    missing = [*command[:-1], str(tmp_path / "missing")]
    result = CliRunner().invoke(cli, missing)
    assert (result.exit_code, "no such folder" in result.output) == (2, True)


def test_quantizing_with_ones_own_build(built: Path, tmp_path: Path, example: Path) -> None:
    files = []
    for name, extra in (("usual", []), ("asked", ["--llama-cpp", str(built)])):
        files.append(tmp_path / f"{name}.gguf")
        done = subprocess.run(
            [sys.executable, "-m", "reap2gguf", "quantize", str(example), "--recipe", "q8_0",
             "-o", str(files[-1]), *extra],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert files[0].read_bytes() == files[1].read_bytes()
