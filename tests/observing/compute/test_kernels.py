"""The kernels, on every device, against their formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeRMSNorm,
    Qwen3_5MoeRMSNormGated,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from reap2gguf.observing.compute import kernels
from reap2gguf.observing.compute.kernels import _norm_recipe, fuse_norms
from tests.observing.devices import DEVICES

N_TOKENS, TOP_K, N_EXPERTS = 37, 4, 6
WIDTHS = [96, 2048, 2056]


def routed(device: str, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random pairs of 37 tokens, the last two of which are padding; one expert has none."""
    generator = torch.Generator().manual_seed(width)
    ids = torch.randint(0, N_EXPERTS - 1, (N_TOKENS, TOP_K), generator=generator)
    ids[-2:] = N_EXPERTS
    ordered, order = torch.sort(ids.reshape(-1), stable=True)
    n_pairs = (N_TOKENS - 2) * TOP_K
    ends = torch.searchsorted(ordered, torch.arange(N_EXPERTS), right=True, out_int32=True)
    places = torch.full((N_TOKENS * TOP_K,), -1, dtype=torch.int32)
    places[order[:n_pairs]] = torch.arange(n_pairs, dtype=torch.int32)
    gates = torch.rand(N_TOKENS, TOP_K, generator=generator)
    pairs = {
        "outputs": torch.randn(n_pairs, width, generator=generator).to(dtype),
        "places": places.view(N_TOKENS, TOP_K),
        "gates": gates,
        "pair_gates": gates.reshape(-1)[order[:n_pairs]],
        "ends": ends,
    }
    return {name: tensor.to(device) for name, tensor in pairs.items()}


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)])
def test_combine(device: str, width: int, dtype: torch.dtype, error: float) -> None:
    pairs = routed(device, width, dtype)
    outputs, places = pairs["outputs"], pairs["places"]
    norms = torch.full((len(outputs),), float("nan"), device=device)
    found = kernels.combine(outputs, places, pairs["gates"], norms)
    exact = torch.zeros(N_TOKENS, width, dtype=torch.float64)
    for token in range(N_TOKENS):
        for choice in range(TOP_K):
            place = int(places[token, choice])
            if place >= 0:
                gate = float(pairs["gates"][token, choice])
                exact[token] += gate * outputs[place].double().cpu()
    assert found.dtype == dtype
    assert relative(found.cpu(), exact) < error
    assert bool((found[-2:] == 0).all()), "padding has no experts"
    assert relative(norms, outputs.double().norm(dim=-1)) < 1e-6
    assert torch.equal(found, kernels.combine(outputs, places, pairs["gates"], None))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_square_sums(device: str, width: int, dtype: torch.dtype) -> None:
    pairs = routed(device, width, dtype)
    found = kernels.square_sums(pairs["outputs"], pairs["ends"])
    exact, begin = [], 0
    for end in pairs["ends"].tolist():
        exact.append(pairs["outputs"][begin:end].double().square().sum(0))
        begin = end
    assert relative(found, torch.stack(exact)) < 1e-6
    assert bool((found[-1] == 0).all()), "no pair came to the last expert"
    whole = kernels.all_square_sums(pairs["outputs"])
    assert whole.shape == (1, width)
    assert relative(whole[0], torch.stack(exact).sum(0)) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
def test_saliency_sums(device: str) -> None:
    pairs = routed(device, 64, torch.float32)
    norms, gates = pairs["outputs"].norm(dim=-1), pairs["pair_gates"]
    sums, peaks = kernels.saliency_sums(norms, gates, pairs["ends"])
    begin = 0
    for expert, end in enumerate(pairs["ends"].tolist()):
        norm, gate = norms[begin:end].double(), gates[begin:end].double()
        expected = torch.stack(((norm * gate).sum(), gate.sum(), norm.sum()))
        torch.testing.assert_close(sums[expert], expected, rtol=1e-12, atol=0)
        assert peaks[expert] == (norm.max() if end > begin else 0)
        begin = end


@pytest.mark.parametrize("device", DEVICES)
def test_swiglu(device: str) -> None:
    gate_up = torch.randn(33, 2 * 24, generator=torch.Generator().manual_seed(0))
    gate, up = gate_up.double().chunk(2, -1)
    found = kernels.swiglu(gate_up.to(device))
    assert relative(found.cpu(), torch.nn.functional.silu(gate) * up) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("norm_type", [Qwen3MoeRMSNorm, Qwen3_5MoeRMSNorm, Qwen3_5MoeRMSNormGated])
@pytest.mark.parametrize("width", [96, 128, 2048])
def test_norms_are_transformers(
    device: str, dtype: torch.dtype, error: float, norm_type: type, width: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    norm = norm_type(width, eps=1e-6)
    norm.weight = torch.nn.Parameter(torch.randn(width, generator=generator), requires_grad=False)
    norm = norm.to(device, dtype)
    # every second head of a projection: rows that do not follow one another
    values = torch.randn(2, 5, 3, 2 * width, generator=generator).to(device, dtype)[..., :width]
    gated = norm_type is Qwen3_5MoeRMSNormGated
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


def test_norms_are_distinguished() -> None:
    assert _norm_recipe(Qwen3MoeRMSNorm) == (0.0, False)
    assert _norm_recipe(Qwen3_5MoeRMSNorm) == (1.0, False)
    assert _norm_recipe(Qwen3_5MoeRMSNormGated) == (0.0, True)
    assert _norm_recipe(torch.nn.LayerNorm) is None
