"""The tensors of one well-known model, so that sizes of recipes can be compared without a model.

Shapes are those of Qwen3-30B-A3B: 48 layers of 128 experts.
"""

from __future__ import annotations

from collections.abc import Iterator

from reap2gguf.models.description import GgufTensor, ModelFacts

REFERENCE_NAME = "Qwen3-30B-A3B"
REFERENCE_FACTS = ModelFacts(
    architecture="Qwen3MoeForCausalLM",
    gguf_arch="qwen3moe",
    n_layers=48,
    moe_layers=tuple(range(48)),
    hidden_size=2048,
    expert_width=768,
    n_experts=128,
    experts_per_token=8,
    n_heads=32,
    n_kv_heads=4,
    head_dim=128,
    vocab_size=151936,
    context_length=40960,
    tied_embeddings=False,
)


def reference_tensors() -> tuple[GgufTensor, ...]:
    """Names and shapes of its GGUF tensors; they have no values."""
    facts = REFERENCE_FACTS
    hidden, vocab = facts.hidden_size, facts.vocab_size
    found = [
        GgufTensor("token_embd.weight", (vocab, hidden), ()),
        GgufTensor("output_norm.weight", (hidden,), (), always_f32=True),
        GgufTensor("output.weight", (vocab, hidden), ()),
    ]
    for layer in range(facts.n_layers):
        found += _layer(f"blk.{layer}.", facts)
    return tuple(found)


def _layer(prefix: str, facts: ModelFacts) -> Iterator[GgufTensor]:
    hidden, width, n_experts = facts.hidden_size, facts.expert_width, facts.n_experts
    queries, keys = facts.n_heads * facts.head_dim, facts.n_kv_heads * facts.head_dim
    matrices = {
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate_exps": (n_experts, width, hidden),
        "ffn_up_exps": (n_experts, width, hidden),
        "ffn_down_exps": (n_experts, hidden, width),
    }
    for name, shape in matrices.items():
        yield GgufTensor(f"{prefix}{name}.weight", shape, ())
    norms = {"attn_norm": hidden, "ffn_norm": hidden}
    norms |= dict.fromkeys(("attn_q_norm", "attn_k_norm"), facts.head_dim)
    for name, size in norms.items():
        yield GgufTensor(f"{prefix}{name}.weight", (size,), (), always_f32=True)
    yield GgufTensor(f"{prefix}ffn_gate_inp.weight", (n_experts, hidden), (), always_f32=True)
