"""The experts function's two ways of computing, against transformers' own loop over experts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, NemotronHConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.observing.compute import experts as experts_module
from reap2gguf.observing.compute import fused
from reap2gguf.observing.compute.experts import (
    RealTokens,
    RoutedPairs,
    observed_experts_forward,
    watch,
)
from tests.observing.devices import DEVICES

N_TOKENS, TOP_K, N_EXPERTS, HIDDEN, WIDTH = 50, 3, 8, 64, 32


class Keeper:
    """Keeps what it sees, expert after expert."""

    def __init__(self, wants_norms: bool, real: RealTokens | None) -> None:
        self.wants_norms = self.wants_squares = wants_norms
        self.real_tokens = real
        self.seen: list[RoutedPairs] = []

    def see(self, pairs: RoutedPairs) -> None:
        self.seen.append(pairs)

    def whole(self) -> dict[str, Tensor]:
        """All pairs of all experts, on the CPU."""
        firsts = [pairs.first_expert for pairs in self.seen]
        assert firsts == sorted(firsts)
        names = ("inputs", "activations", "gates", "counts", "norms")
        return {
            name: torch.cat(
                [getattr(pairs, name).cpu() for pairs in self.seen], dim=1 if name == "norms" else 0
            )
            for name in names
            if self.wants_norms or name != "norms"
        }


def case(device: str) -> tuple[Any, Tensor, Tensor, Tensor]:
    """An experts module and a batch routed to all of its experts but the third."""
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_experts=N_EXPERTS,
        num_experts_per_tok=TOP_K,
    )  # fmt: skip
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    module = Qwen3MoeExperts(config)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    scores = torch.rand(N_TOKENS, N_EXPERTS)
    scores[:, 2] = 0
    gates, chosen = scores.topk(TOP_K)
    hidden = torch.randn(N_TOKENS, HIDDEN)
    module = module.requires_grad_(False).to(device)
    return module, hidden.to(device), chosen.to(device), gates.to(device)


WAYS = ["_all_at_once", "_one_by_one"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n_padding", [0, 7])
def test_outputs_and_pairs(
    device: str, way: str, n_padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, hidden, chosen, gates = case(device)
    with torch.inference_mode():
        expected = module(hidden, chosen, gates)
    for name in WAYS:
        monkeypatch.setattr(experts_module, name, getattr(experts_module, way))
    n_real = N_TOKENS - n_padding
    mask = torch.arange(N_TOKENS, device=device) < n_real
    keeper = Keeper(True, RealTokens(mask, mask.nonzero().squeeze(1)) if n_padding else None)
    watch(module, keeper)
    with torch.inference_mode():
        found = observed_experts_forward(module, hidden, chosen, gates)
    torch.testing.assert_close(found[:n_real], expected[:n_real], rtol=1e-4, atol=1e-4)
    seen = keeper.whole()
    real_chosen = chosen[:n_real].cpu()
    assert seen["counts"].tolist() == torch.bincount(
        real_chosen.reshape(-1), minlength=N_EXPERTS
    ).tolist()  # fmt: skip
    assert seen["counts"][2] == 0
    begin = 0
    for expert in range(N_EXPERTS):
        token, place = torch.where(real_chosen == expert)
        end = begin + len(token)
        inputs = hidden.cpu()[token]
        gate, up = (inputs @ module.gate_up_proj[expert].cpu().T).chunk(2, -1)
        activations = torch.nn.functional.silu(gate) * up
        outputs = activations @ module.down_proj[expert].cpu().T
        norms = torch.stack((outputs.norm(dim=-1), outputs.abs().amax(-1)))
        assert torch.equal(seen["inputs"][begin:end], inputs)
        close = {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(seen["activations"][begin:end], activations, **close)
        torch.testing.assert_close(seen["norms"][:, begin:end], norms, **close)
        assert torch.equal(seen["gates"][begin:end], gates.cpu()[token, place])
        begin = end


def gpt_oss() -> Any:
    """Experts with biases, transposed matrices, and rows of gate and up in turn."""
    config = GptOssConfig(
        hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=N_EXPERTS,
        num_experts_per_tok=TOP_K,
    )  # fmt: skip
    config._experts_implementation = "eager"
    torch.manual_seed(1)
    module = GptOssExperts(config)
    for name, weight in module.named_parameters():
        torch.nn.init.normal_(weight, std=4.0 if name == "gate_up_proj_bias" else 0.3)
    return module.requires_grad_(False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [7, 2**13])
def test_experts_with_biases(
    device: str, way: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm is of the output with its bias, before the gate's weight."""
    _, hidden, chosen, gates = case(device)
    module = gpt_oss().to(device)
    with torch.inference_mode():
        expected = module(hidden, chosen, gates)
    for name in WAYS:
        monkeypatch.setattr(experts_module, name, getattr(experts_module, way))
    monkeypatch.setattr(experts_module, "_BIASED_ROWS", rows)
    keeper = Keeper(True, None)
    watch(module, keeper)
    with torch.inference_mode():
        found = observed_experts_forward(module, hidden, chosen, gates)
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(found, expected, **close)
    seen, begin = keeper.whole(), 0
    alone = gpt_oss()
    for expert in range(N_EXPERTS):
        token, place = torch.where(chosen.cpu() == expert)
        end = begin + len(token)
        inputs, ones = hidden.cpu()[token], torch.ones(len(token), 1)
        outputs = alone(inputs, torch.full((len(token), 1), expert), ones)
        norms = torch.stack((outputs.norm(dim=-1), outputs.abs().amax(-1))) if end > begin else 0
        if end > begin:
            torch.testing.assert_close(seen["norms"][:, begin:end], norms, **close)
        assert torch.equal(seen["gates"][begin:end], gates.cpu()[token, place])
        begin = end


