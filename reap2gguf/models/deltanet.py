"""How llama.cpp stores a Gated DeltaNet: value heads tiled, decay as -exp, convolution squeezed.

A DeltaNet may have more value heads than key heads. Checkpoints keep the value heads that share a
key head together: [k0v0 k0v1 k1v0 k1v1]. GGML repeats key heads as a whole, [k0 k1 k0 k1], so its
value heads are stored as [k0v0 k1v0 k0v1 k1v1].

GGML's older graph, of Qwen3-Next, repeats each key head in its place, so value heads stay where
they are. There, one stored matrix has the rows of each key head together, [q0 k0 v0 z0 q1 k1 ...],
with the value heads of the key head and their gates z; GGUF has [q0 q1 ... k0 ... v0 ...] and [z0
z1 ...].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reap2gguf.models.description import Floats, Transform, picked


def _decay_rate(values: Floats) -> Floats:
    import torch  # its exponential is the one llama.cpp's converter takes

    rate: Floats = -torch.exp(torch.from_numpy(np.array(values))).numpy()
    return rate


def _put_back_decay_rate(values: Floats, stored: Floats) -> None:
    stored[...] = np.log(-values.astype(np.float64)).astype(np.float32).reshape(stored.shape)


# The logarithm of the decay, stored, as the decay rate that GGML multiplies with.
DECAY = Transform(_decay_rate, _put_back_decay_rate)


@dataclass(frozen=True)
class DeltaNet:
    """The heads of one model's linear attention."""

    n_key_heads: int
    n_value_heads: int
    key_dim: int  # of one head
    value_dim: int  # of one head

    @property
    def key_width(self) -> int:
        return self.n_key_heads * self.key_dim

    @property
    def value_width(self) -> int:
        return self.n_value_heads * self.value_dim

    def value_order(self, width: int) -> npt.NDArray[np.int64]:
        """For each place in GGUF, the stored place, of value heads `width` wide."""
        per_key = self.n_value_heads // self.n_key_heads
        places = np.arange(self.n_value_heads * width)
        return places.reshape(self.n_key_heads, per_key, width).swapaxes(0, 1).reshape(-1)

    def transforms(self) -> dict[str, Transform]:
        """What becomes of the tensors of a layer, by GGUF's names below `blk.N.`."""
        return {
            "attn_qkv.weight": self.mixed,
            "attn_gate.weight": self.gates,
            "ssm_alpha.weight": self.heads,
            "ssm_beta.weight": self.heads,
            "ssm_conv1d.weight": self.convolution,
            "ssm_a": self.decay,
            "ssm_dt.bias": self.heads,
            "ssm_out.weight": self.outputs,
        }

    @property
    def heads(self) -> Transform:
        """One row or value per head: alpha, beta, the time step's bias."""
        return picked(self.value_order(1))

    @property
    def gates(self) -> Transform:
        """Rows of `value_dim` per head: the output gate."""
        return picked(self.value_order(self.value_dim))

    @property
    def mixed(self) -> Transform:
        """Rows of queries, then keys, then values; only the values are reordered."""
        return picked(self._mixed_order)

    @property
    def _mixed_order(self) -> npt.NDArray[np.int64]:
        keys = 2 * self.key_width
        return np.concatenate((np.arange(keys), keys + self.value_order(self.value_dim)))

    @property
    def convolution(self) -> Transform:
        """The same rows of a convolution (rows, 1, kernel), without the axis of one."""
        rows = self.mixed

        def put_back(values: Floats, stored: Floats) -> None:
            rows.put_back(values, stored.reshape(values.shape))

        return Transform(lambda values: rows(values.reshape(len(values), -1)), put_back)

    @property
    def outputs(self) -> Transform:
        """Columns of `value_dim` per head: the projection after the attention."""
        return picked(self.value_order(self.value_dim), axis=1)

    @property
    def decay(self) -> Transform:
        """The logarithm of the decay, stored, as the decay rate that GGML multiplies with."""
        return Transform(self._rate, self._put_back_rate)

    def _rate(self, values: Floats) -> Floats:
        return DECAY(self.heads(values))

    def _put_back_rate(self, values: Floats, stored: Floats) -> None:
        logarithms = np.empty_like(values)
        DECAY.put_back(values, logarithms)
        self.heads.put_back(logarithms, stored)


@dataclass(frozen=True)
class PackedDeltaNet(DeltaNet):
    """Value heads that stay in their order, and one matrix of queries, keys, values and gates."""

    def value_order(self, width: int) -> npt.NDArray[np.int64]:
        return np.arange(self.n_value_heads * width)

    def transforms(self) -> dict[str, Transform]:
        return {
            "attn_qkv.weight": self.packed_mixed,
            "attn_gate.weight": self.packed_gates,
            "ssm_conv1d.weight": self.convolution,
            "ssm_a": self.decay,
        }

    @property
    def packed_mixed(self) -> Transform:
        """The rows of queries, then keys, then values, out of the packed matrix."""
        return picked(np.concatenate(self._packed_rows()[:3]))

    @property
    def packed_gates(self) -> Transform:
        """The rows of the output gate, out of the packed matrix."""
        return picked(self._packed_rows()[3])

    def _packed_rows(self) -> list[npt.NDArray[np.int64]]:
        """Where the rows of queries, keys, values and gates are in the packed matrix."""
        per_key = self.n_value_heads // self.n_key_heads * self.value_dim
        ends = np.cumsum((self.key_dim, self.key_dim, per_key, per_key))
        rows = np.arange(self.n_key_heads * ends[-1]).reshape(self.n_key_heads, -1)
        return [part.reshape(-1) for part in np.split(rows, ends[:-1], axis=1)]
