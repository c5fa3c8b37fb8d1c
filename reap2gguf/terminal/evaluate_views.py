"""What an evaluation looks like in a terminal: lines of text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from reap2gguf.messages import size
from reap2gguf.terminal.task_views import task_lines

if TYPE_CHECKING:
    from reap2gguf.bundle.evaluation import Divergence, Estimate, Evaluation, Speed
    from reap2gguf.bundle.wording import Wording

_WITHOUT_EXPONENT = 1e9


def evaluation_lines(evaluation: Evaluation, width: int | None = None) -> Iterator[str]:
    """All that was measured, in tables, which tasks keep within `width` letters.

    None: the width of the terminal.
    """
    width = width or shutil.get_terminal_size((120, 24)).columns
    if evaluation.text is not None:
        yield ""
        yield text_line(evaluation)
        yield ""
        yield from table_lines(_perplexities(evaluation))
    if evaluation.comparisons:
        yield ""
        yield from table_lines(_divergences(evaluation), n_names=2)
        yield ""
        yield "KL divergence in nats per token; Δp: change of the right token's probability"
    if evaluation.engine == "llama.cpp":
        yield "GGUF files were computed by llama.cpp, folders layer by layer"
    if evaluation.tasks:
        yield ""
        yield from task_lines(evaluation.tasks, width=width)
    if evaluation.speeds:
        yield ""
        yield from _speed_lines(evaluation.speeds)
    if evaluation.smoke_tests:
        yield ""
        yield from map(str, evaluation.smoke_tests)


def quality_lines(evaluation: Evaluation, words: Wording) -> Iterator[str]:
    """A short line per variant: its perplexity, and its divergence from what it was made of.

    `words` say what was done to the experts.
    """
    for one in evaluation.variants:
        apart = [
            f"{divergence.mean.value:.4f} from {words.name(reference)}"
            for reference in ("source", "pruned")
            if (divergence := evaluation.divergence(one.name, reference)) is not None
        ]
        means = f", mean KL {', '.join(apart)}" if apart else ""
        yield f"{words.name(one.name)}: perplexity {figure(one.perplexity, 2)}{means}"


def text_line(evaluation: Evaluation) -> str:
    """What was scored, in one line."""
    text = evaluation.text
    if text is None:
        return "no text was scored"
    return (
        f"{text.label}: {text.n_scored:,} tokens scored, in {text.n_chunks:,} chunks of "
        f"{text.chunk_size:,} (the second half of each)"
    )


def _speed_lines(speeds: Sequence[Speed]) -> Iterator[str]:
    rows: list[Sequence[str]] = [("file", "test", "tokens/s", "memory")]
    rows += [
        (one.variant, one.test, figure(one.tokens_per_second, 2), size(one.peak_bytes))
        for one in speeds
    ]
    yield from table_lines(rows, n_names=2)
    where = "a GPU" if speeds[0].on_gpu else f"{speeds[0].n_threads} threads"
    yield ""
    yield f"llama.cpp on {where}; memory: RAM of the process"
    yield "pp512: a prompt of 512 tokens; tg128: 128 tokens generated; x4: for 4 sequences at once"


def _perplexities(evaluation: Evaluation) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [("variant", "experts", "size", "bpw", "perplexity")]
    for one in evaluation.variants:
        bits = f"{one.bits_per_weight:.2f}"
        found = figure(one.perplexity, 4)
        rows.append((one.name, str(one.n_experts), size(one.n_bytes), bits, found))
    return rows


def _divergences(evaluation: Evaluation) -> list[Sequence[str]]:
    title = ("variant", "from", "mean KL", "median", "99 %", "max", "same top token", "RMS Δp")
    rows: list[Sequence[str]] = [title]
    rows += [
        (one.variant, one.reference, *_cells(one.divergence)) for one in evaluation.comparisons
    ]
    return rows


def _cells(found: Divergence) -> Iterator[str]:
    yield figure(found.mean, 4)
    yield f"{found.median.value:.4f}"
    yield f"{found.p99.value:.3f}"
    yield f"{found.maximum:.2f}"
    yield percent(found.same_top)
    yield percent(found.rms_probability)


def table_lines(rows: Sequence[Sequence[str]], n_names: int = 1) -> Iterator[str]:
    """Rows in columns: the first `n_names` begin at the left, figures end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if number < n_names else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield ("  " + "  ".join(cells)).rstrip()


def figure(found: Estimate, digits: int) -> str:
    """A value with its standard error."""
    if max(found.value, found.error) > _WITHOUT_EXPONENT:  # a perplexity of a broken model
        return f"{found.value:.{digits}e} ± {found.error:.{digits}e}"
    return f"{found.value:.{digits}f} ± {found.error:.{digits}f}"


def percent(found: Estimate) -> str:
    """A share in percent, with its standard error."""
    return f"{100 * found.value:.2f} ± {100 * found.error:.2f} %"
