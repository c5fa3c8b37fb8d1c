"""Nemotron-3: Nano-30B-A3B and Super-120B-A12B.

Stored names follow NVIDIA's and transformers' `nemotron_h`; experts are one tensor each (2D, as
published) or one tensor per layer (3D). GGUF names, types and keys are those of llama.cpp's
`nemotron_h_moe`. A block has a norm and one mixer: Mamba-2, attention, or experts and a shared
expert, without gates, whose activation is the square of a ReLU. Nothing is rotated by position. A
router adds a bias to the sigmoids of its logits for the choice of experts. Super's experts work on
a latent, which two matrices make and undo. Its MTP block is two such blocks, one with attention and
one with experts; GGUF has them as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from gguf import GGUFValueType, Keys

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.block_kinds import LAYERS_KEYS, MTP_KEYS, kinds_in, read_kinds
from reap2gguf.models.description import MAX_WIDTH, ModelFacts, Transform
from reap2gguf.models.experts import ExpertLayout
from reap2gguf.models.facts import FACT_KEYS, read_epsilon
from reap2gguf.models.layer_types import FULL, LINEAR, MOE
from reap2gguf.models.mamba2 import MAMBA2, MAMBA_KEYS, mamba2_config, read_mamba2
from reap2gguf.models.nemotron_from_gguf import common_values, kinds_from_gguf
from reap2gguf.models.nextn import NextnDecoder
from reap2gguf.models.rules import HEAD, MtpLayout, TensorRule, nested, paired_halves
from reap2gguf.models.scored_router import read_groups, read_scale, router_config
from reap2gguf.models.shared import ARRAY, FLOAT32, UINT32, Entry
from reap2gguf.models.transformers_config import INFINITY
from reap2gguf.models.tying import KEY as TIE_KEY

if TYPE_CHECKING:
    from reap2gguf.checkpoint.config import ConfigReader
    from reap2gguf.models.gguf_keys import GgufKeys

BOOL = GGUFValueType.BOOL
# of attention without positions; llama.cpp's converter writes it whatever the config says
_CONTEXT = 2**20
_SHARED_KEY, _LATENT_KEY = "moe_shared_expert_intermediate_size", "moe_latent_size"
_LEAST_STEP_KEY, _LEAST_STEP = "time_step_min", 1e-3
_CHUNK_KEY, _CHUNK = "chunk_size", 128
_FAR_STEP = 1e6  # a limit that no step reaches
# transformers reads these in place of others of NVIDIA's names
_OLD_KEYS = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": _CHUNK_KEY,
    "mamba_dt_min": _LEAST_STEP_KEY,
    "mamba_dt_limit": "time_step_limit",
    "layer_types": LAYERS_KEYS[0],
}
_NORM = TensorRule("norm.weight", "attn_norm.weight", "H")
_ATTENTION = (
    TensorRule("mixer.q_proj.weight", "attn_q.weight", "Q H"),
    TensorRule("mixer.k_proj.weight", "attn_k.weight", "KV H", input_of="mixer.q_proj"),
    TensorRule("mixer.v_proj.weight", "attn_v.weight", "KV H", input_of="mixer.q_proj"),
    TensorRule("mixer.o_proj.weight", "attn_output.weight", "H Q"),
)
_EXPERTS = (
    TensorRule("mixer.gate.weight", "ffn_gate_inp.weight", "E H", always_f32=True),
    TensorRule("mixer.gate.e_score_correction_bias", "exp_probs_b.bias", "E"),
    TensorRule("mixer.shared_experts.up_proj.weight", "ffn_up_shexp.weight", "S H"),
    TensorRule("mixer.shared_experts.down_proj.weight", "ffn_down_shexp.weight", "H S"),
)
_LATENT = (
    TensorRule("mixer.fc1_latent_proj.weight", "ffn_latent_down.weight", "L H"),
    TensorRule("mixer.fc2_latent_proj.weight", "ffn_latent_up.weight", "H L"),
)
_MTP = MtpLayout(
    layer="1.",
    module="layer.1.",
    rules=(
        TensorRule("0.eh_proj.weight", "nextn.eh_proj.weight", "H 2H", parameter="fc.weight"),
        TensorRule("0.enorm.weight", "nextn.enorm.weight", "H", parameter="embedding_norm.weight"),
        TensorRule("0.hnorm.weight", "nextn.hnorm.weight", "H", parameter="hidden_norm.weight"),
        TensorRule(
            "1.final_layernorm.weight",
            "nextn.shared_head_norm.weight",
            "H",
            parameter="norm.weight",
        ),
    ),
)
_MTP_KINDS = (FULL, MOE)


class NemotronH(NextnDecoder):
    """One Nemotron-3 Nano or Super."""

    model_type: ClassVar[str] = "nemotron_h"
    gguf_arch: ClassVar[str] = "nemotron_h_moe"
    norm_module: ClassVar[str] = "norm_f"
    mtp_centers: ClassVar[bool] = True  # as in llama.cpp's graph of the block
    outer = (
        TensorRule("{text}embeddings.weight", "token_embd.weight", "V H"),
        TensorRule("{text}norm_f.weight", "output_norm.weight", "H"),
        HEAD,
    )
    experts = ExpertLayout(path="mixer.experts", module="mixer.experts", projections=("up", "down"))
    mtp: ClassVar[MtpLayout | None] = _MTP
    count_keys = ("n_routed_experts", "num_local_experts")
    epsilon = ("layer_norm_epsilon", 1e-5)
    has_rotary = False
    fact_keys = (
        *FACT_KEYS,
        *MAMBA_KEYS,
        *("layer_norm_epsilon", _SHARED_KEY, "n_shared_experts", "n_group", "topk_group"),
        *("norm_topk_prob", "routed_scaling_factor", "mlp_hidden_act", "mamba_hidden_act"),
        *("use_bias", "use_conv_bias", "mlp_bias", _LEAST_STEP_KEY, "time_step_limit", _CHUNK_KEY),
        "num_nextn_predict_layers",
    )
    # transformers' values of absent keys, in NemotronHConfig
    defaults: ClassVar[Mapping[str, int]] = {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "ssm_state_size": 128,
        "n_groups": 8,
        "conv_kernel": 4,
    }

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        kinds, n_kv_heads = kinds_from_gguf(keys)
        llm = Keys.LLM
        shared = keys.integer(llm.EXPERT_SHARED_FEED_FORWARD_LENGTH, 1, MAX_WIDTH)
        latent = keys.integer(llm.MOE_LATENT_SIZE, 0, MAX_WIDTH, default=0)
        has_mtp = keys.integer(llm.NEXTN_PREDICT_LAYERS, 0, 1, default=0)
        return {
            "architectures": ["NemotronHForCausalLM"],
            "model_type": cls.model_type,
            **common_values(keys, n_kv_heads),
            **router_config(keys),
            **mamba2_config(keys),
            LAYERS_KEYS[0]: kinds,
            "mlp_hidden_act": "relu2",
            _SHARED_KEY: shared,
            _LATENT_KEY: latent or None,
            "num_nextn_predict_layers": has_mtp,
        }

    @classmethod
    def names_from_gguf(cls, keys: GgufKeys, keep_mtp: bool) -> tuple[str, ...]:
        found = ("lm_head.weight",) if "output.weight" in keys.tensors else ()
        there = tuple(f"mtp.layers.{r.stored}" for r in _MTP.rules if keys.blocks_with(r.gguf))
        return (*found, *there) if keep_mtp else found

    # names

    @property
    def text_prefix(self) -> str:
        return "backbone."

    @property
    def embedding_name(self) -> str:
        return f"{self.text_prefix}embeddings.weight"

    @cached_property
    def mtp_prefix(self) -> str:
        return "mtp.layers."

    def in_mtp(self, name: str) -> bool:
        return name.startswith("mtp.")

    # the config

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """What the mixer of each block is."""
        return read_kinds(self.reader, self.gguf_arch)

    @cached_property
    def text(self) -> ConfigReader:
        """The config with the number of its blocks, which newer ones do not state."""
        n_blocks = {"num_hidden_layers": len(self.kinds)}
        return self.reader.with_values({**self.reader.values, **n_blocks})

    @property
    def is_nested(self) -> bool:
        return False

    def read_facts(self) -> ModelFacts:
        read = self.reader
        if (found := self.config.get("model_type")) != self.model_type:
            raise UnsupportedModelError(
                f"{read.where}: model_type is {shown(found)}, expected '{self.model_type}': "
                "transformers chooses the architecture by it"
            )
        self._refuse()
        self.mamba = read_mamba2(read, self.defaults)
        self.chunk = read.integer(_CHUNK_KEY, low=1, high=MAX_WIDTH, default=_CHUNK)
        has_mtp = self.keep_mtp and self.stores_block
        moe_layers = [layer for layer, kind in enumerate(self.kinds) if kind == MOE]
        moe_layers += [len(self.kinds)] if has_mtp else []
        facts = self.common_facts(moe_layers, has_mtp)
        if facts.head_dim % 2:
            raise UnsupportedModelError(
                f"{read.where}: head_dim is {facts.head_dim}, expected an even number: llama.cpp's "
                "converter takes heads in halves"
            )
        groups, chosen = read_groups(read, facts.n_experts)
        latent = read.integer(_LATENT_KEY, low=1, high=MAX_WIDTH, default=facts.hidden_size)
        return replace(
            facts,
            context_length=_CONTEXT,
            n_groups=groups,
            groups_per_token=chosen,
            latent_width=latent if self.has_latent else None,
            first_gqa=None if self.kinds[0] == FULL else 0,
        )

    @property
    def has_latent(self) -> bool:
        """Whether experts work on a latent."""
        return self.reader.values.get(_LATENT_KEY) is not None

    def _refuse(self) -> None:
        """Refuse, by name, what llama.cpp or transformers does not do."""
        self.refuse_common()
        self.refuse_blocks()
        read, theirs = self.reader, f"llama.cpp's {self.gguf_arch}"
        read.refuse_spellings(("layer_norm_epsilon", "norm_eps", "rms_norm_eps"))
        for key, name in _OLD_KEYS.items():
            read.expect(key, why=f"transformers reads it in place of {name}; state that one")
        read.expect(TIE_KEY, False, why="transformers does not tie the embeddings of this family")
        read.expect("mlp_hidden_act", "relu2", why=f"{theirs} squares a ReLU")
        read.expect("mamba_hidden_act", "silu", why=f"{theirs} has this activation alone")
        for key in ("use_bias", "mlp_bias"):
            read.expect(key, False, why=f"{theirs} has no such biases")
        read.expect("use_conv_bias", True, why=f"{theirs} adds a bias after each convolution")
        read.expect("sliding_window", why=f"{theirs} has full attention")
        self._refuse_limits(theirs)
        for key in MTP_KEYS:
            kinds = read.values.get(key)
            if kinds is not None and kinds_in(kinds) != _MTP_KINDS:
                raise UnsupportedModelError(
                    f"{read.where}: {key} is {shown(kinds)}, expected attention and then experts: "
                    f"{theirs} has one MTP block, of these two"
                )

    def _refuse_limits(self, theirs: str) -> None:
        """Refuse time steps that are limited."""
        read, why = self.reader, f"{theirs} does not limit time steps"
        low = read.number(_LEAST_STEP_KEY, low=0, default=_LEAST_STEP)
        if low > _LEAST_STEP:
            raise UnsupportedModelError(
                f"{read.where}: {_LEAST_STEP_KEY} is {low:g}, expected at most {_LEAST_STEP}: "
                f"transformers raises time steps to it, and {why}"
            )
        limits = read.values.get("time_step_limit")
        if limits is not None and not _are_none(limits):
            raise UnsupportedModelError(
                f"{read.where}: time_step_limit is {shown(limits)}, expected 0 and infinity: {why}"
            )

    def dense_width(self) -> int | None:
        return None

    def config_values(self) -> dict[str, Any]:
        found = super().config_values()
        del found["max_position_embeddings"]  # it is not read
        return {
            **found,
            **self.mamba.config(),
            LAYERS_KEYS[0]: list(self.kinds),
            _SHARED_KEY: self._shared_width,
            _LATENT_KEY: self.facts.latent_width,
            "norm_topk_prob": self._normalises,
            "routed_scaling_factor": read_scale(self.reader),
            "n_group": self.facts.n_groups,
            "topk_group": self.facts.groups_per_token,
            "num_key_value_heads": self.facts.n_kv_heads,
        }

    @property
    def _shared_width(self) -> int:
        return self.reader.integer(_SHARED_KEY, low=1, high=MAX_WIDTH)

    @property
    def _normalises(self) -> bool:
        return self.reader.boolean("norm_topk_prob", default=True)

    @property
    def _n_shared(self) -> int:
        """How many experts the shared one counts for, which is one matrix whatever it is."""
        return self.reader.integer("n_shared_experts", low=1, high=2**10, default=1)

    # the tensors

    def sizes(self) -> Mapping[str, int]:
        latent = self.facts.expert_io_width
        return {**super().sizes(), **self.mamba.sizes(), "S": self._shared_width, "L": latent}

    @property
    def _expert_rules(self) -> tuple[TensorRule, ...]:
        return (*_EXPERTS, *(_LATENT if self.has_latent else ()))

    def rules(self, layer: int) -> tuple[TensorRule, ...]:
        mixers = {LINEAR: MAMBA2, FULL: _ATTENTION, MOE: self._expert_rules}
        return (_NORM, *mixers[self.kinds[layer]])

    def mtp_layer_rules(self, mtp: MtpLayout) -> tuple[TensorRule, ...]:
        second = replace(_NORM, gguf="post_attention_norm.weight")
        return (
            *nested((_NORM, *_ATTENTION), "0.", "layer.0."),
            *nested((second, *self._expert_rules), "1.", "layer.1."),
        )

    def mtp_templates(self) -> tuple[int, ...]:
        return tuple(self.kinds.index(kind) for kind in _MTP_KINDS)

    def transform(self, rule: TensorRule) -> Transform | None:
        return self._transforms.get(rule.gguf)

    @cached_property
    def _transforms(self) -> Mapping[str, Transform]:
        # the converter does this for a rotation that there is not; both change alike
        facts = self.facts
        return {
            **self.mamba.transforms(),
            "attn_q.weight": paired_halves(facts.n_heads, facts.head_dim),
            "attn_k.weight": paired_halves(facts.n_kv_heads, facts.head_dim),
        }

    def mixer_bytes(self) -> int:
        return self.mamba.position_bytes(self.chunk)

    # the header

    def header(self) -> list[Entry]:
        facts, read = self.facts, self.reader
        llm, attention, rope = Keys.LLM, Keys.Attention, Keys.Rope
        sparse = self.sparse_layers
        has_attention = [kind == FULL for kind in self.kinds] + [True] * facts.has_mtp
        widths = [facts.expert_width if i in sparse else 0 for i in range(facts.n_blocks)]
        kv_heads = [facts.n_kv_heads if one else 0 for one in has_attention]
        others = (attention.HEAD_COUNT_KV, llm.EXPERT_GROUP_COUNT, llm.EXPERT_GROUP_USED_COUNT)
        return [
            *(entry for entry in super().header() if entry[0] not in others),
            (llm.FEED_FORWARD_LENGTH, widths, ARRAY),
            (attention.HEAD_COUNT_KV, kv_heads, ARRAY),
            # of the MTP block's last norm; llama.cpp demands it always
            (attention.LAYERNORM_EPS, read_epsilon(read, *self.epsilon), FLOAT32),
            (llm.EXPERT_GROUP_COUNT, facts.n_groups, UINT32),
            (llm.EXPERT_GROUP_USED_COUNT, facts.groups_per_token, UINT32),
            (llm.VOCAB_SIZE, facts.vocab_size, UINT32),
            (rope.DIMENSION_COUNT, facts.hidden_size // facts.n_heads, UINT32),
            (rope.SCALING_FINETUNED, False, BOOL),
            *self.mamba.entries(),
            (llm.EXPERT_SHARED_FEED_FORWARD_LENGTH, self._shared_width, UINT32),
            (llm.EXPERT_SHARED_COUNT, self._n_shared, UINT32),
            (llm.EXPERT_WEIGHTS_NORM, self._normalises, BOOL),
            (llm.EXPERT_WEIGHTS_SCALE, read_scale(read), FLOAT32),
            (llm.MOE_LATENT_SIZE, facts.latent_width, UINT32),
        ]


def _are_none(limits: Any) -> bool:
    """Whether limits of time steps are 0 and infinity, which JSON spells in several ways."""
    if not isinstance(limits, list) or len(limits) != 2:
        return False
    low, high = limits
    is_far = isinstance(high, int | float) and high >= _FAR_STEP
    return low == 0 and (is_far or high == INFINITY)
