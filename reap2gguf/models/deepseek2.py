"""Families that are `deepseek2` to llama.cpp.

* `deepseek_v2`: DeepSeek-V2-Lite, whose router is a softmax
* `deepseek_v3`: DeepSeek-V3 and R1, Moonlight, Kimi-K2; sigmoids, and groups of experts in V3
* `glm4_moe_lite`: GLM-4.7-Flash; sigmoids, one group

They have latent attention, dense layers first, experts that all tokens share, and a router whose
scores may be sigmoids with a bias for the choice. Stored names follow transformers; experts are one
tensor each, as published, or one tensor per layer. The MTP block is one more decoder layer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from gguf import Keys

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.description import MAX_WIDTH, GgufTensor, HeadMatrices
from reap2gguf.models.facts import FACT_KEYS, read_epsilon
from reap2gguf.models.from_gguf import EMBEDDING, headless_config, trunk_layers
from reap2gguf.models.kimi_k2 import MODEL_TYPE as KIMI_K2
from reap2gguf.models.kimi_k2 import UNREAD, kimi_k2_caveats, unread_in_gguf
from reap2gguf.models.layer_types import (
    MLP_TYPES,
    dense_first,
    moe_layers_after_dense,
    moe_layers_counted,
)
from reap2gguf.models.mla import (
    HEAD_KEYS,
    KV_B,
    LATENT_EPSILON,
    MOST_EPSILON,
    LatentRope,
    heads_from_gguf,
    read_heads,
    read_latent_rope,
    rope_from_gguf,
    without_whole,
)
from reap2gguf.models.nextn import NextnDecoder
from reap2gguf.models.rope import NOTHING, check_rotary_width
from reap2gguf.models.rules import (
    ATTN_NORM,
    DENSE_FFN,
    FFN_NORM,
    ROUTER,
    SCORE_BIAS,
    SHARED_EXPERTS,
    TensorRule,
)
from reap2gguf.models.scored_router import (
    NOT_NORMALISED,
    Scores,
    read_groups,
    read_n_shared,
    read_scale,
    router_config,
    router_entries,
)
from reap2gguf.models.shared import UINT32, Entry

if TYPE_CHECKING:
    from reap2gguf.checkpoint.config import ConfigReader
    from reap2gguf.checkpoint.safetensors_header import StoredTensor
    from reap2gguf.models.description import ModelFacts
    from reap2gguf.models.gguf_keys import GgufKeys

_LITE_LAYERS = (26, 27)  # llama.cpp takes these for models without low-rank queries
_LITE_VOCABULARY = {48: 128_256}  # and these layers with this vocabulary
# of a file that does not say how scores are made, these are llama.cpp's GLM-4.7-Flash
_FLASH_LAYERS, _FLASH_VOCABULARY = (47, 48), 154_880
_DENSE_KEY = "first_k_dense_replace"
_GROUP_KEYS = ("n_group", "topk_group")


class Deepseek2(NextnDecoder):
    """A model that llama.cpp computes as `deepseek2`."""

    gguf_arch: ClassVar[str] = "deepseek2"
    scores: ClassVar[Scores] = Scores.SIGMOID
    normalises: ClassVar[bool] = True  # what an absent `norm_topk_prob` means
    topk_method: ClassVar[str] = "noaux_tc"
    other_types: ClassVar[tuple[str, ...]] = ()  # what `model_type` may be besides
    unread: ClassVar[Mapping[str, float]] = NOTHING  # settings of YaRN that llama.cpp does not read
    fact_keys: ClassVar[tuple[str, ...]] = (
        *FACT_KEYS,
        *HEAD_KEYS,
        "intermediate_size",
        "n_shared_experts",
        "routed_scaling_factor",
    )

    # the config

    def read_facts(self) -> ModelFacts:
        self._refuse()
        self.heads = read_heads(self.text)
        moe = self.trunk_moe_layers()
        facts = self.facts_with_block(moe)
        self.n_dense = facts.n_layers - len(moe)
        if moe != tuple(range(self.n_dense, facts.n_layers)):
            raise UnsupportedModelError(
                f"{self.text.where}: layer {min(moe)} has experts and a later one has none, "
                f"expected dense layers first: llama.cpp's {self.gguf_arch} has no others"
            )
        check_rotary_width(self.rope, self.heads.rotated, self.heads.rotated)
        groups, chosen = self.read_groups(facts.n_experts)
        head_dim = self.heads.query
        return replace(
            facts, n_kv_heads=1, head_dim=head_dim, n_groups=groups, groups_per_token=chosen
        )

    @abstractmethod
    def trunk_moe_layers(self) -> tuple[int, ...]:
        """The layers of the trunk that have experts."""

    def counted_layers(self, n_dense: int) -> tuple[int, ...]:
        """Those after the dense ones that the config counts; `n_dense` is transformers' default."""
        self.text.expect(MLP_TYPES, why=f"transformers reads {_DENSE_KEY} instead")
        return moe_layers_counted(self.text, _DENSE_KEY, n_dense)

    def read_groups(self, n_experts: int) -> tuple[int, int]:
        """How many groups of experts the router has, and how many of them it chooses."""
        return read_groups(self.text, n_experts)

    def refuse_routing(self) -> None:
        """Refuse, by name, values of the router's keys that are not implemented."""
        read, name = self.text, self.scores.name.lower()
        read.expect("scoring_func", name, why=f"transformers' {self.model_type} computes no other")
        # of DeepSeek-V2's group_limited_greedy, the best expert scores a group; here, the best two
        why = f"llama.cpp's {self.gguf_arch} chooses these models' experts in no other way"
        read.expect("topk_method", self.topk_method, why=why)

    def _refuse(self) -> None:
        """Refuse, by name, what llama.cpp's deepseek2 or this program does not do."""
        read, arch = self.text, f"llama.cpp's {self.gguf_arch}"
        types = (self.model_type, *self.other_types)
        if (found := self.config.get("model_type")) not in types:
            raise UnsupportedModelError(
                f"{read.where}: model_type is {shown(found)}, expected "
                f"{' or '.join(map(repr, types))}: transformers chooses the architecture by it"
            )
        self.refuse_common()
        read.expect("rope_interleave", True, why=f"{arch} rotates neighbours")
        read.expect("moe_layer_freq", 1, why="all layers after the dense ones have experts")
        if read_n_shared(read) < 1:
            raise UnsupportedModelError(
                f"{read.where}: n_shared_experts is 0 or missing, expected at least 1: {arch} has "
                "such experts in every layer with experts"
            )
        if (found := read_epsilon(read, *self.epsilon)) > MOST_EPSILON:
            raise UnsupportedModelError(
                f"{read.where}: rms_norm_eps is {found:g}, expected at most {MOST_EPSILON:g}: "
                f"{arch} norms latents with it, and transformers with {LATENT_EPSILON:g}"
            )
        self.refuse_routing()

    @cached_property
    def rope(self) -> LatentRope:
        return read_latent_rope(self.text, f"llama.cpp's {self.gguf_arch}", self.unread)

    def config_values(self) -> dict[str, Any]:
        read = self.text
        return {
            **super().config_values(),
            **self.heads.config_values(),
            "intermediate_size": self.dense_width(),
            "n_shared_experts": read_n_shared(read),
            "routed_scaling_factor": read_scale(read),
            "norm_topk_prob": read.boolean("norm_topk_prob", default=self.normalises),
        }

    def dense_width(self) -> int:
        return self.text.integer("intermediate_size", low=1, high=MAX_WIDTH)

    def sizes(self) -> Mapping[str, int]:
        shared = read_n_shared(self.text) * self.facts.expert_width
        return {
            **super().sizes(),
            **self.heads.sizes(),
            "I": self.dense_width(),
            "S": shared,
        }

    def caveats(self) -> tuple[str, ...]:
        if not (self._is_lite and self.heads.query_rank):
            return super().caveats()
        caveat = (
            f"llama.cpp takes a {self.gguf_arch} of {self.facts.n_layers} layers for one without "
            "q_lora_rank: the GGUF files of this one are written, but llama.cpp cannot load them"
        )
        return (*super().caveats(), caveat)

    @property
    def _is_lite(self) -> bool:
        """Whether llama.cpp takes it for a model whose queries are one product."""
        layers, vocabulary = self.facts.n_layers, self.facts.vocab_size
        return layers in _LITE_LAYERS or _LITE_VOCABULARY.get(layers) == vocabulary

    # the header

    def header(self) -> list[Entry]:
        llm, facts = Keys.LLM, self.facts
        # without the key, llama.cpp loads models of those numbers of layers alone; its converter
        # leaves it out
        query_rank = self.heads.query_rank or (None if self._is_lite else 0)
        sizes = self.heads.entries(query_rank)
        sizes.append((llm.BLOCK_COUNT, self.n_gguf_blocks, UINT32))
        replaced = {key for key, _, _ in sizes}
        one_group = [(llm.EXPERT_GROUP_COUNT, 1, UINT32), (llm.EXPERT_GROUP_USED_COUNT, 1, UINT32)]
        return [
            *(entry for entry in super().header() if entry[0] not in replaced),
            *(one_group if facts.n_groups == 1 else ()),
            *router_entries(self.text, self.n_dense, self.scores, self.normalises),
            (llm.VOCAB_SIZE, facts.vocab_size, UINT32),
            *sizes,
        ]

    @classmethod
    def is_in_gguf(cls, keys: GgufKeys) -> bool:
        return _scores_in_gguf(keys) == cls.scores

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        unread = unread_in_gguf(keys) if cls.unread else NOTHING
        config = headless_config(keys, cls.scores, unread=unread)
        return {
            "model_type": cls.model_type,
            **{key: value for key, value in config.items() if key != "num_experts"},
            "n_routed_experts": config["num_experts"],
            _DENSE_KEY: keys.integer(
                Keys.LLM.LEADING_DENSE_BLOCK_COUNT, 0, config["num_hidden_layers"], default=0
            ),
            "intermediate_size": keys.integer(Keys.LLM.FEED_FORWARD_LENGTH, 1, MAX_WIDTH),
            "num_key_value_heads": config["num_attention_heads"],
            **heads_from_gguf(keys),
            **router_config(keys),
            "rope_parameters": rope_from_gguf(keys, config["rope_parameters"]),
        }

    # the tensors

    def rules(self, layer: int) -> tuple[TensorRule, ...]:
        bias = (SCORE_BIAS,) if self.scores is Scores.SIGMOID else ()
        ffn = (ROUTER, *bias, *SHARED_EXPERTS) if layer in self.sparse_layers else DENSE_FFN
        return (ATTN_NORM, *self.heads.rules, FFN_NORM, *ffn)

    def made_of(
        self, stored: Mapping[str, StoredTensor], name: str, rule: TensorRule, prefix: str
    ) -> tuple[GgufTensor, ...]:
        if rule.gguf != KV_B.gguf:
            return super().made_of(stored, name, rule, prefix)
        return self.heads.split(stored, name, prefix)

    def matrices(self, layer: int) -> Mapping[str, tuple[str, ...]]:
        return without_whole(super().matrices(layer))

    def head_matrices(self, layer: int) -> HeadMatrices:
        return self.heads.matrices(layer, "layer." if layer == self.facts.mtp_layer else "")


