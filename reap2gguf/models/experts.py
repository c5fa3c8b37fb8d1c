"""How families store the experts of a layer, and which GGUF tensors these become."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from gguf import GGMLQuantizationType

from reap2gguf.checkpoint.quantized.keys import BLOCKS
from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.models.description import (
    Expert,
    GgufTensor,
    ModelFacts,
    Part,
    Projection,
    Slab,
    missing,
    picked,
)

if TYPE_CHECKING:
    from reap2gguf.checkpoint.safetensors_header import StoredTensor

INDEX = r"(0|[1-9][0-9]{0,5})"  # a number in a stored name, spelled in one way only
_APART = re.compile(rf"{INDEX}\.(.+)\.weight")  # a 2D expert below the path of the experts


@dataclass(frozen=True)
class ExpertLayout:
    """How a family stores the experts of a layer, and which GGUF tensors they become.

    Experts are one tensor each (2D), `PATH.3.gate_proj.weight`, or fused (3D): `PATH.gate_up_proj`
    (E, 2F, H) and `PATH.down_proj` (E, H, F), with or without `.weight`.
    """

    path: str = "mlp.experts"  # in stored names, below the layer's prefix
    path_apart: str = ""  # of 2D experts, where it is another
    module: str = "mlp.experts"  # in transformers' layer
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    gate_up: str = "gate_up_proj"  # fused only
    projections: tuple[Projection, ...] = ("gate", "up", "down")  # a GGUF tensor each
    # of a fused matrix; "either" where checkpoints differ and the shape shows which
    orientation: Literal["out in", "in out", "either"] = "out in"
    interleaved: bool = False  # fused rows of gate and up alternate: gate 0, up 0, gate 1, up 1
    has_biases: bool = False  # fused only: `gate_up_proj_bias` (E, 2F), `down_proj_bias` (E, H)
    # transformers' module has this layout too, and experts are never one tensor each
    module_is_as_stored: bool = False

    @property
    def inputs(self) -> tuple[Projection, ...]:
        """The projections that multiply the experts' input; `down` multiplies the activations."""
        return tuple(projection for projection in self.projections if projection != "down")

    @property
    def is_fused(self) -> bool:
        """Whether gate and up are one tensor in GGUF too, and experts are never one tensor each."""
        return "gate_up" in self.projections

    def matrices(self, layer: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The GGUF tensors that the experts' input feeds, and those that activations feed."""
        blk = f"blk.{layer}.ffn_"
        fed_by_inputs = tuple(f"{blk}{projection}_exps.weight" for projection in self.inputs)
        return fed_by_inputs, (f"{blk}down_exps.weight",)

    @property
    def _path_apart(self) -> str:
        return self.path_apart or self.path

    def stored_name(self, projection: Projection) -> str:
        """What stored names call a projection."""
        names = {"gate": self.gate, "up": self.up, "down": self.down, "gate_up": self.gate_up}
        return names[projection]

    def fused(self, projection: Projection) -> Projection:
        """The fused tensor that a projection is part of."""
        return projection if projection == "down" or self.inputs == ("up",) else "gate_up"

    @cached_property
    def _apart(self) -> dict[str, Projection]:
        """What 2D tensors end with, `.weight` left out."""
        return {} if self.is_fused else {self.stored_name(p): p for p in self.projections}

    @cached_property
    def _fused(self) -> dict[str, tuple[Projection, Part]]:
        """What 3D tensors are called below `path`."""
        found: dict[str, tuple[Projection, Part]] = {}
        for projection in {self.fused(p): None for p in self.projections}:
            name = self.stored_name(projection)
            found |= {name: (projection, "weight"), f"{name}.weight": (projection, "weight")}
            if self.has_biases:
                found[f"{name}_bias"] = (projection, "bias")
        return found

    def role(self, layer: int, name: str) -> Expert | None:
        """What a stored tensor below the layer's prefix is; None if it is not of the experts."""
        rest = name.removeprefix(f"{self.path}.")
        if rest != name and rest in self._fused:
            projection, part = self._fused[rest]
            return Expert(layer, projection, None, part)
        rest = name.removeprefix(f"{self._path_apart}.")
        is_other = rest == name or self.module_is_as_stored
        match = None if is_other else _APART.fullmatch(rest)
        if match is None or match[2] not in self._apart:
            return None
        return Expert(layer, self._apart[match[2]], int(match[1]))

    def weights(
        self, stored: Mapping[str, StoredTensor], prefix: str, layer: int, facts: ModelFacts
    ) -> dict[Projection, GgufTensor]:
        """The GGUF tensors of a layer's experts: gate and up (E, F, H), down (E, H, F).

        Raises CheckpointError if what is stored below `prefix` has another shape, and
        UnsupportedModelError if its shape fits both orientations of an "either".
        """
        found: dict[Projection, GgufTensor] = {}
        for projection in self.projections:
            slabs = self._slabs(stored, prefix, projection, facts)
            found[projection] = GgufTensor(
                f"blk.{layer}.ffn_{projection}_exps.weight",
                (facts.n_experts, *_matrix(projection, facts)),
                slabs,
                block_type=_block_type(stored, slabs[0]),
            )
        return found

    def shapes(self, prefix: str, facts: ModelFacts) -> dict[str, tuple[int, ...]]:
        """Stored names and shapes of a layer's experts: one tensor each (2D), if they may be."""
        if self.module_is_as_stored or self.is_fused:
            return self._fused_shapes(f"{prefix}{self.path}.", facts)
        return {
            f"{prefix}{self._path_apart}.{expert}.{name}.weight": _matrix(projection, facts)
            for projection, name in ((p, self.stored_name(p)) for p in self.projections)
            for expert in range(facts.n_experts)
        }

    def _fused_shapes(self, base: str, facts: ModelFacts) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for projection in {self.fused(p): None for p in self.projections}:
            rows, columns = _matrix(projection, facts)
            matrix = (columns, rows) if self.orientation == "in out" else (rows, columns)
            found[base + self.stored_name(projection)] = (facts.n_experts, *matrix)
            if self.has_biases:
                found[f"{base}{self.stored_name(projection)}_bias"] = (facts.n_experts, rows)
        return found

    def _slabs(
        self,
        stored: Mapping[str, StoredTensor],
        prefix: str,
        projection: Projection,
        facts: ModelFacts,
    ) -> tuple[Slab, ...]:
        count = facts.n_experts
        fused = self.fused(projection)
        plain = f"{prefix}{self.path}.{self.stored_name(fused)}"
        name = _with_suffix(stored, plain)
        if name is None and self.is_fused:
            raise missing(plain)
        if name is None:
            base, own = prefix + self._path_apart, self.stored_name(projection)
            others = (f"{prefix}{self.path}.{other}" for other in self._fused)
            other = next((one for one in others if one in stored), None)
            is_fused = other or self.module_is_as_stored
            if is_fused and f"{base}.0.{own}.weight" not in stored:
                has_suffix = other is not None and other.endswith(".weight")
                raise missing(f"{plain}.weight" if has_suffix else plain)
            slabs = tuple(Slab(f"{base}.{e}.{own}.weight") for e in range(count))
            for slab in slabs:
                _check_shape(stored, slab.stored, _matrix(projection, facts))
            return slabs
        transposed = self._is_transposed(stored, name, _matrix(fused, facts), count)
        share = self._share(projection, facts.expert_width)
        rows = None if share is None else (share.start, share.stop)
        step = 1 if share is None else share.step
        return tuple(Slab(name, e, rows, step, transposed) for e in range(count))

    def _share(self, projection: Projection, width: int) -> range | None:
        """The rows of a fused tensor that are a projection's; None if all are."""
        if self.fused(projection) == projection:
            return None
        second = int(projection == "up")
        if self.interleaved:
            return range(second, 2 * width, 2)
        return range(second * width, (second + 1) * width)

    def _is_transposed(
        self, stored: Mapping[str, StoredTensor], name: str, matrix: tuple[int, int], count: int
    ) -> bool:
        """Whether fused matrices are stored with axes (in, out); refuses any other shape."""
        straight, turned = (count, *matrix), (count, *reversed(matrix))
        if self.orientation != "either":
            _check_shape(stored, name, straight if self.orientation == "out in" else turned)
            return self.orientation == "in out"
        if straight == turned:
            raise UnsupportedModelError(
                f"tensor {name!r}: shape {list(straight)} does not show whether its matrices are "
                "transposed, and both are stored in this architecture; expected a hidden_size that "
                "is neither moe_intermediate_size nor twice that"
            )
        if stored[name].shape == turned:
            return True
        _check_shape(stored, name, straight)
        return False

    def biases(
        self, stored: Mapping[str, StoredTensor], prefix: str, layer: int, facts: ModelFacts
    ) -> tuple[GgufTensor, ...]:
        """The GGUF tensors of the experts' biases: gate and up (E, F), down (E, H)."""
        if not self.has_biases:
            return ()
        found = []
        for projection in self.projections:
            fused = self.fused(projection)
            name = f"{prefix}{self.path}.{self.stored_name(fused)}_bias"
            _check_shape(stored, name, (facts.n_experts, _matrix(fused, facts)[0]))
            share = self._share(projection, facts.expert_width)
            chosen = None if share is None else picked(_slice(share), axis=1)
            shape = (facts.n_experts, _matrix(projection, facts)[0])
            gguf_name = f"blk.{layer}.ffn_{projection}_exps.bias"
            found.append(GgufTensor(gguf_name, shape, (Slab(name),), True, chosen))
        return tuple(found)


def _matrix(projection: Projection, facts: ModelFacts) -> tuple[int, int]:
    """Rows and columns of one expert's matrix."""
    width, hidden = facts.expert_width, facts.expert_io_width
    if projection == "down":
        return hidden, width
    return (2 * width if projection == "gate_up" else width), hidden


def _block_type(stored: Mapping[str, StoredTensor], slab: Slab) -> GGMLQuantizationType | None:
    """The type of the blocks that rows are stored in, if a GGUF file has such rows.

    Blocks of MXFP4 lie along what the decoded matrices (in, out) have as columns.
    """
    is_mxfp4 = stored[slab.stored].coded == BLOCKS and slab.transposed
    return GGMLQuantizationType.MXFP4 if is_mxfp4 else None


def _slice(chosen: range) -> slice:
    return slice(chosen.start, chosen.stop, chosen.step)


def _with_suffix(stored: Mapping[str, StoredTensor], name: str) -> str | None:
    """A 3D tensor's stored name, with or without `.weight`; None where experts are 2D."""
    return next((found for found in (name, f"{name}.weight") if found in stored), None)


def _check_shape(stored: Mapping[str, StoredTensor], name: str, expected: tuple[int, ...]) -> None:
    if name not in stored:
        raise missing(name)
    if stored[name].shape != expected:
        raise CheckpointError(
            f"tensor {name!r}: shape {list(stored[name].shape)}, expected {list(expected)}"
        )
