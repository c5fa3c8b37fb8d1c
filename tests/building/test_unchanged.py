"""What a build over a finished bundle checks before it says that nothing is left to do."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import reap2gguf
from reap2gguf.building import seals
from reap2gguf.building.pipeline import BuildResult
from reap2gguf.errors import OutputError
from reap2gguf.progress import Silent
from tests.building.builds import build, contents, stages_reused
from tests.tiny import TinyQwen3Moe


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyQwen3Moe().write(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    return build(model, tmp_path_factory.mktemp("made"), recipes=("q8_0", "q4km"), name="name")


@pytest.fixture
def output(made: BuildResult, tmp_path: Path) -> Path:
    """A copy of the finished bundle, with the same times of change."""
    shutil.copytree(made.gguf_folder.parent, tmp_path / "out")
    return tmp_path / "out"


def again(model: Path, output: Path, **changes: object) -> tuple[BuildResult, list[str]]:
    notes = Notes()
    recipes = {"recipes": ("q8_0", "q4km"), **changes}
    return build(model, output, progress=notes, name="name", **recipes), notes.lines


def flip(file: Path, keeps_time: bool = False) -> None:
    """Change the last byte but ten."""
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)
    ns = before.st_mtime_ns + (0 if keeps_time else 1_000_000_000)
    os.utime(file, ns=(before.st_atime_ns, ns))


def refuse_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *rest: object) -> str:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(seals, "file_sha256", refuse)


def test_nothing_is_read_and_it_says_what_was_checked(
    model: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_reading(monkeypatch)
    result, notes = again(model, output)
    assert not result.stages
    n_files = sum(1 for folder in output.glob("name*") for _ in folder.iterdir())
    (line,) = (note for note in notes if "up to date" in note)
    assert f"; {n_files} files have the size and the time of change that the build left" in line
    assert "`reap2gguf verify` reads all bytes" in line


@pytest.mark.parametrize("name", ["name-GGUF/name-Q8_0.gguf", "name-GGUF/name-Q4_K_M.gguf"])
def test_a_gguf_file_with_a_flipped_byte_is_written_again(
    model: Path, made: BuildResult, output: Path, name: str
) -> None:
    flip(output / name)
    result, notes = again(model, output)
    assert f"{Path(name).name} was changed since the bundle was finished; it is written again" in (
        notes
    )
    assert [stage.name for stage in result.stages] == ["export", "verify"]
    assert contents(result) == contents(made)


@pytest.mark.parametrize(
    "name",
    ["name/model.safetensors", "name/config.json", "name-GGUF/imatrix.gguf",
     "name-GGUF/SHA256SUMS"],
)  # fmt: skip
def test_another_file_with_a_flipped_byte_has_the_bundle_built_again(
    model: Path, made: BuildResult, output: Path, name: str
) -> None:
    flip(output / name)
    result, notes = again(model, output)
    assert any(f"name: {name} was changed since the bundle was finished" in n for n in notes)
    assert stages_reused(result)["observe"]
    assert contents(result) == contents(made)


def test_a_copy_is_hashed_once(
    model: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    files = [file for folder in output.glob("name*") for file in folder.iterdir()]
    for file in files:
        os.utime(file)
    result, notes = again(model, output)
    assert not result.stages
    (line,) = (note for note in notes if "up to date" in note)
    assert f"; {len(files)} files have their SHA-256;" in line
    refuse_reading(monkeypatch)
    assert not again(model, output)[0].stages


def test_a_copy_of_a_bundle_whose_record_is_older_is_no_other_bundle(
    model: Path, output: Path
) -> None:
    record = output / ".work" / ".name.finished.json"
    text = record.read_text()
    assert '"sums_sha256": "' in text
    record.write_text(text.replace('"sums_sha256": "', '"unknown": "'))
    os.utime(output / "name-GGUF" / "SHA256SUMS")
    assert not again(model, output)[0].stages


def test_a_changed_file_that_is_not_written_again_is_not_deleted(
    model: Path, output: Path
) -> None:  # fmt: skip
    file = output / "name-GGUF" / "name-Q4_K_M.gguf"
    flip(file)
    with pytest.raises(OutputError, match="was changed since the bundle was finished"):
        again(model, output, recipes=("q8_0",))
    assert file.is_file()


@pytest.mark.parametrize("name", ["name/model.safetensors", "name-GGUF/name-Q8_0.gguf"])
def test_what_leaves_the_time_as_it_was_is_found_by_verify_alone(
    model: Path, output: Path, name: str
) -> None:
    flip(output / name, keeps_time=True)
    assert not again(model, output)[0].stages
    violations = reap2gguf.verify(output / "name-GGUF").violations
    assert any(Path(name).name in one for one in violations)
