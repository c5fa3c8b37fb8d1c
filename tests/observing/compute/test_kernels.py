"""The kernels against their formulas in float64: torch's operations on a CPU, Triton's on a GPU.

Where Triton is installed, its interpreter runs the kernels on a CPU as well.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from reap2gguf.observing.compute import kernels
from tests.observing.devices import DEVICES, INTERPRETED, interpreted

WAYS = [*DEVICES, INTERPRETED]

N_TOKENS, TOP_K, N_EXPERTS = 37, 4, 6
WIDTHS = [96, 520]
TYPES = [torch.float32, torch.bfloat16]


def routed(
    device: str, width: int, dtype: torch.dtype, n_tokens: int = N_TOKENS
) -> dict[str, Tensor]:
    """Random pairs of tokens, the last two of which are padding; one expert has none."""
    generator = torch.Generator().manual_seed(width)
    ids = torch.randint(0, N_EXPERTS - 1, (n_tokens, TOP_K), generator=generator)
    ids[-2:] = N_EXPERTS
    ordered, order = torch.sort(ids.reshape(-1), stable=True)
    n_pairs = (n_tokens - 2) * TOP_K
    ends = torch.searchsorted(ordered, torch.arange(N_EXPERTS), right=True, out_int32=True)
    places = torch.full((n_tokens * TOP_K,), -1, dtype=torch.int32)
    places[order[:n_pairs]] = torch.arange(n_pairs, dtype=torch.int32)
    gates = torch.rand(n_tokens, TOP_K, generator=generator)
    pairs = {
        "outputs": torch.randn(n_pairs, width, generator=generator).to(dtype),
        "places": places.view(n_tokens, TOP_K),
        "gates": gates,
        "pair_gates": gates.reshape(-1)[order[:n_pairs]],
        "order": order[:n_pairs],
        "ends": ends,
    }
    return {name: tensor.to(device) for name, tensor in pairs.items()}


@pytest.fixture
def device(way: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a test's tensors are."""
    if way != "interpreter":
        return way
    layer, experts, convolution, saliency = interpreted()
    monkeypatch.setattr(kernels, "_kernels_for", lambda values: layer)
    monkeypatch.setattr(kernels, "_expert_kernels_for", lambda values: experts)
    monkeypatch.setattr(kernels, "_convolution_kernels_for", lambda values: convolution)
    monkeypatch.setattr(kernels, "_saliency_kernels_for", lambda values: saliency)
    return "cpu"


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_combine(device: str, width: int, dtype: torch.dtype, error: float) -> None:
    pairs = routed(device, width, dtype)
    outputs, places = pairs["outputs"], pairs["places"]
    norms = torch.full((2, len(outputs)), float("nan"), device=device)
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
    assert relative(norms[0], outputs.double().norm(dim=-1)) < 1e-6
    assert torch.equal(norms[1], outputs.float().abs().amax(-1))
    torch.testing.assert_close(kernels.norms_of(outputs), norms, rtol=1e-6, atol=0)
    assert torch.equal(found, kernels.combine(outputs, places, pairs["gates"], None))


def per_expert(values: Tensor, ends: Tensor) -> Tensor:
    """Sums of squares of each expert's rows, float64."""
    lengths = torch.diff(ends.cpu(), prepend=torch.zeros(1, dtype=torch.int32)).tolist()
    return torch.stack([part.double().square().sum(0) for part in torch.split(values, lengths)])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("n_tokens", [N_TOKENS, 300])
