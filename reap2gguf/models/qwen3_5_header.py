"""The GGUF keys of `qwen35moe`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gguf import GGUFValueType, Keys

from reap2gguf.checkpoint.config import ConfigReader
from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.deltanet import DeltaNet
from reap2gguf.models.description import HeaderValue, ModelFacts
from reap2gguf.models.limits import MAX_WIDTH
from reap2gguf.models.rope import rope_metadata, rope_parameters

_UINT32, _FLOAT32, _ARRAY = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.ARRAY
_RECURRENT = "{arch}.attention.recurrent_layers"  # newer than gguf-py 0.19's constants
_DEFAULT_SECTIONS = (11, 11, 10)  # transformers' default where the config has none


def text_header(
    facts: ModelFacts, net: DeltaNet, read: ConfigReader, layer_kinds: Sequence[str]
) -> tuple[HeaderValue, ...]:
    """Every key of the architecture's own."""
    rope = rope_parameters(read.values, read.where)
    rotary = ConfigReader({**read.values, **rope}, read.where)
    sections = rotary.integers("mrope_section", 0, MAX_WIDTH) or _DEFAULT_SECTIONS
    if len(sections) > 4:
        raise UnsupportedModelError(
            f"{read.where}: mrope_section is {shown(sections)}, expected at most four numbers"
        )
    share = rotary.number("partial_rotary_factor", low=0, high=1, default=0.25)
    recurrent = [kind == "linear_attention" for kind in layer_kinds] + [False] * facts.has_mtp
    llm, attention, ssm = Keys.LLM, Keys.Attention, Keys.SSM
    entries: list[tuple[str, Any, GGUFValueType]] = [
        (llm.BLOCK_COUNT, facts.n_blocks, _UINT32),
        (llm.CONTEXT_LENGTH, facts.context_length, _UINT32),
        (llm.EMBEDDING_LENGTH, facts.hidden_size, _UINT32),
        (attention.HEAD_COUNT, facts.n_heads, _UINT32),
        (attention.HEAD_COUNT_KV, facts.n_kv_heads, _UINT32),
        (Keys.Rope.DIMENSION_SECTIONS, [*sections, 0, 0, 0][:4], _ARRAY),
        (attention.LAYERNORM_RMS_EPS, read.number("rms_norm_eps", low=0, high=1), _FLOAT32),
        (llm.EXPERT_COUNT, facts.n_experts, _UINT32),
        (llm.EXPERT_USED_COUNT, facts.experts_per_token, _UINT32),
        (attention.KEY_LENGTH, facts.head_dim, _UINT32),
        (attention.VALUE_LENGTH, facts.head_dim, _UINT32),
        (llm.EXPERT_FEED_FORWARD_LENGTH, facts.expert_width, _UINT32),
        (
            llm.EXPERT_SHARED_FEED_FORWARD_LENGTH,
            read.integer("shared_expert_intermediate_size", low=1, high=MAX_WIDTH),
            _UINT32,
        ),
        (ssm.CONV_KERNEL, read.integer("linear_conv_kernel_dim", low=1, high=MAX_WIDTH), _UINT32),
        (ssm.STATE_SIZE, net.key_dim, _UINT32),
        (ssm.GROUP_COUNT, net.n_key_heads, _UINT32),
        (ssm.TIME_STEP_RANK, net.n_value_heads, _UINT32),
        (ssm.INNER_SIZE, net.value_width, _UINT32),
        (_RECURRENT, recurrent, _ARRAY),
        (
            llm.FULL_ATTENTION_INTERVAL,
            read.integer("full_attention_interval", low=1, default=4),
            _UINT32,
        ),
        (Keys.Rope.DIMENSION_COUNT, int(facts.head_dim * share), _UINT32),
    ]
    if facts.has_mtp:
        entries.append((llm.NEXTN_PREDICT_LAYERS, 1, _UINT32))
    own = (HeaderValue(key.format(arch=facts.gguf_arch), v, kind) for key, v, kind in entries)
    return (*own, *rope_metadata(read.values, facts.gguf_arch, read.where))
