"""MiniMax-M2, M2.1, M2.5 and M2.7.

Checkpoints have Mixtral's names (`block_sparse_moe`, w1, w2, w3), which transformers renames as it
loads them; GGUF names, types and keys are those of llama.cpp's `minimax-m2`. Every layer has
experts. Norms are of whole queries and keys, and the first dimensions of a head are rotated. A
router adds a bias to the sigmoids of its logits for the choice of experts. Modules for
multi-token prediction are named by the published configs and stored in no published checkpoint;
neither transformers nor llama.cpp computes them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from gguf import Keys

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.description import MAX_LAYERS, Dropped
from reap2gguf.models.experts import ExpertLayout
from reap2gguf.models.facts import WIDTH_KEY, read_n_layers
from reap2gguf.models.from_gguf import common_config
from reap2gguf.models.full_attention import UNIFORM_FACT_KEYS, refuse_other_types, refuse_tied
from reap2gguf.models.linear_from_gguf import rotated_share
from reap2gguf.models.rope import Rope, check_rotary_width, read_rope
from reap2gguf.models.rules import (
    ATTENTION,
    ATTN_NORM,
    FFN_NORM,
    QK_NORMS,
    ROUTER,
    SCORE_BIAS,
    TensorRule,
)
from reap2gguf.models.scored_router import Scores
from reap2gguf.models.shared import UINT32, DecoderModel, Entry

if TYPE_CHECKING:
    from collections.abc import Mapping

    from reap2gguf.models.description import ModelFacts, Role
    from reap2gguf.models.gguf_keys import GgufKeys

_MOE = "block_sparse_moe."
_NORMS = (replace(QK_NORMS[0], shape="Q"), replace(QK_NORMS[1], shape="KV"))
_ROUTER = (
    replace(ROUTER, stored=f"{_MOE}gate.weight", parameter="mlp.gate.weight"),
    # In bfloat16 it would choose other experts; transformers' module has the model's type.
    replace(
        SCORE_BIAS,
        stored=f"{_MOE}e_score_correction_bias",
        parameter="mlp.e_score_correction_bias",
        computed_in_f32=True,
    ),
)
_ROTARY_KEY, _SHARE_KEY = "rotary_dim", "partial_rotary_factor"
_MODULES_KEY, _USES_MODULES_KEY = "num_mtp_modules", "use_mtp"
# what MiniMax's own code reads: a key, the only value computed here, and what another one means
_FIXED: tuple[tuple[str, Any, str], ...] = (
    ("scoring_func", "sigmoid", "the router's scores are sigmoids"),
    ("use_routing_bias", True, "a bias is added to every router's scores"),
    ("norm_topk_prob", True, "the chosen experts' weights are normalised"),
    ("routed_scaling_factor", 1, "the chosen experts' weights are not scaled"),
    ("n_group", 1, "there are no groups of experts"),
    ("topk_group", 1, "there are no groups of experts"),
    ("use_qk_norm", True, "queries and keys have norms"),
    ("qk_norm_type", "per_layer", "a norm is of all queries of a token, or of all its keys"),
    ("shared_intermediate_size", 0, "there is no shared expert"),
    ("layernorm_full_attention_beta", 1, "what a layer adds is not scaled"),
    ("layernorm_linear_attention_beta", 1, "what a layer adds is not scaled"),
    ("layernorm_mlp_beta", 1, "what a layer adds is not scaled"),
    ("postnorm", False, "norms are before attention and experts"),
)
_LEFT_OUT = (
    "the checkpoint's modules for multi-token prediction are left out: neither transformers nor "
    "llama.cpp computes them in this architecture, so their experts cannot be observed"
)
_NOT_THERE = (
    "the config names modules for multi-token prediction that the checkpoint does not contain; the "
    "config that is written names none"
)


class MiniMaxM2(DecoderModel):
    """One MiniMax-M2 model."""

    model_type: ClassVar[str] = "minimax_m2"
    gguf_arch: ClassVar[str] = "minimax-m2"
    experts = ExpertLayout(path=f"{_MOE}experts", gate="w1", up="w3", down="w2")
    count_keys = ("num_local_experts", "num_experts")
    width_key = "intermediate_size"
    fact_keys = (*UNIFORM_FACT_KEYS, _SHARE_KEY)
    # transformers' values of absent keys, in MiniMaxM2Config
    defaults: ClassVar[Mapping[str, int]] = {"num_key_value_heads": 8, "head_dim": 128}
    default_theta = 5_000_000.0

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        config = common_config(keys, scores=Scores.SIGMOID)
        width, head_dim = config.pop(WIDTH_KEY), config["head_dim"]
        keys.expect(Keys.LLM.FEED_FORWARD_LENGTH, width, why="all layers are made of experts")
        share = rotated_share(keys, head_dim)
        return {
            "architectures": ["MiniMaxM2ForCausalLM"],
            "model_type": cls.model_type,
            "intermediate_size": width,
            "num_local_experts": config.pop("num_experts"),
            _ROTARY_KEY: int(head_dim * share),
            **config,
            "rope_parameters": config["rope_parameters"] | {_SHARE_KEY: share},
        }

    def read_facts(self) -> ModelFacts:
        read = self.text
        refuse_other_types(self)
        self.refuse_common()
        for key, value, why in _FIXED:
            read.expect(key, value, why=f"in llama.cpp's {self.gguf_arch}, {why}")
        n_layers = read_n_layers(read)
        why = f"llama.cpp's {self.gguf_arch} has full attention"
        read.expect("sliding_window", why=why)
        read.expect("layer_types", ["full_attention"] * n_layers, why=why)
        if set(read.integers("attn_type_list", 0, MAX_LAYERS)) - {1}:
            raise UnsupportedModelError(
                f"{read.where}: attn_type_list is {shown(read.values['attn_type_list'])}, expected "
                f"1 for each layer: {why}"
            )
        facts = self.common_facts(range(n_layers))
        refuse_tied(self, facts)
        check_rotary_width(self.rope, self._rotary_width(facts.head_dim), facts.head_dim)
        return facts

    @cached_property
    def rope(self) -> Rope:
        return read_rope(self.text, self._share_of_rotary_dim(), self.default_theta)

    def _share_of_rotary_dim(self) -> float | None:
        """The rotated share of a head that `rotary_dim` states, if it is there."""
        if self.text.values.get(_ROTARY_KEY) is None:
            return None
        head_dim = self.text.integer("head_dim", low=1, default=self.defaults["head_dim"])
        return self.text.integer(_ROTARY_KEY, low=1, high=head_dim) / head_dim

    def _rotary_width(self, head_dim: int) -> int:
        """The dimensions of a head that are rotated: the first ones."""
        share = self.rope.values.number(_SHARE_KEY, low=0, high=1, default=1.0)
        width = int(head_dim * share)
        if self.text.values.get(_ROTARY_KEY) not in (None, width):
            raise UnsupportedModelError(
                f"{self.text.where}: {_ROTARY_KEY} is {self.text.values[_ROTARY_KEY]}, but "
                f"{_SHARE_KEY} {share:g} of {head_dim} dimensions are {width}; both state the same "
                "fact, so correct one of them"
            )
        return width

    def rules(self, layer: int) -> tuple[TensorRule, ...]:
        return (ATTN_NORM, *ATTENTION, *_NORMS, FFN_NORM, *_ROUTER)

    def header(self) -> list[Entry]:
        return [
            *super().header(),
            # without it, llama.cpp stops at the first token
            (Keys.LLM.EXPERT_GATING_FUNC, int(Scores.SIGMOID), UINT32),
            (Keys.Rope.DIMENSION_COUNT, self._rotary_width(self.facts.head_dim), UINT32),
        ]

    # multi-token prediction

    @cached_property
    def _module_prefixes(self) -> tuple[str, ...]:
        """What the names of stored modules for multi-token prediction begin with.

        Each has something that a decoder layer has not: one that has nothing else is a layer that
        the config does not count, and no module.
        """
        count = self.text.integer(_MODULES_KEY, high=MAX_LAYERS, default=0)
        first, of_layer = read_n_layers(self.text), {rule.stored for rule in self.rules(0)}
        found = []
        for module in range(count):
            prefix = f"{self.text_prefix}layers.{first + module}."
            inside = (n.removeprefix(prefix) for n in self.names if n.startswith(prefix))
            if any(n not in of_layer and self.experts.role(0, n) is None for n in inside):
                found.append(prefix)
        return tuple(found)

    def _role(self, name: str) -> Role | None:
        return Dropped() if name.startswith(self._module_prefixes) else super()._role(name)

    def pruned_config(self, n_experts: int) -> dict[str, Any]:
        config = super().pruned_config(n_experts)
        there_are_none = {_USES_MODULES_KEY: False, _MODULES_KEY: 0}
        return config | {key: value for key, value in there_are_none.items() if key in config}

    def caveats(self) -> tuple[str, ...]:
        found = super().caveats()
        if self._module_prefixes:
            return (*found, _LEFT_OUT)
        if self.text.boolean(_USES_MODULES_KEY, default=False):
            return (*found, _NOT_THERE)
        return found
