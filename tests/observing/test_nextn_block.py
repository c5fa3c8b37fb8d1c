"""An MTP block that is one more decoder layer, against transformers' modules by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.glm4_moe import modeling_glm4_moe as theirs

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.models.table import describe
from reap2gguf.observing.budget import layer_bytes
from reap2gguf.observing.decoder import StreamedDecoder
from reap2gguf.observing.importance import ImportanceObserver
from reap2gguf.observing.saliency import SaliencyObserver
from tests.families.glm import GLM45, GLM46, TinyGlm4Moe
from tests.observing.sweeps import rows_of, run_sweep

ENDS = {
    "own ends": GLM45,
    "shared ends": GLM46,
    "own ends, tied": replace(GLM45, tied=True),
    "shared ends, tied": replace(GLM46, tied=True),
    "3D": replace(GLM45, fused=True),
}
LENGTHS = (40, 40, 23, 7)
N_TOKENS, N_OBSERVED = sum(LENGTHS), sum(LENGTHS) - len(LENGTHS)  # last positions have no next
NORMS = {"enorm": "embedding", "hnorm": "hidden", "shared_head.norm": "last"}


class ByHand:
    """The trunk and the block row by row, and what enters every matrix of the block."""

    def __init__(self, spec: TinyGlm4Moe, folder: Path, rows: list[np.ndarray]) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.trunk, config = model.model, model.config
        prefix = f"model.layers.{spec.n_layers}."
        # transformers' own names are those of the 3D layout
        tensors = replace(spec, fused=True).tensors()
        state = {
            name.removeprefix(prefix): tensor.float()
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        self.fc = torch.nn.Linear(2 * spec.hidden, spec.hidden, bias=False)
        self.fc.load_state_dict({"weight": state.pop("eh_proj.weight")})
        self.norms = {kind: _norm(state.pop(f"{name}.weight")) for name, kind in NORMS.items()}
        embedding = self.trunk.embed_tokens.weight
        self.embedding = state.pop("embed_tokens.weight", embedding)
        self.head = state.pop("shared_head.head.weight", model.lm_head.weight)
        self.layer = theirs.Glm4MoeDecoderLayer(config, spec.n_layers)
        self.layer.load_state_dict(state)
        self.inputs: dict[str, list[torch.Tensor]] = {}
        self.routing: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.fc.register_forward_pre_hook(self._keep("fc"))
        for name, module in self.layer.named_modules():
            if isinstance(module, torch.nn.Linear) or name == "mlp.gate":
                module.register_forward_pre_hook(self._keep(name))
        self.layer.mlp.gate.register_forward_hook(self._keep_routing)
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
        embedded = torch.nn.functional.embedding(tokens[:, 1:], self.embedding)
        halves = (self.norms["embedding"](embedded), self.norms["hidden"](hidden))
        mixed = self.fc(torch.cat(halves, dim=-1))
        rotary = self.trunk.rotary_emb(mixed, torch.arange(mixed.shape[1])[None])
        return self.layer(mixed, position_embeddings=rotary)[0]

    def predictions(self, row: int) -> torch.Tensor:
        """Best tokens (T - 1,)."""
        return (self.norms["last"](self.outputs[row]) @ self.head.T).argmax(-1)

    def expert_pairs(self, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs (S, H), activations (S, F) and gate weights (S,) of one expert."""
        weights, indices = (torch.cat(parts) for parts in zip(*self.routing, strict=True))
        token, place = torch.where(indices == expert)
        inputs = torch.cat(self.inputs["mlp.gate"])[token]
        gate, up = (inputs @ self.layer.mlp.experts.gate_up_proj[expert].T).chunk(2, -1)
        return inputs, torch.nn.functional.silu(gate) * up, weights[token, place]


def _norm(weight: torch.Tensor) -> Any:
    norm = theirs.Glm4MoeRMSNorm(len(weight), eps=1e-5)
    norm.load_state_dict({"weight": weight})
    return norm


@pytest.fixture(params=ENDS)
def spec(request: pytest.FixtureRequest) -> TinyGlm4Moe:
    return ENDS[request.param]


def test_saliency_of_the_block(spec: TinyGlm4Moe, tmp_path: Path) -> None:
    folder = spec.write(tmp_path / "model")
    rows = rows_of(*LENGTHS)
    observer, _ = run_sweep(SaliencyObserver, folder, rows)
    assert set(observer.layers) == set(range(spec.n_dense, spec.n_layers + 1))
    seen = observer.layers[spec.n_layers]
    assert seen.count.sum() == N_OBSERVED * spec.top_k
    by_hand = ByHand(spec, folder, rows)
    for expert in range(spec.n_experts):
        _, activations, gates = by_hand.expert_pairs(expert)
        outputs = activations @ by_hand.layer.mlp.experts.down_proj[expert].T
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


def test_importance_of_the_block(spec: TinyGlm4Moe, tmp_path: Path) -> None:
    folder = spec.write(tmp_path / "model")
    rows = rows_of(*LENGTHS)
    observer, _ = run_sweep(ImportanceObserver, folder, rows)
    by_hand = ByHand(spec, folder, rows)
    blk = f"blk.{spec.n_layers}."
    shared = {
        "nextn.eh_proj": "fc",
        **{f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"},
        "attn_output": "self_attn.o_proj",
        "ffn_gate_inp": "mlp.gate",
        **{f"ffn_{n}_shexp": f"mlp.shared_experts.{n}_proj" for n in ("gate", "up", "down")},
    }
    for name, path in shared.items():
        values = torch.cat(by_hand.inputs[path])
        entry = observer.entries[f"{blk}{name}.weight"]
        assert entry.counts.tolist() == [len(values)] == [N_OBSERVED], name
        sums = values.double().square().sum(0, keepdim=True).numpy()
        np.testing.assert_allclose(entry.sums, sums, rtol=5e-5, err_msg=name)
    pairs = [by_hand.expert_pairs(expert) for expert in range(spec.n_experts)]
    for names, which in ((("gate", "up"), 0), (("down",), 1)):
        sums = torch.stack([p[which].detach().double().square().sum(0) for p in pairs])
        for name in names:
            entry = observer.entries[f"{blk}ffn_{name}_exps.weight"]
            assert entry.counts.tolist() == [len(p[0]) for p in pairs]
            np.testing.assert_allclose(entry.sums, sums.numpy(), rtol=5e-5, err_msg=name)
    expected = {f"{blk}{name}.weight" for name in shared}
    expected |= {f"{blk}ffn_{name}_exps.weight" for name in ("gate", "up", "down")}
    # neither the own embedding nor the own head has an entry
    assert {name for name in observer.entries if name.startswith(blk)} == expected


def test_hits_by_hand(spec: TinyGlm4Moe, tmp_path: Path) -> None:
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
    _, report = run_sweep(SaliencyObserver, folder, rows_of(9), probe=rows)
    assert (report.mtp_hits, report.mtp_tokens) == (expected, 28 + 10 + 1)


def test_own_ends_take_the_place_of_the_models(tmp_path: Path) -> None:
    """In memory too: the layer of the block is as large as without them."""
    found = []
    for number, spec in enumerate((GLM45, replace(GLM45, own_ends=False))):
        with Checkpoint.open(spec.write(tmp_path / str(number))) as checkpoint:
            model = describe(checkpoint)
            decoder = StreamedDecoder(checkpoint, model, torch.float32, torch.device("cpu"))
            planned = layer_bytes(model, checkpoint.tensors, 4, on_gpu=False)
            assert planned[3] == decoder.layer_bytes(3)
            found.append(planned)
            decoder.close()
    assert found[0] == found[1]