def _scores_in_gguf(keys: GgufKeys) -> int:
    """What the router of a file makes of its logits; without a key, what llama.cpp takes."""
    key = Keys.LLM.EXPERT_GATING_FUNC
    if keys.has(key):
        return keys.integer(key, 0, 2**10)
    n_layers, _ = trunk_layers(keys)
    is_flash = n_layers in _FLASH_LAYERS and keys.rows(EMBEDDING) == _FLASH_VOCABULARY
    return Scores.SIGMOID if is_flash else Scores.SOFTMAX


def _is_glm(keys: GgufKeys) -> bool:
    """Whether a file with sigmoids is of GLM: its tokenizer's, or with an MTP block."""
    has_block = bool(keys.blocks_with("nextn.enorm.weight"))
    return has_block or keys.text(Keys.Tokenizer.PRE, "") == "glm4"


class DeepseekV2(Deepseek2):
    """One DeepSeek-V2-Lite."""

    model_type: ClassVar[str] = "deepseek_v2"
    count_keys = ("n_routed_experts", "num_experts")
    scores = Scores.SOFTMAX
    normalises = False
    topk_method = "greedy"
    mtp = None
    fact_keys = (*Deepseek2.fact_keys, _DENSE_KEY, "topk_method")

    def refuse_routing(self) -> None:
        super().refuse_routing()
        why = "transformers' deepseek_v2 does not normalise the chosen experts' weights"
        self.text.expect("norm_topk_prob", False, why=why)
        self.text.expect("mlp_bias", False, why="llama.cpp's deepseek2 has no biases there")

    def read_groups(self, n_experts: int) -> tuple[int, int]:
        return 1, 1  # greedy: the config's have no effect

    def trunk_moe_layers(self) -> tuple[int, ...]:
        return self.counted_layers(0)

    def config_values(self) -> dict[str, Any]:
        return {**super().config_values(), _DENSE_KEY: self.n_dense}

    def caveats(self) -> tuple[str, ...]:
        return (*super().caveats(), NOT_NORMALISED)

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        why = "groups of a softmax are not implemented"
        keys.expect(Keys.LLM.EXPERT_GROUP_COUNT, 0, 1, why=why)
        return {"architectures": ["DeepseekV2ForCausalLM"], **super().config_from_gguf(keys)}


