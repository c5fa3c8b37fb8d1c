"""The types with which an architecture describes itself: facts, roles, tensors, header keys.

Letters: H hidden, F expert width, E experts, K experts per token, V vocabulary, Q query and KV
key/value width (heads times head size), D head size, S width of a shared expert, I width of a dense
layer. Shapes are given slowest dimension first (PyTorch, numpy); GGML's `ne` is the reverse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType

from reap2gguf.errors import CheckpointError

if TYPE_CHECKING:
    from reap2gguf.checkpoint.safetensors_header import StoredTensor

Projection = Literal["gate", "up", "down", "gate_up"]
Part = Literal["weight", "bias"]
Floats = npt.NDArray[np.float32]

# Bounds on the numbers of a config: well above any model, and low enough to count up to.
MAX_LAYERS = 4096
MAX_EXPERTS = 2**16
MAX_WIDTH = 2**20  # of hidden states, experts and heads together
MAX_HEADS = 2**16
MAX_VOCABULARY = 2**20
MAX_EXPERTS_OF_ALL_LAYERS = 2**17

# llama.cpp's quantizer leaves these in the type of the converted file, whatever is asked of it.
_NEVER_QUANTIZED = ("_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d", "shortconv.conv.weight")


@dataclass(frozen=True)
class ModelFacts:
    """The numbers of one model that more than one stage needs."""

    architecture: str  # the class named in config.json
    gguf_arch: str  # general.architecture
    n_layers: int  # the trunk's
    moe_layers: tuple[int, ...]  # with the MTP block as layer n_layers, where there is one
    hidden_size: int  # H
    expert_width: int  # F
    n_experts: int  # E
    experts_per_token: int  # K
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int  # V
    context_length: int
    tied_embeddings: bool
    has_mtp: bool = False  # a multi-token-prediction block follows the trunk
    # the router first chooses groups_per_token of n_groups equal runs of neighbouring experts
    n_groups: int = 1
    groups_per_token: int = 1
    # the width L of what enters and leaves the experts, where it is not H
    latent_width: int | None = None
    # query heads per key-value head in the file's first layer, where those of layers differ;
    # 0 if that layer has no attention
    first_gqa: int | None = None

    @property
    def expert_io_width(self) -> int:
        """Values of a token that enter an expert, and that leave it: H, or those of a latent."""
        return self.latent_width or self.hidden_size

    @property
    def gqa(self) -> int:
        """Query heads per key-value head as llama.cpp's quantizer counts them: in layer 0."""
        return self.n_heads // self.n_kv_heads if self.first_gqa is None else self.first_gqa

    @property
    def mtp_layer(self) -> int | None:
        """The MTP block's number: the one after the trunk's last."""
        return self.n_layers if self.has_mtp else None

    @property
    def n_blocks(self) -> int:
        """GGUF's block_count: decoder layers, MTP block included."""
        return self.n_layers + self.has_mtp


@dataclass(frozen=True, slots=True)
class Expert:
    """Stored values of one expert, or (`expert` None) of all experts of a layer on axis 0.

    `part` distinguishes weights and biases.
    """

    layer: int
    projection: Projection
    expert: int | None
    part: Part = "weight"


@dataclass(frozen=True, slots=True)
class Router:
    """Stored router values with one entry per expert on `axis`: weight (E, H), bias (E,) or (1, E).

    The axis is 0, or 1 after an axis of size 1.
    """

    layer: int
    axis: int = 0


@dataclass(frozen=True, slots=True)
class Plain:
    """A stored tensor that pruning leaves alone; `layer` is None outside the decoder layers."""

    layer: int | None


@dataclass(frozen=True, slots=True)
class Carried:
    """A tensor that stays in the safetensors and that no GGUF of the text model holds."""

    layer: None = None


@dataclass(frozen=True, slots=True)
class Dropped:
    """A stored tensor that is left out of everything that is written."""

    layer: None = None


Role = Expert | Router | Plain | Carried | Dropped


