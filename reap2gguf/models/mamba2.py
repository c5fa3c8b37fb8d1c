"""Mamba-2 (arXiv 2405.21060), Nemotron-H's recurrence: what is stored, and what GGUF makes of it.

One matrix projects a token to z, x, B, C and the time steps: z gates the output; x, B and C go
through a short causal convolution. The heads of a group share B and C, and the values of a group
are normalised together. GGML wants one row per head of decay and skip connection, and one row per
group of the norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGUFValueType, Keys

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.description import MAX_HEADS, MAX_WIDTH, Floats, Transform
from reap2gguf.models.rules import TensorRule

if TYPE_CHECKING:
    from reap2gguf.checkpoint.config import ConfigReader
    from reap2gguf.models.gguf_keys import GgufKeys
    from reap2gguf.models.shared import Entry

_UINT32 = GGUFValueType.UINT32
_HEAD_COUNT, _GROUP_COUNT = "mamba_num_heads", "n_groups"
MAMBA_KEYS = (
    _HEAD_COUNT,
    "mamba_head_dim",
    "ssm_state_size",
    _GROUP_COUNT,
    "conv_kernel",
)
_FLOAT32_BYTES = 4
# Values of float32 that a position takes at most in transformers' own code: for each head and each
# position of its chunk, for each head and value of a state, and of x, B and C. Measured with the
# sizes of Nano and Super: 0.40 and 0.79 MB, of which these make 0.43 and 0.82.
_PER_SCORE, _PER_STATE, _PER_MIXED = 5, 5, 4

MAMBA2 = (
    TensorRule("mixer.in_proj.weight", "ssm_in.weight", "projected H"),
    TensorRule(
        "mixer.conv1d.weight",
        "ssm_conv1d.weight",
        "mixed 1 kernel",
        gguf_shape="mixed kernel",
        always_f32=True,
    ),
    TensorRule("mixer.conv1d.bias", "ssm_conv1d.bias", "mixed"),
    TensorRule("mixer.dt_bias", "ssm_dt.bias", "heads"),
    TensorRule("mixer.A_log", "ssm_a", "heads", gguf_shape="heads 1"),
    TensorRule("mixer.D", "ssm_d", "heads", gguf_shape="heads 1"),
    TensorRule("mixer.norm.weight", "ssm_norm.weight", "inner", gguf_shape="groups share"),
    TensorRule("mixer.out_proj.weight", "ssm_out.weight", "H inner"),
)


@dataclass(frozen=True)
class Mamba2:
    """The sizes of one model's recurrence."""

    n_heads: int
    head_dim: int
    state: int  # values of a state, for each value of a head
    n_groups: int
    kernel: int  # tokens that the convolution reaches over, its own included

    @property
    def inner(self) -> int:
        """The width of x and z."""
        return self.n_heads * self.head_dim

    @property
    def mixed(self) -> int:
        """The width of x, B and C together, which are convolved."""
        return self.inner + 2 * self.n_groups * self.state

    def sizes(self) -> dict[str, int]:
        """The sizes that the rules name."""
        return {
            "projected": self.inner + self.mixed + self.n_heads,
            "mixed": self.mixed,
            "kernel": self.kernel,
            "heads": self.n_heads,
            "inner": self.inner,
            "groups": self.n_groups,
            "share": self.inner // self.n_groups,
        }

    def config(self) -> dict[str, int]:
        """The sizes under transformers' names of them."""
        found = (self.n_heads, self.head_dim, self.state, self.n_groups, self.kernel)
        return dict(zip(MAMBA_KEYS, found, strict=True))

    def entries(self) -> list[Entry]:
        """The keys of a header."""
        ssm = Keys.SSM
        return [
            (ssm.CONV_KERNEL, self.kernel, _UINT32),
            (ssm.STATE_SIZE, self.state, _UINT32),
            (ssm.GROUP_COUNT, self.n_groups, _UINT32),
            (ssm.INNER_SIZE, self.inner, _UINT32),
            (ssm.TIME_STEP_RANK, self.n_heads, _UINT32),
        ]

    def transforms(self) -> dict[str, Transform]:
        """What becomes of the tensors of a layer, by GGUF's names below `blk.N.`."""
        groups = (self.n_groups, -1)
        return {
            "ssm_conv1d.weight": Transform(lambda values: np.squeeze(values, 1), _put_back),
            "ssm_a": Transform(_decay_rate, _put_back_decay_rate),
            "ssm_d": Transform(lambda values: values.reshape(-1, 1), _put_back),
            "ssm_norm.weight": Transform(lambda values: values.reshape(groups), _put_back),
        }

    def position_bytes(self, chunk: int) -> int:
        """Memory of a position in transformers' own code, which computes chunks in float32."""
        values = self.n_heads * (_PER_SCORE * chunk + _PER_STATE * self.state)
        return _FLOAT32_BYTES * (values + _PER_MIXED * self.mixed)


def _put_back(values: Floats, stored: Floats) -> None:
    stored[...] = values.reshape(stored.shape)


def _decay_rate(values: Floats) -> Floats:
    import torch  # its exponential is the one llama.cpp's converter takes

    rate: Floats = -torch.exp(torch.from_numpy(values)).numpy().reshape(-1, 1)
    return rate


def _put_back_decay_rate(values: Floats, stored: Floats) -> None:
    _put_back(np.log(-values.astype(np.float64)).astype(np.float32), stored)


def read_mamba2(read: ConfigReader, defaults: Mapping[str, int]) -> Mamba2:
    """The sizes that a config states; `defaults` are transformers' values of absent keys.

    Raises UnsupportedModelError for heads that groups cannot share.
    """
    limits = (MAX_HEADS, MAX_WIDTH, MAX_WIDTH, MAX_HEADS, MAX_WIDTH)
    heads, head_dim, state, groups, kernel = (
        read.integer(key, low=1 + (key == "conv_kernel"), high=high, default=defaults[key])
        for key, high in zip(MAMBA_KEYS, limits, strict=True)
    )
    if heads % groups:
        raise UnsupportedModelError(
            f"{read.where}: {_HEAD_COUNT} is {heads}, expected a multiple of {_GROUP_COUNT}, "
            f"{groups}"
        )
    return Mamba2(heads, head_dim, state, groups, kernel)


def mamba2_config(keys: GgufKeys) -> dict[str, Any]:
    """The sizes in a header, under transformers' names of them."""
    ssm = Keys.SSM
    heads = keys.integer(ssm.TIME_STEP_RANK, 1, MAX_HEADS)
    inner = keys.integer(ssm.INNER_SIZE, 1, MAX_WIDTH)
    if inner % heads:
        raise UnsupportedModelError(
            f"{keys.where}: {keys.arch}.ssm.inner_size is {inner}, expected a multiple of "
            f"{keys.arch}.ssm.time_step_rank, {heads}"
        )
    state = keys.integer(ssm.STATE_SIZE, 1, MAX_WIDTH)
    groups = keys.integer(ssm.GROUP_COUNT, 1, MAX_HEADS)
    kernel = keys.integer(ssm.CONV_KERNEL, 2, MAX_WIDTH)
    return Mamba2(heads, inner // heads, state, groups, kernel).config()
