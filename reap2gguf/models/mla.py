"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), as llama.cpp's `deepseek2` has it.

Keys and values of all heads are made of one latent vector per token, of size R, by `kv_b_proj`
(heads * (nope + v), R). llama.cpp computes with the latents themselves: what makes keys of them is
applied to the queries, what makes values of them to each head's weighted sum. So `kv_b_proj` is two
GGUF tensors: `attn_k_b` (heads, R, nope), transposed, and `attn_v_b` (heads, v, R). To llama.cpp
this is an attention with one head of keys and values, which is what the header says.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from gguf import GGUFValueType, Keys

from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.description import (
    MAX_HEADS,
    MAX_WIDTH,
    GgufTensor,
    HeadMatrices,
    Slab,
    missing,
)
from reap2gguf.models.facts import FACT_KEYS, read_epsilon
from reap2gguf.models.from_gguf import EMBEDDING, headless_config, trunk_layers
from reap2gguf.models.nextn import NextnDecoder
from reap2gguf.models.rope import Rope, check_rotary_width, read_rope
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
    Scores,
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

_ATTENTION = "self_attn"
_LATENTS = f"{_ATTENTION}.kv_a_proj_with_mqa"
# `attn_kv_b` is the name in old files; it is split here
_KV_B = TensorRule(f"{_ATTENTION}.kv_b_proj.weight", "attn_kv_b.weight", "KVB R")
_QUERIES = TensorRule(f"{_ATTENTION}.q_proj.weight", "attn_q.weight", "Q H", input_of=_LATENTS)
_LOW_RANK_QUERIES = (
    TensorRule(f"{_ATTENTION}.q_a_proj.weight", "attn_q_a.weight", "QR H", input_of=_LATENTS),
    TensorRule(f"{_ATTENTION}.q_a_layernorm.weight", "attn_q_a_norm.weight", "QR"),
    TensorRule(f"{_ATTENTION}.q_b_proj.weight", "attn_q_b.weight", "Q QR"),
)
_KEYS_AND_VALUES = (
    TensorRule(f"{_LATENTS}.weight", "attn_kv_a_mqa.weight", "KVA H"),
    TensorRule(f"{_ATTENTION}.kv_a_layernorm.weight", "attn_kv_a_norm.weight", "R"),
    _KV_B,
    TensorRule(f"{_ATTENTION}.o_proj.weight", "attn_output.weight", "H O"),
)
_HEAD_KEYS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
# Normed latents: transformers has this epsilon in its code, llama.cpp the config's of all norms.
_LATENT_EPSILON = 1e-6
_MOST_EPSILON = 1e-5  # of published models, where the difference is not seen
_LITE_LAYERS = (26, 27)  # llama.cpp takes these for models without low-rank queries
_LITE_VOCABULARY = {48: 128_256}  # and these layers with this vocabulary
# of a file that does not say how scores are made, these are llama.cpp's GLM-4.7-Flash
_FLASH_LAYERS, _FLASH_VOCABULARY = (47, 48), 154_880


@dataclass(frozen=True)
class LatentHeads:
    """The sizes of a latent attention."""

    n_heads: int
    nope: int  # of a head's queries and keys, what is not rotated
    rotated: int  # the rest; of keys, all heads have the same
    value: int  # of a head's values
    rank: int  # R, of the latents
    query_rank: int | None  # None where queries are one product

    @property
    def query(self) -> int:
        """Size of a head's queries and keys."""
        return self.nope + self.rotated

    def sizes(self) -> dict[str, int]:
        """The sizes that the rules name."""
        return {
            "Q": self.n_heads * self.query,
            "QR": self.query_rank or 0,
            "R": self.rank,
            "KVA": self.rank + self.rotated,
            "KVB": self.n_heads * (self.nope + self.value),
            "O": self.n_heads * self.value,
        }

    def split(self, stored: str, prefix: str) -> tuple[GgufTensor, GgufTensor]:
        """The GGUF tensors `attn_k_b` and `attn_v_b` of a stored `kv_b_proj`, a slab per head."""
        each = self.nope + self.value
        starts = range(0, self.n_heads * each, each)
        keys = tuple(
            Slab(stored, transposed=True, columns=(start, start + self.nope)) for start in starts
        )
        values = tuple(Slab(stored, rows=(start + self.nope, start + each)) for start in starts)
        n_heads, rank = self.n_heads, self.rank
        return (
            GgufTensor(f"{prefix}attn_k_b.weight", (n_heads, rank, self.nope), keys),
            GgufTensor(f"{prefix}attn_v_b.weight", (n_heads, self.value, rank), values),
        )


