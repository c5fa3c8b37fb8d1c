"""The files of new weights, here those of a repair."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from reap2gguf.checkpoint.safetensors_header import StoredTensor
from reap2gguf.errors import ArtifactError
from reap2gguf.pruning.layer_files import tensors_sha256
from reap2gguf.repairing.fit import LayerFit
from reap2gguf.repairing.record import RepairFolder

FIT = LayerFit(0.1, 0.5, 0.25, 700, 100)


def tensors() -> dict[str, tuple[StoredTensor, np.ndarray]]:
    content = np.arange(12, dtype=np.uint8)
    return {
        "b": (StoredTensor("b", "BF16", (2, 3)), content),
        "a": (StoredTensor("a", "U8", (2,)), content[:2].copy()),
    }


def test_a_layer_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = RepairFolder(tmp_path / "repair", "key")
    written = folder.save(3, FIT, tensors())
    assert folder.load(3) == written
    assert folder.load_all([3]) == {3: written}
    expected = hashlib.sha256(b"a U8 [2]\n\0\1" + b"b BF16 [2, 3]\n" + bytes(range(12)))
    assert written.sha256 == expected.hexdigest()
    with folder.open([3]) as stored:
        assert list(stored.tensors) == ["a", "b"]
        assert stored.read("b").tobytes() == bytes(range(12))
        assert tensors_sha256(stored, ["b", "a"]) == written.sha256


def test_a_layer_that_keeps_its_weights_has_a_file_without_tensors(tmp_path: Path) -> None:
    folder = RepairFolder(tmp_path, "key")
    fit = LayerFit(None, 0.5, 0.5, 700, 100)
    assert folder.save(0, fit, {}).sha256 == ""
    found = folder.load(0)
    assert found is not None
    assert found.facts == fit
    with folder.open([0]) as stored:
        assert not stored.tensors


@pytest.mark.parametrize("damage", ["missing", "other key", "flipped", "truncated", "no facts"])
def test_what_is_not_whole_counts_as_missing(damage: str, tmp_path: Path) -> None:
    folder = RepairFolder(tmp_path, "key")
    folder.save(0, FIT, tensors())
    content = folder.file(0).read_bytes()
    if damage == "missing":
        folder.file(0).unlink()
    elif damage == "other key":
        folder = RepairFolder(tmp_path, "another")
    elif damage == "flipped":
        folder.file(0).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "truncated":
        folder.file(0).write_bytes(content[:-1])
    else:
        folder.file(0).write_bytes(content.replace(b'"facts"', b'"fakts"'))
    assert folder.load(0) is None
    with pytest.raises(ArtifactError, match=r"layer-00000.*missing or damaged"):
        folder.load_all([0])
