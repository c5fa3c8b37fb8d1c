"""Rules: one line per stored tensor, and those that most decoders have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from reap2gguf.models.description import Floats, GgufTensor, Slab, Transform, missing, picked

if TYPE_CHECKING:
    from reap2gguf.checkpoint.safetensors_header import StoredTensor


@dataclass(frozen=True)
class TensorRule:
    """What one stored tensor is: its names on both sides, its shape, and what it multiplies.

    A size is a letter of the model's (`DecoderModel.sizes`), a number, or both: "2H". A tensor
    with the size E is the router's and is pruned along that axis.
    """

    stored: str  # name below its block's prefix
    gguf: str  # name below `blk.N.`
    shape: str  # stored sizes, slowest first: "V H"
    gguf_shape: str = ""  # where a transform changes the shape
    # transformers' name within the layer, where that is another; rules that share one are parts of
    # it, one after another on axis 0
    parameter: str = ""
    input_of: str = ""  # the module whose input this matrix multiplies too
    always_f32: bool = False
    computed_in_f32: bool = False  # whatever the type of transformers' module, which would round it
    # of an MTP block: what of the model's it has its own of; such a rule holds where it is stored
    replaces: Literal["", "embedding", "head"] = ""

    @property
    def axis_of_experts(self) -> int | None:
        """The axis with one entry per expert, in a router's tensor."""
        sizes = self.shape.split()
        return sizes.index("E") if "E" in sizes else None

    @property
    def fed_by(self) -> str | None:
        """The linear module whose input a matrix multiplies.

        None if it is not a matrix, or an embedding or a head, which have no importance.
        """
        is_matrix = len(self.shape.split()) == 2 and self.stored.endswith(".weight")
        if not is_matrix or self.replaces:
            return None
        return self.input_of or self.in_module.removesuffix(".weight")

    @property
    def in_module(self) -> str:
        """transformers' name of the tensor within its layer."""
        return self.parameter or self.stored


@dataclass(frozen=True)
class MtpLayout:
    """How a family stores its multi-token-prediction block, below the block's prefix."""

    # what the names of its decoder layer begin with, of that with experts where there are several;
    # "" where they stand beside `rules`
    layer: str
    # `parameter` of each is one of observing.mtp.MtpBlock: fc, embedding_norm, hidden_norm, norm
    rules: tuple[TensorRule, ...]
    module: str = "layer."  # what names within the module of that decoder layer begin with


def nested(
    rules: tuple[TensorRule, ...], stored_prefix: str, module_prefix: str
) -> tuple[TensorRule, ...]:
    """Rules of a layer that is part of a larger block, such as one for multi-token prediction."""
    return tuple(
        replace(
            rule,
            stored=stored_prefix + rule.stored,
            parameter=module_prefix + rule.in_module,
            input_of=rule.input_of and module_prefix + rule.input_of,
        )
        for rule in rules
    )