@dataclass(frozen=True)
class Transform:
    """What llama.cpp's converter does to the values of a stored tensor, and the way back.

    `put_back(values, stored)` writes GGUF's values to where they belong in an array of the stored
    shape, which is C-contiguous. Several GGUF tensors may fill one stored tensor.
    """

    apply: Callable[[Floats], Floats]  # stored values -> GGUF's
    put_back: Callable[[Floats, Floats], None]
    # if each of GGUF's rows is a stored one, which: then a range of them can be read alone
    rows: npt.NDArray[np.int64] | None = field(default=None, compare=False)

    def __call__(self, values: Floats) -> Floats:
        return self.apply(values)


def picked(places: npt.NDArray[np.int64] | slice | int, axis: int = 0) -> Transform:
    """GGUF's entries along an axis are the stored ones at `places`."""
    key = (*[slice(None)] * axis, places)

    def apply(values: Floats) -> Floats:
        return np.ascontiguousarray(values[key])

    def put_back(values: Floats, stored: Floats) -> None:
        stored[key] = values

    rows = places if axis == 0 and isinstance(places, np.ndarray) else None
    return Transform(apply, put_back, rows)


@dataclass(frozen=True, slots=True)
class Slab:
    """Where one matrix of a GGUF tensor is in the checkpoint.

    `index` picks from axis 0 of a 3D tensor (an expert). `rows` begin, end and step through the
    rows of the matrix: the gate or the up half of a fused gate_up, or every second row where the
    two alternate. With `transposed` the stored matrix has them as columns; then `columns` begin and
    end the stored rows that are the matrix's columns, where these are not all.
    """

    stored: str
    index: int | None = None
    rows: tuple[int, int] | None = None
    step: int = 1
    transposed: bool = False
    columns: tuple[int, int] | None = None


@dataclass(frozen=True)
class GgufTensor:
    """A GGUF tensor: its name, its shape and the stored matrices it is made of.

    For experts there is one slab per expert and the shape is (E, rows, columns).
    """

    name: str
    shape: tuple[int, ...]
    slabs: tuple[Slab, ...]
    always_f32: bool = False  # llama.cpp's converter never stores it in fewer bits
    transform: Transform | None = None  # applied to each slab's float32 values
    needs_f16: bool = False  # llama.cpp computes with it in F16, whatever its type
    # of the blocks that the checkpoint has it in, where a GGUF file may hold the very same ones
    block_type: GGMLQuantizationType | None = None
    # of its blocks in the GGUF file that the checkpoint is read from; None: it is no GGUF file
    source_type: GGMLQuantizationType | None = None
    # values that follow from the config, and are not stored: the slab says what of it they follow
    made: tuple[float, ...] | None = None

    @property
    def n_columns(self) -> int:
        """Length of a row: GGML's ne[0]."""
        return self.shape[-1]

    @property
    def n_matrices(self) -> int:
        """GGML's ne[2]: the experts of an expert tensor, else 1."""
        return self.shape[0] if len(self.shape) == 3 else 1

    def is_copied_as(self, tensor_type: GGMLQuantizationType) -> bool:
        """Whether a file in which it has this type holds the checkpoint's own blocks."""
        return tensor_type in (self.block_type, self.source_type)

    def is_sliced_as(self, tensor_type: GGMLQuantizationType) -> bool:
        """Whether these blocks are those of a GGUF source, which are cut to experts that stay."""
        return tensor_type is self.source_type

    def with_source_type(self, stored: Mapping[str, StoredTensor]) -> GgufTensor:
        """The same with the type of its blocks, where what is stored is read from a GGUF file."""
        source = None if self.made is not None else stored.get(self.slabs[0].stored)
        found = None if source is None else source.blocks.get(self.name)
        if found is None:
            return self
        # as of a checkpoint in such blocks: a recipe takes them for a type of no fewer bits
        block = found if found is GGMLQuantizationType.MXFP4 else self.block_type
        return replace(self, source_type=found, block_type=block)

    @property
    def never_quantized(self) -> bool:
        """Whether llama.cpp's quantizer leaves it alone, whatever is asked of it."""
        one_row = all(size == 1 for size in self.shape[:-1])
        is_weight = self.name.endswith(".weight")
        return one_row or not is_weight or any(part in self.name for part in _NEVER_QUANTIZED)


