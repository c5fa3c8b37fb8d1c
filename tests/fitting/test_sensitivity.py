"""Weights are those of the kind, shared by its layers."""

from __future__ import annotations

import pytest

from reap2gguf.fitting.sensitivity import kind_of, sensitivities


def test_layers_share_the_weight_of_their_kind() -> None:
    few = sensitivities(f"blk.{layer}.attn_v.weight" for layer in range(4))
    many = sensitivities(f"blk.{layer}.attn_v.weight" for layer in range(40))
    assert sum(few.values()) == pytest.approx(sum(many.values()))
    assert len({*many.values()}) == 1
    assert kind_of("blk.12.attn_v.weight") == "attn_v.weight"


def test_an_output_matrix_is_not_attention_output() -> None:
    names = ["token_embd.weight", "output.weight", "blk.0.attn_output.weight"]
    found = sensitivities(names)
    assert len({*found.values()}) == 3
    tied = sensitivities(name for name in names if name != "output.weight")
    # the embedding is both then
    assert tied["token_embd.weight"] == pytest.approx(
        found["token_embd.weight"] + found["output.weight"]
    )


def test_an_unknown_kind_has_a_weight() -> None:
    found = sensitivities(["blk.0.attn_q.weight", "blk.0.something_new.weight"])
    assert found["blk.0.something_new.weight"] > found["blk.0.attn_q.weight"] > 0
