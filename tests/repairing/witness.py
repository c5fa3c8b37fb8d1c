"""The repair of a layer, computed with transformers' own models and numpy alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM


@dataclass
class Calls:
    """What the experts of one module were called with, and what they gave."""

    entering: np.ndarray  # (N, H) float64, of the block that routes to them
    inputs: np.ndarray  # (N, H), or of a latent
    index: np.ndarray  # (N, K)
    gates: np.ndarray  # (N, K)
    outputs: np.ndarray  # (N, H)
    activations: list[np.ndarray]  # per expert (N, F), of every input
    down: np.ndarray  # (E, H, F)
    rows: list[np.ndarray]  # the tokens
    hidden: list[torch.Tensor]  # what enters the layer, of each row, (1, T, H)


def calls(folder: Path, rows: list[np.ndarray], path: str) -> Calls:
    """Run transformers' whole model on rows; `path` is that of the experts in the text model."""
    whole: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    modules = dict(whole.named_modules())
    name = next(name for name in modules if name.endswith(path))
    experts: Any = modules[name]
    kept: list[Any] = []
    entering: list[torch.Tensor] = []

    def keep(module: Any, arguments: Any, keywords: Any, output: torch.Tensor) -> None:
        kept.append((*arguments, *keywords.values(), output))

    def keep_entering(module: Any, arguments: Any, keywords: Any) -> None:
        values = next(iter((*arguments, *keywords.values())))
        entering.append(values.reshape(-1, values.shape[-1]))

    modules[name.rpartition(".")[0]].register_forward_pre_hook(keep_entering, with_kwargs=True)
    handle = experts.register_forward_hook(keep, with_kwargs=True)
    hidden: list[torch.Tensor] = []
    _layer(whole, path).register_forward_pre_hook(
        lambda module, arguments: hidden.append(arguments[0].clone())
    )
    with torch.inference_mode():
        for row in rows:
            whole(torch.from_numpy(row)[None])
        handle.remove()
        inputs, index, gates, outputs = (torch.cat(one) for one in zip(*kept, strict=True))
        activations = []
        has_gate = hasattr(experts, "gate_up_proj")
        for matrix in experts.gate_up_proj if has_gate else experts.up_proj:
            gate, *up = (inputs @ matrix.T).chunk(1 + has_gate, dim=-1)
            gated = experts.act_fn(gate) * up[0] if has_gate else torch.relu(gate).square()
            activations.append(gated.double().numpy())
    return Calls(
        torch.cat(entering).double().numpy(),
        inputs.double().numpy(),
        index.numpy(),
        gates.double().numpy(),
        outputs.double().numpy(),
        activations,
        experts.down_proj.detach().double().numpy(),
        rows,
        hidden,
    )


def _layer(whole: Any, path: str) -> Any:
    """The decoder layer that `path` begins with the number of."""
    return whole.get_decoder().layers[int(path.split(".")[0])]


def targets(folder: Path, pruned: Calls, path: str) -> np.ndarray:
    """What the experts of a model give where those of the pruned one are, (N, H).

    By its own routing: its block runs on what enters the pruned block, or, where the layer
    itself holds them and its router, the layer runs on the hidden states that enter the pruned one.
    """
    whole: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    modules = dict(whole.named_modules())
    name = next(name for name in modules if name.endswith(path))
    kept: list[torch.Tensor] = []
    modules[name].register_forward_hook(lambda module, arguments, output: kept.append(output))
    block = modules[name.rpartition(".")[0]]
    with torch.inference_mode():
        if block is not _layer(whole, path):
            block(torch.from_numpy(pruned.entering).float()[None])
        for row, values in zip(pruned.rows, pruned.hidden, strict=True) if not kept else ():
            handle = block.register_forward_pre_hook(
                lambda module, arguments, values=values: (values, *arguments[1:])
            )
            whole(torch.from_numpy(row)[None])
            handle.remove()
    return torch.cat(kept).double().numpy()


@dataclass
class Expected:
    """Errors on the rows that were held out, and the new weights (E, H, F), by alpha."""

    before: float
    after: dict[float, float]
    down: dict[float, np.ndarray]


def expected_repair(
    target: np.ndarray, pruned: Calls, down: np.ndarray, is_held: np.ndarray
) -> Expected:
    """Ridge regression towards the original weights, alpha by alpha.

    target: (N, H)    down: the original weights (E, H, F)    is_held: (N,) bool
    """
    n_experts, hidden, width = down.shape
    phi = np.zeros((len(pruned.inputs), n_experts, width))
    for expert in range(n_experts):
        gates = np.where(pruned.index == expert, pruned.gates, 0).sum(axis=1)
        phi[:, expert] = gates[:, None] * pruned.activations[expert]
    phi = phi.reshape(len(phi), -1)
    start = down.transpose(0, 2, 1).reshape(-1, hidden)
    fitted, held = phi[~is_held], phi[is_held]
    gram, right = fitted.T @ fitted, fitted.T @ target[~is_held]
    scale = np.linalg.norm(target[is_held])
    found = Expected(np.linalg.norm(target[is_held] - held @ start) / scale, {}, {})
    for alpha in (0.03, 0.1, 0.3, 1.0):
        shift = alpha * np.trace(gram) / len(gram)
        moved = np.linalg.solve(gram + shift * np.eye(len(gram)), right + shift * start)
        found.after[alpha] = float(np.linalg.norm(target[is_held] - held @ moved) / scale)
        found.down[alpha] = moved.reshape(n_experts, width, hidden).transpose(0, 2, 1)
    return found
