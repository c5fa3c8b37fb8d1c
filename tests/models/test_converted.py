"""Files in F32 and BF16 are those of llama.cpp's own converter: every key and every byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.exporting.header_facts import HeaderNames
from reap2gguf.exporting.model_files import export_side
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from tests.exporting.files import export_files, plain
from tests.models.converted import FOLDER, KINDS, PROJECTOR, RECORDED, contents, side_files
from tests.models.layouts import LAYOUTS, every_family

# by architecture: keys that differ on purpose, each with the reason
DIFFERENCES: dict[str, dict[str, str]] = {
    architecture: keys
    for family in every_family()
    for architecture, keys in getattr(family, "DIFFERENCES", {}).items()
}


def recorded(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    return found


def write(name: str, folder: Path) -> Path:
    """The checkpoint of a record."""
    architecture, layout = RECORDED[name]
    written: Path = LAYOUTS[architecture][layout].write(folder)
    return written


def test_every_record_is_of_a_layout() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == RECORDED.keys()


@pytest.mark.parametrize("name", RECORDED)
def test_keys_and_bytes(name: str, tmp_path: Path) -> None:
    theirs = recorded(name)
    folder = write(name, tmp_path / "model")
    files = export_files(folder, tmp_path, map(plain, KINDS))
    for kind, path in files.items():
        ours = contents(path)
        assert ours["tensors"] == theirs[kind]
        differ = {
            key
            for key in ours["keys"].keys() | theirs["keys"].keys()
            if ours["keys"].get(key) != theirs["keys"].get(key)
        }
        assert differ == DIFFERENCES.get(RECORDED[name][0], {}).keys()


@pytest.mark.parametrize("name", RECORDED)
def test_projectors(name: str, tmp_path: Path) -> None:
    theirs = recorded(name)
    folder = write(name, tmp_path / "model")
    files = side_files(folder)
    assert bool(files) is (PROJECTOR in theirs)
    for side in files:
        with Checkpoint.open(folder) as checkpoint:
            model, path = describe(checkpoint), tmp_path / "projector.gguf"
            export_side(checkpoint, model, HeaderNames("Tiny"), path, side, 2, Silent())
        ours = contents(path)
        assert ours["tensors"] == theirs[PROJECTOR]
        assert ours["keys"] == theirs[f"{PROJECTOR} keys"]
