from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFValueType

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.safetensors_header import StoredTensor
from reap2gguf.errors import CheckpointError, UnknownTensorError, UnsupportedModelError
from reap2gguf.models.description import Carried, GgufTensor, Slab
from reap2gguf.models.qwen3_moe import Qwen3Moe
from tests.models.layouts import stored_of
from tests.tiny import REPOSITORY, TinyQwen3Moe

REFERENCE = REPOSITORY / "tests" / "data" / "qwen3moe-reference-header.json"
BASE = TinyQwen3Moe(n_layers=4, n_experts=4, vocab=32, hidden=16, width=8, head_dim=8)
LAYOUTS = {
    "2D": BASE,
    "3D": replace(BASE, fused=True),
    "tied": replace(BASE, tied=True),
    "dense": replace(BASE, dense_layers=(0, 3)),
    "3D dense": replace(BASE, fused=True, dense_layers=(2,)),
    "local experts": replace(BASE, count_key="num_local_experts"),
}


def model_of(tiny: TinyQwen3Moe = BASE, **changes: Any) -> Qwen3Moe:
    config = {key: value for key, value in (tiny.config() | changes).items() if value is not ...}
    return Qwen3Moe(config, "here/config.json")


def checked(model: Qwen3Moe, stored: dict[str, StoredTensor]) -> tuple[GgufTensor, ...]:
    model.check_tensors(stored)
    return model.gguf_tensors(stored)


def of_transformers(config: dict[str, Any]) -> torch.nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    with torch.device("meta"):
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**config | {"pad_token_id": None}))


def refusal(**changes: Any) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        model_of(**changes).gguf_metadata()
    message = str(caught.value)
    assert message.startswith("here/config.json: ")
    return message


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> TinyQwen3Moe:
    return LAYOUTS[request.param]


def test_facts(example: Path) -> None:
    config = json.loads((example / "config.json").read_text())
    facts = Qwen3Moe(config, "config.json").facts
    assert facts.gguf_arch == gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN3MOE]
    assert (facts.n_layers, facts.moe_layers) == (4, (0, 1, 2, 3))
    assert (facts.hidden_size, facts.expert_width, facts.vocab_size) == (256, 256, 4096)
    assert (facts.n_experts, facts.experts_per_token) == (16, 4)
    assert (facts.n_heads, facts.n_kv_heads, facts.head_dim) == (4, 2, 64)
    assert (facts.context_length, facts.tied_embeddings) == (2048, True)


def test_defaults_of_absent_keys() -> None:
    facts = model_of(
        num_key_value_heads=...,
        head_dim=...,
        tie_word_embeddings=...,
        mlp_only_layers=None,
        decoder_sparse_step=...,
        hidden_act=...,
        attention_bias=...,
    ).facts
    assert (facts.n_kv_heads, facts.head_dim, facts.tied_embeddings) == (4, 4, False)
    assert facts.moe_layers == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("step", "dense", "expected"),
    [(1, [], (0, 1, 2, 3)), (2, [], (1, 3)), (3, [], (2,)), (4, [], (3,)), (1, [1, 3], (0, 2)),
     (2, [1], (3,)), (2, [0], (1, 3))],
)  # fmt: skip
def test_moe_layers_are_those_of_transformers(
    step: int, dense: list[int], expected: tuple[int, ...]
) -> None:
    config = BASE.config() | {"decoder_sparse_step": step, "mlp_only_layers": dense}
    assert Qwen3Moe(config, "config.json").facts.moe_layers == expected
    theirs = of_transformers(config)
    routed = [n for n, layer in enumerate(theirs.model.layers) if hasattr(layer.mlp, "experts")]
    assert tuple(routed) == expected


def test_a_tied_models_copy_of_its_embeddings_is_left_out() -> None:
    tensors = BASE.tensors()
    model = model_of(replace(BASE, tied=True))
    found = {tensor.name for tensor in model.gguf_tensors(stored_of(tensors))}
    assert model.role("lm_head.weight") == Carried()
    assert "output.weight" not in found
    assert "token_embd.weight" in found


