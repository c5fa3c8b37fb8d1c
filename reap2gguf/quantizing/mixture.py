"""Which tensor type each tensor gets from a file type, where the recipe has no rule for it.

llama-quantize keeps two counters, and types depend on them: attention values are counted as they
are met (a tensor that a rule overrides is not met), feed-forward tensors take their layer's number
(in the IQ1 and IQ2 family, they too are counted).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gguf import GGMLQuantizationType as Type

from reap2gguf.ggml import NEEDS_IMPORTANCE
from reap2gguf.gguf_files.tensor_types import IkType, block_of
from reap2gguf.quantizing.file_types import Mixture, Part, Place

if TYPE_CHECKING:
    from reap2gguf.models.description import GgufTensor

# what a tensor's name contains -> its part; the first that fits
_PARTS = (
    ("attn_qkv.weight", Part.ATTN_V),
    ("attn_v.weight", Part.ATTN_V),
    ("attn_k.weight", Part.ATTN_K),
    ("attn_q.weight", Part.ATTN_Q),
    ("attn_output.weight", Part.ATTN_OUTPUT),
    ("ffn_up", Part.FFN_UP),
    ("ffn_gate", Part.FFN_GATE),
    ("ffn_down", Part.FFN_DOWN),
)

# an embedding and a head of the MTP block's own, to llama.cpp matrices like any other
_WITHOUT_IMPORTANCE = ("nextn.embed_tokens.weight", "nextn.shared_head_head.weight")

# If a row is not a multiple of 256, a type with blocks of 32 replaces the one wanted.
_FALLBACK = {
    **dict.fromkeys(
        ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"], Type.IQ4_NL
    ),
    **dict.fromkeys(["Q2_K", "Q3_K", "TQ1_0", "TQ2_0"], Type.Q4_0),
    **{one.name: Type.IQ4_NL for one in IkType},
    **dict.fromkeys(["IQ5_K", "IQ5_KS"], Type.Q5_1),
    "IQ6_K": Type.Q8_0,
    "Q4_K": Type.Q5_0,
    "Q5_K": Type.Q5_1,
    "Q6_K": Type.Q8_0,
}


def mixture_part(name: str) -> Part:
    """The role of a GGUF tensor, by its name."""
    if name == "output.weight":
        return Part.OUTPUT
    if name == "token_embd.weight":
        return Part.TOKEN_EMBD
    return next((part for piece, part in _PARTS if piece in name), Part.OTHER)


def type_that_fits(tensor_type: Type, n_columns: int) -> Type:
    """`tensor_type`, or the type llama.cpp falls back to where rows do not fill its blocks."""
    if n_columns % block_of(tensor_type)[0] == 0:
        return tensor_type
    fallback = _FALLBACK.get(tensor_type.name, tensor_type)
    return fallback if n_columns % block_of(fallback)[0] == 0 else Type.F16


class MixtureChooser:
    """Chooses types tensor by tensor, in llama.cpp's order (by layer, then by name)."""

    def __init__(
        self,
        mixture: Mixture,
        tensors: Sequence[GgufTensor],
        n_layers: int,
        n_experts: int,
        gqa: int,
        has_imatrix: bool,
    ) -> None:
        self._mixture = mixture
        self._n_layers = n_layers
        self._n_experts = n_experts
        self._gqa = gqa
        self._has_imatrix = has_imatrix
        self._tied = all(tensor.name != "output.weight" for tensor in tensors)
        self._n_values = sum(mixture_part(tensor.name) is Part.ATTN_V for tensor in tensors)
        self._met: Counter[Part] = Counter()

    def fitted(self, tensor: GgufTensor, wanted: Type) -> Type:
        """The type of a tensor that no rule overrides: `wanted`, as far as its rows fit."""
        base = self._mixture.base
        if self._is_output(tensor) and tensor.n_columns % block_of(base)[0]:
            wanted = Type.Q8_0
        return type_that_fits(wanted, tensor.n_columns)

    def _is_output(self, tensor: GgufTensor) -> bool:
        part = mixture_part(tensor.name)
        return part is Part.OUTPUT or (self._tied and part is Part.TOKEN_EMBD)

    def choose(self, tensor: GgufTensor) -> Type:
        """The type that the mixture gives a tensor, whatever the length of its rows."""
        mixture = self._mixture
        part = mixture_part(tensor.name)
        if mixture.base in (Type.F32, Type.F16, Type.BF16):
            return mixture.base
        if self._is_output(tensor):
            return mixture.output
        place = self._place(part, tensor)
        tensor_type = self._for_eight_experts(part) or next(
            (
                tensor_type
                for p, when, tensor_type in mixture.exceptions
                if p is part and when(place)
            ),
            mixture.base,
        )
        weighted = NEEDS_IMPORTANCE | mixture.needs_importance
        if tensor_type in weighted and tensor.name.endswith(_WITHOUT_IMPORTANCE):
            tensor_type = mixture.output  # llama-quantize refuses to write such a file
        return tensor_type

    def _place(self, part: Part, tensor: GgufTensor) -> Place:
        layer = re.match(r"blk\.(\d+)\.", tensor.name)
        index, count = int(layer[1]) if layer else 0, self._n_layers
        if part is Part.ATTN_V:
            index, count = self._met[part], self._n_values
        elif part is Part.FFN_DOWN and self._mixture.low_bit:
            index = self._met[part]
        self._met[part] += 1
        return Place(index, count, self._gqa, self._n_experts, self._has_imatrix, tensor.n_matrices)

    def _for_eight_experts(self, part: Part) -> Type | None:
        """llama.cpp spends more on the attention of models with exactly eight experts (Mixtral)."""
        if self._n_experts != 8 or self._mixture.experts_alone:
            return None
        if part in (Part.ATTN_V, Part.ATTN_K):
            return Type.Q4_K if self._mixture.low_bit else Type.Q8_0
        if part is Part.ATTN_OUTPUT:
            return self._mixture.eight_expert_output or self._mixture.base
        return None
