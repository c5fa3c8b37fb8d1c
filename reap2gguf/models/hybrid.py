"""What Qwen3-Next and Qwen3.5-MoE share: Gated DeltaNet in most layers, full attention in the rest.

Every layer has experts and a shared expert with a gate, attention is gated too, and one block for
multi-token prediction, `mtp.*`, follows the trunk; in GGUF it is the last layer and has `nextn.*`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from gguf import Keys

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.deltanet import DeltaNet
from reap2gguf.models.description import MAX_HEADS, MAX_WIDTH, ModelFacts, Transform
from reap2gguf.models.facts import FACT_KEYS, read_epsilon, rewritten
from reap2gguf.models.from_gguf import common_config, trunk_layers
from reap2gguf.models.layer_types import FULL, LINEAR, read_layer_types, types_of
from reap2gguf.models.linear_from_gguf import (
    RECURRENT,
    linear_attention_config,
    recurrent_layers,
    rotated_share,
)
from reap2gguf.models.rope import Rope, check_rotary_width, read_rope
from reap2gguf.models.rules import (
    ADD_ONE,
    ATTENTION,
    ATTN_NORM,
    EMBEDDING,
    HEAD,
    NORM,
    QK_NORMS,
    ROUTER,
    SHARED_EXPERT,
    MtpLayout,
    TensorRule,
)
from reap2gguf.models.shared import ARRAY, FLOAT32, UINT32, DecoderModel, Entry

if TYPE_CHECKING:
    from reap2gguf.checkpoint.config import ConfigReader
    from reap2gguf.models.gguf_keys import GgufKeys

# In every layer.
_COMMON = (
    ATTN_NORM,
    TensorRule("post_attention_layernorm.weight", "post_attention_norm.weight", "H"),
    ROUTER,
    *SHARED_EXPERT,
)
# Each query head has a gate of its own.
_ATTENTION = tuple(
    replace(rule, shape="2Q H") if rule.gguf == "attn_q.weight" else rule
    for rule in (*ATTENTION, *QK_NORMS)
)
# Of the linear attention, its input projections left out.
_RECURRENCE = (
    TensorRule(
        "linear_attn.conv1d.weight",
        "ssm_conv1d.weight",
        "mixed 1 kernel",
        gguf_shape="mixed kernel",
        always_f32=True,
    ),
    TensorRule("linear_attn.A_log", "ssm_a", "heads"),
    TensorRule("linear_attn.dt_bias", "ssm_dt.bias", "heads"),
    TensorRule("linear_attn.norm.weight", "ssm_norm.weight", "head_values"),
    TensorRule("linear_attn.out_proj.weight", "ssm_out.weight", "H values"),
)
_MTP = MtpLayout(
    layer="layers.0.",
    rules=(
        TensorRule("fc.weight", "nextn.eh_proj.weight", "H 2H"),
        TensorRule(
            "pre_fc_norm_embedding.weight",
            "nextn.enorm.weight",
            "H",
            parameter="embedding_norm.weight",
        ),
        TensorRule(
            "pre_fc_norm_hidden.weight", "nextn.hnorm.weight", "H", parameter="hidden_norm.weight"
        ),
        TensorRule("norm.weight", "nextn.shared_head_norm.weight", "H"),
    ),
)
MTP_KEY = "mtp_num_hidden_layers"
_KEYS = (
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "shared_expert_intermediate_size",
)


class HybridMoe(DecoderModel):
    """One model with linear attention; what its input projections are is for a family to say."""

    outer = (HEAD, EMBEDDING, NORM)
    mtp = _MTP
    count_keys = ("num_experts",)  # transformers has no other spelling for these families
    fact_keys: ClassVar[tuple[str, ...]] = (
        *FACT_KEYS,
        *_KEYS,
        "shared_expert_intermediate_size",
    )
    defaults: ClassVar[Mapping[str, int]] = {"num_key_value_heads": 2, "head_dim": 256}
    inputs: ClassVar[tuple[TensorRule, ...]]  # projections into the linear attention
    layout: ClassVar[type[DeltaNet]] = DeltaNet  # where checkpoint and GGUF have the heads

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        common = common_config(keys)
        share = rotated_share(keys, common["head_dim"])
        return {
            **common,
            **linear_attention_config(keys),
            "layer_types": types_of(recurrent_layers(keys, common["num_hidden_layers"])),
            "rope_parameters": common["rope_parameters"] | {"partial_rotary_factor": share},
        }

    @classmethod
    def names_from_gguf(cls, keys: GgufKeys, keep_mtp: bool) -> tuple[str, ...]:
        has_mtp = keep_mtp and trunk_layers(keys)[1] > 0
        return super().names_from_gguf(keys, keep_mtp) + (("mtp.fc.weight",) if has_mtp else ())

    def read_facts(self) -> ModelFacts:
        self.refuse_common()
        self._refuse()
        self.layer_types, self.interval = read_layer_types(self.text)
        self.deltanet = self._read_deltanet(self.text)
        has_mtp = self.keep_mtp and any(self.in_mtp(name) for name in self.names)
        facts = self.common_facts(range(len(self.layer_types) + has_mtp), has_mtp)
        self.rotary_width = self._read_rotary_width(facts.head_dim)
        return facts

    def _refuse(self) -> None:
        """Refuse, by name, what llama.cpp or this program does not do."""
        read, theirs = self.text, f"llama.cpp's {self.gguf_arch}"
        read.expect("attn_output_gate", True, why=f"{theirs} gates its attention")
        read.expect("mlp_only_layers", [], why=f"{theirs} has experts in every layer")
        read.expect(MTP_KEY, 0, 1, why=f"{theirs} has one MTP block")
        read.expect("mtp_use_dedicated_embeddings", False, why="the MTP block shares embeddings")
        read.expect("norm_topk_prob", True, why=f"{theirs} normalises experts' weights")
        read.expect("decoder_sparse_step", 1, why=f"{theirs} has experts in every layer")
        read.expect("use_sliding_window", False, why=f"{theirs} has full attention")

    def _read_deltanet(self, read: ConfigReader) -> DeltaNet:
        """The heads of the linear attention."""
        keys = read.integer("linear_num_key_heads", low=1, high=MAX_HEADS)
        values = read.integer("linear_num_value_heads", low=1, high=MAX_HEADS)
        if values % keys:
            raise UnsupportedModelError(
                f"{read.where}: linear_num_value_heads is {values}, expected a multiple of "
                f"linear_num_key_heads, {keys}"
            )
        key_dim = read.integer("linear_key_head_dim", low=1, high=MAX_WIDTH)
        why = "it must equal linear_key_head_dim, since llama.cpp has one size for both"
        read.expect("linear_value_head_dim", key_dim, why=why)
        value_dim = read.integer("linear_value_head_dim", low=1, high=MAX_WIDTH)
        return self.layout(keys, values, key_dim, value_dim)

    @cached_property
    def rope(self) -> Rope:
        return read_rope(self.text, default_share=0.25)

    def _read_rotary_width(self, head_dim: int) -> int:
        share = self.rope.values.number("partial_rotary_factor", low=0, high=1)
        width = int(head_dim * share)
        check_rotary_width(self.rope, width, head_dim)
        return width

    @cached_property
    def mtp_prefix(self) -> str:
        nested = any(name.startswith("model.mtp.") for name in self.names)
        return "model.mtp." if nested else "mtp."

    def in_mtp(self, name: str) -> bool:
        return name.startswith(("mtp.", "model.mtp."))

    def mtp_templates(self) -> tuple[int, ...]:
        return (self.layer_types.index(FULL),)

    def config_values(self) -> dict[str, Any]:
        sizes = self.sizes()
        return {
            **super().config_values(),
            "layer_types": list(self.layer_types),
            "shared_expert_intermediate_size": sizes["S"],
            "linear_conv_kernel_dim": sizes["kernel"],
            "linear_num_key_heads": self.deltanet.n_key_heads,
            "linear_num_value_heads": self.deltanet.n_value_heads,
            "linear_key_head_dim": self.deltanet.key_dim,
            "linear_value_head_dim": self.deltanet.value_dim,
        }

    def sizes(self) -> Mapping[str, int]:
        net, read = self.deltanet, self.text
        return {
            **super().sizes(),
            "S": read.integer("shared_expert_intermediate_size", low=1, high=MAX_WIDTH),
            # transformers' value of an absent key, in both families' configs
            "kernel": read.integer("linear_conv_kernel_dim", low=1, high=MAX_WIDTH, default=4),
            "mixed": 2 * net.key_width + net.value_width,
            "values": net.value_width,
            "heads": net.n_value_heads,
            "head_values": net.value_dim,
        }

    def rules(self, layer: int) -> tuple[TensorRule, ...]:
        if self.layer_types[layer] == LINEAR:
            return (*_COMMON, *self.inputs, *_RECURRENCE)
        return (*_COMMON, *_ATTENTION)

    def transform(self, rule: TensorRule) -> Transform | None:
        # transformers adds one to every norm but the linear attention's
        is_norm = rule.gguf.endswith("norm.weight") and rule.gguf != "ssm_norm.weight"
        return self._transforms.get(rule.gguf, ADD_ONE if is_norm else None)

    @cached_property
    def _transforms(self) -> Mapping[str, Transform]:
        return self.deltanet.transforms()

    def rope_sections(self) -> tuple[int, ...] | None:
        """How rotated dimensions are shared out to the axes of images; None without images."""
        return None

    def header(self) -> list[Entry]:
        facts, net, read = self.facts, self.deltanet, self.text
        sections = self.rope_sections()
        recurrent = [one == LINEAR for one in self.layer_types] + [False] * facts.has_mtp
        llm, attention, ssm = Keys.LLM, Keys.Attention, Keys.SSM
        entries: list[Entry] = [
            (llm.BLOCK_COUNT, facts.n_blocks, UINT32),
            (llm.CONTEXT_LENGTH, facts.context_length, UINT32),
            (llm.EMBEDDING_LENGTH, facts.hidden_size, UINT32),
            (llm.FEED_FORWARD_LENGTH, self.dense_width(), UINT32),
            (attention.HEAD_COUNT, facts.n_heads, UINT32),
            (attention.HEAD_COUNT_KV, facts.n_kv_heads, UINT32),
            (Keys.Rope.DIMENSION_SECTIONS, sections and [*sections], ARRAY),
            (attention.LAYERNORM_RMS_EPS, read_epsilon(read), FLOAT32),
            (llm.EXPERT_COUNT, facts.n_experts, UINT32),
            (llm.EXPERT_USED_COUNT, facts.experts_per_token, UINT32),
            (attention.KEY_LENGTH, facts.head_dim, UINT32),
            (attention.VALUE_LENGTH, facts.head_dim, UINT32),
            (llm.EXPERT_FEED_FORWARD_LENGTH, facts.expert_width, UINT32),
            (llm.EXPERT_SHARED_FEED_FORWARD_LENGTH, self.sizes()["S"], UINT32),
            (ssm.CONV_KERNEL, self.sizes()["kernel"], UINT32),
            (ssm.STATE_SIZE, net.key_dim, UINT32),
            (ssm.GROUP_COUNT, net.n_key_heads, UINT32),
            (ssm.TIME_STEP_RANK, net.n_value_heads, UINT32),
            (ssm.INNER_SIZE, net.value_width, UINT32),
            (RECURRENT, recurrent, ARRAY),
            (llm.FULL_ATTENTION_INTERVAL, self.interval, UINT32),
            (Keys.Rope.DIMENSION_COUNT, self.rotary_width, UINT32),
            (llm.NEXTN_PREDICT_LAYERS, 1 if facts.has_mtp else None, UINT32),
        ]
        return entries

    def pruned_config(self, n_experts: int) -> dict[str, Any]:
        # the key must agree with the tensors, which some re-saved sources have lost
        config = super().pruned_config(n_experts)
        return rewritten(config, self.text_sections, {MTP_KEY: int(self.facts.has_mtp)})

    def claims_mtp(self) -> bool:
        """Whether config.json says that there is an MTP block."""
        return bool(self.text.values.get(MTP_KEY))

    def config_at_odds(self) -> str | None:
        if self.claims_mtp() is self.facts.has_mtp:
            return None
        claimed = self.text.values.get(MTP_KEY) or 0
        found = "an" if self.facts.has_mtp else "no"
        return f"config.json says {MTP_KEY} {claimed}, but the checkpoint has {found} MTP block"

    def caveats(self) -> tuple[str, ...]:
        found = [*super().caveats()]
        if self.claims_mtp() and not any(self.in_mtp(name) for name in self.names):
            found.append("the config names an MTP block that the checkpoint does not contain")
        if self.interval is None:
            found.append(
                "layers with full attention are not evenly spaced: GGUF files need a llama.cpp "
                "that reads attention.recurrent_layers (of September 2026, or newer); older ones "
                "do not load them"
            )
        return tuple(found)
