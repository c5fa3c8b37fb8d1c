"""Comparisons as text: tables that fit the terminal, and a block per model where none does."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from reap2gguf.messages import parameters, size
from reap2gguf.terminal.evaluate_views import figure

if TYPE_CHECKING:
    from reap2gguf.comparing.compared import ComparedModel, ModelComparison
    from reap2gguf.comparing.contents import Contents, Portion

_LEAST_NAME, _MOST_NAME = 16, 60  # letters of a model's name in a table
_CELL = 8  # letters of a number in the tables of bits
_LEAD = 14  # of what stands before them
_MOST_TYPES = 6  # of a role in one model


def comparison_lines(found: ModelComparison, width: int, by_layer: bool = False) -> Iterator[str]:
    """A comparison for people, in lines of at most `width` letters."""
    yield from _table(
        found, ["size", "bits", "experts", "type"], [_facts(one) for one in found.models], width
    )
    yield ""
    if found.evaluation is not None:
        rows = [_figures(found, one.label) for one in found.models]
        yield from _table(found, ["perplexity", "KL divergence", "same top"], rows, width)
        yield ""
    yield "bits per weight"
    yield from _by_model(
        [(role, [one.contents.roles.get(role) for one in found.models]) for role in found.roles],
        width,
    )
    yield from _by_model([("all", [one.contents.total for one in found.models])], width, head=False)
    if by_layer:
        yield ""
        yield "bits per weight of each layer"
        layers = [
            (f"layer {layer}", [one.contents.layer(layer) for one in found.models])
            for layer in found.layers
        ]
        yield from _by_model(layers, width)
    yield ""
    yield "types"
    yield from _types(found, width)
    yield from _notes(found, width)


def _table(
    found: ModelComparison, heads: Sequence[str], rows: Sequence[Sequence[str]], width: int
) -> Iterator[str]:
    """A row for each model with its number and name, or a few lines where rows do not fit."""
    names = [one.label for one in found.models]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    longest = max(map(len, names))
    room = min(width - 4 - sum(w + 2 for w in widths), longest, _MOST_NAME)
    if room < min(_LEAST_NAME, longest):
        yield from _blocks(names, heads, rows, width)
        return
    for number, name, cells in zip(
        ["", *map(str, range(1, len(names) + 1))], ["", *names], [heads, *rows], strict=True
    ):
        padded = "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
        yield f"{number:>2}  {_cut(name, room):<{room}}{padded}".rstrip()


def _blocks(
    names: Sequence[str], heads: Sequence[str], rows: Sequence[Sequence[str]], width: int
) -> Iterator[str]:
    lead = max(map(len, heads))
    for number, (name, row) in enumerate(zip(names, rows, strict=True), start=1):
        yield f"{number:>2}  {_cut(name, width - 4)}"
        for head, cell in zip(heads, row, strict=True):
            if cell:
                yield f"    {head:<{lead}}  {cell}"


def _facts(one: ComparedModel) -> list[str]:
    contents = one.contents
    return [
        size(contents.n_file_bytes),
        f"{contents.bits_per_weight:.2f}",
        _experts(contents),
        contents.file_type,
    ]


def _experts(contents: Contents) -> str:
    """How many experts the layers have."""
    if not contents.experts:
        return "none"
    low, high = contents.experts[0], contents.experts[-1]
    return str(low) if low == high else f"{low}-{high}"


def _figures(found: ModelComparison, label: str) -> list[str]:
    perplexity, divergence = found.perplexity(label), found.divergence(label)
    if perplexity is None:
        return ["-", "", ""]
    first = figure(perplexity, 4)
    if divergence is None:
        return [first, "reference", ""]
    mean, top = divergence.mean, divergence.same_top
    return [
        first,
        f"{mean.value:.5f} ± {mean.error:.5f}",
        f"{100 * top.value:.2f} ± {100 * top.error:.2f} %",
    ]


def _by_model(
    rows: Sequence[tuple[str, Sequence[Portion | None]]], width: int, head: bool = True
) -> Iterator[str]:
    """A table of bits per weight with a column per model, in several tables if they are many."""
    n_models = len(rows[0][1]) if rows else 0
    fitting = max(1, (width - _LEAD - 2) // _CELL)
    for first in range(0, n_models, fitting):
        numbers = range(first, min(first + fitting, n_models))
        if head:
            yield f"  {'':<{_LEAD}}" + "".join(f"{number + 1:>{_CELL}}" for number in numbers)
        for name, portions in rows:
            cells = "".join(f"{_bits(portions[number]):>{_CELL}}" for number in numbers)
            yield f"  {name:<{_LEAD}}{cells}"


def _bits(portion: Portion | None) -> str:
    return "-" if portion is None else f"{portion.bits_per_weight:.2f}"


def _types(found: ModelComparison, width: int) -> Iterator[str]:
    """The types of each role; models that have the same share a line."""
    for role in found.roles:
        groups: dict[str, list[int]] = {}
        for number, one in enumerate(found.models, start=1):
            portion = one.contents.roles.get(role)
            groups.setdefault("-" if portion is None else _shares(portion), []).append(number)
        lead = f"  {role:<{_LEAD}}"
        for text, numbers in groups.items():
            which = "" if len(groups) == 1 else f"{', '.join(map(str, numbers))}: "
            yield from textwrap.wrap(
                which + text,
                max(width, len(lead) + 10),
                initial_indent=lead,
                subsequent_indent=" " * len(lead),
            )
            lead = " " * len(lead)


def _shares(portion: Portion) -> str:
    """The types of a portion, the most first, each with its share of the weights."""
    types: Mapping[str, int] = portion.types
    if len(types) == 1:
        return next(iter(types))
    shares = [f"{name} {_percent(count / portion.n_weights)}" for name, count in types.items()]
    more = len(shares) - _MOST_TYPES
    return ", ".join(shares[:_MOST_TYPES]) + (f" and {more} more" if more > 0 else "")


def _percent(share: float) -> str:
    return "< 1 %" if share < 0.01 else f"{100 * share:.0f} %"


def _notes(found: ModelComparison, width: int) -> Iterator[str]:
    """What the figures are, and why some models have none."""
    lines: list[str] = []
    evaluation = found.evaluation
    if evaluation is not None and evaluation.text is not None:
        text = evaluation.text
        lines.append(
            f"perplexity of {text.n_scored:,} tokens of {text.label} in {text.n_chunks:,} chunks "
            f"of {text.chunk_size}; KL divergence: mean from {found.reference}, in nats; same top: "
            "tokens where both find the same token likeliest. llama.cpp also rounds activations "
            "of quantized files, which is not done here."
        )
    lines += [
        f"{one.label}: not evaluated: {one.not_evaluated}"
        for one in found.models
        if one.not_evaluated
    ]
    counts = {one.contents.total.n_weights for one in found.models}
    if len(counts) > 1:
        listed = ", ".join(
            f"{number}: {parameters(one.contents.total.n_weights)}"
            for number, one in enumerate(found.models, start=1)
        )
        lines.append(f"weights: {listed}")
    for line in lines:
        yield ""
        yield from textwrap.wrap(line, width) or [""]


def _cut(name: str, room: int) -> str:
    """A name in `room` letters: what differs between files of one model is at the end."""
    return name if len(name) <= room else f"...{name[len(name) - room + 3 :]}"
