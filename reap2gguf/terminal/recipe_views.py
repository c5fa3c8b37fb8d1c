"""Recipes as text and as JSON: the list, one recipe, its types for a model, and differences."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from math import prod
from typing import TYPE_CHECKING, Any

from reap2gguf.messages import parameters, size
from reap2gguf.models.reference import REFERENCE_FACTS, REFERENCE_NAME, reference_tensors
from reap2gguf.quantizing.file_types import IK_MIXTURES, MIXTURES
from reap2gguf.quantizing.ik.workers import EXTRA
from reap2gguf.quantizing.recipe import Recipe, load_recipe, shipped_recipes
from reap2gguf.quantizing.resolve import ResolvedRecipe, resolve

if TYPE_CHECKING:
    from reap2gguf.quantizing.minimum import Minimum
    from reap2gguf.quantizing.role_table import RecipeDifference, RecipeTable, RoleChange, RoleRow

_PER_LINE = 6  # file types
_COLUMNS = 80  # of what is not a table
_FEW = 100_000  # elements, which are not rounded
_NAMES, _LAYERS = 27, 18  # letters of a column, before it is broken into lines


@dataclass
class TypeGroup:
    """Tensors of one name, in whatever layer, that get the same type for the same reason."""

    name: str  # blk.*.NAME for those of layers
    tensor_type: str
    rule: str | None
    n_tensors: int = 0
    n_weights: int = 0
    n_bytes: int = 0

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / self.n_weights


def type_groups(recipe: ResolvedRecipe) -> Sequence[TypeGroup]:
    """The type table with layer numbers collapsed, in the order of the tensors."""
    groups: dict[tuple[str, str, str | None], TypeGroup] = {}
    for entry in recipe.table:
        name = re.sub(r"^blk\.\d+\.", "blk.*.", entry.tensor.name)
        key = (name, entry.tensor_type.name, entry.rule)
        group = groups.setdefault(key, TypeGroup(*key))
        group.n_tensors += 1
        group.n_weights += prod(entry.tensor.shape)
        group.n_bytes += entry.n_bytes
    names = list(dict.fromkeys(name for name, _, _ in groups))
    return sorted(groups.values(), key=lambda group: names.index(group.name))


def reference_bits(recipe: Recipe) -> float:
    """Bits per weight of the reference model, unpruned and with an importance matrix."""
    facts = REFERENCE_FACTS
    tensors = reference_tensors()
    return resolve(recipe, tensors, facts, facts.n_experts, has_imatrix=True).bits_per_weight


def list_lines() -> Iterable[str]:
    """The shipped recipes, and llama.cpp's file types in a second block."""
    shipped = [load_recipe(name) for name in shipped_recipes()]
    width = max(len(recipe.name) for recipe in shipped)
    yield f"{'RECIPE':<{width}}  BITS  WHAT IT IS"
    for recipe in shipped:
        yield f"{recipe.name:<{width}}  {reference_bits(recipe):>4.1f}  {recipe.title}"
    yield ""
    yield "FILE TYPES OF LLAMA.CPP, with bits; each is a recipe as well (any case, - or _)"
    longest = max(map(len, MIXTURES))
    cells = [f"{name:<{longest}} {reference_bits(load_recipe(name)):>4.1f}" for name in MIXTURES]
    for start in range(0, len(cells), _PER_LINE):
        yield "   ".join(cells[start : start + _PER_LINE])
    yield ""
    yield f"FILE TYPES OF IK_LLAMA.CPP, which alone loads them; to make them, `{EXTRA}`"
    cells = [f"{name:<{longest}} {reference_bits(load_recipe(name)):>4.1f}" for name in IK_MIXTURES]
    for start in range(0, len(cells), _PER_LINE):
        yield "   ".join(cells[start : start + _PER_LINE])
    yield ""
    yield f"BITS are per weight, for {REFERENCE_NAME}; `reap2gguf recipes check` has other models'."


def list_as_json() -> dict[str, Any]:
    """The same for programs."""
    return {
        "reference": REFERENCE_NAME,
        "recipes": [_summary(load_recipe(name)) for name in shipped_recipes()],
        "file_types": [{**_summary(load_recipe(name)), "name": name} for name in MIXTURES],
        "ik_file_types": [{**_summary(load_recipe(name)), "name": name} for name in IK_MIXTURES],
    }


def _summary(recipe: Recipe) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "title": recipe.title,
        "label": recipe.label,
        "file_type": recipe.file_type,
        "bits_per_weight": round(reference_bits(recipe), 4),
    }


