"""Calibration mixes as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from reap2gguf.messages import quantity, size

if TYPE_CHECKING:
    from reap2gguf.calibration.mixes import KnownMix


def list_lines(mixes: Sequence[KnownMix]) -> Iterable[str]:
    """One line per mix: name, rows, tokens, where it comes from, what it is."""
    rows = [("MIX", "ROWS", "TOKENS", "FROM", "WHAT IT IS")]
    for mix in mixes:
        n_rows = "" if mix.n_rows is None else f"{mix.n_rows:,}"
        rows.append((mix.name, n_rows, _amount(mix), _place(mix), mix.title))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for name, n_rows, amount, place, title in rows:
        yield (
            f"{name:<{widths[0]}}  {n_rows:>{widths[1]}}  {amount:>{widths[2]}}  "
            f"{place:<{widths[3]}}  {title}"
        )
    yield ""
    yield "For a release, use a published mix or your own text: --calibration MIX|FILE|FOLDER."


def mix_lines(mix: KnownMix) -> Iterable[str]:
    """What one mix consists of."""
    yield f"{mix.name}: {mix.title}"
    yield f"  from: {_place(mix)}, {mix.source}"
    rows = "one sample or piece of a text per row"
    if mix.n_rows is not None:
        rows = f"{mix.n_rows:,} rows" + (", filled with samples (--pack)" if mix.pack else "")
    amount = f"; {_amount(mix)}" if mix.n_tokens is None else f"; at most {_amount(mix)} tokens"
    yield f"  rows: {rows}, at most {mix.max_length:,} tokens each{amount}"
    width = max(len(part.name) for part in mix.parts)
    for part in mix.parts:
        count = f"{part.n_rows:,} rows" if part.n_rows is not None else size(part.n_bytes or 0)
        yield f"  {part.name:<{width}}  {count:>10}  {part.what}".rstrip()
    if not mix.is_local:
        pack = " --pack" if mix.pack else ""
        yield f"  the same as: --calibration '{mix.spec}' --max-length {mix.max_length}{pack}"


def mix_as_json(mix: KnownMix) -> dict[str, Any]:
    """The same for programs."""
    totals = {"rows": mix.n_rows, "tokens": mix.n_tokens, "bytes": mix.n_bytes}
    return {**asdict(mix), **totals}


def _amount(mix: KnownMix) -> str:
    if mix.n_tokens is not None:
        return quantity(mix.n_tokens, "").strip()
    return f"{size(mix.n_bytes or 0)} of text"


def _place(mix: KnownMix) -> str:
    return "program" if mix.is_local else "Hub"
