"""What Qwen3-Next alone has: a packed projection, and an MTP block that no key tells of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.models.description import Dropped, GgufTensor
from reap2gguf.models.from_gguf import model_from_gguf
from reap2gguf.models.qwen3_next import Qwen3Next
from reap2gguf.models.table import BY_GGUF
from reap2gguf.observing.importance import ImportanceObserver
from tests.exporting.files import export_files, plain
from tests.families.qwen3_next import NEXT, TinyQwen3Next
from tests.models.layouts import stored_of
from tests.models.oracles import mean_kl, mtp_of_both, of_transformers, pruned
from tests.models.test_from_gguf import header_of as header_of_file
from tests.observing.llama_collector import collect
from tests.observing.sweeps import rows_of, run_sweep

PLAIN = replace(NEXT, mtp=False)


def model_of(tiny: TinyQwen3Next = NEXT, keep_mtp: bool = True, **changes: Any) -> Qwen3Next:
    """The model of a layout with other values in its config; `...` leaves a key out."""
    config = tiny.config() | changes
    config = {key: value for key, value in config.items() if value is not ...}
    return Qwen3Next(config, "here/config.json", tiny.tensors().keys(), keep_mtp)


def tensors_of(tiny: TinyQwen3Next = NEXT) -> dict[str, GgufTensor]:
    found = model_of(tiny).gguf_tensors(stored_of(tiny.tensors()))
    return {tensor.name: tensor for tensor in found}


def header_of(model: Qwen3Next) -> dict[str, Any]:
    return {v.key.removeprefix("qwen3next."): v.value for v in model.gguf_metadata()}


def test_the_header() -> None:
    assert header_of(model_of()) == {
        "block_count": 5,
        "context_length": 512,
        "embedding_length": 96,
        "feed_forward_length": 160,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.recurrent_layers": [True, True, True, False, False],
        "expert_count": 8,
        "expert_used_count": 3,
        "expert_feed_forward_length": 32,
        "expert_shared_feed_forward_length": 64,
        "full_attention_interval": 4,
        "nextn_predict_layers": 1,
        "rope.dimension_count": 8,
        "rope.freq_base": 10000.0,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 16,
        "ssm.group_count": 2,
        "ssm.time_step_rank": 6,
        "ssm.inner_size": 96,
    }


def test_the_header_without_the_mtp_block() -> None:
    dropped = header_of(model_of(keep_mtp=False))
    assert dropped == header_of(model_of(PLAIN))
    assert dropped["block_count"] == 4
    assert dropped["attention.recurrent_layers"] == [True, True, True, False]
    assert "nextn_predict_layers" not in dropped


def test_a_config_without_a_dense_width() -> None:
    assert "feed_forward_length" not in header_of(model_of(intermediate_size=...))


def test_the_packed_projection_becomes_two_tensors() -> None:
    stored = stored_of(NEXT.tensors())
    name = "model.layers.0.linear_attn.in_proj_qkvz.weight"
    assert stored[name].shape == (256, 96)
    found = tensors_of()
    mixed, gates = found["blk.0.attn_qkv.weight"], found["blk.0.attn_gate.weight"]
    assert (mixed.shape, gates.shape) == ((160, 96), (96, 96))
    assert {slab.stored for tensor in (mixed, gates) for slab in tensor.slabs} == {name}
    assert found["blk.0.ssm_ba.weight"].shape == (12, 96)
    assert found["blk.0.ssm_ba.weight"].transform is None
    assert found["blk.0.ssm_out.weight"].transform is None
    assert model_of().column_order("blk.0.ssm_out.weight") is None
    assert "blk.0.ssm_in.weight" not in found


def test_a_packed_projection_of_another_size_is_named() -> None:
    tensors = NEXT.tensors()
    name = "model.layers.1.linear_attn.in_proj_qkvz.weight"
    tensors[name] = tensors[name][:-1].clone()
    with pytest.raises(CheckpointError, match=r"in_proj_qkvz.*\[255, 96\], expected \[256, 96\]"):
        model_of().check_tensors(stored_of(tensors))


def test_the_rows_are_what_transformers_splits() -> None:
    """transformers' own splitting of its projections' outputs, for inputs that name the rows."""
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    module: Any = Qwen3NextGatedDeltaNet(Qwen3NextConfig(**NEXT.config()), 0)
    rows = torch.arange(256.0)
    query, key, value, z, _, _ = module.fix_query_key_value_ordering(
        rows[None, None], torch.zeros(1, 1, 12)
    )
    found = tensors_of()
    column = rows.numpy()[:, None]
    mixed = found["blk.0.attn_qkv.weight"].transform
    gates = found["blk.0.attn_gate.weight"].transform
    assert mixed is not None
    assert gates is not None
    expected = torch.cat([part.reshape(-1) for part in (query, key, value)])
    np.testing.assert_array_equal(mixed(column)[:, 0], expected.numpy())
    np.testing.assert_array_equal(gates(column)[:, 0], z.reshape(-1).numpy())


def test_one_input_feeds_both_halves() -> None:
    matrices = model_of().matrices(0)
    fed = matrices["linear_attn.in_proj_qkvz"]
    assert fed == ("blk.0.attn_qkv.weight", "blk.0.attn_gate.weight")
    assert matrices["linear_attn.in_proj_ba"] == ("blk.0.ssm_ba.weight",)
    assert matrices["linear_attn.out_proj"] == ("blk.0.ssm_out.weight",)


def test_the_mtp_block_is_found_by_its_tensors() -> None:
    assert "mtp_num_hidden_layers" not in NEXT.config()
    for keep_mtp in (True, False):
        model = model_of(keep_mtp=keep_mtp)
        assert model.facts.has_mtp is keep_mtp
        assert model.facts.moe_layers == tuple(range(4 + keep_mtp))
        assert model.config_at_odds() is None
        for name in NEXT.tensors():
            dropped = name.startswith("mtp.") and not keep_mtp
            assert isinstance(model.role(name), Dropped) is dropped
        assert "mtp_num_hidden_layers" not in model.pruned_config(4)
    assert not model_of(PLAIN).facts.has_mtp


def test_a_key_of_the_mtp_block_must_agree_with_the_tensors() -> None:
    assert model_of(mtp_num_hidden_layers=1).config_at_odds() is None
    lost = model_of(PLAIN, mtp_num_hidden_layers=1)
    assert "no MTP block" in str(lost.config_at_odds())
    assert any("does not contain" in caveat for caveat in lost.caveats())
    assert lost.pruned_config(4)["mtp_num_hidden_layers"] == 0
    unsaid = model_of(mtp_num_hidden_layers=0)
    assert "an MTP block" in str(unsaid.config_at_odds())
    assert unsaid.pruned_config(4)["mtp_num_hidden_layers"] == 1


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("model_type", "qwen3_moe", "expected 'qwen3_next'"),
        ("norm_topk_prob", False, "llama.cpp's qwen3next normalises"),
        ("mlp_only_layers", [0], "experts in every layer"),
        ("decoder_sparse_step", 2, "experts in every layer"),
        ("attn_output_gate", False, "gates its attention"),
        ("use_sliding_window", True, "full attention"),
        ("mtp_num_hidden_layers", 2, "one MTP block"),
        ("linear_num_value_heads", 5, "a multiple of linear_num_key_heads, 2"),
        ("linear_value_head_dim", 32, "one size for both"),
        ("linear_num_key_heads", None, "is null"),
        ("partial_rotary_factor", 0.1, "even number"),
        ("layer_types", ["linear_attention"] * 4, "layer_types"),
    ],
)
def test_what_is_refused(key: str, value: Any, why: str) -> None:
    model_of()
    with pytest.raises(UnsupportedModelError, match=why) as caught:
        model_of(**{key: value})
    assert "here/config.json" in str(caught.value)


def test_layers_that_are_not_evenly_spaced_have_a_caveat() -> None:
    model = model_of(replace(NEXT, layers="lffl"))
    assert "full_attention_interval" not in header_of(model)
    assert any("not evenly spaced" in caveat for caveat in model.caveats())
    assert not any("not evenly spaced" in caveat for caveat in model_of().caveats())


@pytest.mark.parametrize("layers", ["lllf", "lffl"])
def test_the_importance_is_what_llama_imatrix_collects(layers: str, tmp_path: Path) -> None:
    """The MTP block apart, which llama.cpp computes only when it drafts."""
    folder = replace(NEXT, layers=layers).write(tmp_path / "model")
    rows = rows_of(40, 32, 19)
    theirs = collect(export_files(folder, tmp_path, [plain("F32")])["F32"], rows)
    observer, _ = run_sweep(ImportanceObserver, folder, rows)
    ours = observer.entries
    assert {name for name in ours if not name.startswith("blk.4.")} == set(theirs.sums)
    for name, sums in theirs.sums.items():
        assert ours[name].sums.shape == sums.shape
        np.testing.assert_array_equal(ours[name].counts, theirs.counts[name], err_msg=name)
        np.testing.assert_allclose(
            ours[name].sums, sums, rtol=1e-3, atol=1e-4 * sums.max(), err_msg=name
        )
    mixed, gates = (ours[f"blk.0.{name}.weight"].sums for name in ("attn_qkv", "attn_gate"))
    np.testing.assert_array_equal(mixed, gates)
    in_block = {name.removeprefix("blk.4.") for name in ours if name.startswith("blk.4.")}
    full = layers.index("f")
    assert in_block - {"nextn.eh_proj.weight"} == {
        name.removeprefix(f"blk.{full}.") for name in ours if name.startswith(f"blk.{full}.")
    }


@pytest.mark.parametrize("is_pruned", [False, True], ids=["whole", "pruned"])
def test_the_mtp_block_predicts_what_llama_cpps_does(is_pruned: bool, tmp_path: Path) -> None:
    folder = NEXT.write(tmp_path / "model")
    if is_pruned:
        folder = pruned(folder, tmp_path / "pruned", 4)
    theirs, ours = mtp_of_both(folder, tmp_path, NEXT.vocab)
    assert theirs.std() > 1
    assert mean_kl(theirs, ours) < 1e-6
    assert mean_kl(of_transformers(folder, NEXT.vocab)[:-1], theirs) > 0.1  # not the trunk's


def test_a_file_of_the_first_converter_is_refused_by_its_tensor() -> None:
    header = header_of_file(model_of(), stored_of(NEXT.tensors()))
    tensors = dict(header.tensors)
    mixed = tensors.pop("blk.0.attn_qkv.weight")
    gates = tensors.pop("blk.0.attn_gate.weight")
    rows = mixed.shape[0] + gates.shape[0]
    name = "blk.0.ssm_in.weight"
    tensors[name] = replace(mixed, name=name, shape=(rows, mixed.shape[1]))
    with pytest.raises(UnsupportedModelError, match=r"some\.gguf: tensor 'blk\.0\.ssm_in\.weight'"):
        model_from_gguf(replace(header, tensors=tensors), BY_GGUF)
    assert model_from_gguf(header, BY_GGUF).model.facts == model_of().facts