class DeepseekV3(Deepseek2):
    """One DeepSeek-V3, DeepSeek-R1, Moonlight or Kimi-K2."""

    model_type: ClassVar[str] = "deepseek_v3"
    other_types = (KIMI_K2,)
    unread = UNREAD
    mtp_in_gguf = False  # as in files of llama.cpp's converter
    count_keys = ("n_routed_experts", "num_local_experts")
    fact_keys = (
        *Deepseek2.fact_keys,
        *_GROUP_KEYS,
        _DENSE_KEY,
        "norm_topk_prob",
        "rope_interleave",
        "num_mtp_layers",
    )
    # transformers' value of an absent key
    defaults: ClassVar[Mapping[str, int]] = {"num_key_value_heads": 128}

    def trunk_moe_layers(self) -> tuple[int, ...]:
        return self.counted_layers(3)

    def config_values(self) -> dict[str, Any]:
        return {**super().config_values(), **_groups(self.text), _DENSE_KEY: self.n_dense}

    def pruned_config(self, n_experts: int) -> dict[str, Any]:
        return {**super().pruned_config(n_experts), "model_type": self.model_type}

    def caveats(self) -> tuple[str, ...]:
        found = [*super().caveats()]
        if self.facts.has_mtp:
            found.append(
                "the MTP block is pruned in the safetensors; the GGUF files do not have it, like "
                "those of llama.cpp's converter"
            )
        return (*found, *kimi_k2_caveats(self.config, self.rope))

    @classmethod
    def is_in_gguf(cls, keys: GgufKeys) -> bool:
        return super().is_in_gguf(keys) and not _is_glm(keys)

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        return {"architectures": ["DeepseekV3ForCausalLM"], **super().config_from_gguf(keys)}


