"""Kimi-Linear (Kimi-Linear-48B-A3B): Kimi Delta Attention, and latent attention without a rotation.

Stored names are those of the published checkpoint: experts are `block_sparse_moe.experts.N.w1`, w2
and w3, and the dense layers are `mlp.gate_proj` and so on. transformers calls all of them `mlp`,
and saves dense layers as `block_sparse_moe.gate_proj`, which is read too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from gguf import Keys

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.description import (
    MAX_VOCABULARY,
    MAX_WIDTH,
    GgufTensor,
    HeadMatrices,
    Transform,
)
from reap2gguf.models.experts import ExpertLayout
from reap2gguf.models.facts import CHOSEN_KEY, CONTEXT_KEY, FACT_KEYS, read_epsilon, read_n_layers
from reap2gguf.models.from_gguf import headless_config, kv_heads_by_layer
from reap2gguf.models.kda import (
    FLAT_KEYS,
    KDA,
    SECTION,
    TRANSFORMS,
    kda_config,
    read_kda_heads,
    read_kda_layers,
)
from reap2gguf.models.layer_types import FULL, MLP_TYPES, dense_first, moe_layers_after_dense
from reap2gguf.models.mla import (
    HEAD_KEYS,
    KV_B,
    LATENT_EPSILON,
    MOST_EPSILON,
    ONE_HEAD,
    read_heads,
    sizes_from_gguf,
    without_whole,
)
from reap2gguf.models.rope import Rope, read_rope
from reap2gguf.models.rules import (
    ATTN_NORM,
    DENSE_FFN,
    EMBEDDING,
    FFN_NORM,
    HEAD,
    NORM,
    ROUTER,
    SCORE_BIAS,
    SHARED_EXPERTS,
    TensorRule,
)
from reap2gguf.models.scored_router import MOST_SHARED, Scores, read_scale
from reap2gguf.models.shared import ARRAY, FLOAT32, UINT32, DecoderModel, Entry

if TYPE_CHECKING:
    from reap2gguf.checkpoint.safetensors_header import StoredTensor
    from reap2gguf.models.description import ModelFacts
    from reap2gguf.models.gguf_keys import GgufKeys

_MOE, _MODULE = "block_sparse_moe.", "mlp."
_PADDING = 163_839  # transformers' token of an absent `pad_token_id`
_DENSE_KEY = "first_k_dense_replace"
# the published spelling, and that of other families, which transformers reads as the same
_SHARED_KEYS = ("num_shared_experts", "n_shared_experts")
_SPELLINGS = (
    ("num_experts_per_token", CHOSEN_KEY),
    ("model_max_length", CONTEXT_KEY),
    ("moe_renormalize", "norm_topk_prob"),
    ("num_expert_group", "n_group"),
    _SHARED_KEYS,
)


def _in_moe(rule: TensorRule) -> TensorRule:
    """A rule of what `block_sparse_moe` stores, and the module has as `mlp`."""
    stored = _MOE + rule.stored.removeprefix(_MODULE)
    return replace(rule, stored=stored, parameter=rule.stored)


_SPARSE = tuple(_in_moe(rule) for rule in (ROUTER, SCORE_BIAS, *SHARED_EXPERTS))
_DENSE_AS_SAVED = tuple(_in_moe(rule) for rule in DENSE_FFN)


class KimiLinear(DecoderModel):
    """One Kimi-Linear model."""

    model_type: ClassVar[str] = "kimi_linear"
    gguf_arch: ClassVar[str] = "kimi-linear"
    outer = (HEAD, EMBEDDING, NORM)
    experts = ExpertLayout(path=f"{_MOE}experts", gate="w1", up="w3", down="w2")
    spellings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        ours: (published,) for published, ours in _SPELLINGS[:2]
    }
    epsilon = ("rms_norm_eps", 1e-5)
    fact_keys = (
        *FACT_KEYS,
        *HEAD_KEYS,
        *FLAT_KEYS,
        *(spelling for spellings in _SPELLINGS for spelling in spellings),
        SECTION,
        _DENSE_KEY,
        "intermediate_size",
        "routed_scaling_factor",
        "topk_group",
    )
    # transformers' value of an absent key
    defaults: ClassVar[Mapping[str, int]] = {"num_key_value_heads": 32}

    # the config

    def read_facts(self) -> ModelFacts:
        read, n_layers = self.text, read_n_layers(self.text)
        self._refuse()
        self.layer_types = read_kda_layers(read, n_layers)
        # the published head_dim is of nothing that is computed
        given = {key: value for key, value in read.values.items() if key != "head_dim"}
        self.heads, self.kda = read_heads(read.with_values(given)), read_kda_heads(read)
        moe = self._moe_layers()
        if moe != tuple(range(n_layers - len(moe), n_layers)):
            raise UnsupportedModelError(
                f"{read.where}: layer {min(moe)} has experts and a later one has none, expected "
                f"dense layers first: llama.cpp's {self.gguf_arch} has no others"
            )
        if self.kda.n_heads != self.heads.n_heads:
            raise UnsupportedModelError(
                f"{read.where}: linear attention has {self.kda.n_heads} heads (linear_num_heads, "
                f"or num_heads in {SECTION}), expected num_attention_heads, {self.heads.n_heads}: "
                f"llama.cpp's {self.gguf_arch} has one number of heads"
            )
        facts = self.common_facts(moe)
        if facts.tied_embeddings:
            raise UnsupportedModelError(
                f"{read.where}: the output matrix is the token embedding (tie_word_embeddings), "
                f"expected a matrix of its own: llama.cpp's {self.gguf_arch} loads no other model"
            )
        first_gqa = facts.n_heads if self.layer_types[0] == FULL else 0
        head_dim = self.heads.query
        return replace(facts, n_kv_heads=1, head_dim=head_dim, first_gqa=first_gqa)

    def _refuse(self) -> None:
        """Refuse, by name, what llama.cpp's kimi-linear or this program does not do."""
        read, arch = self.text, f"llama.cpp's {self.gguf_arch}"
        if (found := self.config.get("model_type")) != self.model_type:
            raise UnsupportedModelError(
                f"{read.where}: model_type is {shown(found)}, expected '{self.model_type}': "
                "transformers chooses the architecture by it"
            )
        self.refuse_common()
        if "pad_token_id" not in read.values:
            vocab = read.integer("vocab_size", low=1, high=MAX_VOCABULARY)
            if vocab <= _PADDING:
                raise UnsupportedModelError(
                    f"{read.where}: pad_token_id is missing, and transformers' default {_PADDING} "
                    f"is beyond the vocabulary of {vocab}; state it, or null"
                )
        for spellings in _SPELLINGS:
            read.refuse_spellings(spellings)
        for key in _SPELLINGS[2]:
            read.expect(key, True, why=f"{arch} normalises the experts' weights")
        for key in _SPELLINGS[3]:
            read.expect(key, 1, why=f"{arch} has no groups of experts")
        read.expect("topk_group", 1, why="the router has one group of experts")
        read.expect("moe_router_activation_func", "sigmoid", why="transformers computes no other")
        read.expect("moe_layer_freq", 1, why="all layers after the dense ones have experts")
        read.expect("q_lora_rank", why=f"{arch} makes queries by one product")
        read.expect("mla_use_nope", True, why=f"{arch} rotates nothing")
        read.expect("num_nextn_predict_layers", 0, why="transformers has no MTP block here")
        if (epsilon := read_epsilon(read, *self.epsilon)) > MOST_EPSILON:
            raise UnsupportedModelError(
                f"{read.where}: rms_norm_eps is {epsilon:g}, expected at most {MOST_EPSILON:g}: "
                f"{arch} norms latents with it, and transformers with {LATENT_EPSILON:g}"
            )

    def _moe_layers(self) -> tuple[int, ...]:
        read, found = self.text, self.text.values
        if found.get(MLP_TYPES) is None and found.get(_DENSE_KEY) is None:
            read = read.with_values({**found, _DENSE_KEY: 1})  # transformers' value of both absent
        moe = moe_layers_after_dense(read, _DENSE_KEY)
        if moe and found.get(MLP_TYPES) is not None:
            what = f"the number of dense layers in {MLP_TYPES}"
            read.refuse_difference(what, moe[0], _DENSE_KEY, found.get(_DENSE_KEY))
        return moe

    @cached_property
    def rope(self) -> Rope:
        """Of no effect: nothing is rotated. llama.cpp's converter writes what the config says."""
        found = read_rope(self.text)
        if found.kind != "default":
            raise UnsupportedModelError(
                f"{self.text.where}: rope_type is {found.kind}, expected default: nothing is "
                "rotated in this architecture"
            )
        return found

    @property
    def n_dense(self) -> int:
        """How many dense layers come first."""
        return self.facts.moe_layers[0]

    def dense_width(self) -> int:
        return self.text.integer("intermediate_size", low=1, high=MAX_WIDTH)

    def _n_shared(self) -> int:
        return self.text.integer(*_SHARED_KEYS, low=1, high=MOST_SHARED, default=1)

    def _scale(self) -> float:
        return read_scale(self.text, default=2.446)

    def config_values(self) -> dict[str, Any]:
        heads = self.heads.config_values()
        of_no_effect = ("head_dim", "rope_parameters")
        found = {**super().config_values(), **heads, **self.kda.config_values()}
        return {
            **{key: value for key, value in found.items() if key not in of_no_effect},
            "intermediate_size": self.dense_width(),
            "n_shared_experts": self._n_shared(),
            "routed_scaling_factor": self._scale(),
            "norm_topk_prob": True,
            "n_group": 1,
            "topk_group": 1,
            "layer_types": list(self.layer_types),
            MLP_TYPES: dense_first(self.n_dense, self.facts.n_layers),
        }

    def sizes(self) -> Mapping[str, int]:
        return {
            **super().sizes(),
            **self.heads.sizes(),
            **self.kda.sizes(),
            "I": self.dense_width(),
            "S": self._n_shared() * self.facts.expert_width,
        }

    # the header

    def header(self) -> list[Entry]:
        facts, llm, attention, read = self.facts, Keys.LLM, Keys.Attention, self.text
        kv_heads = [int(one == FULL) for one in self.layer_types]
        # llama.cpp's converter writes the config's head_dim, which nothing is computed with
        has_size = read.values.get("head_dim") is not None
        head_dim = read.integer("head_dim", low=1, high=MAX_WIDTH) if has_size else None
        others = (attention.HEAD_COUNT_KV, attention.KEY_LENGTH, attention.VALUE_LENGTH)
        latent = self.heads.entries(None)
        return [
            *(entry for entry in super().header() if entry[0] not in others),
            (attention.HEAD_COUNT_KV, kv_heads, ARRAY),
            (llm.EXPERT_GROUP_USED_COUNT, 1, UINT32),
            (llm.EXPERT_GATING_FUNC, int(Scores.SIGMOID), UINT32),
            (attention.VALUE_LENGTH, head_dim, UINT32),
            (llm.VOCAB_SIZE, facts.vocab_size, UINT32),
            (Keys.SSM.CONV_KERNEL, self.kda.kernel, UINT32),
            (Keys.KDA.HEAD_DIM, self.kda.head_dim, UINT32),
            *(entry for entry in latent if entry[0] != attention.VALUE_LENGTH),
            (llm.EXPERT_SHARED_COUNT, self._n_shared(), UINT32),
            (llm.LEADING_DENSE_BLOCK_COUNT, self.n_dense, UINT32),
            (llm.EXPERT_WEIGHTS_SCALE, self._scale(), FLOAT32),
        ]

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        config = headless_config(keys, Scores.SIGMOID)
        has_attention, n_kv_heads = kv_heads_by_layer(keys)
        if n_kv_heads != 1:
            raise UnsupportedModelError(
                f"{keys.where}: {n_kv_heads} heads of keys and values, expected 1: {ONE_HEAD}"
            )
        n_layers, llm, attention = config["num_hidden_layers"], Keys.LLM, Keys.Attention
        keys.expect(llm.EXPERT_GROUP_COUNT, 0, 1, why="there are no groups of experts here")
        keys.expect(attention.Q_LORA_RANK, 0, why="queries are one product")
        head_dim = keys.integer(attention.VALUE_LENGTH, 0, MAX_WIDTH, default=0)
        return {
            "architectures": ["KimiLinearForCausalLM"],
            "model_type": cls.model_type,
            **{key: value for key, value in config.items() if key not in (CHOSEN_KEY, CONTEXT_KEY)},
            "num_experts_per_token": config[CHOSEN_KEY],
            "model_max_length": config[CONTEXT_KEY],
            "num_key_value_heads": config["num_attention_heads"],
            "pad_token_id": None,
            **({"head_dim": head_dim} if head_dim else {}),
            SECTION: kda_config(keys, has_attention),
            **sizes_from_gguf(keys),
            # llama.cpp's value of an absent key
            _DENSE_KEY: keys.integer(llm.LEADING_DENSE_BLOCK_COUNT, 0, n_layers, default=0),
            "intermediate_size": keys.integer(llm.FEED_FORWARD_LENGTH, 1, MAX_WIDTH),
            "num_shared_experts": keys.integer(llm.EXPERT_SHARED_COUNT, 1, MOST_SHARED),
            "routed_scaling_factor": keys.number(llm.EXPERT_WEIGHTS_SCALE, 0, 2**10, default=1.0),
        }

    # the tensors

    def rules(self, layer: int) -> tuple[TensorRule, ...]:
        mixer = self.heads.rules if self.layer_types[layer] == FULL else KDA
        return (ATTN_NORM, *mixer, FFN_NORM, *self._ffn(layer))

    def _ffn(self, layer: int) -> tuple[TensorRule, ...]:
        if layer in self.sparse_layers:
            return _SPARSE
        saved = self.layer_prefix(layer) + _DENSE_AS_SAVED[0].stored
        return _DENSE_AS_SAVED if saved in self.names else DENSE_FFN

    def transform(self, rule: TensorRule) -> Transform | None:
        return TRANSFORMS.get(rule.gguf)

    def made_of(
        self, stored: Mapping[str, StoredTensor], name: str, rule: TensorRule, prefix: str
    ) -> tuple[GgufTensor, ...]:
        if rule.gguf != KV_B.gguf:
            return super().made_of(stored, name, rule, prefix)
        return self.heads.split(stored, name, prefix)

    def matrices(self, layer: int) -> Mapping[str, tuple[str, ...]]:
        return without_whole(super().matrices(layer))

    def head_matrices(self, layer: int) -> HeadMatrices | None:
        return self.heads.matrices(layer, "") if self.layer_types[layer] == FULL else None
