"""Whole merges of tiny models, against transformers, numpy and scipy, and interrupted ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reap2gguf.errors import ObservationError
from reap2gguf.merging.folder import MergeFolder
from reap2gguf.merging.limits import merged_layers
from reap2gguf.merging.merge import Group
from reap2gguf.observing import state
from reap2gguf.options import Resume
from reap2gguf.progress import Silent
from reap2gguf.pruning.view import PrunedView
from reap2gguf.pruning.write import write_pruned
from tests.families import deepseek, glm, granite, lfm2, mixtral, olmoe, qwen2, qwen3_next
from tests.merging.merges import ROWS, merged, merged_view
from tests.merging.witness import (
    block_of,
    hc_groups,
    hc_matrices,
    ream_groups,
    ream_matrices,
    reap_weights,
    reduced_neurons,
)
from tests.repairing.repairs import CPU
from tests.repairing.test_sweep import first_of
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

MODELS: dict[str, Any] = {
    "qwen3 float32": TinyQwen3Moe(dtype=torch.float32),
    "qwen3 fused, a dense layer first": TinyQwen3Moe(n_layers=3, fused=True, dense_layers=(0,)),
    "qwen3.5 with MTP and a shared expert": TinyQwen35Moe(),
}
for family in (deepseek, glm, granite, lfm2, mixtral, olmoe, qwen2, qwen3_next):
    MODELS |= first_of(family)
FAST = ("qwen3 float32", "qwen3.5 with MTP and a shared expert", "DeepseekV3ForCausalLM")
EACH = [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in MODELS]


@pytest.mark.parametrize("name", EACH)
def test_ream_is_what_numpy_and_scipy_compute(name: str, tmp_path: Path) -> None:
    source, written = MODELS[name].write(tmp_path / "model"), tmp_path / "written"
    found = merged(source, tmp_path / "merge")
    with merged_view(source, tmp_path / "merge", found) as view:
        written.mkdir()
        write_pruned(view, written, Silent())
        layers = merged_layers(view.model)
        for layer in (layers[0], layers[-1]):
            path = f"{layer}.{view.model.experts_path(layer)}"
            # in transformers, the layers before are merged
            block = block_of(source, written, ROWS, path)
            groups = found[layer].facts.groups
            expected = ream_groups(block, len(groups), 3, view.model.facts.n_groups)
            assert {one.centroid: list(one.members[1:]) for one in groups} == expected
            scores, projected = reap_weights(block), reduced_neurons(block)
            for number, group in enumerate(groups):
                members = list(group.members)
                assert group.shares == pytest.approx(scores[members] / scores[members].sum())
                if group.is_merged:
                    compare(view, layer, number, ream_matrices(block, members, projected, scores))


@pytest.mark.parametrize("name", EACH)
def test_hc_smoe_is_what_numpy_and_scipy_compute(name: str, tmp_path: Path) -> None:
    source = MODELS[name].write(tmp_path / "model")
    found = merged(source, tmp_path / "merge", "hc_smoe")
    with merged_view(source, tmp_path / "merge", found) as view:
        layers = merged_layers(view.model)
        for layer in (layers[0], layers[-1]):
            path = f"{layer}.{view.model.experts_path(layer)}"
            block = block_of(source, source, ROWS, path)
            groups = found[layer].facts.groups
            expected = hc_groups(block, len(groups), view.model.facts.n_groups)
            assert {one.centroid: list(one.members[1:]) for one in groups} == expected
            for number, group in enumerate(groups):
                if group.is_merged:
                    compare(view, layer, number, hc_matrices(block, list(group.members)))


def compare(view: PrunedView, layer: int, expert: int, expected: Sequence[np.ndarray]) -> None:
    """Stored matrices of an expert, against gate, up and down."""
    tensors = view.model.expert_tensors(layer, view.tensors)
    for name, wanted in zip(("gate", "up", "down"), expected, strict=True):
        slab = tensors[name].slabs[expert]  # type: ignore[index]
        whole = view.read_float32(slab.stored, index=slab.index)
        stored = whole.T if slab.transposed else whole
        first, last = slab.rows or (0, len(stored))
        is_bfloat16 = view.tensors[slab.stored].dtype == "BF16"
        # within half a unit in the last place of what is stored, and the shares' rounding
        unit = 2.0**-8 if is_bfloat16 else 2e-5
        near = np.abs(stored[first : last : slab.step] - wanted) <= unit * np.abs(wanted) + 1e-6
        assert near.all()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyQwen3Moe(n_layers=3).write(tmp_path_factory.mktemp("merge") / "model")


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.mark.parametrize("method", ["ream", "hc_smoe"])
def test_two_runs_and_any_number_of_threads_give_the_same_bytes(
    method: str, source: Path, tmp_path: Path
) -> None:
    made = []
    for number, n_threads in enumerate((2, 2, 1)):
        options = replace(CPU, threads=n_threads)
        merged(source, tmp_path / str(number), method, options=options)
        made.append(files(tmp_path / str(number)))
    assert made[0] == made[1] == made[2]
    assert len(made[0]) == 3


@pytest.mark.parametrize("method", ["ream", "hc_smoe"])
@pytest.mark.parametrize("spool", ["device", "disk"])
def test_an_interrupted_merge_goes_on_to_the_same_bytes(
    method: str, spool: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "MOST_OF_TIME", 1e9)  # every layer is worth saving
    resume = Resume(tmp_path / "state", "key") if spool == "disk" else None
    options = replace(CPU, spool=spool, scratch=tmp_path, resume=resume)
    save, done = MergeFolder.save, []

    def stop_at(layer: int | None) -> None:
        def counted(self: MergeFolder, index: int, *rest: Any) -> Any:
            if index == layer:
                raise KeyboardInterrupt
            done.append(index)
            return save(self, index, *rest)

        monkeypatch.setattr(MergeFolder, "save", counted)

    stop_at(None)
    merged(source, tmp_path / "whole", method)
    done.clear()
    for layer in (1, 2):
        stop_at(layer)
        with pytest.raises(KeyboardInterrupt):
            merged(source, tmp_path / "stopped", method, options=options)
    stop_at(None)
    merged(source, tmp_path / "stopped", method, options=options)
    assert done == [0, 1, 2]
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_a_damaged_file_of_a_layer_is_made_again(source: Path, tmp_path: Path) -> None:
    merged(source, tmp_path / "merge")
    before, file = files(tmp_path / "merge"), MergeFolder(tmp_path / "merge", "key").file(1)
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    merged(source, tmp_path / "merge")
    assert files(tmp_path / "merge") == before


def test_an_mtp_block_is_pruned_and_its_file_has_no_tensors(tmp_path: Path) -> None:
    source = TinyQwen35Moe().write(tmp_path / "model")
    found = merged(source, tmp_path / "merge")
    layer = max(found)
    block = found[layer]
    assert block.sha256 == ""
    assert all(group.shares == (1.0,) for group in block.facts.groups)
    assert all(one.sha256 for index, one in found.items() if index != layer)
    assert len(block.facts.kept) == len(found[0].facts.kept)


def test_protected_experts_stay_as_they_are(source: Path, tmp_path: Path) -> None:
    alone = {1: (0, 5)}
    for method in ("ream", "hc_smoe"):
        found = merged(source, tmp_path / method, method, protected=alone)
        groups = found[1].facts.groups
        assert Group((0,), (1.0,)) in groups
        assert Group((5,), (1.0,)) in groups
        with merged_view(source, tmp_path / method, found) as view:
            for number, group in enumerate(groups):
                names = {
                    tensor.slabs[number].stored
                    for tensor in view.model.expert_tensors(1, view.tensors).values()
                }
                assert (not names & set(view.replaced)) != group.is_merged


def test_padding_does_not_count(source: Path, tmp_path: Path) -> None:
    rows = [row[: 20 + number] for number, row in enumerate(ROWS[:8])]
    one = merged(source, tmp_path / "one", rows=rows)
    assert one[0].facts.n_tokens == sum(map(len, rows))
    # batches of other sizes pad other rows; what is summed is the same but for the last bits
    short = replace(CPU, threads=1)
    other = merged(source, tmp_path / "other", rows=rows[::-1], options=short)
    assert one[2].facts.kept == other[2].facts.kept
    for name in ("one", "other"):
        with merged_view(source, tmp_path / name, one) as view:
            found = {key: view.read_float32(key) for key in view.replaced}
        if name == "one":
            before = found
    assert all(np.allclose(before[key], found[key], rtol=2**-7) for key in before)


def test_all_routers_are_those_of_the_experts_that_stay(source: Path, tmp_path: Path) -> None:
    found = merged(source, tmp_path / "merge")
    name = "model.layers.1.mlp.gate.weight"
    with merged_view(source, tmp_path / "merge", found) as view:
        rows = view.read_float32(name)
        assert np.array_equal(rows, view.source.read_float32(name)[list(view.kept[1])])
        assert name not in view.replaced
        assert all(np.isfinite(view.read_float32(one)).all() for one in view.replaced)


def test_weights_that_are_not_finite_end_a_merge(tmp_path: Path) -> None:
    source = TinyQwen3Moe(dtype=torch.float32).write(tmp_path / "model")
    from safetensors.torch import load_file, save_file

    file = next(source.glob("*.safetensors"))
    tensors = load_file(file)
    tensors["model.layers.0.mlp.experts.2.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ObservationError, match="NaN or infinite"):
        merged(source, tmp_path / "merge")
