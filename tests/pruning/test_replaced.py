"""The repaired model as a view."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reap2gguf.checkpoint.safetensors_header import StoredTensor
from reap2gguf.errors import CheckpointError
from reap2gguf.pruning.replaced import ReplacedView
from reap2gguf.repairing.fit import LayerFit
from reap2gguf.repairing.record import RepairFolder
from tests.repairing.repairs import pruned_view
from tests.tiny import TinyQwen3Moe

NAME = "model.layers.1.mlp.experts.2.down_proj.weight"
FIT = LayerFit(0.1, 0.5, 0.25, 700, 100)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyQwen3Moe().write(tmp_path_factory.mktemp("view") / "model")


def test_new_tensors_are_read_in_place_of_the_sources(source: Path, tmp_path: Path) -> None:
    folder = RepairFolder(tmp_path, "key")
    with pruned_view(source) as pruned:
        stored = pruned.tensors[NAME]
        content = np.arange(stored.n_bytes, dtype=np.uint8) % 60  # finite values
        folder.save(1, FIT, {NAME: (StoredTensor(NAME, stored.dtype, stored.shape), content)})
        with folder.open([1]) as replaced:
            view = ReplacedView(pruned, replaced)
            assert view.tensors == pruned.tensors
            assert view.kept == pruned.kept
            assert view.source is pruned.source
            assert set(view.replaced) == {NAME}
            for name, tensor in view.tensors.items():
                view.expect(name)
                expected = content if name == NAME else pruned.read(name).reshape(-1)
                assert view.read(name).tobytes() == expected.tobytes()
                assert view.have_same_values(name, name)
                assert tensor.n_bytes == len(expected.tobytes())
            other = NAME.replace("experts.2", "experts.1")
            assert not view.have_same_values(NAME, other)
            assert not view.have_same_values(other, NAME)
            view.fetch_ahead([NAME, other])
            part = np.empty(5, np.uint8)
            view.read_bytes(NAME, 3, part)
            assert part.tolist() == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.7.down_proj.weight", NAME])
def test_a_tensor_that_the_model_does_not_have_is_refused(
    name: str, source: Path, tmp_path: Path
) -> None:
    folder = RepairFolder(tmp_path, "key")
    folder.save(1, FIT, {name: (StoredTensor(name, "U8", (2,)), np.zeros(2, np.uint8))})
    with (
        pruned_view(source) as pruned,
        folder.open([1]) as replaced,
        pytest.raises(CheckpointError, match="is not in the pruned model"),
    ):
        ReplacedView(pruned, replaced)
