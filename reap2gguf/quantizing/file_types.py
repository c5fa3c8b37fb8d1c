"""llama.cpp's file types as one table: a base tensor type, and exceptions by the tensor's role.

The exceptions are facts of llama.cpp b11434 (`src/llama-quant.cpp`); the tests compare them with
what llama-quantize chose for whole models and with `llama_model_quantize` itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType

from reap2gguf.errors import RecipeError
from reap2gguf.gguf_files.tensor_types import IkFileType, IkType


class Part(Enum):
    """The roles that the mixtures distinguish."""

    OUTPUT = auto()
    TOKEN_EMBD = auto()
    ATTN_V = auto()  # attn_v, or attn_qkv where the three are one matrix
    ATTN_K = auto()
    ATTN_Q = auto()
    ATTN_OUTPUT = auto()
    FFN_UP = auto()
    FFN_GATE = auto()
    FFN_DOWN = auto()
    OTHER = auto()


@dataclass(frozen=True)
class Place:
    """Where in the model a tensor stands when its type is chosen."""

    index: int  # how many of its part came before, or its layer
    count: int  # how many of its part there are, or the number of layers
    gqa: int  # query heads per key-value head
    n_experts: int
    has_imatrix: bool
    n_matrices: int = 1  # GGML's ne[2]

    @property
    def in_first_eighth(self) -> bool:
        return self.index < self.count // 8

    @property
    def deserves_more_bits(self) -> bool:
        """The first and last eighth of the layers, and every third between."""
        eighth = self.count // 8
        inside = self.in_first_eighth or self.index >= 7 * self.count // 8
        return inside or (self.index - eighth) % 3 == 2


When = Callable[[Place], bool]


def _always(place: Place) -> bool:
    return True


def _more_bits(place: Place) -> bool:
    return place.deserves_more_bits


def _first_eighth(place: Place) -> bool:
    return place.in_first_eighth


def _grouped(place: Place) -> bool:
    return place.gqa >= 4


def _has_experts(place: Place) -> bool:
    return place.n_matrices > 1


def _middle(place: Place) -> bool:
    return place.count // 8 <= place.index < 7 * place.count // 8


def _first(n: int) -> When:
    return lambda place: place.index < n


def _eight_experts_or_first_eighth(place: Place) -> bool:
    return place.in_first_eighth or (place.n_experts == 8 and place.deserves_more_bits)


def _with_imatrix(when: When, expected: bool) -> When:
    return lambda place: place.has_imatrix is expected and when(place)


Exemption = tuple[Part, When, Type]


@dataclass(frozen=True)
class Mixture:
    """One file type: its base tensor type, and exceptions of which the first that fits counts."""

    file_type: LlamaFileType | IkFileType
    base: Type
    exceptions: Sequence[Exemption] = ()
    output: Type = Type.Q6_K
    # what attn_output becomes in a model of exactly eight experts
    eight_expert_output: Type | None = None
    low_bit: bool = False  # the IQ1 and IQ2 family, which has its own rules
    experts_alone: bool = False  # only `exceptions` count: no special roles, no special models
    # types that need an importance matrix in files of this file type alone
    needs_importance: frozenset[Type] = frozenset()


def _few_values(place: Place) -> bool:
    """Attention values are a small part of the model."""
    return place.gqa >= 4 or place.n_experts >= 4


def _low(embedding: Type, down: Type, output: Type | None) -> Sequence[Exemption]:
    """The IQ1 and IQ2 family."""
    found: list[Exemption] = [
        (Part.TOKEN_EMBD, _always, embedding),
        (Part.ATTN_V, _few_values, Type.Q4_K),
        (Part.ATTN_V, _always, down),
        (Part.FFN_DOWN, _first_eighth, down),
    ]
    return found if output is None else [*found, (Part.ATTN_OUTPUT, _always, output)]


_DOWN, _V, _OUT = Part.FFN_DOWN, Part.ATTN_V, Part.ATTN_OUTPUT
_F = LlamaFileType
_Q5 = Type.Q5_K

MIXTURES: dict[str, Mixture] = {
    "F32": Mixture(_F.ALL_F32, Type.F32, output=Type.F32),
    "F16": Mixture(_F.MOSTLY_F16, Type.F16, output=Type.F16),
    "BF16": Mixture(_F.MOSTLY_BF16, Type.BF16, output=Type.BF16),
    "Q8_0": Mixture(_F.MOSTLY_Q8_0, Type.Q8_0, output=Type.Q8_0),
    "Q6_K": Mixture(_F.MOSTLY_Q6_K, Type.Q6_K),
    "Q5_K_M": Mixture(
        _F.MOSTLY_Q5_K_M, _Q5, [(_V, _more_bits, Type.Q6_K), (_DOWN, _more_bits, Type.Q6_K)]
    ),
    "Q5_K_S": Mixture(_F.MOSTLY_Q5_K_S, _Q5),
    "Q5_1": Mixture(_F.MOSTLY_Q5_1, Type.Q5_1),
    "Q5_0": Mixture(
        _F.MOSTLY_Q5_0, Type.Q5_0, [(_DOWN, _with_imatrix(_first_eighth, True), Type.Q5_1)]
    ),
    "Q4_K_M": Mixture(
        _F.MOSTLY_Q4_K_M,
        Type.Q4_K,
        [(_V, _more_bits, Type.Q6_K), (_DOWN, _more_bits, Type.Q6_K)],
        eight_expert_output=_Q5,
    ),
    "Q4_K_S": Mixture(
        _F.MOSTLY_Q4_K_S,
        Type.Q4_K,
        [(_V, _first(4), _Q5), (_DOWN, _first_eighth, _Q5)],
        eight_expert_output=_Q5,
    ),
    "Q4_1": Mixture(_F.MOSTLY_Q4_1, Type.Q4_1),
    "Q4_0": Mixture(
        _F.MOSTLY_Q4_0, Type.Q4_0, [(_DOWN, _with_imatrix(_first_eighth, True), Type.Q4_1)]
    ),
    "MXFP4_MOE": Mixture(
        _F.MOSTLY_MXFP4_MOE,
        Type.Q8_0,
        [(part, _has_experts, Type.MXFP4) for part in Part],
        output=Type.Q8_0,
        experts_alone=True,
    ),
    # llama-quantize does not make this one: NVFP4 where MXFP4_MOE has MXFP4
    "NVFP4": Mixture(
        _F.MOSTLY_NVFP4,
        Type.Q8_0,
        [(part, _has_experts, Type.NVFP4) for part in Part],
        output=Type.Q8_0,
        experts_alone=True,
    ),
    "Q3_K_L": Mixture(
        _F.MOSTLY_Q3_K_L,
        Type.Q3_K,
        [(_V, _always, _Q5), (_DOWN, _always, _Q5), (_OUT, _always, _Q5)],
    ),
    "Q3_K_M": Mixture(
        _F.MOSTLY_Q3_K_M,
        Type.Q3_K,
        [
            (_V, _first(2), _Q5),
            (_V, _always, Type.Q4_K),
            (_DOWN, lambda place: place.index < place.count // 16, _Q5),
            (_DOWN, _always, Type.Q4_K),
            (_OUT, _always, Type.Q4_K),
        ],
        eight_expert_output=_Q5,
    ),
    "Q3_K_S": Mixture(_F.MOSTLY_Q3_K_S, Type.Q3_K, eight_expert_output=_Q5),
    "Q2_K": Mixture(
        _F.MOSTLY_Q2_K,
        Type.Q2_K,
        [
            (_V, _grouped, Type.Q4_K),
            (_V, _always, Type.Q3_K),
            (_DOWN, _always, Type.Q3_K),
            (_OUT, _always, Type.Q3_K),
        ],
        eight_expert_output=_Q5,
    ),
    "Q2_K_S": Mixture(
        _F.MOSTLY_Q2_K_S,
        Type.Q2_K,
        [(_V, _grouped, Type.Q4_K), (_DOWN, _first_eighth, Type.Q4_K)],
        needs_importance=frozenset((Type.Q2_K,)),
    ),
    "IQ4_NL": Mixture(
        _F.MOSTLY_IQ4_NL,
        Type.IQ4_NL,
        [(_V, _grouped, _Q5), (_DOWN, _with_imatrix(_first_eighth, False), _Q5)],
        eight_expert_output=_Q5,
    ),
    "IQ4_XS": Mixture(
        _F.MOSTLY_IQ4_XS,
        Type.IQ4_XS,
        [(_V, _grouped, _Q5), (_DOWN, _with_imatrix(_first_eighth, False), _Q5)],
        eight_expert_output=_Q5,
    ),
    "IQ3_M": Mixture(
        _F.MOSTLY_IQ3_M,
        Type.IQ3_S,
        [
            (_V, _always, Type.Q4_K),
            (_DOWN, _eight_experts_or_first_eighth, Type.Q4_K),
            (_OUT, _always, Type.Q4_K),
        ],
        eight_expert_output=_Q5,
    ),
    "IQ3_S": Mixture(
        _F.MOSTLY_IQ3_S, Type.IQ3_S, [(_V, _grouped, Type.Q4_K)], eight_expert_output=_Q5
    ),
    "IQ3_XS": Mixture(
        _F.MOSTLY_IQ3_XS,
        Type.IQ3_S,
        [
            (_V, _grouped, Type.Q4_K),
            (Part.ATTN_K, _always, Type.IQ3_XXS),
            (Part.ATTN_Q, _always, Type.IQ3_XXS),
            (Part.FFN_GATE, _middle, Type.IQ3_XXS),
            (Part.FFN_UP, _middle, Type.IQ3_XXS),
        ],
        eight_expert_output=_Q5,
    ),
    "IQ3_XXS": Mixture(
        _F.MOSTLY_IQ3_XXS,
        Type.IQ3_XXS,
        [
            (Part.TOKEN_EMBD, _always, Type.IQ3_S),
            (_V, _grouped, Type.Q4_K),
            (_V, _with_imatrix(_always, False), Type.IQ3_S),
            (Part.ATTN_K, _always, Type.IQ2_S),
            (Part.ATTN_Q, _always, Type.IQ2_S),
            (_DOWN, _with_imatrix(_first_eighth, False), Type.Q4_K),
            (_DOWN, _with_imatrix(_always, False), Type.Q3_K),
            (_OUT, _always, Type.IQ3_S),
        ],
        output=_Q5,
        eight_expert_output=_Q5,
    ),
    "IQ2_M": Mixture(
        _F.MOSTLY_IQ2_M,
        Type.IQ2_S,
        _low(Type.IQ3_S, Type.IQ3_S, Type.IQ3_S),
        output=_Q5,
        eight_expert_output=_Q5,
        low_bit=True,
    ),
    "IQ2_S": Mixture(
        _F.MOSTLY_IQ2_S,
        Type.IQ2_XS,
        _low(Type.IQ3_S, Type.IQ3_S, Type.IQ3_S),
        output=_Q5,
        eight_expert_output=_Q5,
        low_bit=True,
    ),
    "IQ2_XS": Mixture(
        _F.MOSTLY_IQ2_XS,
        Type.IQ2_XS,
        _low(Type.Q2_K, Type.Q2_K, None),
        output=_Q5,
        eight_expert_output=_Q5,
        low_bit=True,
    ),
    "IQ2_XXS": Mixture(
        _F.MOSTLY_IQ2_XXS,
        Type.IQ2_XXS,
        _low(Type.Q2_K, Type.Q2_K, None),
        output=_Q5,
        eight_expert_output=_Q5,
        low_bit=True,
    ),
    "TQ2_0": Mixture(_F.MOSTLY_TQ2_0, Type.TQ2_0, [(Part.TOKEN_EMBD, _always, Type.Q4_K)]),
    "TQ1_0": Mixture(_F.MOSTLY_TQ1_0, Type.TQ1_0, [(Part.TOKEN_EMBD, _always, Type.Q4_K)]),
    "IQ1_M": Mixture(
        _F.MOSTLY_IQ1_M,
        Type.IQ1_M,
        _low(Type.Q2_K, Type.Q2_K, Type.IQ2_XXS),
        output=_Q5,
        eight_expert_output=_Q5,
        low_bit=True,
    ),
    "IQ1_S": Mixture(
        _F.MOSTLY_IQ1_S,
        Type.IQ1_S,
        _low(Type.Q2_K, Type.Q2_K, Type.IQ2_XXS),
        output=_Q5,
        eight_expert_output=_Q5,
        low_bit=True,
    ),
}


_IK_OUTPUT = {
    **dict.fromkeys((IkType.IQ4_K, IkType.IQ5_K, IkType.IQ5_KS, IkType.IQ4_KT), Type.Q6_K),
    **dict.fromkeys((IkType.IQ4_KS, IkType.IQ4_KSS), IkType.IQ5_K),
    IkType.IQ6_K: IkType.IQ6_K,
}
_FINE = (IkType.IQ5_K, IkType.IQ6_K, IkType.IQ4_KT)  # their own type for attention's output
# File types that only ik_llama.cpp loads: what its llama-quantize gives a model of many experts,
# but for the smallest, whose first layers get more there.
IK_MIXTURES: dict[str, Mixture] = {
    one.name: Mixture(
        IkFileType[f"MOSTLY_{one.name}"],
        one,
        [
            (Part.ATTN_K, _always, Type.Q8_0),
            (_V, _always, Type.Q8_0),
            (_OUT, _always, one if one in _FINE else Type.Q5_K),
        ],
        output=_IK_OUTPUT.get(one, IkType.IQ4_K),
        experts_alone=True,
    )
    for one in IkType
}

# what else llama.cpp has a name for, and why no file can be made of it
REFUSED: dict[str, str] = {
    "Q1_0": (
        "it holds only the sign of a weight, for models that were trained with such weights, and "
        "no model that reap2gguf supports was; use IQ1_M"
    ),
    "Q2_0": (
        "the gguf package, which reap2gguf reads and writes files with, does not have its tensor "
        "type; use Q2_K_S or IQ2_M"
    ),
    "COPY": "it quantizes nothing, and copies tensors of a GGUF file as they are; use BF16",
}


def mixture_named(name: str) -> Mixture:
    """The mixture of a file type; RecipeError lists the known ones, or says why there is none."""
    if name in REFUSED:
        raise RecipeError(f"file_type {name!r} is not supported: {REFUSED[name]}")
    if name in IK_MIXTURES:
        return IK_MIXTURES[name]
    if name not in MIXTURES:
        raise RecipeError(f"file_type {name!r}, expected one of {', '.join(MIXTURES)}")
    return MIXTURES[name]