def test_both_layouts_give_the_same_matrices(tmp_path: Path) -> None:
    folders = [
        replace(BASE, fused=fused).write(tmp_path / ("3D" if fused else "2D"))
        for fused in (False, True)
    ]
    values = []
    for folder in folders:
        with Checkpoint.open(folder) as checkpoint:
            model = Qwen3Moe(checkpoint.config, "config.json")
            found = {}
            for tensor in model.gguf_tensors(checkpoint.tensors):
                for number, slab in enumerate(tensor.slabs):
                    first, last = slab.rows or (0, None)
                    found[tensor.name, number] = checkpoint.read_float32(
                        slab.stored, first, last, slab.index
                    )
            values.append(found)
    assert values[0].keys() == values[1].keys()
    for key, matrix in values[0].items():
        assert np.array_equal(matrix, values[1][key])


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_fused_names(suffix: str) -> None:
    tensors = {
        name + (suffix if ".experts." in name else ""): tensor
        for name, tensor in replace(BASE, fused=True).tensors().items()
    }
    model = model_of()
    stored = stored_of(tensors)
    model.check_tensors(stored)
    experts = model.expert_tensors(1, stored)
    base = "model.layers.1.mlp.experts."
    assert experts["gate"].slabs[3] == Slab(f"{base}gate_up_proj{suffix}", 3, (0, 8))
    assert experts["up"].slabs[3] == Slab(f"{base}gate_up_proj{suffix}", 3, (8, 16))
    assert experts["down"].slabs[3] == Slab(f"{base}down_proj{suffix}", 3)
    assert experts["gate"].shape == experts["up"].shape == (4, 8, 16)
    assert experts["down"].shape == (4, 16, 8)


def test_names_are_those_of_gguf_py(layout: TinyQwen3Moe) -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, layout.n_layers)
    theirs: dict[str, set[str | None]] = {}
    for tensor in model_of(layout).gguf_tensors(stored_of(layout.tensors())):
        for slab in tensor.slabs:
            # the converter merges the experts under a name without their numbers
            source = re.sub(r"experts\.\d+\.", "experts.", slab.stored)
            found = names.get_name(source, try_suffixes=(".weight",))
            theirs.setdefault(tensor.name, set()).add(found)
    unknown = {name for name, found in theirs.items() if found == {None}}
    for name in theirs.keys() - unknown:
        # a fused gate_up has a name of its own there
        if not (layout.fused and re.search(r"ffn_(gate|up)_exps", name)):
            assert {f"{found}".removesuffix(".weight") for found in theirs[name]} == {
                name.removesuffix(".weight")
            }
    # gguf-py knows no dense layers of a qwen3moe
    assert unknown <= {
        f"blk.{layer}.ffn_{kind}.weight"
        for layer in layout.dense_layers
        for kind in ("gate", "up", "down")
    } | {
        f"blk.{layer}.ffn_{kind}_exps.weight"
        for layer in range(layout.n_layers if layout.fused else 0)
        for kind in ("gate", "up")
    }


def test_the_example_equals_the_reference(example: Path) -> None:
    reference = json.loads(REFERENCE.read_text())
    with Checkpoint.open(example) as checkpoint:
        model = Qwen3Moe(checkpoint.config, "config.json")
        tensors = model.gguf_tensors(checkpoint.tensors)
    found = {
        tensor.name: ["F32" if tensor.always_f32 else "BF16", *reversed(tensor.shape)]
        for tensor in tensors
    }
    assert found == reference["tensors"]
    assert len(tensors) == len(found)
    values = {value.key: value for value in model.gguf_metadata()}
    assert len(values) == len(model.gguf_metadata())
    assert values.keys() == reference["metadata"].keys()
    for key, expected in reference["metadata"].items():
        value = values[key]
        if isinstance(expected, float):
            assert value.value_type is GGUFValueType.FLOAT32
            assert float(np.float32(value.value)) == expected
        else:
            assert value.value_type is GGUFValueType.UINT32
            assert value.value == expected
            assert type(value.value) is int


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_pruned_config(key: str) -> None:
    tiny = replace(BASE, count_key=key)
    before = tiny.config()
    model = model_of(tiny)
    after = model.pruned_config(3)
    assert after == before | {key: 3}
    assert list(after) == list(before)
    assert model.config == before
    assert Qwen3Moe(after, "config.json").facts.n_experts == 3