class LatentRope(Rope):
    """YaRN of an attention whose scores are scaled, and not its rotated values."""

    @property
    def all_dims(self) -> float:
        """What YaRN's scale of the scores is made of; 0 if they are not scaled."""
        return float(self.values.values.get("mscale_all_dim") or 0)

    @property
    def implied_factor(self) -> float:
        return 1.0 if self.all_dims else super().implied_factor

    def metadata(self) -> list[tuple[str, Any, GGUFValueType]]:
        found = super().metadata()
        if self.kind == "yarn" and self.all_dims:
            key = Keys.Rope.SCALING_YARN_LOG_MUL
            # a tenth, which llama.cpp's loader of this architecture undoes
            found.append((key, 0.1 * self.all_dims, GGUFValueType.FLOAT32))
        return found


class MlaModel(NextnDecoder):
    """A model with latent attention, dense layers first, and experts that all tokens share."""

    gguf_arch: ClassVar[str] = "deepseek2"
    count_keys: ClassVar[tuple[str, ...]] = ("n_routed_experts",)
    fact_keys: ClassVar[tuple[str, ...]] = (
        *FACT_KEYS,
        *_HEAD_KEYS,
        "intermediate_size",
        "n_shared_experts",
    )
    scores: ClassVar[Scores] = Scores.SIGMOID

    # the config

    def read_facts(self) -> ModelFacts:
        self._refuse()
        self.heads = _read_heads(self.text)
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
        return replace(
            facts,
            n_kv_heads=1,
            head_dim=self.heads.query,
            n_groups=groups,
            groups_per_token=chosen,
        )

    @abstractmethod
    def trunk_moe_layers(self) -> tuple[int, ...]:
        """The layers of the trunk that have experts."""

    def read_groups(self, n_experts: int) -> tuple[int, int]:
        """How many groups of experts the router has, and how many of them it chooses."""
        groups = self.text.integer("n_group", low=1, high=n_experts, default=1)
        chosen = self.text.integer("topk_group", low=1, high=groups, default=1)
        if groups > 1 and n_experts < 2 * groups:
            raise UnsupportedModelError(
                f"{self.text.where}: n_group is {groups}, expected at least two of the "
                f"{n_experts} experts in each group: the best two score it"
            )
        # all of them are the same as one
        return (1, 1) if chosen == groups else (groups, chosen)

    def refuse_routing(self) -> None:
        """Refuse, by name, values of the router's keys that are not implemented."""
        why = f"{type(self).__name__} makes its scores with {self.scores.name.lower()}"
        self.text.expect("scoring_func", self.scores.name.lower(), why=why)

    def _refuse(self) -> None:
        """Refuse, by name, what llama.cpp's deepseek2 or this program does not do."""
        read, arch = self.text, self.gguf_arch
        if (found := self.config.get("model_type")) != self.model_type:
            raise UnsupportedModelError(
                f"{read.where}: model_type is {shown(found)}, expected '{self.model_type}': "
                "transformers chooses the architecture by it"
            )
        self.refuse_common()
        read.expect("rope_interleave", True, why=f"llama.cpp's {arch} rotates neighbours")
        read.expect("moe_layer_freq", 1, why="all layers after the dense ones have experts")
        n_heads = read.integer("num_attention_heads", low=1, high=MAX_HEADS)
        why = "as num_attention_heads: every head has its own keys and values, made of latents"
        read.expect("num_key_value_heads", n_heads, why=why)
        why = f"llama.cpp's {arch} has such experts in every layer with experts"
        if read_n_shared(read) < 1:
            raise UnsupportedModelError(
                f"{read.where}: n_shared_experts is 0 or missing, expected at least 1: {why}"
            )
        if not read_scale(read):
            raise UnsupportedModelError(
                f"{read.where}: routed_scaling_factor is 0, expected a positive number: llama.cpp "
                "reads 0 as no scaling"
            )
        if (found := read_epsilon(read)) > _MOST_EPSILON:
            raise UnsupportedModelError(
                f"{read.where}: rms_norm_eps is {found:g}, expected at most {_MOST_EPSILON:g}: "
                f"llama.cpp's {arch} norms latents with it, and transformers with "
                f"{_LATENT_EPSILON:g}"
            )
        self.refuse_routing()

    @cached_property
    def rope(self) -> Rope:
        read = self.text
        found = read_rope(read)
        arch = f"llama.cpp's {self.gguf_arch}"
        values = found.values
        values.expect("partial_rotary_factor", 1, why=f"{arch} rotates all of qk_rope_head_dim")
        if found.kind == "linear":
            raise UnsupportedModelError(
                f"{read.where}: rope_type is linear, expected default or yarn: {arch} would scale "
                "the scores too"
            )
        if found.kind == "yarn":
            values.number("mscale_all_dim", low=0, high=2**10, default=0)
            if found.factor < 1 or found.attention_factor != 1:
                raise UnsupportedModelError(
                    f"{read.where}: YaRN has factor {found.factor:g} and scales rotated values by "
                    f"{found.attention_factor:g}, expected a factor of at least 1 and no such "
                    f"scale (mscale equal to mscale_all_dim): {arch} scales whole heads"
                )
        return LatentRope(**vars(found))

    def config_values(self) -> dict[str, Any]:
        heads, read = self.heads, self.text
        return {
            **super().config_values(),
            "num_key_value_heads": heads.n_heads,
            "head_dim": heads.rotated,
            "q_lora_rank": heads.query_rank,
            "kv_lora_rank": heads.rank,
            "qk_nope_head_dim": heads.nope,
            "qk_rope_head_dim": heads.rotated,
            "v_head_dim": heads.value,
            "intermediate_size": self.dense_width(),
            "n_shared_experts": read_n_shared(read),
            "routed_scaling_factor": read_scale(read),
            "norm_topk_prob": read.boolean("norm_topk_prob", default=False),
        }

    def dense_width(self) -> int:
        return self.text.integer("intermediate_size", low=1, high=MAX_WIDTH)

    def sizes(self) -> Mapping[str, int]:
        width = self.dense_width()
        shared = read_n_shared(self.text) * self.facts.expert_width
        return {**super().sizes(), **self.heads.sizes(), "I": width, "S": shared}

    def caveats(self) -> tuple[str, ...]:
        if not (self._is_lite and self.heads.query_rank):
            return super().caveats()
        caveat = (
            f"llama.cpp takes {self.gguf_arch} models with {self.facts.n_layers} layers for ones "
            "without q_lora_rank: the GGUF files of this one are written, but llama.cpp cannot "
            "load them"
        )
        return (*super().caveats(), caveat)

    @property
    def _is_lite(self) -> bool:
        """Whether llama.cpp takes it for a model whose queries are one product."""
        layers, vocabulary = self.facts.n_layers, self.facts.vocab_size
        return layers in _LITE_LAYERS or _LITE_VOCABULARY.get(layers) == vocabulary

    # the header

    def header(self) -> list[Entry]:
        facts, heads = self.facts, self.heads
        llm, attention = Keys.LLM, Keys.Attention
        replaced = (attention.KEY_LENGTH, attention.VALUE_LENGTH)
        # llama.cpp's converter leaves a missing rank out, and then only models of certain numbers
        # of layers can be loaded
        query_rank = heads.query_rank or (None if self._is_lite else 0)
        one_group = [(llm.EXPERT_GROUP_COUNT, 1, UINT32), (llm.EXPERT_GROUP_USED_COUNT, 1, UINT32)]
        return [
            *(entry for entry in super().header() if entry[0] not in replaced),
            *(one_group if facts.n_groups == 1 else ()),
            *router_entries(self.text, self.n_dense, self.scores),
            (llm.VOCAB_SIZE, facts.vocab_size, UINT32),
            (attention.Q_LORA_RANK, query_rank, UINT32),
            (attention.KV_LORA_RANK, heads.rank, UINT32),
            (attention.KEY_LENGTH, heads.rank + heads.rotated, UINT32),
            (attention.VALUE_LENGTH, heads.rank, UINT32),
            (attention.KEY_LENGTH_MLA, heads.query, UINT32),
            (attention.VALUE_LENGTH_MLA, heads.value, UINT32),
            (Keys.Rope.DIMENSION_COUNT, heads.rotated, UINT32),
        ]

    @classmethod
    def scores_in_gguf(cls, keys: GgufKeys) -> Scores:
        """What the router of a file makes of its logits; without a key, what llama.cpp takes."""
        key = Keys.LLM.EXPERT_GATING_FUNC
        if keys.has(key):
            return Scores(keys.integer(key, min(Scores), max(Scores)))
        n_layers, _ = trunk_layers(keys)
        is_flash = n_layers in _FLASH_LAYERS and keys.rows(EMBEDDING) == _FLASH_VOCABULARY
        return Scores.SIGMOID if is_flash else Scores.SOFTMAX

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        config = headless_config(keys, cls.scores)  # refuses other scores
        return {
            "model_type": cls.model_type,
            **{key: value for key, value in config.items() if key != "num_experts"},
            "n_routed_experts": config["num_experts"],
            "intermediate_size": keys.integer(Keys.LLM.FEED_FORWARD_LENGTH, 1, MAX_WIDTH),
            "num_key_value_heads": config["num_attention_heads"],
            "rope_interleave": True,
            **_heads_from_gguf(keys),
            **router_config(keys),
            "rope_parameters": _rope_from_gguf(keys, config["rope_parameters"]),
        }

    # the tensors

    def rules(self, layer: int) -> tuple[TensorRule, ...]:
        queries = (_QUERIES,) if self.heads.query_rank is None else _LOW_RANK_QUERIES
        bias = (SCORE_BIAS,) if self.scores is Scores.SIGMOID else ()
        ffn = (ROUTER, *bias, *SHARED_EXPERTS) if layer in self.sparse_layers else DENSE_FFN
        return (ATTN_NORM, *queries, *_KEYS_AND_VALUES, FFN_NORM, *ffn)

    def made_of(
        self, stored: Mapping[str, StoredTensor], name: str, rule: TensorRule, prefix: str
    ) -> tuple[GgufTensor, ...]:
        if rule.gguf != _KV_B.gguf:
            return super().made_of(stored, name, rule, prefix)
        if name not in stored:
            raise missing(name)
        sizes = self.heads.sizes()
        expected = (sizes["KVB"], sizes["R"])
        if stored[name].shape != expected:
            raise CheckpointError(
                f"tensor {name!r}: shape {list(stored[name].shape)}, expected {list(expected)}"
            )
        return self.heads.split(name, prefix)

    def matrices(self, layer: int) -> Mapping[str, tuple[str, ...]]:
        whole = f"blk.{layer}.{_KV_B.gguf}"
        found = super().matrices(layer)
        return {module: names for module, names in found.items() if whole not in names}

    def head_matrices(self, layer: int) -> HeadMatrices:
        inside = "layer." if layer == self.facts.mtp_layer else ""
        return HeadMatrices(
            attention=f"{inside}{_ATTENTION}",
            latents=f"{inside}{_ATTENTION}.kv_a_layernorm",
            queries=f"blk.{layer}.attn_k_b.weight",
            sums=f"blk.{layer}.attn_v_b.weight",
            n_heads=self.heads.n_heads,
            query_width=self.heads.nope,
            sum_width=self.heads.rank,
        )