def _groups(read: ConfigReader) -> dict[str, int]:
    """What the config says of groups; llama.cpp's values of absent keys."""
    return {key: read.integer(key, default=1) for key in _GROUP_KEYS}


class Glm4MoeLite(Deepseek2):
    """One GLM-4.7-Flash."""

    model_type: ClassVar[str] = "glm4_moe_lite"
    count_keys = ("n_routed_experts", "num_local_experts")
    epsilon = ("rms_norm_eps", 1e-5)
    fact_keys = (*Deepseek2.fact_keys, *_GROUP_KEYS, "norm_topk_prob")
    # transformers' value of an absent key
    defaults: ClassVar[Mapping[str, int]] = {"num_key_value_heads": 20}

    def trunk_moe_layers(self) -> tuple[int, ...]:
        """All after the dense ones.

        Published configs count those; transformers reads a type for each layer, and takes one dense
        layer where there is none.
        """
        read, found = self.text, self.text.values
        if found.get(MLP_TYPES) is None and found.get(_DENSE_KEY) is None:
            read = read.with_values({**found, _DENSE_KEY: 1})
        moe = moe_layers_after_dense(read, _DENSE_KEY)
        if moe and found.get(MLP_TYPES) is not None:
            what = f"the number of dense layers in {MLP_TYPES}"
            read.refuse_difference(what, moe[0], _DENSE_KEY, found.get(_DENSE_KEY))
        return moe

    def config_values(self) -> dict[str, Any]:
        types = dense_first(self.n_dense, self.facts.n_layers)
        return {**super().config_values(), **_groups(self.text), MLP_TYPES: types}

    @classmethod
    def is_in_gguf(cls, keys: GgufKeys) -> bool:
        return super().is_in_gguf(keys) and _is_glm(keys)

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        config = super().config_from_gguf(keys)
        types = dense_first(config.pop(_DENSE_KEY), config["num_hidden_layers"])
        return {"architectures": ["Glm4MoeLiteForCausalLM"], **config, MLP_TYPES: types}