def test_biases_may_stay_in_the_type_they_are_stored_in() -> None:
    _, hidden, chosen, gates = case("cpu")
    half = gpt_oss().to(torch.bfloat16)
    with torch.inference_mode():
        kept = observed_experts_forward(half, hidden, chosen, gates)
        widened = observed_experts_forward(half.float(), hidden, chosen, gates)
    assert torch.equal(kept, widened)


def test_the_kernel_of_swiglu_is_not_for_a_clamped_one() -> None:
    assert not fused.is_swiglu(gpt_oss())
    assert fused.is_swiglu(case("cpu")[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("with_squares", [False, True])
def test_experts_without_a_gate_on_a_latent(
    device: str, way: str, with_squares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, chosen, gates = case(device)
    config = NemotronHConfig(
        hidden_size=HIDDEN, moe_latent_size=16, moe_intermediate_size=WIDTH,
        n_routed_experts=N_EXPERTS, layers_block_type=["moe"],
    )  # fmt: skip
    config._experts_implementation = "eager"
    module = NemotronHExperts(config).requires_grad_(False)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    module = module.to(device)
    hidden = torch.randn(N_TOKENS, 16).to(device)
    with torch.inference_mode():
        expected = module(hidden, chosen, gates)
    for name in WAYS:
        monkeypatch.setattr(experts_module, name, getattr(experts_module, way))
    keeper = Keeper(True, None)
    keeper.wants_squares = with_squares
    watch(module, keeper)
    with torch.inference_mode():
        found = observed_experts_forward(module, hidden, chosen, gates)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    seen, begin = keeper.whole(), 0
    for expert in range(N_EXPERTS):
        token, _ = torch.where(chosen.cpu() == expert)
        inputs, end = hidden.cpu()[token], begin + len(token)
        activations = torch.relu(inputs @ module.up_proj[expert].cpu().T).square()
        norms = (activations @ module.down_proj[expert].cpu().T).norm(dim=-1)
        assert torch.equal(seen["inputs"][begin:end], inputs)
        close = {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(seen["activations"][begin:end], activations, **close)
        torch.testing.assert_close(seen["norms"][0, begin:end], norms, **close)
        begin = end


def test_weights_may_stay_in_the_type_they_are_stored_in() -> None:
    module, hidden, chosen, gates = case("cpu")
    half = module.to(torch.bfloat16)
    with torch.inference_mode():
        kept = observed_experts_forward(half, hidden, chosen, gates)
        widened = observed_experts_forward(half.float(), hidden, chosen, gates)
    assert kept.dtype == torch.float32
    assert torch.equal(kept, widened)


def test_norms_are_computed_only_where_they_are_wanted() -> None:
    module, hidden, chosen, gates = case("cpu")
    keeper = Keeper(False, None)
    watch(module, keeper)
    observed_experts_forward(module, hidden, chosen, gates)
    assert [pairs.norms for pairs in keeper.seen] == [None] * N_EXPERTS


def test_experts_of_another_kind_are_refused() -> None:
    module, *_ = case("cpu")
    del module.has_gate
    with pytest.raises(UnsupportedModelError, match="Qwen3MoeExperts: experts of this kind"):
        watch(module, Keeper(False, None))


def test_a_thread_widens_all_experts_into_the_same_memory() -> None:
    weights = torch.randn(3, 4, 5).to(torch.bfloat16)
    widened = experts_module._Widened(torch.float32)
    places = set()
    for weight in weights:
        values = widened(weight)
        assert torch.equal(values, weight.float())
        places.add(values.data_ptr())
    assert len(places) == 1
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(widened, weights[0]).result().data_ptr() not in places
    exact = weights.float()
    assert widened(exact[0]).data_ptr() == exact[0].data_ptr()