def _read_heads(read: ConfigReader) -> LatentHeads:
    """The sizes of the attention; refuses a `head_dim` that is not that of rotated values."""
    rank, nope, rotated, value = (read.integer(key, low=1, high=MAX_WIDTH) for key in _HEAD_KEYS)
    # transformers rotates so much of a head
    read.expect("head_dim", rotated, why="it is qk_rope_head_dim in this architecture")
    read.expect("qk_head_dim", nope + rotated, why="it is qk_nope_head_dim + qk_rope_head_dim")
    query_rank = read.values.get("q_lora_rank")
    if query_rank is not None:
        query_rank = read.integer("q_lora_rank", low=1, high=MAX_WIDTH)
    n_heads = read.integer("num_attention_heads", low=1, high=MAX_HEADS)
    return LatentHeads(n_heads, nope, rotated, value, rank, query_rank)


def _heads_from_gguf(keys: GgufKeys) -> dict[str, Any]:
    """The sizes of the attention in a header."""
    attention = Keys.Attention
    rank = keys.integer(attention.KV_LORA_RANK, 1, MAX_WIDTH)
    rotated = keys.integer(Keys.Rope.DIMENSION_COUNT, 1, MAX_WIDTH)
    query = keys.integer(attention.KEY_LENGTH_MLA, rotated + 1, MAX_WIDTH)
    one_head = "latents are the only head of keys and values"
    keys.expect(attention.HEAD_COUNT_KV, 1, why=one_head)
    keys.expect(attention.KEY_LENGTH, rank + rotated, why=one_head)
    keys.expect(attention.VALUE_LENGTH, rank, why=one_head)
    for key in ("temperature_scale", "temperature_length"):
        keys.expect(f"{{arch}}.attention.{key}", why="attention has no temperature here")
    return {
        "q_lora_rank": keys.integer(attention.Q_LORA_RANK, 0, MAX_WIDTH, default=0) or None,
        "kv_lora_rank": rank,
        "qk_nope_head_dim": query - rotated,
        "qk_rope_head_dim": rotated,
        "v_head_dim": keys.integer(attention.VALUE_LENGTH_MLA, 1, MAX_WIDTH),
    }


def _rope_from_gguf(keys: GgufKeys, found: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` whose scale of the scores is that of a header."""
    if found["rope_type"] != "yarn":
        return found
    # the shortest decimal, as of every number in a header
    tenth = keys.number(Keys.Rope.SCALING_YARN_LOG_MUL, 0, 2**10, default=0.0)
    all_dims = float(f"{10 * tenth:.7g}")
    if not all_dims:
        factor = found["attention_factor"]
        return {
            **found,
            "attention_factor": 1.0 if math.isclose(factor, 1, rel_tol=1e-6) else factor,
        }
    factor = keys.number(Keys.Rope.SCALING_ATTN_FACTOR, 0, 2**20, default=1.0)
    return {**found, "attention_factor": factor, "mscale": all_dims, "mscale_all_dim": all_dims}