def sizes_of(shape: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A rule's shape in numbers.

    >>> sizes_of("1 2H", {"H": 64})
    (1, 128)
    """

    def size(token: str) -> int:
        letters = token.lstrip("0123456789")
        factor = token.removesuffix(letters)
        return int(factor or 1) * (sizes[letters] if letters else 1)

    return tuple(size(token) for token in shape.split())


def single(
    stored: Mapping[str, StoredTensor],
    name: str,
    gguf_name: str,
    always_f32: bool = False,
    transform: Transform | None = None,
    shape: tuple[int, ...] | None = None,
) -> GgufTensor:
    """A GGUF tensor that is one stored tensor; vectors, norms and all but weights are F32.

    `shape` is given where the transform changes it. Raises CheckpointError if it is not stored.
    """
    if name not in stored:
        raise missing(name)
    shape = shape or stored[name].shape
    norm = gguf_name.endswith("_norm.weight")
    pinned = always_f32 or len(shape) < 2 or norm or not gguf_name.endswith(".weight")
    return GgufTensor(gguf_name, shape, (Slab(name),), always_f32=pinned, transform=transform)


def paired_halves(n_heads: int, head_dim: int) -> Transform:
    """Rows of heads as llama.cpp's converter has them: the two halves of a head alternate."""
    rows = np.arange(n_heads * head_dim, dtype=np.int64).reshape(n_heads, 2, -1)
    return picked(rows.swapaxes(1, 2).reshape(-1))


def _subtract_one(values: Floats, stored: Floats) -> None:
    stored[...] = values - np.float32(1)


# Norms stored around zero, as llama.cpp wants them: around one.
ADD_ONE = Transform(lambda values: values + np.float32(1), _subtract_one)

# Outside the layers; `{text}` is the prefix of the text model, `{head}` that of its head.
EMBEDDING = TensorRule("{text}embed_tokens.weight", "token_embd.weight", "V H")
NORM = TensorRule("{text}norm.weight", "output_norm.weight", "H")
HEAD = TensorRule("{head}lm_head.weight", "output.weight", "V H")
# Within a layer.
# Old versions of transformers saved it, and so do the published Moonlight and Kimi-K2. It follows
# from the config: transformers ignores it, and llama.cpp's converter leaves it out.
ROTARY_BUFFER = "self_attn.rotary_emb.inv_freq"
ATTN_NORM = TensorRule("input_layernorm.weight", "attn_norm.weight", "H")
ATTENTION = (
    TensorRule("self_attn.q_proj.weight", "attn_q.weight", "Q H"),
    TensorRule("self_attn.k_proj.weight", "attn_k.weight", "KV H", input_of="self_attn.q_proj"),
    TensorRule("self_attn.v_proj.weight", "attn_v.weight", "KV H", input_of="self_attn.q_proj"),
    TensorRule("self_attn.o_proj.weight", "attn_output.weight", "H Q"),
)
QKV_BIASES = (
    TensorRule("self_attn.q_proj.bias", "attn_q.bias", "Q"),
    TensorRule("self_attn.k_proj.bias", "attn_k.bias", "KV"),
    TensorRule("self_attn.v_proj.bias", "attn_v.bias", "KV"),
)
QK_NORMS = (
    TensorRule("self_attn.q_norm.weight", "attn_q_norm.weight", "D"),
    TensorRule("self_attn.k_norm.weight", "attn_k_norm.weight", "D"),
)
FFN_NORM = TensorRule("post_attention_layernorm.weight", "ffn_norm.weight", "H")
DENSE_FFN = (
    TensorRule("mlp.gate_proj.weight", "ffn_gate.weight", "I H"),
    TensorRule("mlp.up_proj.weight", "ffn_up.weight", "I H", input_of="mlp.gate_proj"),
    TensorRule("mlp.down_proj.weight", "ffn_down.weight", "H I"),
)
ROUTER = TensorRule("mlp.gate.weight", "ffn_gate_inp.weight", "E H", always_f32=True)
SHARED_EXPERT = (
    TensorRule(
        "mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight", "1 H", always_f32=True
    ),
    TensorRule("mlp.shared_expert.gate_proj.weight", "ffn_gate_shexp.weight", "S H"),
    TensorRule(
        "mlp.shared_expert.up_proj.weight",
        "ffn_up_shexp.weight",
        "S H",
        input_of="mlp.shared_expert.gate_proj",
    ),
    TensorRule("mlp.shared_expert.down_proj.weight", "ffn_down_shexp.weight", "H S"),
)
# What is added to a router's scores for the choice of experts alone (DeepSeek-V3, GLM).
SCORE_BIAS = TensorRule("mlp.gate.e_score_correction_bias", "exp_probs_b.bias", "E")
# Experts that every token goes through, stored as one wide one (S: the widths of all together).
SHARED_EXPERTS = (
    TensorRule("mlp.shared_experts.gate_proj.weight", "ffn_gate_shexp.weight", "S H"),
    TensorRule(
        "mlp.shared_experts.up_proj.weight",
        "ffn_up_shexp.weight",
        "S H",
        input_of="mlp.shared_experts.gate_proj",
    ),
    TensorRule("mlp.shared_experts.down_proj.weight", "ffn_down_shexp.weight", "H S"),
)
# An MTP block stored as one more decoder layer (DeepSeek-V3, GLM). GLM-4.5 has an embedding and a
# head of its own there, GLM-4.6 has not.
NEXTN = MtpLayout(
    layer="",
    rules=(
        TensorRule("eh_proj.weight", "nextn.eh_proj.weight", "H 2H", parameter="fc.weight"),
        TensorRule("enorm.weight", "nextn.enorm.weight", "H", parameter="embedding_norm.weight"),
        TensorRule("hnorm.weight", "nextn.hnorm.weight", "H", parameter="hidden_norm.weight"),
        TensorRule(
            "shared_head.norm.weight", "nextn.shared_head_norm.weight", "H", parameter="norm.weight"
        ),
        TensorRule("embed_tokens.weight", "nextn.embed_tokens.weight", "V H", replaces="embedding"),
        TensorRule(
            "shared_head.head.weight", "nextn.shared_head_head.weight", "V H", replaces="head"
        ),
    ),
)


def joined_parameters(rules: Iterable[TensorRule]) -> dict[str, tuple[str, ...]]:
    """The parameters of a layer's module that several stored tensors make, and those tensors."""
    found: dict[str, dict[str, None]] = {}
    for rule in rules:
        found.setdefault(rule.in_module, {})[rule.stored] = None
    return {module: tuple(stored) for module, stored in found.items() if len(stored) > 1}


def fed_matrices(rules: Iterable[TensorRule], layer: int) -> dict[str, tuple[str, ...]]:
    """The GGUF matrices of a layer, by the module whose input feeds them."""
    found: dict[str, tuple[str, ...]] = {}
    for rule in rules:
        if (module := rule.fed_by) is not None:
            found[module] = (*found.get(module, ()), f"blk.{layer}.{rule.gguf}")
    return found
