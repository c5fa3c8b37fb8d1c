"""The bundled example, wherever the package is installed, and what is said where it cannot run."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import reap2gguf
from reap2gguf import resources
from reap2gguf.cli import cli
from reap2gguf.errors import OutputError, SourceError
from reap2gguf.hub.source import resolve_source
from reap2gguf.resources import (
    EXAMPLE_FILES,
    EXTRAS,
    example_checkpoint,
    install_command,
    write_example,
)
from tests.tiny import EXAMPLE, REPOSITORY


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package as a wheel installs it; the folder of its examples."""
    package = tmp_path / "site-packages" / "reap2gguf"
    for name in ("recipes", "calibration", "examples"):
        shutil.copytree(REPOSITORY / name, package / "data" / name)
    monkeypatch.setattr(resources, "_PACKAGE", package)
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    return package / "data" / "examples" / EXAMPLE.name


def test_the_hashes_are_those_of_the_example() -> None:
    found = {name: hashlib.sha256(data).hexdigest() for name, data in contents(EXAMPLE).items()}
    assert found == EXAMPLE_FILES


def test_the_example_is_written_from_a_wheel(installed: Path) -> None:
    result = run("example", "tiny")
    assert result.exit_code == 0
    assert result.stdout == "tiny: tiny-qwen3-moe, 9 files, 27.83 MiB, hashes verified\n"
    assert "reap2gguf build tiny --recipe" in result.stderr
    assert contents(Path("tiny")) == contents(EXAMPLE)
    assert os.listdir() == ["tiny"]


def test_without_a_model_the_example_in_the_wheel_is_used(installed: Path) -> None:
    assert example_checkpoint() == installed
    source = resolve_source(None)
    assert (source.label, source.folder) == ("tiny-qwen3-moe", installed)
    result = run("recipes", "check", "unsloth-iq4km")
    assert result.exit_code == 0
    assert "tiny-qwen3-moe" in result.output


def test_the_example_in_a_wheel_may_consist_of_links(installed: Path) -> None:
    for path in installed.iterdir():
        path.unlink()
        path.symlink_to(EXAMPLE / path.name)
    write_example(Path("tiny"))
    assert not any(path.is_symlink() for path in Path("tiny").iterdir())


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "broken link"])
def test_nothing_is_overwritten(kind: str, tmp_path: Path) -> None:
    there = tmp_path / "there"
    if "folder" in kind:
        there.mkdir()
    if kind == "folder":
        (there / "config.json").write_text("mine")
    elif kind == "file":
        there.write_text("mine")
    elif kind == "broken link":
        there.symlink_to(tmp_path / "nowhere")
    before = there.lstat()
    result = run("example", there)
    assert result.exit_code == 2
    assert result.output == (
        f"Error: {there}: exists already; pass another folder or move it away\n"
    )
    assert there.lstat() == before
    with pytest.raises(OutputError, match="exists already"):
        reap2gguf.example(there)


def test_the_function_returns_the_folder(tmp_path: Path) -> None:
    assert reap2gguf.example(tmp_path / "tiny") == tmp_path / "tiny"
    assert contents(tmp_path / "tiny") == contents(EXAMPLE)


def test_a_damaged_installation_is_found_before_anything_is_written(installed: Path) -> None:
    path = installed / "config.json"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(SourceError, match=r"config.json: its SHA-256 is .*; reinstall reap2gguf"):
        write_example(Path("tiny"))
    assert os.listdir() == []
    path.unlink()
    result = run("plan", "--recipe", "q8_0")
    assert result.exit_code == 2
    assert "the bundled example has no config.json; reinstall reap2gguf" in result.output


def test_what_the_disk_changed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_less(path: Path, data: bytes) -> None:
        path.write_bytes(data[:-1])

    monkeypatch.setattr(resources, "write_whole", write_less)
    with pytest.raises(SourceError, match=r"README.md: its SHA-256 .*check the disk"):
        write_example(tmp_path / "tiny")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        raise OutputError(f"{path}: no room")

    monkeypatch.setattr(resources, "write_whole", fail)
    with pytest.raises(OutputError, match="no room"):
        write_example(tmp_path / "tiny")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["recipes", "calibration", "examples"])
def test_a_missing_folder_says_what_to_do(name: str, installed: Path) -> None:
    shutil.rmtree(installed.parents[1] / name)
    with pytest.raises(SourceError, match=f"the folder '{name}' is missing .*reinstall reap2gguf"):
        resources.shipped_folder(name)


# ------------------------------------------------------------------------------------- the extras


def test_packages_of_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for extra, package in EXTRAS.items():
        assert project["optional-dependencies"][extra] == [package]


@pytest.mark.parametrize(
    ("mark", "command"),
    [
        (None, "pip install 'llama-cpp-python[server]>=0.3.30'"),
        ("pipx_metadata.json", "pipx inject reap2gguf 'llama-cpp-python[server]>=0.3.30'"),
        ("uv-receipt.toml", "uv pip install --python '{prefix}/my bin/python' 'llama-cpp-python"),
    ],
)
def test_an_extra_is_added_as_the_program_was_installed(
    mark: str | None, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mark is not None:
        (tmp_path / mark).write_text("")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "executable", f"{tmp_path}/my bin/python")
    assert install_command("serve").startswith(command.format(prefix=tmp_path))


def test_installing_from_git_fetches_no_submodule() -> None:
    settings = (REPOSITORY / ".gitmodules").read_text()
    assert settings.count("[submodule ") == len(re.findall(r"^\tupdate = none", settings, re.M))


# -------------------------------------------------------------------------- systems without POSIX


def without_modules(code: str, *names: str) -> subprocess.CompletedProcess[str]:
    """Run Python where modules do not exist, as on Windows."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({names!r}))\n"
    return subprocess.run(
        [sys.executable, "-c", hide + code], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("hidden", [("fcntl", "resource"), ("fcntl",), ("resource",)])
@pytest.mark.parametrize("arguments", [["build", "--recipe", "q8_0"], ["--help"], []])
def test_the_program_says_in_one_line_where_it_runs(
    hidden: tuple[str, ...], arguments: list[str]
) -> None:
    code = f"sys.argv = {['reap2gguf', *arguments]}; from reap2gguf.__main__ import main; main()"
    done = without_modules(code, *hidden)
    assert (done.returncode, done.stdout) == (2, "")
    line = "Error: reap2gguf runs on Linux and macOS; on Windows use WSL2: "
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


def test_the_library_says_where_it_runs() -> None:
    code = (
        "import reap2gguf; print(reap2gguf.__version__)\n"
        "try:\n    reap2gguf.plan\nexcept ImportError as error:\n    print(error)\n"
    )
    done = without_modules(code, "fcntl", "resource")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{reap2gguf.__version__}\nreap2gguf runs on Linux and macOS;")
