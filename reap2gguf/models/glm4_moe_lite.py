"""GLM-4.7-Flash (`glm4_moe_lite`): latent attention, GLM's router, and an MTP block.

Stored names follow transformers' `glm4_moe_lite`; the MTP block is one more decoder layer. GGUF
names, types and keys are those of llama.cpp's `deepseek2`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from gguf import Keys

from reap2gguf.models.description import MAX_LAYERS
from reap2gguf.models.layer_types import moe_layers_after_dense
from reap2gguf.models.mla import MlaModel

if TYPE_CHECKING:
    from reap2gguf.models.gguf_keys import GgufKeys

_DENSE_KEY = "first_k_dense_replace"
_DENSE, _SPARSE = "dense", "sparse"


class Glm4MoeLite(MlaModel):
    """One GLM-4.7-Flash."""

    model_type: ClassVar[str] = "glm4_moe_lite"
    # transformers' values of absent keys
    defaults: ClassVar[Mapping[str, int]] = {"num_key_value_heads": 20}

    def trunk_moe_layers(self) -> tuple[int, ...]:
        read = self.text
        read.expect("topk_method", "noaux_tc", why="a bias of its own balances the experts")
        moe = moe_layers_after_dense(read, _DENSE_KEY)
        n_dense = read.values.get(_DENSE_KEY)
        read.refuse_difference(
            "mlp_layer_types", min(moe, default=0), _DENSE_KEY, n_dense
        )
        return moe
