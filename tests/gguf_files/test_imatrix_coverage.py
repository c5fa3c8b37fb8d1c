"""How much of a model an importance matrix covers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from reap2gguf.errors import ArtifactError
from reap2gguf.gguf_files.imatrix import Imatrix, ImatrixEntry
from reap2gguf.gguf_files.imatrix_coverage import (
    check_coverage,
    coverage,
    hits_line,
    layer_hits,
    shapes_of,
)
from tests.models.layouts import CASES, Case

SHAPES = {
    "token_embd.weight": (99, 4),
    "blk.0.attn_norm.weight": (4,),
    "blk.0.attn_q.weight": (5, 4),  # 20 weights
    "blk.0.ffn_gate_inp.weight": (4, 4),  # never quantized
    "blk.0.ffn_up_exps.weight": (4, 5, 4),  # 80 weights
    "blk.1.attn_q.weight": (25, 4),  # 100 weights
}


def matrix(**counts: list[int]) -> Imatrix:
    entries = {}
    for short, numbers in counts.items():
        block, name = short[1], short[3:]
        full = f"blk.{block}.{name}.weight"
        sums = np.ones((len(numbers), 4), np.float32)
        entries[full] = ImatrixEntry(full, sums, np.array(numbers))
    return Imatrix(entries, "", 1, 8)


def test_weights_count() -> None:
    found = coverage(matrix(b0_attn_q=[3], b0_ffn_up_exps=[1, 0, 5, 0]), SHAPES)
    assert (found.n_tensors, found.n_missing, found.missing) == (3, 1, ("blk.1.attn_q.weight",))
    assert (found.n_experts, found.n_unseen) == (4, 2)
    assert found.share == (20 + 40) / 200
    assert not found.lacks_mtp
    assert found.line == (
        "covers 30.0% of the weights in 3 matrices; 1 have no entry, such as blk.1.attn_q.weight; "
        "2 of 4 experts (one per tensor) were never hit and are quantized with equal weights; "
        "fewest 0 and median 0 tokens per expert, 4 saw fewer than 100 tokens"
    )
    assert found.n_few == 4
    (hits,) = found.experts
    assert (hits.name, hits.hits) == ("blk.0.ffn_up_exps.weight", (1, 0, 5, 0))
    assert (hits.n_unseen, hits.n_below, hits.share_below) == (2, 4, 1.0)
    with pytest.raises(ArtifactError, match=r"x.dat: covers 30.0% .* expected at least 80%; comp"):
        check_coverage(found, "x.dat")


def test_experts_with_enough_tokens_are_not_counted_as_few() -> None:
    found = coverage(matrix(b0_attn_q=[3], b0_ffn_up_exps=[100, 99, 500, 400]), SHAPES)
    assert (found.n_few, found.n_unseen) == (1, 0)
    assert found.line.endswith(
        "; fewest 99 and median 250 tokens per expert, 1 saw fewer than 100 tokens"
    )
    whole = coverage(matrix(b0_attn_q=[3], b0_ffn_up_exps=[100] * 4), SHAPES)
    assert whole.line.endswith("; fewest 100 and median 100 tokens per expert")


def test_a_dat_file_does_not_say_how_many_tokens() -> None:
    of_calls = replace(matrix(b0_attn_q=[3], b0_ffn_up_exps=[8, 8, 0, 8]), chunk_size=0)
    found = coverage(of_calls, SHAPES)
    assert (found.experts, found.n_few, found.n_unseen) == ((), 0, 1)
    assert "tokens per expert" not in found.line
    assert layer_hits(of_calls) == {}


def test_the_tokens_of_layers() -> None:
    names = ("b0_ffn_down_exps", "b1_ffn_down_exps", "b0_ffn_up_exps", "b0_attn_q")
    counts = ([7, 0, 200], [100, 150, 99], [7, 0, 200], [9])
    hits = layer_hits(matrix(**dict(zip(names, counts, strict=True))))
    assert hits == {0: (7, 0, 200), 1: (100, 150, 99)}
    assert hits_line(hits) == (
        "fewest tokens 0, median 99 tokens per expert; 3 of 6 experts (50.0%) saw fewer than 100, "
        "and 1 none, which are quantized with equal weights"
    )
    assert hits_line({0: (100, 300)}) == "fewest tokens 100, median 200 tokens per expert"


def test_an_mtp_block_without_entries_does_not_count() -> None:
    trunk = {"b0_attn_q": [3], "b0_ffn_up_exps": [1, 1, 5, 2]}
    found = coverage(matrix(**trunk), SHAPES, mtp_block=1)
    assert (found.share, found.n_missing, found.lacks_mtp) == (1, 0, True)
    assert "the multi-token-prediction block has none" in found.line
    check_coverage(found, "file")
    found = coverage(matrix(**trunk, b1_attn_q=[1]), SHAPES, mtp_block=1)
    assert (found.share, found.n_tensors, found.lacks_mtp) == (1, 3, False)


def test_an_entry_that_no_token_reached_is_missing() -> None:
    found = coverage(matrix(b0_attn_q=[0], b0_ffn_up_exps=[0, 0, 0, 0]), SHAPES)
    assert (found.share, found.n_missing, found.n_unseen) == (0, 3, 0)
    assert coverage(matrix(), {"token_embd.weight": (9, 4)}).share == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_counted_matrix_is_one_that_the_model_multiplies(case: Case) -> None:
    shapes = shapes_of(case.model.gguf_tensors(case.stored))
    ones = {
        name: ImatrixEntry(name, np.ones((1, 1), np.float32), np.array([1]))
        for name in case.model.weighted_matrices()
    }
    found = coverage(Imatrix(ones, "", 1, 8), shapes)
    assert (found.share, found.missing) == (1, ())
    assert found.n_tensors > 0
