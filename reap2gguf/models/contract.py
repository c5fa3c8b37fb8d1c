"""What an architecture must say about itself for the rest of the program to handle it.

Letters: H hidden, F expert width, E experts, K experts per token, V vocabulary. Shapes are given
slowest dimension first (PyTorch, numpy); GGML's `ne` is the reverse.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from gguf import GGUFValueType

from reap2gguf.checkpoint.config import ConfigReader
from reap2gguf.checkpoint.safetensors_header import StoredTensor
from reap2gguf.errors import CheckpointError

Projection = Literal["gate", "up", "down", "gate_up"]
Transform = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class ModelFacts:
    """The numbers of one model that more than one stage needs."""

    architecture: str  # the class named in config.json
    gguf_arch: str  # general.architecture
    n_layers: int
    moe_layers: tuple[int, ...]
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


@dataclass(frozen=True)
class Expert:
    """Stored weights of one expert, or (`expert` None) of all experts of a layer on axis 0."""

    layer: int
    projection: Projection
    expert: int | None


@dataclass(frozen=True)
class Router:
    """Stored router values whose axis 0 is the expert: weight (E, H), or a bias (E,)."""

    layer: int


@dataclass(frozen=True)
class Plain:
    """A stored tensor that pruning leaves alone; `layer` is None outside the decoder layers."""

    layer: int | None


Role = Expert | Router | Plain


@dataclass(frozen=True)
class Slab:
    """Where one matrix of a GGUF tensor lies in the checkpoint.

    `index` picks from axis 0 of a 3D tensor (an expert); `rows` cuts the matrix (the gate or the
    up half of a fused gate_up).
    """

    stored: str
    index: int | None = None
    rows: tuple[int, int] | None = None


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

    @property
    def n_columns(self) -> int:
        """Length of a row: GGML's ne[0]."""
        return self.shape[-1]

    @property
    def n_matrices(self) -> int:
        """GGML's ne[2]: the experts of an expert tensor, else 1."""
        return self.shape[0] if len(self.shape) == 3 else 1


@dataclass(frozen=True)
class HeaderValue:
    """One key of a GGUF header."""

    key: str
    value: Any
    kind: GGUFValueType


class MoeModel(ABC):
    """One model of one architecture: reads its config and explains its tensors."""

    model_type: ClassVar[str]

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config = config
        self.reader = ConfigReader(config, where)
        self.facts = self.read_facts()

    @abstractmethod
    def read_facts(self) -> ModelFacts:
        """The model's numbers; refuses config values that are not implemented."""

    @abstractmethod
    def role(self, name: str) -> Role:
        """What a stored tensor is; UnknownTensorError if no rule explains it."""

    @abstractmethod
    def gguf_tensors(self, stored: Mapping[str, StoredTensor]) -> tuple[GgufTensor, ...]:
        """Every GGUF tensor, made of every stored tensor exactly once."""

    @abstractmethod
    def gguf_metadata(self) -> tuple[HeaderValue, ...]:
        """The architecture's own keys of the GGUF header."""

    @abstractmethod
    def pruned_config(self, n_experts: int) -> dict[str, Any]:
        """The config with its expert count replaced, wherever it is spelled."""

    @abstractmethod
    def layer_prefix(self, layer: int) -> str:
        """What the stored names of a decoder layer begin with."""

    @abstractmethod
    def matrices(self, layer: int) -> Mapping[str, tuple[str, ...]]:
        """Per linear module of a decoder layer, the GGUF matrices that its input multiplies."""

    @abstractmethod
    def expert_matrices(self, layer: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """GGUF names of the matrices fed by the experts' inputs and by their activations."""

    @abstractmethod
    def expert_tensors(
        self, layer: int, stored: Mapping[str, StoredTensor]
    ) -> Mapping[Projection, GgufTensor]:
        """Gate, up and down of a MoE layer, (E, rows, columns) each, and where they are stored."""

    @abstractmethod
    def renumbered(self, name: str, expert: int) -> str:
        """The stored name of a 2D expert tensor with another expert's number."""

    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """What the config says of the shapes of stored tensors that are not experts."""

    def unused(self) -> frozenset[str]:
        """Stored tensors that the model carries and nothing reads; they are in no GGUF file."""
        return frozenset()

    def caveats(self) -> tuple[str, ...]:
        """What a user must know before publishing, one sentence each."""
        return ()

    embedding_name: ClassVar[str]  # stored name of the token embedding
    experts_module: ClassVar[str] = "mlp.experts"  # path of the experts within a decoder layer

    def check_tensors(self, stored: Mapping[str, StoredTensor]) -> None:
        """Refuse a checkpoint whose tensors are not those that its config describes.

        Raises CheckpointError naming the tensor, and UnknownTensorError for an unexplained one.
        """
        roles = {name: self.role(name) for name in stored}
        self._check_expert_axes(stored, roles)
        _check_experts_present(roles, self.facts.n_experts)
        for name, shape in self.shapes().items():
            if name in stored and stored[name].shape != shape:
                raise CheckpointError(
                    f"tensor {name!r}: shape {list(stored[name].shape)}, expected {list(shape)}, "
                    "as config.json says"
                )
        tensors = self.gguf_tensors(stored)
        used = {slab.stored for tensor in tensors for slab in tensor.slabs} | self.unused()
        if left := sorted(stored.keys() - used):
            raise CheckpointError(
                f"tensor {left[0]!r} is stored, but another tensor stands for the same weights"
            )

    def _check_expert_axes(
        self, stored: Mapping[str, StoredTensor], roles: Mapping[str, Role]
    ) -> None:
        """Fused experts and routers have E entries on axis 0."""
        for name, role in roles.items():
            shape = stored[name].shape
            fused = isinstance(role, Expert) and role.expert is None
            if (fused or isinstance(role, Router)) and shape[:1] != (self.facts.n_experts,):
                raise CheckpointError(
                    f"{name}: shape {list(shape)}, expected {self.facts.n_experts} experts on its "
                    "first axis, as config.json says"
                )


def _check_experts_present(roles: Mapping[str, Role], n_experts: int) -> None:
    """Where experts are one tensor each, every layer and projection has all of them."""
    seen: dict[tuple[int, Projection], set[int]] = {}
    for role in roles.values():
        if isinstance(role, Expert) and role.expert is not None:
            seen.setdefault((role.layer, role.projection), set()).add(role.expert)
    everyone = set(range(n_experts))
    for (layer, projection), found in seen.items():
        if found != everyone:
            odd = min(found ^ everyone)
            problem = "missing" if odd in everyone else "beyond the config's count"
            raise CheckpointError(
                f"layer {layer}: {projection} of expert {odd} is {problem}: found {len(found)} "
                f"experts, expected {n_experts}"
            )
