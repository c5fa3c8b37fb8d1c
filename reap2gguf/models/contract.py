"""What an architecture must say about itself for the rest of the program to handle it.

`shared.DecoderModel` answers most of it from tables of rules.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from reap2gguf.checkpoint.config import ConfigReader
from reap2gguf.errors import CheckpointError, UnknownTensorError, UnsupportedModelError
from reap2gguf.models.description import (
    MAX_EXPERTS_OF_ALL_LAYERS,
    Carried,
    Dropped,
    Expert,
    GgufTensor,
    HeaderValue,
    HeadMatrices,
    ModelFacts,
    Part,
    Projection,
    Role,
    Router,
    SideFile,
    missing,
)
from reap2gguf.models.foreign import foreign_layout
from reap2gguf.models.quantized import refuse_quantized
from reap2gguf.models.tokenizer_families import TokenizerFamily, tokenizer_family

if TYPE_CHECKING:
    from reap2gguf.checkpoint.safetensors_header import StoredTensor
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.models.gguf_keys import GgufKeys

SameValues = Callable[[str, str], bool]


class MoeModel(ABC):
    """One model of one architecture: reads its config and explains its tensors."""

    model_type: ClassVar[str]
    gguf_arch: ClassVar[str]  # general.architecture
    mtp_in_gguf: ClassVar[bool] = True  # whether GGUF files have a multi-token-prediction block
    has_eager_attention: ClassVar[bool] = False  # transformers has no other of this architecture
    norm_module: ClassVar[str] = "norm"  # after the last layer, in transformers' model
    mtp_centers: ClassVar[bool] = False  # whether the MTP block's last norm takes off the mean

    def __init__(
        self,
        config: Mapping[str, Any],
        where: str,
        names: Collection[str] = (),
        keep_mtp: bool = True,
        have_same_values: SameValues | None = None,
    ) -> None:
        """`names` are the stored tensors; without `have_same_values`, a tied head is a copy."""
        self.config = config
        self.reader = ConfigReader(config, where)
        self.names = frozenset(names)  # of the stored tensors: some prefixes vary
        self.have_same_values = have_same_values  # of two stored tensors
        self.keep_mtp = keep_mtp  # false: a multi-token-prediction block is Dropped
        self.facts = self.read_facts()
        self._check_facts()

    @classmethod
    def of(cls, weights: Weights, keep_mtp: bool = True) -> Self:
        """The model of weights of this architecture, their tensors checked against their config.

        Without `keep_mtp`, a multi-token-prediction block is ignored. Raises CheckpointError if
        tensors and config disagree.
        """
        where, names = str(weights.shown / "config.json"), weights.tensors.keys()
        model = cls(weights.config, where, names, keep_mtp, weights.have_same_values)
        model.check_tensors(weights.tensors)
        return model

    def _check_facts(self) -> None:
        """Refuse numbers that contradict each other, before any loop runs over them."""
        facts, where = self.facts, self.reader.where
        if not facts.moe_layers:
            raise UnsupportedModelError(f"{where}: every layer is dense; nothing to prune")
        total = len(facts.moe_layers) * facts.n_experts
        if total > MAX_EXPERTS_OF_ALL_LAYERS:
            raise UnsupportedModelError(
                f"{where}: {facts.n_experts:,} experts in each of {len(facts.moe_layers):,} "
                f"layers, expected at most {MAX_EXPERTS_OF_ALL_LAYERS:,} in total"
            )
        if facts.n_heads % facts.n_kv_heads:
            raise UnsupportedModelError(
                f"{where}: num_attention_heads is {facts.n_heads}, expected a multiple of "
                f"num_key_value_heads, {facts.n_kv_heads}"
            )
        if facts.n_experts % facts.n_groups:
            raise UnsupportedModelError(
                f"{where}: {facts.n_experts} experts, expected a multiple of the router's "
                f"{facts.n_groups} groups"
            )

    @abstractmethod
    def read_facts(self) -> ModelFacts:
        """The model's numbers; refuses config values that are not implemented."""

    @abstractmethod
    def role(self, name: str) -> Role:
        """What a stored tensor is; UnknownTensorError if no rule explains it."""

    def gguf_tensors(self, stored: Mapping[str, StoredTensor]) -> tuple[GgufTensor, ...]:
        """Every GGUF tensor, made of every stored tensor exactly once."""
        return tuple(one.with_source_type(stored) for one in self._gguf_tensors(stored))

    @abstractmethod
    def _gguf_tensors(self, stored: Mapping[str, StoredTensor]) -> Iterator[GgufTensor]:
        """The same, without the types that a GGUF source has them in."""

    @abstractmethod
    def gguf_metadata(self) -> tuple[HeaderValue, ...]:
        """The architecture's own keys of the GGUF header."""

    @classmethod
    @abstractmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        """The config.json of the model in a GGUF file, flat, as transformers reads it.

        From it, `gguf_metadata` and `gguf_tensors` give the header's keys and tensors again.
        Raises UnsupportedModelError for numbers that are not possible.
        """

    @classmethod
    def is_in_gguf(cls, keys: GgufKeys) -> bool:
        """Whether a GGUF file of `gguf_arch`, which several classes may have, is of this one."""
        return True

    @classmethod
    def names_from_gguf(cls, keys: GgufKeys, keep_mtp: bool) -> tuple[str, ...]:
        """Stored names by which the model knows that it has a head and an MTP block of its own."""
        return ("lm_head.weight",) if "output.weight" in keys.tensors else ()

    @property
    def tokenizers(self) -> TokenizerFamily:
        """The ways of splitting text that its tokenizer may have, with llama.cpp's names."""
        return tokenizer_family(self.model_type)

    def config_values(self) -> dict[str, Any]:
        """What was read from the config, under transformers' names of it."""
        return {}

    def config_values_of_layers(self) -> Mapping[int, Mapping[str, Any]]:
        """The same of single layers, where they differ in what is one value in other models."""
        return {}

    @abstractmethod
    def pruned_config(self, n_experts: int) -> dict[str, Any]:
        """The config with its expert count replaced, wherever it is spelled."""

    @abstractmethod
    def block_prefix(self, layer: int) -> str:
        """What the stored names of everything in a decoder layer, or in the MTP block, begin with.

        The module that is observed as `layer` holds exactly these tensors.
        """

    @abstractmethod
    def parameter(self, layer: int, name: str) -> str:
        """transformers' name, within that module, of a tensor stored below `block_prefix`.

        The MTP block's module is `observing.mtp.MtpBlock`: `fc`, `embedding_norm`, `hidden_norm`,
        `norm`, and its decoder layer below `layer.`, or several below `layer.0.`, `layer.1.`.
        """

    def joined(self, layer: int) -> Mapping[str, tuple[str, ...]]:
        """That module's parameters that are several stored tensors, one after another on axis 0.

        By transformers' name, what is stored below `block_prefix`, in its order.
        """
        return {}

    def is_computed_in_f32(self, layer: int, name: str) -> bool:
        """Whether a tensor stored below `block_prefix` is float32 whatever its module's type is."""
        return False

    @abstractmethod
    def experts_path(self, layer: int) -> str:
        """Path of the experts within that module."""

    @property
    def module_is_as_stored(self) -> bool:
        """Whether transformers' module keeps fused experts in the layout they are stored in.

        Otherwise it has (E, 2F, H) with all rows of the gate first, and (E, H, F).
        """
        return False

    @abstractmethod
    def matrices(self, layer: int) -> Mapping[str, tuple[str, ...]]:
        """Per linear module of that module, the GGUF matrices that its input multiplies."""

    @abstractmethod
    def expert_matrices(self, layer: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """GGUF names of the matrices fed by the experts' inputs and by their activations."""

    @property
    def n_gguf_blocks(self) -> int:
        """GGUF's block_count.

        One less than the facts' where no file holds the MTP block: it is observed and pruned like
        the others, and stays in the safetensors.
        """
        return self.facts.n_layers + (self.facts.has_mtp and self.mtp_in_gguf)

    def is_beside_gguf(self, name: str) -> bool:
        """Whether a stored tensor is of a block that no GGUF file holds."""
        block = self.facts.mtp_layer
        left_out = block is not None and block >= self.n_gguf_blocks
        return left_out and name.startswith(self.block_prefix(self.facts.n_layers))

    def mixer_bytes(self) -> int:
        """Memory that a position takes in a layer's mixer at least, where that is not attention."""
        return 0

    def head_matrices(self, layer: int) -> HeadMatrices | None:
        """Matrices of that module's attention whose inputs transformers does not form."""
        return None

    def weighted_matrices(self) -> set[str]:
        """GGUF names of all matrices that an importance matrix has entries for.

        Those are the layers' own: embeddings and head have none, as in llama.cpp.
        """
        found: set[str] = set()
        for block in range(self.n_gguf_blocks):
            for names in self.matrices(block).values():
                found.update(names)
            if (heads := self.head_matrices(block)) is not None:
                found.update(heads.names)
            if block in self.facts.moe_layers:
                for names in self.expert_matrices(block):
                    found.update(names)
        return found

    @abstractmethod
    def expert_tensors(
        self, layer: int, stored: Mapping[str, StoredTensor]
    ) -> Mapping[Projection, GgufTensor]:
        """Each projection of a MoE layer, (E, rows, columns), and where it is stored."""

    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """What the config says of the shapes of stored tensors that are not experts."""

    @abstractmethod
    def expert_shapes(self, layer: int) -> Mapping[str, tuple[int, ...]]:
        """Stored names and shapes of the experts of a MoE layer: a tensor each, if they may be."""

    def renumbered(self, name: str, expert: int) -> str:
        """The stored name of a 2D expert tensor with another expert's number."""
        return re.sub(r"(?<=\.experts\.)\d+(?=\.)", str(expert), name)

    def column_order(self, name: str) -> npt.NDArray[np.int64] | None:
        """Where a GGUF matrix has its columns in another order: the stored column of each."""
        return None

    def side_files(self, folder: Path, stored: Mapping[str, StoredTensor]) -> tuple[SideFile, ...]:
        """Further GGUF files that belong to the model, such as a vision projector."""
        return ()

    def config_at_odds(self) -> str | None:
        """A claim of the config that the tensors contradict; no published folder may have one."""
        return None

    def caveats(self) -> tuple[str, ...]:
        """What a user must know before publishing, one sentence each."""
        return ()

    @property
    def text_prefix(self) -> str:
        """What the stored names of embedding, layers and final norm begin with."""
        return "model."

    @property
    def embedding_name(self) -> str:
        return f"{self.text_prefix}embed_tokens.weight"

    @property
    def norm_name(self) -> str:
        return f"{self.text_prefix}{self.norm_module}.weight"

    @property
    def own_head_name(self) -> str:
        """The stored name of the output matrix, where it is not the embedding."""
        return "lm_head.weight"

    @property
    def head_name(self) -> str:
        return self.embedding_name if self.facts.tied_embeddings else self.own_head_name

    @property
    def mtp_embedding_name(self) -> str:
        """The embedding in which the MTP block looks up the next token."""
        return self.embedding_name

    @property
    def mtp_head_name(self) -> str:
        """The head that makes logits of what the MTP block computes."""
        return self.head_name

    @property
    def logits_divisor(self) -> float:
        """What the products of hidden states and head are divided by to be logits."""
        return 1.0

    @property
    def logit_cap(self) -> float | None:
        """The bound that logits are drawn below, by a tangent; None without."""
        return None

    @property
    def scales_experts(self) -> bool:
        """Whether the router has a factor for each expert, and other inputs than the experts."""
        return False

    def mtp_templates(self) -> tuple[int, ...]:
        """Trunk layers of the kinds that the MTP block's decoder layers are, mostly one."""
        return (self.facts.n_layers - 1,)

    def check_tensors(self, stored: Mapping[str, StoredTensor]) -> None:
        """Refuse a checkpoint whose tensors are not those that its config describes.

        Raises CheckpointError naming the tensor, UnknownTensorError for an unexplained one, and
        UnsupportedModelError for one of a quantized weight.
        """
        self.gguf_metadata()  # refuses values that could not be written later
        if foreign := foreign_layout(stored):
            raise UnknownTensorError(foreign)
        refuse_quantized(stored, self.reader.where, self.config)
        roles = {name: self.role(name) for name in stored}
        self._check_expert_axes(stored, roles)
        _check_experts_present(roles, self.facts.n_experts)
        for name, shape in self.shapes().items():
            if name in stored and stored[name].shape != shape:
                raise CheckpointError(
                    f"tensor {name!r}: shape {list(stored[name].shape)}, expected {list(shape)}, "
                    "as config.json says"
                )
        self._check_beside_gguf(stored)
        used = {slab.stored for t in self.gguf_tensors(stored) for slab in t.slabs}
        for name in sorted(stored.keys() - used):
            if not isinstance(roles[name], Carried | Dropped) and not self.is_beside_gguf(name):
                raise CheckpointError(
                    f"tensor {name!r} is stored, but another tensor holds the same weights"
                )

    def _check_beside_gguf(self, stored: Mapping[str, StoredTensor]) -> None:
        """A block that no GGUF tensor is made of has all its tensors too."""
        for name in self.shapes():
            if name not in stored and self.is_beside_gguf(name):
                raise missing(name)
        for layer in range(self.n_gguf_blocks, self.facts.n_blocks):
            self.expert_tensors(layer, stored)

    def _check_expert_axes(
        self, stored: Mapping[str, StoredTensor], roles: Mapping[str, Role]
    ) -> None:
        """Fused experts and routers have E entries on their axis of experts."""
        for name, role in roles.items():
            fused = isinstance(role, Expert) and role.expert is None
            if not fused and not isinstance(role, Router):
                continue
            axis = role.axis if isinstance(role, Router) else 0
            shape = stored[name].shape
            expected = (*[1] * axis, self.facts.n_experts)
            if shape[: axis + 1] != expected:
                which = "first" if axis == 0 else "last"
                raise CheckpointError(
                    f"{name}: shape {list(shape)}, expected {self.facts.n_experts} experts on its "
                    f"{which} axis, as config.json says"
                )


def _check_experts_present(roles: Mapping[str, Role], n_experts: int) -> None:
    """Where experts are one tensor each, every layer and projection has all of them."""
    seen: dict[tuple[int, Projection, Part], set[int]] = {}
    for role in roles.values():
        if isinstance(role, Expert) and role.expert is not None:
            seen.setdefault((role.layer, role.projection, role.part), set()).add(role.expert)
    everyone = set(range(n_experts))
    for (layer, projection, _), found in seen.items():
        if found != everyone:
            if len(found) == n_experts:
                raise CheckpointError(
                    f"layer {layer}: {projection} of {n_experts} experts are numbered "
                    f"{min(found)} to {max(found)} with gaps, expected 0 to {n_experts - 1}; "
                    "renumber the experts in the order of the router's rows"
                )
            odd = min(found ^ everyone)
            problem = "missing" if odd in everyone else "beyond the config's count"
            raise CheckpointError(
                f"layer {layer}: {projection} of expert {odd} is {problem}: found {len(found)} "
                f"experts, expected {n_experts}"
            )
