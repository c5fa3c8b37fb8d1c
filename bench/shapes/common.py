"""Names and shapes of what many families have, as their checkpoints store it."""

from __future__ import annotations

from collections.abc import Iterator

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def projections(prefix: str, hidden: int, query: int, key: int) -> Shapes:
    """The four matrices of an attention whose queries and keys are this wide."""
    yield f"{prefix}self_attn.q_proj.weight", (query, hidden)
    yield f"{prefix}self_attn.k_proj.weight", (key, hidden)
    yield f"{prefix}self_attn.v_proj.weight", (key, hidden)
    yield f"{prefix}self_attn.o_proj.weight", (hidden, query)


def ends(config: dict) -> Shapes:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden)


def plain_attention(prefix: str, config: dict) -> Shapes:
    """Heads that are, together, as wide as the hidden states."""
    hidden = config["hidden_size"]
    head = hidden // config["num_attention_heads"]
    yield from projections(prefix, hidden, hidden, config["num_key_value_heads"] * head)


def attention(prefix: str, config: dict, query_rows: int) -> Shapes:
    hidden, head = config["hidden_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield f"{prefix}self_attn.q_proj.weight", (query_rows * query, hidden)
    yield f"{prefix}self_attn.k_proj.weight", (key, hidden)
    yield f"{prefix}self_attn.v_proj.weight", (key, hidden)
    yield f"{prefix}self_attn.o_proj.weight", (hidden, query)
    yield f"{prefix}self_attn.q_norm.weight", (head,)
    yield f"{prefix}self_attn.k_norm.weight", (head,)


def experts(prefix: str, config: dict, fused: bool) -> Shapes:
    count = config["num_experts"]
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    hidden = config["hidden_size"]
    yield f"{prefix}mlp.gate.weight", (count, hidden)
    if fused:
        yield f"{prefix}mlp.experts.gate_up_proj", (count, 2 * width, hidden)
        yield f"{prefix}mlp.experts.down_proj", (count, hidden, width)
        return
    for expert in range(count):
        yield f"{prefix}mlp.experts.{expert}.gate_proj.weight", (width, hidden)
        yield f"{prefix}mlp.experts.{expert}.up_proj.weight", (width, hidden)
        yield f"{prefix}mlp.experts.{expert}.down_proj.weight", (hidden, width)


def norms(prefix: str, hidden: int) -> Shapes:
    yield f"{prefix}input_layernorm.weight", (hidden,)
    yield f"{prefix}post_attention_layernorm.weight", (hidden,)


def shared_expert(prefix: str, config: dict) -> Shapes:
    hidden, width = config["hidden_size"], config["shared_expert_intermediate_size"]
    yield f"{prefix}mlp.shared_expert.gate_proj.weight", (width, hidden)
    yield f"{prefix}mlp.shared_expert.up_proj.weight", (width, hidden)
    yield f"{prefix}mlp.shared_expert.down_proj.weight", (hidden, width)
    yield f"{prefix}mlp.shared_expert_gate.weight", (1, hidden)
