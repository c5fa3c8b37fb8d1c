"""Part of the bundled, trained example: its own values, and less to compute with."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from safetensors.torch import load_file

from tests.tiny import EXAMPLE


def part_of_config(n_layers: int, n_experts: int) -> dict[str, Any]:
    """The config of the first layers and experts."""
    config: dict[str, Any] = json.loads((EXAMPLE / "config.json").read_text())
    return config | {"num_hidden_layers": n_layers, "num_experts": n_experts}


def part_of_tensors(n_layers: int, n_experts: int) -> dict[str, torch.Tensor]:
    """The tensors of the first layers and experts; embedding and head are whole."""
    found = {}
    for shard in sorted(EXAMPLE.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            numbers = {kind: int(n) for kind, n in re.findall(r"(layers|experts)\.(\d+)\.", name)}
            if numbers.get("layers", 0) >= n_layers or numbers.get("experts", 0) >= n_experts:
                continue
            is_router = name.endswith("mlp.gate.weight")
            found[name] = tensor[:n_experts].clone() if is_router else tensor
    return found
