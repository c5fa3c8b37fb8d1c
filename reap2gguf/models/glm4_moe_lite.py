"""GLM-4.7-Flash (`glm4_moe_lite`): latent attention, GLM's router, and an MTP block.

Stored names follow transformers' `glm4_moe_lite`, experts are one tensor each; the MTP block is one
more decoder layer. GGUF names, types and keys are those of llama.cpp's `deepseek2`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from gguf import Keys

from reap2gguf.models.description import MAX_LAYERS
from reap2gguf.models.layer_types import moe_layers_after_dense
from reap2gguf.models.mla import MlaModel
from reap2gguf.models.scored_router import Scores

if TYPE_CHECKING:
    from reap2gguf.models.gguf_keys import GgufKeys

_TYPES_KEY, _DENSE_KEY = "mlp_layer_types", "first_k_dense_replace"
_DENSE, _SPARSE = "dense", "sparse"


class Glm4MoeLite(MlaModel):
    """One GLM-4.7-Flash."""

    model_type: ClassVar[str] = "glm4_moe_lite"
    count_keys = ("n_routed_experts", "num_local_experts")
    fact_keys = (*MlaModel.fact_keys, "n_group", "topk_group", "norm_topk_prob")
    # transformers' value of an absent key
    defaults: ClassVar[Mapping[str, int]] = {"num_key_value_heads": 20}

    def refuse_routing(self) -> None:
        super().refuse_routing()
        self.text.expect("topk_method", "noaux_tc", why="a bias alone balances the experts")

    def trunk_moe_layers(self) -> tuple[int, ...]:
        """All after the dense ones.

        Published configs count those; transformers reads a type for each layer, and takes one dense
        layer where there is none.
        """
        read = self.text
        found = read.values
        if found.get(_TYPES_KEY) is None and found.get(_DENSE_KEY) is None:
            read = read.with_values({**found, _DENSE_KEY: 1})
        moe = moe_layers_after_dense(read, _DENSE_KEY)
        if moe and found.get(_TYPES_KEY) is not None:
            what = f"the number of dense layers in {_TYPES_KEY}"
            read.refuse_difference(what, moe[0], _DENSE_KEY, found.get(_DENSE_KEY))
        return moe

    def config_values(self) -> dict[str, Any]:
        sparse = self.facts.n_layers - self.n_dense
        types = [_DENSE] * self.n_dense + [_SPARSE] * sparse
        return {**super().config_values(), _TYPES_KEY: types}

    @classmethod
    def is_in_gguf(cls, keys: GgufKeys) -> bool:
        return cls.scores_in_gguf(keys) is Scores.SIGMOID

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        config = super().config_from_gguf(keys)
        n_layers = config["num_hidden_layers"]
        n_dense = keys.integer(Keys.LLM.LEADING_DENSE_BLOCK_COUNT, 0, MAX_LAYERS, default=0)
        n_dense = min(n_dense, n_layers)
        types = [_DENSE] * n_dense + [_SPARSE] * (n_layers - n_dense)
        return {"architectures": ["Glm4MoeLiteForCausalLM"], **config, _TYPES_KEY: types}
