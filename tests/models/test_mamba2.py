"""Mamba-2's tensors as GGML wants them, and the memory of its code."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from reap2gguf.checkpoint.config import ConfigReader
from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.mamba2 import MAMBA2, Mamba2, read_mamba2
from reap2gguf.models.rules import sizes_of

TINY = Mamba2(n_heads=6, head_dim=4, state=5, n_groups=3, kernel=4)
DEFAULTS = Mamba2(128, 64, 128, 8, 4).config()


def test_sizes_are_those_of_transformers_module() -> None:
    config = NemotronHConfig(
        hidden_size=20, layers_block_type=["linear_attention"], **TINY.config()
    )
    module = NemotronHMamba2Mixer(config, layer_idx=0)
    sizes = {**TINY.sizes(), "H": 20}
    ours = {rule.stored.removeprefix("mixer."): sizes_of(rule.shape, sizes) for rule in MAMBA2}
    assert ours == {name: tuple(value.shape) for name, value in module.named_parameters()}


def test_transforms() -> None:
    generator = np.random.default_rng(0)
    changed = TINY.transforms()
    logs = generator.normal(size=6).astype(np.float32)
    assert changed["ssm_a"](logs).shape == (6, 1)
    np.testing.assert_allclose(changed["ssm_a"](logs)[:, 0], -np.exp(logs), rtol=1e-6)
    skip = np.arange(6, dtype=np.float32)
    assert changed["ssm_d"](skip).tolist() == [[0], [1], [2], [3], [4], [5]]
    norm = np.arange(24, dtype=np.float32)
    assert changed["ssm_norm.weight"](norm)[:, 0].tolist() == [0, 8, 16]
    kernels = generator.normal(size=(54, 1, 4)).astype(np.float32)
    assert np.array_equal(changed["ssm_conv1d.weight"](kernels), kernels[:, 0])


def test_heads_that_groups_cannot_share() -> None:
    config = ConfigReader({**TINY.config(), "n_groups": 4}, "here")
    with pytest.raises(UnsupportedModelError, match="mamba_num_heads is 6, expected a multiple"):
        read_mamba2(config, DEFAULTS)
    assert read_mamba2(ConfigReader({}, "here"), DEFAULTS) == Mamba2(128, 64, 128, 8, 4)
    assert read_mamba2(ConfigReader(TINY.config(), "here"), DEFAULTS) == TINY


def test_memory_is_that_of_transformers_code() -> None:
    """What the largest tensors that live together take, counted as torch allocates them."""
    sizes = Mamba2(n_heads=16, head_dim=16, state=32, n_groups=2, kernel=4)
    peaks = {}
    for chunk in (16, 64):
        config = NemotronHConfig(
            hidden_size=64, layers_block_type=["linear_attention"], chunk_size=chunk,
            **sizes.config(),
        )  # fmt: skip
        module = NemotronHMamba2Mixer(config, layer_idx=0).eval()
        peaks[chunk] = peak_bytes(module, torch.randn(4, 256, 64)) / (4 * 256)
        counted = sizes.position_bytes(chunk)
        assert 0.8 * peaks[chunk] < counted < 1.3 * peaks[chunk]
    assert replace(sizes, n_heads=32).position_bytes(64) > 1.5 * sizes.position_bytes(64)


def peak_bytes(module: torch.nn.Module, hidden: torch.Tensor) -> int:
    """The most bytes that a module's forward holds beside its input and weights."""
    with (
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
        torch.inference_mode(),
    ):
        module(hidden)
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
