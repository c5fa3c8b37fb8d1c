"""The keys of a GGUF header that most architectures have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gguf import GGUFValueType, Keys

if TYPE_CHECKING:
    from reap2gguf.models.description import ModelFacts
    from reap2gguf.models.shared import Entry

_UINT32, _FLOAT32 = GGUFValueType.UINT32, GGUFValueType.FLOAT32


def common_entries(facts: ModelFacts, dense_width: int | None, epsilon: float) -> list[Entry]:
    """Sizes, heads, norms and experts, in the order of llama.cpp's converter.

    `dense_width` is that of dense feed-forward layers, `epsilon` what norms add.
    """
    llm, attention = Keys.LLM, Keys.Attention
    groups: list[Entry] = []
    if facts.n_groups > 1:
        groups = [
            (llm.EXPERT_GROUP_COUNT, facts.n_groups, _UINT32),
            (llm.EXPERT_GROUP_USED_COUNT, facts.groups_per_token, _UINT32),
        ]
    return [
        (llm.BLOCK_COUNT, facts.n_blocks, _UINT32),
        (llm.CONTEXT_LENGTH, facts.context_length, _UINT32),
        (llm.EMBEDDING_LENGTH, facts.hidden_size, _UINT32),
        (llm.FEED_FORWARD_LENGTH, dense_width, _UINT32),
        (attention.HEAD_COUNT, facts.n_heads, _UINT32),
        (attention.HEAD_COUNT_KV, facts.n_kv_heads, _UINT32),
        (attention.LAYERNORM_RMS_EPS, epsilon, _FLOAT32),
        (attention.KEY_LENGTH, facts.head_dim, _UINT32),
        (attention.VALUE_LENGTH, facts.head_dim, _UINT32),
        (llm.EXPERT_COUNT, facts.n_experts, _UINT32),
        (llm.EXPERT_USED_COUNT, facts.experts_per_token, _UINT32),
        (llm.EXPERT_FEED_FORWARD_LENGTH, facts.expert_width, _UINT32),
        *groups,
    ]
