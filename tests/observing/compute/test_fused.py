"""Modules of transformers with kernels, on every device, against their own code."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.gemma4 import modeling_gemma4 as gemma4
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as qwen3_5
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

from reap2gguf.observing.compute import fused
from reap2gguf.observing.compute.fused import Shapes, _norm_recipe, fuse, fuse_norms
from tests.observing.devices import DEVICES

BATCH, LENGTH, HIDDEN = 2, 37, 96
COMMON = {
    "hidden_size": HIDDEN, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
    "moe_intermediate_size": 32, "num_experts": 12, "num_experts_per_tok": 3,
    "num_hidden_layers": 2, "vocab_size": 64,
}  # fmt: skip
TYPES = [(torch.float32, 3e-6), (torch.bfloat16, 1e-2)]


def qwen3_config(**others: Any) -> Any:
    config = Qwen3MoeConfig(**COMMON | others)
    config._attn_implementation = "sdpa"
    config._experts_implementation = "eager"
    return config


def qwen3_5_config(**others: Any) -> Any:
    config = Qwen3_5MoeTextConfig(
        **COMMON, shared_expert_intermediate_size=32, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    config._experts_implementation = "eager"
    return config


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def randomized(module: torch.nn.Module, device: str, dtype: torch.dtype) -> Any:
    generator = torch.Generator().manual_seed(1)
    for name, weight in module.named_parameters():
        spread = 0.3 if "norm" in name or weight.dim() == 1 else weight.shape[-1] ** -0.5
        weight.data = torch.randn(weight.shape, generator=generator) * spread
    return module.requires_grad_(False).to(device, dtype).eval()


def inputs(device: str, dtype: torch.dtype, rotary: int) -> tuple[Tensor, dict[str, Any]]:
    """Hidden states, and what transformers calls a layer with."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(BATCH, LENGTH, HIDDEN, generator=generator).to(device, dtype)
    angles = torch.randn(1, LENGTH, rotary, generator=generator)
    embeddings = (angles.cos().to(device, dtype), angles.sin().to(device, dtype))
    positions = torch.arange(LENGTH, device=device)[None]
    arguments = {
        "attention_mask": None, "position_ids": positions, "use_cache": False,
        "position_embeddings": embeddings,
    }  # fmt: skip
    return hidden, arguments


ATTENTIONS = [
    (qwen3.Qwen3MoeAttention, qwen3_config, 0, 32),
    (qwen3_5.Qwen3_5MoeAttention, qwen3_5_config, 1, 8),
    (qwen3_5.Qwen3_5MoeAttention, qwen3_5_config, 1, 32),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "error"), TYPES)
@pytest.mark.parametrize(("kind", "config", "index", "rotary"), ATTENTIONS)
def test_attention_is_transformers(
    device: str, dtype: torch.dtype, error: float, kind: Any, config: Any, index: int, rotary: int
) -> None:
    module = randomized(kind(config(), index), device, dtype)
    hidden, arguments = inputs(device, dtype, rotary)
    del arguments["use_cache"]
    with torch.inference_mode():
        expected = module(hidden_states=hidden, **arguments)[0]
        fuse(module, Shapes())
        assert module.forward.func is fused._attention
        found = module(hidden_states=hidden, **arguments)[0]
        assert relative(found, expected) < error
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=device).tril()[None, None]
        masked = module(hidden_states=hidden, **arguments | {"attention_mask": mask})[0]
    assert relative(masked, expected) < error, "a mask is for the module's own code"


LAYERS = [
    (qwen3.Qwen3MoeDecoderLayer, qwen3_config, 0, 32),
    (qwen3_5.Qwen3_5MoeDecoderLayer, qwen3_5_config, 0, 8),
    (qwen3_5.Qwen3_5MoeDecoderLayer, qwen3_5_config, 1, 8),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "error"), TYPES)