def test_gather(device: str, width: int, dtype: torch.dtype, n_tokens: int) -> None:
    pairs = routed(device, width, dtype, n_tokens)
    order, ends = pairs["order"], pairs["ends"]
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(n_tokens, width, generator=generator).to(device, dtype)
    found = kernels.gather(hidden, pairs["gates"], order, ends, True)
    inputs, places, gates, squares = found
    assert torch.equal(inputs, hidden[order // TOP_K])
    assert torch.equal(places, pairs["places"])
    assert torch.equal(gates, pairs["pair_gates"])
    assert squares is not None
    assert relative(squares, per_expert(inputs, ends)) < 1e-6
    assert bool((squares[-1] == 0).all()), "no pair came to the last expert"
    again = kernels.gather(hidden, pairs["gates"], order, ends, True)[3]
    assert again is not None
    assert torch.equal(again, squares), "equal inputs give equal bits"
    assert kernels.gather(hidden, pairs["gates"], order, ends, False)[3] is None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("n_rows", [1, 140, 300])
def test_all_square_sums(device: str, width: int, dtype: torch.dtype, n_rows: int) -> None:
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(n_rows, width, generator=generator).to(device, dtype)
    whole = kernels.all_square_sums(values)
    assert whole.shape == (1, width)
    assert relative(whole[0], values.double().square().sum(0)) < 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_saliency_sums(device: str) -> None:
    pairs = routed(device, 64, torch.float32)
    norms, gates = kernels.norms_of(pairs["outputs"]), pairs["pair_gates"]
    sums, peaks = kernels.saliency_sums(norms, gates, pairs["ends"])
    assert (sums.shape, peaks.shape) == ((N_EXPERTS, 8), (N_EXPERTS, 2))
    powers = ((1, 1), (1, 0), (0, 1), (2, 0), (0, 2), (2, 1), (1, 2), (2, 2))
    begin = 0
    for expert, end in enumerate(pairs["ends"].tolist()):
        (norm, largest), gate = norms[:, begin:end].double(), gates[begin:end].double()
        expected = torch.stack([(gate**a * norm**b).sum() for a, b in powers])
        torch.testing.assert_close(sums[expert], expected, rtol=1e-12, atol=0)
        assert peaks[expert, 0] == (norm.max() if end > begin else 0)
        assert peaks[expert, 1] == (largest.max() if end > begin else 0)
        begin = end
    again = kernels.saliency_sums(norms, gates, pairs["ends"])
    assert all(map(torch.equal, again, (sums, peaks))), "equal inputs give equal bits"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("width", [24, 264])
@pytest.mark.parametrize("n_tokens", [N_TOKENS, 300])
def test_swiglu(device: str, width: int, n_tokens: int) -> None:
    pairs = routed(device, 2 * width, torch.float32, n_tokens)
    gate, up = pairs["outputs"].double().chunk(2, -1)
    found, squares = kernels.swiglu(pairs["outputs"], pairs["ends"], True)
    assert relative(found, silu(gate) * up) < 1e-6
    assert squares is not None
    assert relative(squares, per_expert(found, pairs["ends"])) < 1e-6
    alone, nothing = kernels.swiglu(pairs["outputs"], pairs["ends"])
    assert torch.equal(alone, found)
    assert nothing is None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n_tokens", [N_TOKENS, 300])
def test_gate_up(device: str, way: str, n_tokens: int) -> None:
    dtype = torch.float32 if way == "interpreter" else torch.bfloat16
    pairs = routed(device, 1, dtype, n_tokens)
    order, ends = pairs["order"], pairs["ends"]
    generator = torch.Generator().manual_seed(10)
    hidden = torch.randn(n_tokens, 128, generator=generator).to(device, dtype)
    matrices = torch.randn(N_EXPERTS, 256, 128, generator=generator).to(device, dtype) / 8
    inputs = hidden[order // TOP_K]
    lengths = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    parts = zip(torch.split(inputs.double(), lengths), matrices.double(), strict=True)
    gate, up = torch.cat([part @ matrix.T for part, matrix in parts]).chunk(2, -1)
    found = kernels.gate_up(hidden, matrices, order, ends, TOP_K)
    assert relative(found, silu(gate) * up) < 2e-2
    assert torch.equal(kernels.gate_up(hidden, matrices, order, ends, TOP_K), found)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_add_rms_norm(device: str, offset: float) -> None:
    generator = torch.Generator().manual_seed(5)
    values, added = torch.randn(2, 3, 5, 96, generator=generator).to(device)
    weight = torch.randn(96, generator=generator).to(device)
    total, normed = kernels.add_rms_norm(values, added, weight, 1e-3, offset)
    assert torch.equal(total, values + added)
    exact = total.double()
    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-3)
    assert relative(normed, exact * (weight.double() + offset)) < 1e-6


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("width", "rotary"), [(40, 40), (40, 16), (128, 128), (256, 64)])
@pytest.mark.parametrize("n_angles", [1, 2])
def test_norm_rotary(device: str, width: int, rotary: int, n_angles: int) -> None:
    generator = torch.Generator().manual_seed(6)
    # the first half of each head, as where gates follow the queries
    values = torch.randn(2, 6, 3, 2 * width, generator=generator).to(device)[..., :width]
    weight = torch.randn(width, generator=generator).to(device)
    cos, sin = torch.randn(2, n_angles, 6, rotary, generator=generator).to(device)
    found = kernels.norm_rotary(values, weight, 1e-3, 1.0, cos, sin)
    exact = values.double()
    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-3)
    exact = exact * (weight.double() + 1.0)
    first, second = exact[..., : rotary // 2], exact[..., rotary // 2 : rotary]
    angles = [angle[:, :, None].double().chunk(2, -1) for angle in (cos, sin)]
    (cos_1, cos_2), (sin_1, sin_2) = angles
    turned = (first * cos_1 - second * sin_1, second * cos_2 + first * sin_2)
    assert relative(found, torch.cat((*turned, exact[..., rotary:]), -1)) < 1e-6


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("length", [2, 37])  # fewer tokens than taps, and several blocks
@pytest.mark.parametrize(("biased", "activated"), [(False, True), (True, False)])
def test_causal_convolution(device: str, length: int, biased: bool, activated: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    apart = torch.randn(3, length, 420, generator=generator).to(torch.bfloat16)
    values = apart[..., :300].to(device)  # rows lie further apart than they are wide
    weight = torch.randn(300, 4, generator=generator).to(device)
    bias = torch.randn(300, generator=generator).to(device) if biased else None
    found = kernels.causal_convolution(values, weight, bias, activated)
    exact = torch.nn.functional.conv1d(
        values.cpu().double().transpose(1, 2),
        weight.cpu().double()[:, None],
        None if bias is None else bias.cpu().double(),
        padding=3,
        groups=300,
    )[..., :length].transpose(1, 2)
    exact = silu(exact) if activated else exact
    assert found.dtype == torch.bfloat16
    assert relative(found.cpu(), exact) < 5e-3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("renormalized", [False, True])
@pytest.mark.parametrize(("n_experts", "top_k"), [(8, 1), (12, 3), (128, 8), (256, 10)])
def test_route(device: str, renormalized: bool, n_experts: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(N_TOKENS, n_experts, generator=generator).to(device)
    weights, ids = kernels.route(logits, top_k, renormalized)
    exact, expected = torch.softmax(logits.double(), -1).topk(top_k, -1)
    if renormalized:
        exact = exact / exact.sum(-1, keepdim=True)
    assert torch.equal(ids, expected)
    assert relative(weights, exact) < 1e-6


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of Triton's interpreter
def test_every_router_finds_experts_that_exist(device: str) -> None:
    """Whatever a broken model computes: places in memory follow from them."""
    logits = torch.zeros(5, 12)
    logits[1], logits[2], logits[3, 4] = float("nan"), float("-inf"), float("inf")
    logits[4, ::2] = float("nan")
    _, ids = kernels.route(logits.to(device), 4, True)
    for row in ids.tolist():
        assert len(set(row)) == 4
        assert set(row) <= set(range(12))


@pytest.mark.parametrize("way", WAYS)
def test_sigmoid_gated(device: str) -> None:
    generator = torch.Generator().manual_seed(8)
    values = torch.randn(2, 5, 3, 16, generator=generator).to(device)
    gates = torch.randn(2, 5, 3, 32, generator=generator).to(device)[..., 16:]
    exact = values.double() * torch.sigmoid(gates.double())
    assert relative(kernels.sigmoid_gated(values, gates), exact) < 1e-6


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of Triton's interpreter
def test_finite_rows(device: str) -> None:
    values = torch.ones(3, 4, 33, device=device)
    values[0, 1, 2], values[2, 3, 32], values[1, 0, 0] = float("nan"), float("inf"), -float("inf")
    expected = torch.ones(3, 4, dtype=torch.bool)
    expected[0, 1] = expected[2, 3] = expected[1, 0] = False
    assert torch.equal(kernels.finite_rows(values).cpu(), expected)


@pytest.mark.parametrize("way", WAYS)
def test_copy_if(device: str) -> None:
    values, target = torch.ones(70, 3, device=device), torch.zeros(70, 3, device=device)
    kernels.copy_if(torch.tensor(False, device=device), values, target)
    assert not bool(target.any())
    kernels.copy_if(torch.tensor(True, device=device), values, target)
    assert torch.equal(target, values)


@pytest.mark.parametrize("device", ["cpu"])
def test_attention(device: str) -> None:
    generator = torch.Generator().manual_seed(9)
    query = torch.randn(2, 5, 4, 8, generator=generator).to(device)
    key, value = torch.randn(2, 2, 5, 2, 8, generator=generator).to(device)
    found = kernels.attention(query, key, value, 0.3, by_cudnn=False)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key.repeat_interleave(2, 2)).double() * 0.3
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    exact = torch.einsum(
        "bhqk,bkhd->bqhd", scores.softmax(-1), value.repeat_interleave(2, 2).double()
    )
    assert relative(found, exact) < 1e-6
    assert not kernels.has_cudnn_attention(torch.device("cpu"), torch.bfloat16, 64)