def recipe_lines(recipe: Recipe) -> Iterable[str]:
    """A recipe rule by rule."""
    yield f"{recipe.name}: {recipe.title}"
    yield f"  file type {recipe.file_type}, files end in -{recipe.label}.gguf"
    if recipe.minimum is not None:
        asked = recipe.minimum.words
        yield f"  the importance matrix must have {asked}, in every tensor of experts"
    for rule in recipe.rules:
        only = "  (if the model has it)" if rule.optional else ""
        asks = "" if rule.minimum is None else f"  (with {rule.minimum.words} of importance)"
        yield f"  {rule.selector.words:<28} {rule.tensor_type.name}{only}{asks}"


def recipe_as_json(recipe: Recipe) -> dict[str, Any]:
    """The same for programs, with the TOML text."""
    return {
        "name": recipe.name,
        "title": recipe.title,
        "label": recipe.label,
        "file_type": recipe.file_type,
        **_minimum(recipe.minimum),
        "rules": [
            {
                rule.selector.key: rule.match,
                "layers": rule.layers,
                "type": rule.tensor_type.name,
                "optional": rule.optional,
                **_minimum(rule.minimum),
            }
            for rule in recipe.rules
        ],
        "toml": recipe.source,
    }


def _minimum(found: Minimum | None) -> dict[str, Any]:
    """The keys of a recipe or a rule that has one."""
    return {} if found is None else {"min_coverage": found.share, "min_tokens": found.tokens}


def table_lines(table: RecipeTable) -> Iterator[str]:
    """The types that a model's tensors get, one line per role, layers and type, and the sizes."""
    yield f"{table.recipe} for {table.model}: {table.title}"
    rows = [
        [
            *_which(row),
            row.tensor_type + ("*" if row.wanted else ""),
            _elements(row.n_weights),
            f"{row.bits_per_weight:.3f}",
            size(row.n_bytes),
        ]
        for row in table.rows
    ]
    head = ["ROLE", "TENSORS", "LAYERS", "TYPE", "ELEMENTS", "BPW", "SIZE"]
    yield from _columns(head, rows, n_left=4)
    for row in {(row.tensor_type, row.reason): row for row in table.rows if row.wanted}.values():
        yield from _wrapped(f"* {row.tensor_type} in place of {row.wanted}: {row.reason}")
    if table.needs_imatrix:
        name = table.needs_imatrix[0]
        yield from _wrapped(
            f"{len(table.needs_imatrix):,} tensors need an importance matrix, such as {name} "
            f"({table.tensor_types[name]})"
        )
    yield from _wrapped(
        f"{table.recipe}: {parameters(table.n_weights)} weights in {size(table.n_bytes)}, "
        f"{table.bits_per_weight:.2f} bits per weight; the file has {size(table.n_file_bytes)}, "
        f"{table.file_bits_per_weight:.2f} with its header"
    )


def table_as_json(table: RecipeTable) -> dict[str, Any]:
    """The same for programs, with the type of every tensor."""
    values = asdict(table)
    return {
        **{name: value for name, value in values.items() if name not in ("rows", "tensor_types")},
        **_bits_of(table),
        "rows": [
            {**asdict(row), "bits_per_weight": round(row.bits_per_weight, 4)} for row in table.rows
        ],
        "types": values["tensor_types"],
    }


def _bits_of(table: RecipeTable) -> dict[str, float]:
    return {
        "bits_per_weight": round(table.bits_per_weight, 4),
        "file_bits_per_weight": round(table.file_bits_per_weight, 4),
    }


def difference_lines(found: RecipeDifference) -> Iterator[str]:
    """What two recipes give a model differently, and the size of each."""
    first, second = found.first, found.second
    yield f"{first.recipe} and {second.recipe} for {found.model}"
    if found.is_equal:
        yield f"equal: all {first.n_tensors:,} tensors have the same type in both"
    else:
        rows = [
            [
                *_which(change),
                *change.types,
                *(f"{bits:.3f}" for bits in change.bits_per_weight),
                _signed(change.n_bytes[1] - change.n_bytes[0]),
            ]
            for change in found.changes
        ]
        head = ["ROLE", "TENSORS", "LAYERS", "FIRST", "SECOND", "BPW", "BPW", "SIZE"]
        yield from _columns(head, rows, n_left=5)
        same = first.n_tensors - found.n_changed
        yield f"{found.n_changed:,} tensors differ, {same:,} have the same type in both"
    for table in (first, second):
        yield (
            f"{table.recipe}: {table.bits_per_weight:.2f} bits per weight, the file has "
            f"{size(table.n_file_bytes)}"
        )
    bits = second.bits_per_weight - first.bits_per_weight
    n_bytes = second.n_file_bytes - first.n_file_bytes
    share = n_bytes / first.n_file_bytes
    yield f"difference: {bits:+.2f} bits per weight, {_signed(n_bytes)} ({share:+.1%})"