@pytest.mark.parametrize(("kind", "config", "index", "rotary"), LAYERS)
def test_layers_are_transformers(
    device: str, dtype: torch.dtype, error: float, kind: Any, config: Any, index: int, rotary: int
) -> None:
    layer = randomized(kind(config(), index), device, dtype)
    hidden, arguments = inputs(device, dtype, rotary)
    with torch.inference_mode():
        expected = layer(hidden, **arguments)
        fuse(layer, Shapes())
        found = layer(hidden, **arguments)
    mixer = "linear_attn" if hasattr(layer, "linear_attn") else "self_attn"
    names = fused._LAYERS[kind, mixer, tuple(sorted(arguments))]
    assert names is not None
    assert ("position_embeddings" in names) == (mixer == "self_attn")
    # in bfloat16 a token may be routed otherwise, by other roundings of a tie
    near = (found.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
    assert float(near.quantile(0.8)) < 2 * error


class OddLayer(qwen3.Qwen3MoeDecoderLayer):
    """A layer that scales its second block."""

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        hidden_states = hidden_states + self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), **arguments
        )[0]  # fmt: skip
        return hidden_states + 0.5 * self.mlp(self.post_attention_layernorm(hidden_states))


def test_a_layer_that_computes_something_else_keeps_its_forward() -> None:
    layer = randomized(OddLayer(qwen3_config(), 0), "cpu", torch.float32)
    hidden, arguments = inputs("cpu", torch.float32, 32)
    with torch.inference_mode():
        expected = layer(hidden, **arguments)
        fuse(layer, Shapes())
        assert relative(layer(hidden, **arguments), expected) < 3e-6
    assert fused._LAYERS[OddLayer, "self_attn", tuple(sorted(arguments))] is None


class OddAttention(qwen3.Qwen3MoeAttention):
    """Attention whose scores are twice as large."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.attention_scale = 2.0

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Any:
        return super().forward(hidden_states * self.attention_scale, **arguments)


def test_attention_that_computes_something_else_keeps_its_forward() -> None:
    module = randomized(OddAttention(qwen3_config(), 0), "cpu", torch.float32)
    fuse(module, Shapes())
    assert "forward" not in vars(module)


ROUTERS = [
    (qwen3.Qwen3MoeTopKRouter, qwen3_config(norm_topk_prob=True)),
    (qwen3.Qwen3MoeTopKRouter, qwen3_config(norm_topk_prob=False)),
    (qwen3_5.Qwen3_5MoeTopKRouter, qwen3_5_config()),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "config"), ROUTERS)
def test_routers_are_transformers(device: str, kind: Any, config: Any) -> None:
    module = randomized(kind(config), device, torch.float32)
    hidden, _ = inputs(device, torch.float32, 8)
    expected = module(hidden)
    fuse(module, Shapes())
    assert module.forward.func is fused._router
    found = module(hidden)
    assert relative(found[0], expected[0]) < 1e-6
    assert torch.equal(found[2], expected[2])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-7)


class OddRouter(qwen3.Qwen3MoeTopKRouter):
    """A router with sigmoids."""

    def forward(self, hidden_states: Tensor) -> Any:
        logits = torch.nn.functional.linear(hidden_states, self.weight)
        weights, ids = logits.sigmoid().topk(self.top_k, dim=-1)
        return logits, weights, ids


def test_a_router_that_computes_something_else_keeps_its_forward() -> None:
    module = OddRouter(qwen3_config())
    fuse(module, Shapes())
    assert "forward" not in vars(module)


def test_trials_leave_no_traces() -> None:
    """Not in the module, and not in torch's random numbers."""
    module = randomized(qwen3.Qwen3MoeDecoderLayer(qwen3_config(), 0), "cpu", torch.float32)
    fused._ATTENTIONS.clear()
    fused._ROUTERS.clear()
    before = copy.deepcopy(module.state_dict())
    state = torch.get_rng_state()
    fuse(module, Shapes())
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, before[name])
    assert module.mlp.gate.num_experts == COMMON["num_experts"]
    assert module.mlp.gate.top_k == COMMON["num_experts_per_tok"]


