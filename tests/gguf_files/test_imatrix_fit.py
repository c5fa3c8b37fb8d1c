"""An importance matrix in the names and shapes of a model, and cut to kept experts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from reap2gguf.errors import ArtifactError
from reap2gguf.gguf_files.imatrix import Imatrix, ImatrixEntry
from reap2gguf.gguf_files.imatrix_fit import cut, fit, n_experts_in, with_experts

SHAPES = {
    "blk.0.attn_q.weight": (6, 4),
    "blk.0.attn_v_b.weight": (2, 3, 4),
    "blk.0.ffn_gate_exps.weight": (3, 5, 4),
    "blk.0.ffn_up_exps.weight": (3, 5, 4),
    "blk.0.ffn_down_exps.weight": (3, 4, 5),
}
FUSED = {
    "blk.0.ffn_gate_up_exps.weight": (3, 10, 4),
    "blk.0.ffn_down_exps.weight": (3, 4, 5),
}
_GENERATOR = np.random.default_rng(3)


def entry(name: str, rows: int, columns: int, counts: list[int] | None = None) -> ImatrixEntry:
    sums = _GENERATOR.random((rows, columns)).astype(np.float32) + 1
    return ImatrixEntry(name, sums, np.array(counts or range(7, 7 + rows)))


def matrix(*entries: ImatrixEntry) -> Imatrix:
    return Imatrix({one.name: one for one in entries}, "a\ntext", 3, 8)


def test_what_fits_stays() -> None:
    given = matrix(entry("blk.0.attn_q.weight", 1, 4), entry("blk.0.ffn_up_exps.weight", 3, 4))
    found = fit(given, SHAPES, "file")
    assert found.imatrix.entries.keys() == given.entries.keys()
    for name, one in given.entries.items():
        np.testing.assert_array_equal(found.imatrix.entries[name].sums, one.sums)
        np.testing.assert_array_equal(found.imatrix.entries[name].counts, one.counts)
    assert (found.imatrix.dataset, found.left_out) == (r"a\ntext", ())


def test_heads_with_a_count_each_share_one() -> None:
    found = fit(matrix(entry("blk.0.attn_v_b.weight", 2, 4, [9, 9])), SHAPES, "file").imatrix
    one = found.entries["blk.0.attn_v_b.weight"]
    assert (one.sums.shape, one.counts.tolist()) == ((1, 8), [9])


def test_a_dat_files_row_is_divided_and_its_unseen_expert_known() -> None:
    """llama-imatrix stores (sum / count or, without tokens, one) times the calls."""
    one = entry("blk.0.ffn_up_exps.weight", 1, 12, [5])
    one.sums[0, 4:8] = 5
    found = fit(matrix(one), SHAPES, "file").imatrix.entries[one.name]
    np.testing.assert_array_equal(found.sums, one.sums.reshape(3, 4))
    assert found.counts.tolist() == [5, 0, 5]
    whole = np.concatenate([found.importance_of(expert, 4) for expert in range(3)])
    np.testing.assert_array_equal(whole, one.sums[0] / 5)  # what llama-quantize uses
    assert found.importance_of(1, 4).tolist() == [1, 1, 1, 1]


def test_gate_and_up_together_and_apart() -> None:
    together = entry("blk.0.ffn_gate_up_exps.weight", 3, 4)
    apart = fit(matrix(together), SHAPES, "file").imatrix
    assert list(apart.entries) == ["blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"]
    for name, one in apart.entries.items():
        assert one.name == name
        np.testing.assert_array_equal(one.sums, together.sums)
    (again,) = fit(apart, FUSED, "file").imatrix.entries.values()
    assert again.name == together.name
    np.testing.assert_array_equal(again.sums, together.sums)
    np.testing.assert_array_equal(again.counts, together.counts)
    (half,) = fit(matrix(apart.entries["blk.0.ffn_up_exps.weight"]), FUSED, "f").imatrix.entries
    assert half == together.name


def test_gate_and_up_of_different_inputs_are_not_one() -> None:
    gate, up = (entry(f"blk.0.ffn_{name}_exps.weight", 3, 4) for name in ("gate", "up"))
    with pytest.raises(ArtifactError, match=r"file: blk.0.ffn_gate_exps.weight and .* differ"):
        fit(matrix(gate, up), FUSED, "file")
    same = replace(gate, name=up.name, counts=gate.counts + 1)
    with pytest.raises(ArtifactError, match="differ, and the model has one tensor for both"):
        fit(matrix(gate, same), FUSED, "file")


def test_what_the_model_has_no_use_for_is_left_out_and_the_rest_refused() -> None:
    spare = entry("blk.1.attn_q.weight", 1, 4), entry("output.weight", 1, 4)
    found = fit(matrix(entry("blk.0.attn_q.weight", 1, 4), *spare), SHAPES, "file")
    assert found.left_out == ("blk.1.attn_q.weight", "output.weight")
    assert list(found.imatrix.entries) == ["blk.0.attn_q.weight"]
    for name in ("blk.2.attn_q.weight", "blk.0.attn_k.weight", "blk.0.ffn_gate_up_exps.bias"):
        with pytest.raises(ArtifactError, match=f"file: has an entry for '{name}', which the"):
            fit(matrix(entry(name, 1, 4)), SHAPES, "file")
    for one in (entry("blk.0.attn_q.weight", 1, 5), entry("blk.0.ffn_up_exps.weight", 6, 2)):
        with pytest.raises(ArtifactError, match=f"file: {one.name} has .* values, expected"):
            fit(matrix(one), SHAPES, "file")


def test_experts_are_counted_and_cut() -> None:
    before = with_experts(SHAPES, 5)
    assert before["blk.0.ffn_down_exps.weight"] == (5, 4, 5)
    assert before["blk.0.attn_v_b.weight"] == (2, 3, 4)
    up, down = entry("blk.0.ffn_up_exps.weight", 5, 4), entry("blk.0.ffn_down_exps.weight", 5, 5)
    dense = entry("blk.0.attn_q.weight", 1, 4)
    given = matrix(dense, up, down)
    assert n_experts_in(given, SHAPES, "file") == 5
    assert n_experts_in(matrix(dense), SHAPES, "file") is None
    assert n_experts_in(matrix(entry(up.name, 1, 20)), SHAPES, "file") == 5
    assert n_experts_in(matrix(entry("blk.0.ffn_gate_up_exps.weight", 5, 4)), SHAPES, "f") == 5
    found = cut(fit(given, before, "file").imatrix, {0: (1, 2, 4)}, "file").entries
    for one in (up, down):
        np.testing.assert_array_equal(found[one.name].sums, one.sums[[1, 2, 4]])
        assert found[one.name].counts.tolist() == [8, 9, 11]
    np.testing.assert_array_equal(found[dense.name].sums, dense.sums)


def test_experts_that_disagree_are_refused() -> None:
    up, down = entry("blk.0.ffn_up_exps.weight", 5, 4), entry("blk.0.ffn_down_exps.weight", 4, 5)
    with pytest.raises(ArtifactError, match=f"file: {up.name} has 5 experts and {down.name} has 4"):
        n_experts_in(matrix(up, down), SHAPES, "file")
    with pytest.raises(ArtifactError, match="expected a multiple of 4"):
        n_experts_in(matrix(entry(up.name, 5, 3)), SHAPES, "file")
    for kept in ({1: (0,)}, {0: (0, 5)}):
        with pytest.raises(ArtifactError, match="which of them are kept is not recorded"):
            cut(matrix(up), kept, "file")
