"""Names of GGUF tensors and the part of a model that each is of."""

from __future__ import annotations

import pytest

from reap2gguf.models.roles import recurrent_blocks, role_of
from tests.models.layouts import CASES, Case


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("token_embd.weight", "embedding"),
        ("output.weight", "output"),
        ("output_norm.weight", "norms"),
        ("rope_freqs.weight", "attention"),
        ("v.blk.0.attn_q.weight", "vision"),
        ("mm.0.weight", "vision"),
        ("blk.0.attn_q.weight", "attention"),
        ("blk.0.attn_q_norm.weight", "norms"),
        ("blk.0.attn_norm.weight", "norms"),
        ("blk.0.attn_norm_2.weight", "norms"),
        ("blk.1.ssm_norm.weight", "norms"),
        ("blk.1.attn_gate.weight", "DeltaNet"),
        ("blk.1.ssm_a", "DeltaNet"),
        ("blk.12.ffn_gate_inp.weight", "router"),
        ("blk.12.exp_probs_b.bias", "router"),
        ("blk.12.ffn_gate_inp_shexp.weight", "shared expert"),
        ("blk.12.ffn_up_shexp.weight", "shared expert"),
        ("blk.12.ffn_gate_exps.weight", "experts gate"),
        ("blk.12.ffn_gate_up_exps.weight", "experts gate"),
        ("blk.12.ffn_up_exps.weight", "experts up"),
        ("blk.12.ffn_down_exps.bias", "experts down"),
        ("blk.12.ffn_down.weight", "dense FFN"),
        ("blk.0.shortconv.in_proj.weight", "convolution"),
        ("blk.2.ssm_a", "Mamba"),
        ("blk.2.ssm_norm.weight", "norms"),
        ("blk.12.ffn_latent_down.weight", "latent"),
        ("blk.12.whatever.weight", "other"),
        ("blk.40.attn_q.weight", "MTP"),
    ],
)
def test_names(name: str, role: str) -> None:
    assert role_of(name, recurrent={1: "DeltaNet", 2: "Mamba"}, mtp={40}) == role


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_of_a_known_family_has_a_role(case: Case) -> None:
    names = [tensor.name for tensor in case.model.gguf_tensors(case.stored)]
    recurrent = recurrent_blocks(names)
    mtp = {case.model.facts.mtp_layer} - {None}
    roles = {role_of(name, recurrent, mtp) for name in names}  # type: ignore[arg-type]
    assert "other" not in roles
    facts = case.model.facts  # llama.cpp's files of DeepSeek-V3 do not have its block
    assert ("MTP" in roles) is (facts.has_mtp and case.model.n_gguf_blocks > facts.n_layers)
    kinds = getattr(case.model, "kinds", ())
    types = kinds or getattr(case.model, "layer_types", ())
    role = "Mamba" if kinds else "DeltaNet"
    linear = [n for n, one in enumerate(types) if one == "linear_attention"]
    assert recurrent == dict.fromkeys(linear, role)
