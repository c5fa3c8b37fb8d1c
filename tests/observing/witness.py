"""transformers' own model, run row by row, and REAP's formula written out on what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from reap2gguf.artifacts.observations import LayerObservation
from tests.tiny import TinyQwen3Moe

LAYOUTS = {
    "2d": TinyQwen3Moe(),
    "3d": TinyQwen3Moe(fused=True, tied=True),
    "dense layer": TinyQwen3Moe(n_layers=3, dense_layers=(1,)),
    "num_local_experts": TinyQwen3Moe(count_key="num_local_experts", n_shards=3),
    "float32": TinyQwen3Moe(dtype=torch.float32),
}


# powers of gate and norm, and the names of their sums and of the largest values
_POWERS = ((1, 1), (1, 0), (0, 1), (2, 0), (0, 2), (2, 1), (1, 2), (2, 2))
_NAMES = (
    *("reap_sum", "gate_sum", "norm_sum", "gate2_sum", "norm2_sum"),
    *("gate2_norm_sum", "gate_norm2_sum", "gate2_norm2_sum", "norm_max", "output_max"),
)


class Witness:
    """Runs transformers' model row by row and keeps what enters its modules."""

    def __init__(
        self, folder: Path, rows: list[np.ndarray], dtype: torch.dtype = torch.float32
    ) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, experts_implementation="eager"
        )
        self.model = model.requires_grad_(False)
        self.inputs: dict[str, list[torch.Tensor]] = {}
        self.routing: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(self._keep_input(name))
            elif name.endswith("mlp.gate"):
                module.register_forward_pre_hook(self._keep_input(name))
                module.register_forward_hook(self._keep_routing(name))
        with torch.inference_mode():
            for row in rows:
                self.model(torch.from_numpy(row)[None])

    def _keep_input(self, name: str) -> Any:
        def hook(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            flat = arguments[0].reshape(-1, arguments[0].shape[-1])
            self.inputs.setdefault(name, []).append(flat)

        return hook

    def _keep_routing(self, name: str) -> Any:
        def hook(module: torch.nn.Module, arguments: Any, output: Any) -> None:
            _, weights, indices = output
            self.routing.setdefault(name, []).append((weights, indices))

        return hook

    def expert_pairs(self, layer: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Per expert: inputs (S, H), activations (S, F), gate weights (S,)."""
        name = f"model.layers.{layer}.mlp.gate"
        hidden = torch.cat(self.inputs[name])
        weights = torch.cat([w for w, _ in self.routing[name]])
        indices = torch.cat([i for _, i in self.routing[name]])
        experts = self.model.model.layers[layer].mlp.experts
        found = []
        for expert in range(experts.num_experts):
            token, place = torch.where(indices == expert)
            gate, up = (hidden[token] @ experts.gate_up_proj[expert].T).chunk(2, -1)
            activations = torch.nn.functional.silu(gate) * up
            found.append((hidden[token], activations, weights[token, place]))
        return found

    def gates_and_norms(self, layer: int) -> list[tuple[list[float], list[float]]]:
        """Per expert, of each of its tokens: the gate weight, and the norm of the output."""
        down = self.model.model.layers[layer].mlp.experts.down_proj
        return [
            (gates.tolist(), (activations @ down[expert].T).norm(dim=-1).tolist())
            for expert, (_, activations, gates) in enumerate(self.expert_pairs(layer))
        ]

    def saliency(self, layer: int) -> LayerObservation:
        """The sums of arXiv 2510.13999, expert by expert."""
        down = self.model.model.layers[layer].mlp.experts.down_proj
        sums = []
        for expert, (_, activations, gates) in enumerate(self.expert_pairs(layer)):
            outputs = (activations @ down[expert].T).double()
            norms, gates = outputs.norm(dim=-1), gates.double()
            products = [gates**a * norms**b for a, b in _POWERS]
            peaks = [values.max() if len(norms) else 0.0 for values in (norms, outputs.abs())]
            sums.append((len(norms), *(values.sum() for values in products), *peaks))
        columns = zip(*sums, strict=True)
        count, *others = (np.array([float(v) for v in c]) for c in columns)
        return LayerObservation(count.astype(np.int64), **dict(zip(_NAMES, others, strict=True)))