def difference_as_json(found: RecipeDifference) -> dict[str, Any]:
    """The same for programs."""
    changes = [
        {
            "role": one.role,
            "tensors": list(one.tensors),
            "layers": one.layers,
            "is_everywhere": one.is_everywhere,
            "types": list(one.types),
            "n_tensors": one.n_tensors,
            "n_weights": one.n_weights,
            "n_bytes": list(one.n_bytes),
            "bits_per_weight": [round(bits, 4) for bits in one.bits_per_weight],
        }
        for one in found.changes
    ]
    return {
        "model": found.model,
        "equal": found.is_equal,
        "n_changed": found.n_changed,
        "n_tensors": found.first.n_tensors,
        "recipes": [
            {
                "recipe": table.recipe,
                "label": table.label,
                "file_type": table.file_type,
                "n_bytes": table.n_bytes,
                "n_file_bytes": table.n_file_bytes,
                **_bits_of(table),
            }
            for table in (found.first, found.second)
        ],
        "changes": changes,
    }


def _which(row: RoleRow | RoleChange) -> tuple[str, str, str]:
    """Role, names and layers of a row's tensors."""
    layers = "all" if row.is_everywhere and row.layers else row.layers or "-"
    return row.role, ", ".join(row.tensors), layers


def _elements(count: int) -> str:
    return f"{count:,}" if count < _FEW else parameters(count)


def _signed(n_bytes: int) -> str:
    return f"{'-' if n_bytes < 0 else '+'}{size(abs(n_bytes))}"


def _columns(head: list[str], rows: list[list[str]], n_left: int) -> Iterator[str]:
    """Rows below their heads; the second and the third column are broken into lines.

    The first `n_left` columns are flush left.
    """
    broken = [
        [row[:1], _broken(row[1], ", ", _NAMES), _broken(row[2], ",", _LAYERS)]
        + [[cell] for cell in row[3:]]
        for row in rows
    ]
    cells = [[[cell] for cell in head], *broken]
    widths = [max(len(text) for row in cells for text in row[i]) for i in range(len(head))]
    for row in cells:
        for texts in zip_longest(*row, fillvalue=""):
            yield "  ".join(
                text.ljust(width) if i < n_left else text.rjust(width)
                for i, (text, width) in enumerate(zip(texts, widths, strict=True))
            ).rstrip()


def _broken(text: str, separator: str, width: int) -> list[str]:
    """A list in lines of at most `width` letters, as far as its members are that short."""
    lines = [""]
    for member in text.split(separator):
        longer = f"{lines[-1]}{separator}{member}" if lines[-1] else member
        if lines[-1] and len(longer) > width:
            lines[-1] += separator.rstrip()
            lines.append(member)
        else:
            lines[-1] = longer
    return lines


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _COLUMNS, subsequent_indent="  ", break_on_hyphens=False)


def check_lines(recipe: ResolvedRecipe, model: str) -> Iterable[str]:
    """The types that a model's tensors get, one line per name and type, and the total."""
    groups = type_groups(recipe)
    name_width = max(len(group.name) for group in groups)
    type_width = max(len(group.tensor_type) for group in groups)
    for group in groups:
        times = f"x{group.n_tensors}" if group.name.startswith("blk.") else ""
        because = f"  rule {group.rule}" if group.rule else ""
        yield (
            f"  {group.name:<{name_width}}  {group.tensor_type:<{type_width}}  {times:>5}  "
            f"{size(group.n_bytes):>10}  {group.bits_per_weight:>6.3f}{because}"
        )
    n_weights = sum(group.n_weights for group in groups)
    yield (
        f"{recipe.name}: fits {model}: {size(recipe.n_bytes)} for {parameters(n_weights)} weights, "
        f"{recipe.bits_per_weight:.2f} bits per weight"
    )


def check_as_json(recipe: ResolvedRecipe, model: str, notes: Sequence[str]) -> dict[str, Any]:
    """The same for programs, and the type of every tensor."""
    return {
        "recipe": recipe.name,
        "title": recipe.title,
        "label": recipe.label,
        "file_type": recipe.file_type,
        "model": model,
        "bytes": recipe.n_bytes,
        "bits_per_weight": round(recipe.bits_per_weight, 4),
        "groups": [
            {
                "tensors": group.name,
                "type": group.tensor_type,
                "rule": group.rule,
                "count": group.n_tensors,
                "weights": group.n_weights,
                "bytes": group.n_bytes,
                "bits_per_weight": round(group.bits_per_weight, 4),
            }
            for group in type_groups(recipe)
        ],
        "types": {name: found.name for name, found in recipe.tensor_types().items()},
        "notes": list(notes),
    }