def test_pruned_config_with_both_spellings() -> None:
    after = model_of(num_local_experts=4).pruned_config(2)
    assert (after["num_experts"], after["num_local_experts"]) == (2, 2)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "weight",
        "model.embed_tokens.bias",
        "model.layers.4.input_layernorm.weight",
        "model.layers.0.input_layernorm",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.4.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.layers.0.mlp.shared_expert.up_proj.weight",
        "model.layers.0.mlp.gate.e_score_correction_bias",
        "model.layers.0.mlp.experts.0.up_proj.weight_scale_inv",
        "model.layers.0.mlp.experts.0.gate_up_proj.weight",
        "model.layers.0.mlp.experts.up_proj",
        "model.layers.-1.input_layernorm.weight",
        "model.layers.x.input_layernorm.weight",
        "language_model.model.layers.0.input_layernorm.weight",
        "model.layers.0.input_layernorm.weight ",
    ],
)
def test_unknown_tensors(name: str) -> None:
    model = model_of()
    with pytest.raises(UnknownTensorError) as caught:
        model.role(name)
    assert repr(name) in str(caught.value)
    quantized = name.endswith("_scale_inv")
    with pytest.raises(UnsupportedModelError if quantized else UnknownTensorError):
        model.check_tensors(stored_of(BASE.tensors() | {name: torch.ones(2)}))


@pytest.mark.parametrize("rest", ["gate.weight", "experts.0.up_proj.weight", "experts.down_proj"])
def test_experts_in_a_dense_layer(rest: str) -> None:
    model = model_of(replace(BASE, dense_layers=(2,)))
    with pytest.raises(UnknownTensorError):
        model.role(f"model.layers.2.mlp.{rest}")


@pytest.mark.parametrize("rest", ["gate_proj", "up_proj", "down_proj"])
def test_a_dense_mlp_in_a_moe_layer(rest: str) -> None:
    with pytest.raises(UnknownTensorError):
        model_of().role(f"model.layers.2.mlp.{rest}.weight")


@pytest.mark.parametrize(
    "name", ["model.layers.00.input_layernorm.weight", "model.layers.٢.input_layernorm.weight",
             "model.layers.0.mlp.experts.01.up_proj.weight"]
)  # fmt: skip
def test_numbers_that_are_spelled_otherwise(name: str) -> None:
    with pytest.raises(UnknownTensorError):
        model_of().role(name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"model_type": ...}, "model_type is None"),
        ({"model_type": "qwen2_moe"}, "model_type is 'qwen2_moe'"),
        ({"num_experts": ...}, "num_experts or num_local_experts is missing"),
        ({"num_experts": 1}, "num_experts is 1"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_experts": True}, "num_experts is True"),
        ({"num_experts": [4]}, "num_experts is [4]"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"num_experts_per_tok": ...}, "num_experts_per_tok is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"hidden_size": "16"}, "hidden_size is '16'"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"moe_intermediate_size": -8}, "moe_intermediate_size is -8"),
        ({"moe_intermediate_size": ...}, "moe_intermediate_size is missing"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"head_dim": 8.0}, "head_dim is 8.0"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"max_position_embeddings": None}, "max_position_embeddings is null"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"mlp_only_layers": [4]}, "mlp_only_layers is [4]"),
        ({"mlp_only_layers": "0"}, "mlp_only_layers is '0'"),
        ({"mlp_only_layers": [0, 1, 2, 3]}, "every layer is dense"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({"decoder_sparse_step": 5}, "every layer is dense"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
        ({"intermediate_size": "96"}, "intermediate_size is '96'"),
        ({"intermediate_size": -1}, "intermediate_size is -1"),
    ],
)
def test_configs_that_are_not_implemented(changes: dict[str, Any], words: str) -> None:
    assert words in refusal(**changes)


