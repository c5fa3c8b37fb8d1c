"""Bits per weight of every file by layer and role, and the type of every tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from reap2gguf.gguf_files.tensor_types import block_of, type_of_name
from reap2gguf.messages import size
from reap2gguf.reporting.charts import figure
from reap2gguf.reporting.facts import ROLES, TensorSize, in_layer, layer_of, role_of
from reap2gguf.reporting.grids import Strip, strips, tabs
from reap2gguf.reporting.html import Html, absent, code, details, element, section
from reap2gguf.reporting.numbers import layers as ranges
from reap2gguf.reporting.tables import Cell, Column, count, missing, table, words

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import GgufRecord
    from reap2gguf.reporting.facts import ReportFacts

_EDGES = (2.9, 3.9, 4.9, 5.9, 7.5, 12.0)  # bits per weight between the colours
_STEPS = ("1 and 2 bits", "3", "4", "5", "6", "8", "16 and 32")


def precision(facts: ReportFacts) -> Html:
    """The section of bits and types."""
    title = "Bits per weight by layer and role"
    records = facts.manifest.gguf
    panes = [(record.label, _strips(record)) for record in records]
    return section(
        "bits",
        "Bits per weight",
        figure(
            "bits-by-layer",
            title,
            _legend(),
            tabs("bits-of", panes),
            note="Each row is a tensor that every layer has, each column a layer.",
        ),
        _role_table(facts),
        details("Types of all tensors, by file", [_type_table(record) for record in records]),
    )


def bits_of(tensor_type: str) -> float:
    """Bits per weight of a tensor type, scales included."""
    block, n_bytes = block_of(type_of_name(tensor_type))
    return float(8 * n_bytes / block)


def look(bits: float) -> str:
    """The class that colours a number of bits."""
    return f"b{sum(bits >= edge for edge in _EDGES)}"


def _legend() -> Html:
    items = []
    for step, title in enumerate(_STEPS):
        square = element("rect", width=16, height=12, class_=f"b{step}")
        drawn = element("svg", square, width=16, height=12, aria_hidden="true")
        items.append(element("li", drawn, title))
    return element("ul", items, class_="legend swatches")


def _by_name(record: GgufRecord) -> dict[str, dict[int, str]]:
    """Types by the name inside a layer, then by layer; roles in their order."""
    found: dict[str, dict[int, str]] = {}
    for tensor, tensor_type in record.tensors.items():
        found.setdefault(in_layer(tensor), {})[layer_of(tensor)] = tensor_type
    place = {role: number for number, role in enumerate(ROLES)}
    return dict(sorted(found.items(), key=lambda one: (place[role_of(one[0])], one[0])))


def _strips(record: GgufRecord) -> list[Html]:
    by_name = _by_name(record)
    layers = sorted({layer for types in by_name.values() for layer in types} - {-1})
    rows = [
        (code(name), list(_runs(name, types, layers)))
        for name, types in by_name.items()
        if -1 not in types and role_of(name) != "norms"
    ]
    alone = [
        element("li", code(name), f" {types[-1]}, {bits_of(types[-1]):.2f} bits")
        for name, types in by_name.items()
        if -1 in types and role_of(name) != "norms"
    ]
    title = f"Bits per weight by layer in {record.file}"
    others = element("ul", alone, class_="alone") if alone else None
    return [
        strips(title, rows, layers) if rows else absent("No tensor of a layer."),
        *([others] if others else []),
    ]


def _runs(name: str, types: Mapping[int, str], layers: Sequence[int]) -> Iterator[Strip]:
    """Neighbouring layers of one type as one strip; layers without the tensor stay empty."""
    first = 0
    for slot in range(1, len(layers) + 1):
        current = types.get(layers[first])
        if slot < len(layers) and types.get(layers[slot]) == current:
            continue
        if current is not None:
            bits = bits_of(current)
            where = ranges(list(layers[first:slot]))
            several = "layers" if slot - first > 1 else "layer"
            tip = f"{name}, {several} {where}\n{current}, {bits:.2f} bits per weight"
            yield Strip(first, slot - first, look(bits), tip)
        first = slot


def _role_table(facts: ReportFacts) -> Html:
    """Bits by role, a column for each file that is there."""
    records = [one for one in facts.manifest.gguf if one.file in facts.sizes]
    lacking = [one.file for one in facts.manifest.gguf if one.file not in facts.sizes]
    if not records:
        why = "No GGUF file lies beside this bundle, so weights and bytes by role are not known."
        return absent(why)
    by_file = [_by_role(facts.sizes[one.file]) for one in records]
    columns = [Column("role", is_number=False), Column("tensors"), Column("weights")]
    columns += [Column(one.label, note="bits per weight") for one in records]
    rows: list[list[Cell]] = []
    for role in ROLES:
        known = [roles[role] for roles in by_file if role in roles]
        if known:
            row = [words(role), count(len(known[0])), count(sum(one.n_weights for one in known[0]))]
            rows.append([*row, *(_bits_cell(roles.get(role, ())) for roles in by_file)])
    note = f"Not there, and so not counted: {', '.join(lacking)}." if lacking else ""
    return table("Weights and bits by role", columns, rows, note)


def _by_role(sizes: Mapping[str, TensorSize]) -> dict[str, list[TensorSize]]:
    found: dict[str, list[TensorSize]] = {}
    for tensor, one in sizes.items():
        found.setdefault(role_of(tensor), []).append(one)
    return found


def _bits_cell(tensors: Sequence[TensorSize]) -> Cell:
    """Bits per weight, and under them the bytes."""
    n_weights, n_bytes = sum(t.n_weights for t in tensors), sum(t.n_bytes for t in tensors)
    if not n_weights:
        return missing("not in this file")
    bits = 8 * n_bytes / n_weights
    shown = [f"{bits:.2f}", element("span", size(n_bytes), class_="title")]
    return Cell(shown, bits)


def _type_table(record: GgufRecord) -> Html:
    """One row per name, with the layers of each of its types."""
    columns = [
        Column("tensor", is_number=False),
        Column("role", is_number=False),
        Column("types", is_number=False),
    ]
    rows = []
    for name, types in _by_name(record).items():
        kinds: dict[str, list[int]] = {}
        for layer, tensor_type in sorted(types.items()):
            kinds.setdefault(tensor_type, []).append(layer)
        rows.append([words(name, code(name)), words(role_of(name)), words(_kinds(kinds))])
    note = f"{len(record.tensors):,} tensors, {size(record.n_bytes)}."
    return table(f"Types in {record.file}", columns, rows, note)


def _kinds(kinds: Mapping[str, Sequence[int]]) -> str:
    if len(kinds) == 1:
        return next(iter(kinds))
    return "; ".join(f"{kind} in {ranges(list(where))}" for kind, where in kinds.items())
