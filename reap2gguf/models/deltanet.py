"""How llama.cpp stores a Gated DeltaNet: value heads tiled, decay as -exp, convolution squeezed.

A DeltaNet may have more value heads than key heads. Checkpoints keep the value heads that share a
key head together: [k0v0 k0v1 k1v0 k1v1]. GGML repeats key heads as a whole, [k0 k1 k0 k1], so its
value heads are stored as [k0v0 k1v0 k0v1 k1v1].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


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

    def heads(self, values: Floats) -> Floats:
        """One row or value per head: alpha, beta, the time step's bias."""
        return values[self.value_order(1)]

    def gates(self, values: Floats) -> Floats:
        """Rows of `value_dim` per head: the output gate."""
        return values[self.value_order(self.value_dim)]

    def mixed(self, values: Floats) -> Floats:
        """Rows of queries, then keys, then values; only the values are reordered."""
        keys = 2 * self.key_width
        return np.concatenate((values[:keys], self.gates(values[keys:])))

    def convolution(self, values: Floats) -> Floats:
        """The same rows of a convolution (rows, 1, kernel), without the axis of one."""
        return self.mixed(values.reshape(values.shape[0], -1))

    def outputs(self, values: Floats) -> Floats:
        """Columns of `value_dim` per head: the projection after the attention."""
        return np.ascontiguousarray(values[:, self.value_order(self.value_dim)])

    def decay(self, values: Floats) -> Floats:
        """The logarithm of the decay, stored, as the decay rate that GGML multiplies with."""
        import torch  # its exponential is the one llama.cpp's converter takes

        rate: Floats = -torch.exp(torch.from_numpy(self.heads(values))).numpy()
        return rate