def test_cudnn_is_for_shapes_of_several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused.kernels, "has_cudnn_attention", lambda *arguments: True)
    shapes = Shapes()
    for count in range(4):
        assert not shapes.wants_cudnn(torch.empty(3, 5, 2, 16)), count
        shapes.count(torch.zeros(3, 5, dtype=torch.int64))
    assert shapes.wants_cudnn(torch.empty(3, 5, 2, 16))
    assert not shapes.wants_cudnn(torch.empty(2, 5, 2, 16))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize(
    "norm_type",
    [qwen3.Qwen3MoeRMSNorm, qwen3_5.Qwen3_5MoeRMSNorm, qwen3_5.Qwen3_5MoeRMSNormGated],
)
@pytest.mark.parametrize("width", [96, 128, 2048])
def test_norms_are_transformers(
    device: str, dtype: torch.dtype, error: float, norm_type: Any, width: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    norm = norm_type(width, eps=1e-6)
    norm.weight = torch.nn.Parameter(torch.randn(width, generator=generator), requires_grad=False)
    norm = norm.to(device, dtype)
    # every second head of a projection: rows that do not follow one another
    values = torch.randn(2, 5, 3, 2 * width, generator=generator).to(device, dtype)[..., :width]
    gated = norm_type is qwen3_5.Qwen3_5MoeRMSNormGated
    arguments = (values, torch.randn_like(values)) if gated else (values,)
    expected = norm(*arguments)
    assert fuse_norms(norm) == 1
    found = norm(*arguments)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert relative(found, expected) < error


class OddRMSNorm(torch.nn.Module):
    """A norm that is named like one and computes something else."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * torch.rsqrt(hidden_states.square().sum(-1, keepdim=True) + self.eps)


def test_a_norm_that_computes_something_else_keeps_its_forward() -> None:
    norm = OddRMSNorm(8, 1e-6)
    assert fuse_norms(norm) == 0
    assert norm(torch.ones(1, 8))[0, 0] == pytest.approx(8**-0.5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "error"), TYPES)
@pytest.mark.parametrize("index", [0, 1])
def test_a_layer_of_gemma4(device: str, dtype: torch.dtype, error: float, index: int) -> None:
    """Some of its norms have no weight, and keep their code; so do attention, router and layer."""
    config = Gemma4TextConfig(
        hidden_size=HIDDEN, num_attention_heads=6, num_key_value_heads=2, head_dim=32,
        global_head_dim=64, num_global_key_value_heads=1, attention_k_eq_v=True,
        intermediate_size=64, moe_intermediate_size=32, num_experts=12, top_k_experts=3,
        enable_moe_block=True, hidden_size_per_layer_input=0, num_hidden_layers=2, vocab_size=64,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    config._attn_implementation, config._experts_implementation = "sdpa", "eager"
    layer = randomized(gemma4.Gemma4TextDecoderLayer(config, index), device, dtype)
    hidden, arguments = inputs(device, dtype, 64 if index else 32)
    with torch.inference_mode():
        expected = layer(hidden, shared_kv_states={}, **arguments)
        fuse(layer, Shapes())
        found = layer(hidden, shared_kv_states={}, **arguments)
    assert relative(found, expected) < error
    norms = {name: part for name, part in layer.named_modules() if name.endswith("norm")}
    plain = {name for name, part in norms.items() if not hasattr(part.forward, "func")}
    assert plain == {"self_attn.v_norm", "router.norm"}


def test_norms_are_distinguished() -> None:
    assert _norm_recipe(qwen3.Qwen3MoeRMSNorm) == (0.0, False)
    assert _norm_recipe(qwen3_5.Qwen3_5MoeRMSNorm) == (1.0, False)
    assert _norm_recipe(qwen3_5.Qwen3_5MoeRMSNormGated) == (0.0, True)
    assert _norm_recipe(torch.nn.LayerNorm) is None