def made_tensor(name: str, values: Floats, source: str) -> GgufTensor:
    """A GGUF tensor of values that follow from the config, by `source`, and are not stored."""
    made = tuple(float(value) for value in values.flat)
    return GgufTensor(name, values.shape, (Slab(source),), always_f32=True, made=made)


@dataclass(frozen=True)
class HeadMatrices:
    """GGUF matrices of a layer's attention that multiply something else in each head.

    Of a latent attention, llama.cpp multiplies each head's queries, as they are before the rotation
    and without what will be rotated, and each head's sum of latents, weighted by its attention.
    transformers forms neither: it expands the latents to keys and values.
    """

    attention: str  # path of the attention within the layer's module
    latents: str  # of what makes the latents (B, T, R)
    queries: str  # the matrix (heads, R, query_width) that multiplies queries
    sums: str  # the matrix (heads, rows, R) that multiplies sums of latents
    n_heads: int
    query_width: int  # the first values of a head's queries
    sum_width: int  # R

    @property
    def names(self) -> tuple[str, str]:
        """Both matrices."""
        return self.queries, self.sums


def is_rounded(name: str) -> bool:
    """Whether a GGUF tensor holds exponentials, whose last bits depend on the processor."""
    return name.endswith(".ssm_a")


def experts_of(name: str, shape: tuple[int, ...]) -> int | None:
    """How many experts a GGUF tensor has entries for; None if it is not one of experts' tensors.

    >>> experts_of("blk.3.ffn_up_exps.weight", (16, 32, 64))
    16
    """
    if is_of_experts(name) or ".ffn_gate_inp.weight" in name or ".ffn_gate_inp.bias" in name:
        return shape[0]
    return shape[-1] if ".exp_probs_b." in name else None


def is_of_experts(name: str) -> bool:
    """Whether a GGUF tensor holds weights, biases or scales of experts."""
    return "_exps." in name


def sums_shape(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of what an importance matrix has of a GGUF tensor; each row has a count.

    Experts have a row each. The matrices of other tensors, such as those of each head, share one.

    >>> sums_shape("blk.3.ffn_up_exps.weight", (16, 32, 64))
    (16, 64)
    >>> sums_shape("blk.3.attn_v_b.weight", (4, 32, 64))
    (1, 256)
    """
    n_matrices = shape[0] if len(shape) == 3 else 1
    if is_of_experts(name):
        return n_matrices, shape[-1]
    return 1, n_matrices * shape[-1]


def missing(name: str) -> CheckpointError:
    """The error for a tensor that the model needs and the checkpoint does not have."""
    return CheckpointError(f"tensor {name!r} is missing from the checkpoint")


@dataclass(frozen=True)
class HeaderValue:
    """One key of a GGUF header."""

    key: str
    value: Any
    value_type: GGUFValueType


@dataclass(frozen=True)
class SideFile:
    """A GGUF file beside the model's own: what it is made of and what its header says."""

    prefix: str  # begins the file name
    general_type: str  # general.type
    arch: str  # general.architecture
    title: str
    tensors: tuple[GgufTensor, ...]
    values: tuple[HeaderValue, ...]
    notes: tuple[str, ...] = ()  # what the user should know of it
    is_checked: bool = False  # whether the types are known to hold all values

    def tensor_types(self) -> dict[str, GGMLQuantizationType]:
        """F16, and F32 for the tensors that llama.cpp never stores in fewer bits."""
        full, half = GGMLQuantizationType.F32, GGMLQuantizationType.F16
        return {t.name: full if t.always_f32 else half for t in self.tensors}
