"""A recipe applied to a model, by role and layers: a few rows in place of a thousand names.

Tensors of a role share a row where they have the same type in the same layers. Rows are exact: each
tensor is in one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Generic, TypeVar

from reap2gguf.gguf_files.tensor_types import block_of
from reap2gguf.models.roles import ROLE_WORDS, ROLES, Role, spots
from reap2gguf.quantizing.selector import layers_text

if TYPE_CHECKING:
    from reap2gguf.models.roles import Spot
    from reap2gguf.quantizing.resolve import ResolvedRecipe, ResolvedTensor

_Outcome = TypeVar("_Outcome", bound=Hashable)
_WORDS: dict[Role, str] = {next(iter(r)): word for word, r in ROLE_WORDS.items() if len(r) == 1}


@dataclass(frozen=True)
class RoleRow:
    """Tensors of one role that get the same type."""

    role: str  # a word of recipes where there is one, such as experts.down; else norms and so on
    tensors: tuple[str, ...]  # their names, without `blk.N.` and `.weight`
    layers: str  # as rules write them; "" outside of layers
    is_everywhere: bool  # in all layers that have such tensors
    tensor_type: str
    wanted: str | None  # the type that was meant, if rows do not fill its blocks
    reason: str  # why it is another one
    rules: tuple[str, ...]  # what the rules match that gave it; none: the file type did
    n_tensors: int
    n_weights: int
    n_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / self.n_weights


@dataclass(frozen=True)
class RecipeTable:
    """The types that a recipe gives a model, and the size of the file."""

    recipe: str
    title: str
    label: str
    file_type: str
    model: str
    rows: tuple[RoleRow, ...]
    n_tensors: int
    n_weights: int
    n_bytes: int  # of the tensors
    n_file_bytes: int  # with the header, and what lies between tensors
    needs_imatrix: tuple[str, ...]  # tensors whose type is of no use without importance
    tensor_types: Mapping[str, str] = field(repr=False)  # GGUF tensor name -> GGML type

    @property
    def bits_per_weight(self) -> float:
        """Of the tensors alone, as everywhere."""
        return 8 * self.n_bytes / self.n_weights

    @property
    def file_bits_per_weight(self) -> float:
        """Of the whole file."""
        return 8 * self.n_file_bytes / self.n_weights


@dataclass(frozen=True)
class RoleChange:
    """Tensors of one role to which two recipes give different types."""

    role: str
    tensors: tuple[str, ...]
    layers: str
    is_everywhere: bool
    types: tuple[str, str]  # of the first recipe and of the second
    n_tensors: int
    n_weights: int
    n_bytes: tuple[int, int]

    @property
    def bits_per_weight(self) -> tuple[float, float]:
        first, second = (8 * count / self.n_weights for count in self.n_bytes)
        return first, second


@dataclass(frozen=True)
class RecipeDifference:
    """What two recipes give one model differently."""

    first: RecipeTable
    second: RecipeTable
    changes: tuple[RoleChange, ...]

    @property
    def model(self) -> str:
        return self.first.model

    @property
    def n_changed(self) -> int:
        """Tensors of different types."""
        return sum(change.n_tensors for change in self.changes)

    @property
    def is_equal(self) -> bool:
        """Whether every tensor gets the same type from both."""
        return not self.changes


def table_of(resolved: ResolvedRecipe, model: str, n_file_bytes: int) -> RecipeTable:
    """The rows of a recipe; `n_file_bytes` is the size of its file of the model called `model`."""
    entries = {entry.tensor.name: entry for entry in resolved.table}
    outcomes = {
        name: (entry.tensor_type.name, _reason(entry), entry.wanted and entry.wanted.name)
        for name, entry in entries.items()
    }
    return RecipeTable(
        recipe=resolved.name,
        title=resolved.title,
        label=resolved.label,
        file_type=resolved.file_type,
        model=model,
        rows=tuple(_row(group, entries) for group in _groups(outcomes)),
        n_tensors=len(entries),
        n_weights=sum(prod(entry.tensor.shape) for entry in resolved.table),
        n_bytes=resolved.n_bytes,
        n_file_bytes=n_file_bytes,
        needs_imatrix=tuple(resolved.needs_importance()),
        tensor_types={name: one.name for name, one in resolved.tensor_types().items()},
    )


def difference(
    resolved: tuple[ResolvedRecipe, ResolvedRecipe], tables: tuple[RecipeTable, RecipeTable]
) -> RecipeDifference:
    """What differs between two recipes that were resolved for the same tensors."""
    first, second = ({entry.tensor.name: entry for entry in one.table} for one in resolved)
    types = {
        name: (entry.tensor_type.name, second[name].tensor_type.name)
        for name, entry in first.items()
    }
    changes = []
    for group in _groups(types):
        if len(set(group.outcome)) > 1:
            changes.append(
                RoleChange(
                    group.role,
                    group.tensors,
                    group.layers,
                    group.is_everywhere,
                    group.outcome,
                    len(group.names),
                    sum(prod(first[name].tensor.shape) for name in group.names),
                    (
                        sum(first[name].n_bytes for name in group.names),
                        sum(second[name].n_bytes for name in group.names),
                    ),
                )
            )
    return RecipeDifference(*tables, tuple(changes))


@dataclass(frozen=True)
class _Group(Generic[_Outcome]):
    """Tensors of a role with the same outcome."""

    role: str
    tensors: tuple[str, ...]
    layers: str
    is_everywhere: bool
    outcome: _Outcome
    names: tuple[str, ...]  # whole ones


def _groups(outcomes: Mapping[str, _Outcome]) -> Iterator[_Group[_Outcome]]:
    """Tensors by role and outcome, in the order of the roles.

    Those of different names are together only if they have the same outcomes in the same layers.
    """
    places = spots(outcomes)
    kinds: dict[tuple[Role, str], dict[int | None, str]] = {}  # to the name in each layer
    for name, spot in places.items():
        kinds.setdefault((spot.role, _kind(name)), {})[spot.block] = name
    alike: dict[tuple[Role, Hashable], list[tuple[str, dict[int | None, str]]]] = {}
    for (role, kind), names in kinds.items():
        pattern = tuple(
            (block, outcomes[name]) for block, name in sorted(names.items(), key=_order)
        )
        alike.setdefault((role, pattern), []).append((kind, names))
    for (role, _), members in sorted(alike.items(), key=lambda item: ROLES.index(item[0][0])):
        yield from _parts(role, members, outcomes, places)


def _parts(
    role: Role,
    members: Sequence[tuple[str, dict[int | None, str]]],
    outcomes: Mapping[str, _Outcome],
    places: Mapping[str, Spot],
) -> Iterator[_Group[_Outcome]]:
    """The tensors of some kinds, which have the same outcomes, by outcome."""
    by_outcome: dict[_Outcome, list[str]] = {}
    for _, names in members:
        for _, name in sorted(names.items(), key=_order):
            by_outcome.setdefault(outcomes[name], []).append(name)
    tensors = tuple(sorted(kind for kind, _ in members))
    for outcome, found in by_outcome.items():
        layers = layers_text({places[name].block for name in found})
        everywhere = len(by_outcome) == 1
        yield _Group(_WORDS.get(role, role), tensors, layers, everywhere, outcome, tuple(found))


def _order(item: tuple[int | None, str]) -> int:
    return -1 if item[0] is None else item[0]


def _kind(name: str) -> str:
    """A tensor's name without its layer and its last word.

    >>> _kind("blk.3.attn_q.weight"), _kind("blk.3.attn_q.bias"), _kind("output.weight")
    ('attn_q', 'attn_q.bias', 'output')
    """
    return re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight")


def _row(
    group: _Group[tuple[str, str, str | None]], entries: Mapping[str, ResolvedTensor]
) -> RoleRow:
    found: Collection[ResolvedTensor] = [entries[name] for name in group.names]
    tensor_type, reason, wanted = group.outcome
    return RoleRow(
        role=group.role,
        tensors=group.tensors,
        layers=group.layers,
        is_everywhere=group.is_everywhere,
        tensor_type=tensor_type,
        wanted=wanted,
        reason=reason,
        rules=tuple(dict.fromkeys(entry.rule for entry in found if entry.rule is not None)),
        n_tensors=len(found),
        n_weights=sum(prod(entry.tensor.shape) for entry in found),
        n_bytes=sum(entry.n_bytes for entry in found),
    )


def _reason(entry: ResolvedTensor) -> str:
    """Why a tensor did not get the type that was meant for it."""
    if entry.wanted is None:
        return ""
    if entry.is_as_stored:
        return (
            f"they are stored as {entry.tensor_type.name}, and would take no fewer bits in another"
        )
    block = block_of(entry.wanted)[0]
    return (
        f"rows of {entry.tensor.n_columns:,} do not fill the blocks of {block} that "
        f"{entry.wanted.name} has"
    )
