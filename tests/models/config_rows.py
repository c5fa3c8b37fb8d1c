"""What a table says of a field of one of transformers' config classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Read:
    """Read as transformers reads it; another value is one more that is possible."""

    other: Any
    may_be_null: bool = False  # in transformers too


@dataclass(frozen=True)
class Refused:
    """Refused unless it has one value; the others are some that are refused."""

    others: tuple[Any, ...]


@dataclass(frozen=True)
class Carried:
    """Of no effect on weights or logits; another value changes nothing but the config."""

    other: Any


@dataclass(frozen=True)
class Elsewhere:
    """Tested by another file."""

    file: str


Row = Read | Refused | Carried | Elsewhere
EVERY_CONFIG: dict[str, Row] = {
    "transformers_version": Carried("4.51.0"),
    "architectures": Elsewhere("test_table.py"),
    "output_hidden_states": Carried(True),
    "return_dict": Refused((False, None)),
    "dtype": Carried("float32"),
    "chunk_size_feed_forward": Carried(2),
    "is_encoder_decoder": Carried(True),
    "id2label": Carried({"0": "a", "1": "b", "2": "c"}),
    "label2id": Carried({"a": 0, "b": 1}),
    "problem_type": Carried("regression"),
}
TEXT: dict[str, Row] = {
    **EVERY_CONFIG,
    "vocab_size": Read(5000),
    "hidden_size": Read(128),
    "num_hidden_layers": Read(8),
    "num_attention_heads": Read(16),
    "num_key_value_heads": Read(4),
    "hidden_act": Refused(("gelu", "swish", None)),
    "max_position_embeddings": Read(1024),
    "initializer_range": Carried(0.5),
    "rms_norm_eps": Read(1e-5),
    "use_cache": Carried(False),
    "tie_word_embeddings": Elsewhere("test_tying.py"),
    "rope_parameters": Elsewhere("test_rope.py"),
    "attention_bias": Refused((True, None, 1)),
    "attention_dropout": Carried(0.5),
    "moe_intermediate_size": Read(64),
    "num_experts_per_tok": Read(3),
    "num_experts": Read(16),
    "output_router_logits": Carried(True),
    "router_aux_loss_coef": Carried(0.5),
    "pad_token_id": Carried(3),
    "bos_token_id": Carried(3),
    "eos_token_id": Carried([3, 4]),
}
