"""Qwen3.5-MoE (Qwen3.5-35B-A3B): DeltaNet, a shared expert, a vision tower and an MTP block.

The Hub's layout nests the text model's config and names (`text_config`, `model.language_model.*`)
and fuses the experts (3D) except those of the MTP block (2D); re-saved checkpoints are flat, or 2D
throughout, or have lost the MTP block. All of them are read; what is written keeps the source's
layout. GGUF names, types and keys are those of llama.cpp's `qwen35moe`, where the MTP block is the
last layer and has `nextn.*`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
from gguf import Keys

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.deltanet import DeltaNet
from reap2gguf.models.description import MAX_HEADS, MAX_WIDTH, ModelFacts, SideFile, Transform
from reap2gguf.models.facts import (
    FACT_KEYS,
    read_epsilon,
)
from reap2gguf.models.from_gguf import common_config, trunk_layers
from reap2gguf.models.layer_types import read_layer_types, types_of
from reap2gguf.models.linear_from_gguf import (
    RECURRENT,
    linear_attention_config,
    partial_rope,
    recurrent_layers,
)
from reap2gguf.models.mrope import read_sections
from reap2gguf.models.qwen_vision import DEEPSTACK, refuse_tower, tower_caveats, vision_projector
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
from reap2gguf.models.shared import (
    ARRAY,
    FLOAT32,
    UINT32,
    DecoderModel,
    Entry,
)

if TYPE_CHECKING:
    from reap2gguf.checkpoint.config import ConfigReader
    from reap2gguf.checkpoint.safetensors_header import StoredTensor
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
_QKV = "linear_attn.in_proj_qkv"
_DELTANET = (
    TensorRule(f"{_QKV}.weight", "attn_qkv.weight", "mixed H"),
    TensorRule("linear_attn.in_proj_z.weight", "attn_gate.weight", "values H", input_of=_QKV),
    TensorRule("linear_attn.in_proj_a.weight", "ssm_alpha.weight", "heads H", input_of=_QKV),
    TensorRule("linear_attn.in_proj_b.weight", "ssm_beta.weight", "heads H", input_of=_QKV),
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
_MTP_KEY = "mtp_num_hidden_layers"
_VISION = ("model.visual.", "visual.")
_LINEAR_KEYS = (
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
)


class Qwen35Moe(DecoderModel):
    """One Qwen3.5-MoE model."""

    model_type: ClassVar[str] = "qwen3_5_moe"
    gguf_arch: ClassVar[str] = "qwen35moe"
    outer = (HEAD, EMBEDDING, NORM)
    mtp = _MTP
    count_keys = ("num_experts",)  # transformers has no other spelling for this family
    text_sections = ("text_config",)
    carried_prefixes = _VISION
    fact_keys = (*FACT_KEYS, *_LINEAR_KEYS, "shared_expert_intermediate_size")
    defaults: ClassVar[Mapping[str, int]] = {"num_key_value_heads": 2, "head_dim": 256}

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        common = common_config(keys)
        return {
            "architectures": ["Qwen3_5MoeForCausalLM"],
            "model_type": f"{cls.model_type}_text",
            **common,
            **linear_attention_config(keys),
            "layer_types": types_of(recurrent_layers(keys, common["num_hidden_layers"])),
            "rope_parameters": common["rope_parameters"] | partial_rope(keys, common["head_dim"]),
            _MTP_KEY: trunk_layers(keys)[1],
        }

    @classmethod
    def names_from_gguf(cls, keys: GgufKeys, keep_mtp: bool) -> tuple[str, ...]:
        has_mtp = keep_mtp and trunk_layers(keys)[1] > 0
        return super().names_from_gguf(keys, keep_mtp) + (("mtp.fc.weight",) if has_mtp else ())

    def read_facts(self) -> ModelFacts:
        self._refuse()
        self.layer_types, self.interval = read_layer_types(self.text)
        self.deltanet = _read_deltanet(self.text)
        has_mtp = self.keep_mtp and any(self.in_mtp(name) for name in self.names)
        if has_mtp and "full_attention" not in self.layer_types:
            raise UnsupportedModelError(
                f"{self.text.where}: no layer is full_attention, which the MTP block needs"
            )
        n_blocks = len(self.layer_types) + has_mtp
        facts = self.common_facts(range(n_blocks), has_mtp)
        self.rotary_width = self._read_rotary_width(facts.head_dim)
        self.sections = read_sections(self.rope.values, self.rotary_width, facts.head_dim)
        return facts

    def _refuse(self) -> None:
        """Refuse, by name, what llama.cpp's qwen35moe or this program does not do."""
        read = self.text
        self._refuse_model_types()
        self.refuse_common()
        read.expect("attn_output_gate", True, why="llama.cpp's qwen35moe gates its attention")
        read.expect("mlp_only_layers", [], why="llama.cpp's qwen35moe has experts in every layer")
        read.expect(_MTP_KEY, 0, 1, why="llama.cpp's qwen35moe has one MTP block")
        read.expect("mtp_use_dedicated_embeddings", False, why="the MTP block shares embeddings")
        read.expect("norm_topk_prob", True, why="llama.cpp's qwen35moe normalises experts' weights")
        read.expect("decoder_sparse_step", 1, why="every layer of a Qwen3.5-MoE has experts")
        read.expect("use_sliding_window", False, why="llama.cpp's qwen35moe has full attention")

    def _refuse_model_types(self) -> None:
        """Refuse a config whose model type and nesting disagree: transformers goes by the type."""
        flat, nested = f"{self.model_type}_text", self.model_type
        found = self.config.get("model_type")
        if found not in (flat, nested):
            raise UnsupportedModelError(
                f"{self.reader.where}: model_type is {shown(found)}, expected '{nested}' or "
                f"'{flat}'"
            )
        if self.is_nested is not (found == nested):
            has = "has a" if self.is_nested else "has no"
            raise UnsupportedModelError(
                f"{self.reader.where}: model_type is {found}, but the config {has} text_config; "
                f"expected {nested} with one, or {flat} without"
            )
        if self.is_nested:
            why = "it is the type of the text model"
            self.text.expect("model_type", flat, why=why)
        # with null, transformers does not find the names of the weights
        for section in ("text_config", "vision_config"):
            self.reader.with_values(self.reader.section(section)).refuse_nulls(("model_type",))

    @cached_property
    def rope(self) -> Rope:
        return read_rope(self.text, default_share=0.25)

    def _read_rotary_width(self, head_dim: int) -> int:
        share = self.rope.values.number("partial_rotary_factor", low=0, high=1)
        width = int(head_dim * share)
        check_rotary_width(self.rope, width, head_dim)
        self.rope.values.expect(
            "mrope_interleaved", True, why="transformers and llama.cpp interleave the sections"
        )
        return width

    @cached_property
    def text_prefix(self) -> str:
        nested = any(name.startswith("model.language_model.") for name in self.names)
        return "model.language_model." if nested else "model."

    @cached_property
    def mtp_prefix(self) -> str:
        nested = any(name.startswith("model.mtp.") for name in self.names)
        return "model.mtp." if nested else "mtp."

    def in_mtp(self, name: str) -> bool:
        return name.startswith(("mtp.", "model.mtp."))

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

    def mtp_template(self) -> int:
        return self.layer_types.index("full_attention")

    def sizes(self) -> Mapping[str, int]:
        net, read = self.deltanet, self.text
        return {
            **super().sizes(),
            "S": read.integer("shared_expert_intermediate_size", low=1, high=MAX_WIDTH),
            # transformers' value of an absent key, in Qwen3_5MoeTextConfig
            "kernel": read.integer("linear_conv_kernel_dim", low=1, high=MAX_WIDTH, default=4),
            "mixed": 2 * net.key_width + net.value_width,
            "values": net.value_width,
            "heads": net.n_value_heads,
            "head_values": net.value_dim,
        }

    def rules(self, layer: int) -> tuple[TensorRule, ...]:
        is_linear = self.layer_types[layer] == "linear_attention"
        return (*_COMMON, *(_DELTANET if is_linear else _ATTENTION))

    def transform(self, rule: TensorRule) -> Transform | None:
        net = self.deltanet
        transforms: dict[str, Transform | None] = {
            "attn_qkv.weight": net.mixed,
            "attn_gate.weight": net.gates,
            "ssm_alpha.weight": net.heads,
            "ssm_beta.weight": net.heads,
            "ssm_conv1d.weight": net.convolution,
            "ssm_a": net.decay,
            "ssm_dt.bias": net.heads,
            "ssm_norm.weight": None,
            "ssm_out.weight": net.outputs,
        }
        is_norm = rule.gguf.endswith("norm.weight")
        return transforms.get(rule.gguf, ADD_ONE if is_norm else None)

    def header(self) -> list[Entry]:
        facts, net, read = self.facts, self.deltanet, self.text
        recurrent = [one == "linear_attention" for one in self.layer_types] + [
            False
        ] * facts.has_mtp
        llm, attention, ssm = Keys.LLM, Keys.Attention, Keys.SSM
        entries: list[Entry] = [
            (llm.BLOCK_COUNT, facts.n_blocks, UINT32),
            (llm.CONTEXT_LENGTH, facts.context_length, UINT32),
            (llm.EMBEDDING_LENGTH, facts.hidden_size, UINT32),
            (attention.HEAD_COUNT, facts.n_heads, UINT32),
            (attention.HEAD_COUNT_KV, facts.n_kv_heads, UINT32),
            (Keys.Rope.DIMENSION_SECTIONS, [*self.sections], ARRAY),
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
        ]
        if facts.has_mtp:
            entries.append((llm.NEXTN_PREDICT_LAYERS, 1, UINT32))
        return entries

    def pruned_config(self, n_experts: int) -> dict[str, Any]:
        # the key must agree with the tensors, which some re-saved sources have lost
        config = super().pruned_config(n_experts)
        has_mtp = int(self.facts.has_mtp)
        if _MTP_KEY in config:
            config[_MTP_KEY] = has_mtp
        text = config.get("text_config") or config
        if has_mtp or _MTP_KEY in text:
            text[_MTP_KEY] = has_mtp
        return config

    def column_order(self, name: str) -> npt.NDArray[np.int64] | None:
        if name.endswith(".ssm_out.weight"):
            return self.deltanet.value_order(self.deltanet.value_dim)
        return None

    def side_files(self, folder: Path, stored: Mapping[str, StoredTensor]) -> tuple[SideFile, ...]:
        if not any(name.startswith(_VISION) for name in self.names):
            return ()
        refuse_tower(self.reader, self.facts.hidden_size)
        read = self.reader.with_values(self.reader.section("vision_config"))
        read.expect(DEEPSTACK, [], why="llama.cpp's qwen35moe takes the tower's last layer alone")
        return (vision_projector(self.reader, folder, stored, self.facts.hidden_size),)

    def config_at_odds(self) -> str | None:
        claimed = self.text.values.get(_MTP_KEY) or 0
        if bool(claimed) is self.facts.has_mtp:
            return None
        found = "an" if self.facts.has_mtp else "no"
        return f"config.json says {_MTP_KEY} {claimed}, but the checkpoint has {found} MTP block"

    def caveats(self) -> tuple[str, ...]:
        found = [*super().caveats()]
        has_tower = any(name.startswith(_VISION) for name in self.names)
        claimed = self.text.values.get(_MTP_KEY) or 0
        if claimed and not any(self.in_mtp(name) for name in self.names):
            found.append("the config names an MTP block that the checkpoint does not contain")
        found += tower_caveats(has_tower, bool(self.config.get("vision_config")))
        if self.interval is None:
            found.append(
                "layers with full attention are not evenly spaced: GGUF files need a llama.cpp "
                "that reads attention.recurrent_layers (of September 2026, or newer); older ones "
                "do not load them"
            )
        return tuple(found)


def _read_deltanet(read: ConfigReader) -> DeltaNet:
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
    return DeltaNet(keys, values, key_dim, value_dim)
