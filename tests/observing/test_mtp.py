"""The multi-token-prediction block, against transformers' own modules put together by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as theirs

from reap2gguf.artifacts.observations import LayerObservation
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.gguf_files.imatrix import ImatrixEntry
from reap2gguf.models.table import describe
from reap2gguf.observing import budget
from reap2gguf.observing import decoder as decoder_module
from reap2gguf.observing.decoder import StreamedDecoder
from reap2gguf.observing.importance import ImportanceObserver
from reap2gguf.observing.mtp import count_hits, next_tokens
from reap2gguf.observing.saliency import SaliencyObserver
from reap2gguf.observing.sweep import SweepReport
from tests.models.oracles import through_layers
from tests.observing.sweeps import rows_of, run_sweep
from tests.tiny import TinyQwen35Moe

BASE = TinyQwen35Moe(vision=False)
LAYOUTS = {
    "the Hub's": TinyQwen35Moe(),
    "3D": replace(BASE, fused_mtp=True),
    "flat 2D": replace(BASE, nested=False, fused=False),
    "tied, equal heads": replace(BASE, tied=True, value_heads=4),
    "another order of layers": replace(BASE, layers="lfl"),
}
LENGTHS = (40, 40, 23, 7)


class ByHand:
    """The trunk and the block row by row, and what enters every matrix of both."""

    def __init__(self, spec: TinyQwen35Moe, folder: Path, rows: list[np.ndarray]) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.trunk = model.model
        self.head = model.lm_head
        config = self.trunk.config
        self.block = torch.nn.Module()
        kind = spec.layers.index("f")
        self.block.layer = theirs.Qwen3_5MoeDecoderLayer(config, kind)
        self.block.fc = torch.nn.Linear(2 * spec.hidden, spec.hidden, bias=False)
        for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            norm = theirs.Qwen3_5MoeRMSNorm(spec.hidden, eps=config.rms_norm_eps)
            self.block.add_module(name, norm)
        # the 3D layout's names are transformers' own
        state = replace(spec, fused_mtp=True).tensors()
        self.block.load_state_dict(
            {
                name.removeprefix("mtp.").replace("layers.0.", "layer."): tensor.float()
                for name, tensor in state.items()
                if name.startswith("mtp.")
            }
        )
        self.inputs: dict[str, list[torch.Tensor]] = {}
        self.routing: list[tuple[torch.Tensor, torch.Tensor]] = []
        for name, module in self.block.named_modules():
            if isinstance(module, torch.nn.Linear) or name == "layer.mlp.gate":
                module.register_forward_pre_hook(self._keep(name))
        for layer, module in enumerate(self.trunk.layers):
            if spec.layers[layer] == "l":
                out = module.linear_attn.out_proj
                out.register_forward_pre_hook(self._keep(f"out_proj.{layer}"))
        self.block.layer.mlp.gate.register_forward_hook(self._keep_routing)
        with torch.inference_mode():
            self.outputs = [self._run(torch.from_numpy(row)[None]) for row in rows]

    def _keep(self, name: str) -> Any:
        def hook(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            flat = arguments[0].reshape(-1, arguments[0].shape[-1])
            self.inputs.setdefault(name, []).append(flat)

        return hook

    def _keep_routing(self, module: torch.nn.Module, arguments: Any, output: Any) -> None:
        self.routing.append(output[1:])

    def _run(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states (T - 1, H) of the positions that have a next token."""
        hidden = self.trunk(tokens).last_hidden_state[:, :-1]
        embedded = self.trunk.embed_tokens(tokens[:, 1:])
        halves = (
            self.block.pre_fc_norm_embedding(embedded),
            self.block.pre_fc_norm_hidden(hidden),
        )
        mixed = self.block.fc(torch.cat(halves, dim=-1))
        places = torch.arange(mixed.shape[1]).expand(3, 1, -1)
        rotary = self.trunk.rotary_emb(mixed, places)
        return self.block.layer(mixed, position_embeddings=rotary)[0]

    def predictions(self, row: int) -> torch.Tensor:
        """Best tokens (T - 1,)."""
        return self.head(self.block.norm(self.outputs[row])).argmax(-1)

    def expert_pairs(self, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs (S, H), activations (S, F) and gate weights (S,) of one expert."""
        weights, indices = (torch.cat(parts) for parts in zip(*self.routing, strict=True))
        token, place = torch.where(indices == expert)
        inputs = torch.cat(self.inputs["layer.mlp.gate"])[token]
        gate, up = (inputs @ self.block.layer.mlp.experts.gate_up_proj[expert].T).chunk(2, -1)
        return inputs, torch.nn.functional.silu(gate) * up, weights[token, place]


@pytest.fixture(params=LAYOUTS)
def spec(request: pytest.FixtureRequest) -> TinyQwen35Moe:
    return LAYOUTS[request.param]


def observe(
    folder: Path, rows: list[np.ndarray], probe: list[np.ndarray] | None = None
) -> tuple[dict[int, LayerObservation], SweepReport]:
    observer, report = run_sweep(SaliencyObserver, folder, rows, probe=probe or ())
    return observer.layers, report


def importance(folder: Path, rows: list[np.ndarray]) -> dict[str, ImatrixEntry]:
    observer, _ = run_sweep(ImportanceObserver, folder, rows)
    return observer.entries


def test_the_block_is_transformers_modules_put_together(
    spec: TinyQwen35Moe, tmp_path: Path
) -> None:
    folder = spec.write(tmp_path / "model")
    rows = rows_of(40, 40)
    tokens = torch.from_numpy(np.stack(rows))
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        decoder = StreamedDecoder(checkpoint, model, torch.float32, torch.device("cpu"))
        hidden = through_layers(decoder, model.facts.n_layers, tokens)
        decoder.load_ends()
        decoder.load_layer(model.facts.n_layers)
        found = decoder.run_mtp(hidden, tokens)
        predicted = decoder.mtp_logits(found).argmax(-1)
    by_hand = ByHand(spec, folder, rows)
    for row in range(2):
        torch.testing.assert_close(found[row, :-1], by_hand.outputs[row], rtol=1e-4, atol=1e-5)
        assert torch.equal(predicted[row, :-1], by_hand.predictions(row))


def test_saliency_of_the_block(spec: TinyQwen35Moe, tmp_path: Path) -> None:
    folder = spec.write(tmp_path / "model")
    rows = rows_of(*LENGTHS)
    layers, report = observe(folder, rows)
    last = len(spec.layers)
    assert set(layers) == set(range(last + 1))
    assert (report.n_rows, report.n_tokens, report.n_dropped_rows) == (4, 110, 0)
    for layer in range(last):
        assert layers[layer].count.sum() == 110 * spec.top_k
    assert layers[last].count.sum() == (110 - len(rows)) * spec.top_k  # no last positions
    by_hand = ByHand(spec, folder, rows)
    seen = layers[last]
    for expert in range(spec.n_experts):
        _, activations, gates = by_hand.expert_pairs(expert)
        outputs = activations @ by_hand.block.layer.mlp.experts.down_proj[expert].T
        norms, gates = outputs.norm(dim=-1).double(), gates.double()
        assert seen.count[expert] == len(norms)
        sums = {
            "reap_sum": (norms * gates).sum(),
            "gate_sum": gates.sum(),
            "norm_sum": norms.sum(),
            "norm_max": norms.max() if len(norms) else torch.zeros(()),
        }
        for name, expected in sums.items():
            found = getattr(seen, name)[expert]
            assert found == pytest.approx(float(expected.detach()), rel=5e-5), name


def test_importance_of_the_block(spec: TinyQwen35Moe, tmp_path: Path) -> None:
    folder = spec.write(tmp_path / "model")
    rows = rows_of(*LENGTHS)
    entries = importance(folder, rows)
    by_hand = ByHand(spec, folder, rows)
    blk = f"blk.{len(spec.layers)}."
    shared = {
        "nextn.eh_proj": "fc",
        "attn_q": "layer.self_attn.q_proj",
        "attn_k": "layer.self_attn.k_proj",
        "attn_v": "layer.self_attn.v_proj",
        "attn_output": "layer.self_attn.o_proj",
        "ffn_gate_inp": "layer.mlp.gate",
        "ffn_gate_inp_shexp": "layer.mlp.shared_expert_gate",
        "ffn_gate_shexp": "layer.mlp.shared_expert.gate_proj",
        "ffn_up_shexp": "layer.mlp.shared_expert.up_proj",
        "ffn_down_shexp": "layer.mlp.shared_expert.down_proj",
    }
    for name, path in shared.items():
        values = torch.cat(by_hand.inputs[path])
        assert len(values) == 110 - len(rows)
        entry = entries[f"{blk}{name}.weight"]
        assert entry.counts.tolist() == [len(values)], name
        sums = values.double().square().sum(0, keepdim=True).numpy()
        np.testing.assert_allclose(entry.sums, sums, rtol=5e-5, err_msg=name)
    pairs = [by_hand.expert_pairs(expert) for expert in range(spec.n_experts)]
    for names, which in ((("gate", "up"), 0), (("down",), 1)):
        sums = torch.stack([p[which].detach().double().square().sum(0) for p in pairs])
        for name in names:
            entry = entries[f"{blk}ffn_{name}_exps.weight"]
            assert entry.counts.tolist() == [len(p[0]) for p in pairs]
            np.testing.assert_allclose(entry.sums, sums.numpy(), rtol=5e-5, err_msg=name)
    expected = {f"{blk}{name}.weight" for name in shared}
    expected |= {f"{blk}ffn_{name}_exps.weight" for name in ("gate", "up", "down")}
    assert {name for name in entries if name.startswith(blk)} == expected


def test_importance_of_ssm_out_is_in_ggufs_order(spec: TinyQwen35Moe, tmp_path: Path) -> None:
    folder = spec.write(tmp_path / "model")
    rows = rows_of(*LENGTHS)
    entries = importance(folder, rows)
    by_hand = ByHand(spec, folder, rows)
    per_key, width = spec.value_heads // spec.key_heads, spec.linear_dim
    for layer, kind in enumerate(spec.layers):
        name = f"blk.{layer}.ssm_out.weight"
        assert (name in entries) is (kind == "l")
        if kind == "f":
            continue
        sums = torch.cat(by_hand.inputs[f"out_proj.{layer}"]).double().square().sum(0)
        assert len(sums) == spec.value_heads * width
        for key in range(spec.key_heads):
            for value in range(per_key):
                there = (value * spec.key_heads + key) * width
                here = (key * per_key + value) * width
                np.testing.assert_allclose(
                    entries[name].sums[0, there : there + width],
                    sums[here : here + width].numpy(),
                    rtol=5e-5,
                )


def test_hits_by_hand(spec: TinyQwen35Moe, tmp_path: Path) -> None:
    folder = spec.write(tmp_path / "model")
    rows = rows_of(30, 12, 3, 2)
    by_hand = ByHand(spec, folder, rows)
    # what the block predicts becomes the text, where it can: the last token is no input of it
    for row, tokens in enumerate(rows):
        if len(tokens) > 2:
            tokens[-1] = by_hand.predictions(row)[len(tokens) - 3]
    by_hand = ByHand(spec, folder, rows)
    expected = sum(
        int(by_hand.predictions(row)[place] == tokens[place + 2])
        for row, tokens in enumerate(rows)
        for place in range(len(tokens) - 2)
    )
    assert expected >= 3
    layers, report = observe(folder, rows_of(9), rows)
    assert (report.mtp_hits, report.mtp_tokens) == (expected, 28 + 10 + 1)
    # passengers are not observed
    assert (report.n_rows, report.n_tokens) == (1, 9)
    assert layers[0].count.sum() == 9 * spec.top_k


def test_a_model_without_a_block_predicts_nothing(tmp_path: Path) -> None:
    folder = replace(BASE, mtp=False).write(tmp_path / "model")
    layers, report = observe(folder, rows_of(9), rows_of(12))
    assert set(layers) == {0, 1, 2, 3}
    assert (report.mtp_hits, report.mtp_tokens) == (0, 0)


def test_batching_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = BASE.write(tmp_path / "model")
    rows, probe = rows_of(30, 12, 30, 5), rows_of(20, 9, seed=1)
    together, one = observe(folder, rows, probe)
    monkeypatch.setitem(budget.MOST_TOKENS, "cpu", 1)
    apart, other = observe(folder, rows, probe)
    assert one == other
    for layer in together:
        np.testing.assert_array_equal(together[layer].count, apart[layer].count)
        np.testing.assert_allclose(together[layer].reap_sum, apart[layer].reap_sum, rtol=1e-5)


def test_layouts_are_observed_alike(tmp_path: Path) -> None:
    rows = rows_of(20, 11)
    first, _ = observe(BASE.write(tmp_path / "hub"), rows)
    second, _ = observe(LAYOUTS["flat 2D"].write(tmp_path / "flat"), rows)
    for layer in first:
        np.testing.assert_array_equal(first[layer].reap_sum, second[layer].reap_sum)


def test_next_tokens() -> None:
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert next_tokens(tokens).tolist() == [[2, 3, 3], [5, 6, 6]]


def test_count_hits_leaves_padding_out() -> None:
    tokens = torch.tensor([[1, 2, 3, 4, 2], [3, 1, 2, 0, 0], [4, 4, 0, 0, 0]])
    lengths = torch.tensor([5, 3, 2])
    best = torch.tensor([[3, 0, 2, 9, 9], [2, 0, 0, 9, 9], [0, 0, 0, 9, 9]])
    # row 0: 3 and 2 are right, 0 is wrong; row 1: 2 is right, the rest is padding; row 2: none
    assert count_hits(best, tokens, lengths) == (3, 4)


@pytest.mark.parametrize("width", [1, 2])
def test_count_hits_of_rows_too_short(width: int) -> None:
    tokens = torch.zeros(2, width, dtype=torch.int64)
    assert count_hits(tokens, tokens, torch.tensor([width] * 2)) == (0, 0)


def test_the_best_tokens_a_slice_at_a_time_are_the_best_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpoint.open(BASE.write(tmp_path / "model")) as checkpoint:
        model = describe(checkpoint)
        decoder = StreamedDecoder(checkpoint, model, torch.float32, torch.device("cpu"))
        decoder.load_layer(model.facts.n_layers)
        hidden = torch.randn(3, 7, BASE.hidden, generator=torch.Generator().manual_seed(0))
        monkeypatch.setattr(decoder_module, "_HEAD_TOKENS", 4)  # 21 positions: six slices
        best = decoder.mtp_best(hidden)
        assert torch.equal(best, decoder.mtp_logits(hidden).argmax(-1))
        assert len(best.unique()) > 5
        decoder.close()
