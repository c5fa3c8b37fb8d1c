"""The importance matrix against the inputs of transformers' own modules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from reap2gguf.observing.importance import ImportanceObserver
from tests.observing.sweeps import rows_of, run_sweep
from tests.observing.witness import LAYOUTS, Witness


@pytest.mark.parametrize("layout", ["2d", "3d", "dense layer"])
def test_importance_is_the_sum_of_squared_inputs(layout: str, tmp_path: Path) -> None:
    spec = LAYOUTS[layout]
    folder = spec.write(tmp_path / "model")
    rows = rows_of(32, 32, 19)
    observer, _ = run_sweep(ImportanceObserver, folder, rows)
    entries = observer.entries
    witness = Witness(folder, rows)
    dense = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    expected: dict[str, tuple[torch.Tensor, list[int]]] = {}
    for layer in range(spec.n_layers):
        for gguf_name, path in dense.items():
            if seen := witness.inputs.get(f"model.layers.{layer}.{path}"):
                values = torch.cat(seen)
                sums = values.double().square().sum(0, keepdim=True)
                expected[f"blk.{layer}.{gguf_name}.weight"] = (sums, [len(values)])
        if layer in spec.dense_layers:
            continue
        pairs = witness.expert_pairs(layer)
        counts = [len(inputs) for inputs, _, _ in pairs]
        by_inputs = torch.stack([i.double().square().sum(0) for i, _, _ in pairs])
        by_activations = torch.stack([a.double().square().sum(0) for _, a, _ in pairs])
        expected[f"blk.{layer}.ffn_gate_exps.weight"] = (by_inputs, counts)
        expected[f"blk.{layer}.ffn_up_exps.weight"] = (by_inputs, counts)
        expected[f"blk.{layer}.ffn_down_exps.weight"] = (by_activations, counts)
    assert set(entries) == set(expected)
    for name, (sums, counts) in expected.items():
        np.testing.assert_array_equal(entries[name].counts, counts, err_msg=name)
        np.testing.assert_allclose(entries[name].sums, sums.numpy(), rtol=2e-5, err_msg=name)
