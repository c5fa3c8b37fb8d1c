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
from tests.models.converted import FOLDER, KINDS, PROJECTOR, contents, side_files
from tests.models.layouts import RECORDED, Case, every_family

# by the name of a record: keys and tensors that differ on purpose, each with the reason
DIFFERENCES: dict[str, dict[str, str]] = {
    record: keys
    for family in every_family()
    for record, keys in getattr(family, "DIFFERENCES", {}).items()
}
PROJECTOR_DIFFERENCES: dict[str, dict[str, str]] = {
    architecture: keys
    for family in every_family()
    for architecture, keys in getattr(family, "PROJECTOR_DIFFERENCES", {}).items()
}


def recorded(case: Case) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{case.record}.json").read_text("utf-8"))
    return found


def test_every_record_is_of_an_architecture() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == {case.record for case in RECORDED}


@pytest.mark.parametrize("case", RECORDED, ids=str)
def test_keys_and_bytes(case: Case, tmp_path: Path) -> None:
    theirs = recorded(case)
    folder = case.tiny.write(tmp_path / "model")
    files = export_files(folder, tmp_path, map(plain, KINDS))
    meant, found = DIFFERENCES.get(case.record, {}), set()
    for kind, path in files.items():
        ours = contents(path)
        tensors = differences(ours["tensors"], theirs[kind])
        assert tensors <= meant.keys()
        assert not any(ours["tensors"][name][1] != theirs[kind][name][1] for name in tensors)
        found |= tensors | differences(ours["keys"], theirs["keys"])
    assert found == meant.keys()


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> set[str]:
    """The names under which the two have other values, or one has none."""
    return {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}


@pytest.mark.parametrize("case", RECORDED, ids=str)
def test_projectors(case: Case, tmp_path: Path) -> None:
    theirs = recorded(case)
    folder = case.tiny.write(tmp_path / "model")
    files = side_files(folder)
    assert bool(files) is (PROJECTOR in theirs)
    for side in files:
        with Checkpoint.open(folder) as checkpoint:
            model, path = describe(checkpoint), tmp_path / "projector.gguf"
            export_side(checkpoint, model, HeaderNames("Tiny"), path, side, 2, Silent())
        ours = contents(path)
        assert ours["tensors"] == theirs[PROJECTOR]
        expected = theirs[f"{PROJECTOR} keys"]
        differ = {
            key
            for key in ours["keys"].keys() | expected.keys()
            if ours["keys"].get(key) != expected.get(key)
        }
        assert differ == PROJECTOR_DIFFERENCES.get(case.architecture, {}).keys()