@pytest.mark.parametrize("value", [False, ...])
def test_weights_that_are_not_normalised(value: Any) -> None:
    # llama.cpp's qwen3moe always divides the top-k weights by their sum
    assert "norm_topk_prob" in refusal(norm_topk_prob=value)


def test_intermediate_size_may_be_absent() -> None:
    keys = {value.key for value in model_of(intermediate_size=...).gguf_metadata()}
    assert "qwen3moe.feed_forward_length" not in keys
    assert "qwen3moe.expert_feed_forward_length" in keys


@pytest.mark.parametrize("projection", ["gate", "up", "down"])
@pytest.mark.parametrize("expert", [0, 2, 3])
def test_a_missing_expert(projection: str, expert: int) -> None:
    tensors = BASE.tensors()
    del tensors[f"model.layers.1.mlp.experts.{expert}.{projection}_proj.weight"]
    with pytest.raises(
        CheckpointError, match=rf"layer 1: {projection} of expert {expert} is missing"
    ):
        model_of().check_tensors(stored_of(tensors))


def test_an_expert_too_many() -> None:
    tensors = BASE.tensors()
    tensors["model.layers.1.mlp.experts.4.up_proj.weight"] = torch.ones(8, 16)
    with pytest.raises(CheckpointError, match="layer 1: up of expert 4 is beyond"):
        model_of().check_tensors(stored_of(tensors))


@pytest.mark.parametrize("rows", [3, 5, 8])
def test_router_rows(rows: int) -> None:
    tensors = BASE.tensors() | {"model.layers.2.mlp.gate.weight": torch.ones(rows, 16)}
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.gate\.weight: .* expected 4"):
        model_of().check_tensors(stored_of(tensors))


def test_fused_experts_of_another_count() -> None:
    tensors = replace(BASE, fused=True, n_experts=5).tensors()
    name = "model.layers.0.mlp.experts.down_proj"
    with pytest.raises(CheckpointError, match="expected 4 experts"):
        model_of().check_tensors(stored_of({name: tensors[name]}))


@pytest.mark.parametrize(
    ("fused", "name", "shape"),
    [
        (False, "experts.1.up_proj.weight", (8, 17)),
        (False, "experts.1.up_proj.weight", (16, 8)),
        (False, "experts.1.down_proj.weight", (8, 16)),
        (True, "experts.gate_up_proj", (4, 16, 17)),
        (True, "experts.gate_up_proj", (4, 8, 16)),
        (True, "experts.down_proj", (4, 8, 16)),
        (True, "experts.down_proj", (4, 128)),
    ],
)
def test_expert_shapes(fused: bool, name: str, shape: tuple[int, ...]) -> None:
    full = f"model.layers.1.mlp.{name}"
    tensors = replace(BASE, fused=fused).tensors() | {full: torch.ones(shape)}
    with pytest.raises(CheckpointError, match=re.escape(f"tensor {full!r}: shape {list(shape)}")):
        model_of().gguf_tensors(stored_of(tensors))


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_experts_stored_twice(suffix: str) -> None:
    tensors = BASE.tensors() if suffix else replace(BASE, fused=True).tensors()
    tensors["model.layers.1.mlp.experts.down_proj.weight"] = torch.ones(4, 16, 8)
    stored = stored_of(tensors)
    model = model_of()
    with pytest.raises(CheckpointError):
        checked(model, stored)
