"""What was measured, in a card: what pruning cost, what quantizing cost, tasks and speed.

Every figure is one of the manifest's, with its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from reap2gguf.bundle.layout import QUALITY_PICTURE
from reap2gguf.bundle.manifest import NO_METHOD
from reap2gguf.bundle.markdown import code, inline, picture, table
from reap2gguf.bundle.wording import wording
from reap2gguf.messages import size

if TYPE_CHECKING:
    from reap2gguf.bundle.evaluation import (
        Divergence,
        Estimate,
        Evaluation,
        TaskScore,
        TextRecord,
        VariantRecord,
    )
    from reap2gguf.bundle.manifest import GgufRecord, Manifest

NOT_MEASURED = "-"
_MOST_DECIMALS = 6
_WITHOUT_EXPONENT = 1e9
_BESIDE_LLAMA_CPP = (
    "llama.cpp rounds activations while it computes, and this evaluation does not, so its own "
    "figures can differ by some tenths of a percent."
)


def figure(found: Estimate | None, factor: float = 1.0, unit: str = "") -> str:
    """An estimate with its standard error, which has two significant digits."""
    if found is None:
        return NOT_MEASURED
    value, error = found.value * factor, found.error * factor
    if max(value, error) > _WITHOUT_EXPONENT:  # a perplexity of a broken model
        return f"{value:.3e} ± {error:.1e}{unit}"
    decimals = 4
    if error > 0:
        decimals = min(max(1 - math.floor(math.log10(error)), 0), _MOST_DECIMALS)
    return f"{value:.{decimals}f} ± {error:.{decimals}f}{unit}"


def percent(found: Estimate | None) -> str:
    """A share as a percentage with its standard error."""
    return figure(found, 100, " %")


def file_figures(manifest: Manifest, record: GgufRecord) -> tuple[str, ...]:
    """The cells of a file in the table of files, under `FILE_FIGURES`."""
    evaluation = manifest.evaluation
    assert evaluation is not None
    variant = evaluation.variant(record.file)
    pruned = evaluation.divergence(record.file, "pruned")
    source = evaluation.divergence(record.file, "source")
    cells = [NOT_MEASURED if variant is None else figure(variant.perplexity)]
    if has_pruned(manifest):
        cells.append(figure(None if pruned is None else pruned.mean))
    cells.append(figure(None if source is None else source.mean))
    cells.append(percent(None if source is None else source.same_top))
    return tuple(cells)


def file_headings(manifest: Manifest) -> tuple[str, ...]:
    """The headings of `file_figures`."""
    model = wording(manifest.pruning).model
    pruned = (f"KL from {model}",) if has_pruned(manifest) else ()
    return ("perplexity", *pruned, "KL from source", "same top token as source")


def has_pruned(manifest: Manifest) -> bool:
    """Whether there is a pruned model beside the files, from which they were quantized."""
    return manifest.pruning.method != NO_METHOD and manifest.source.gguf is None


def has_figures(manifest: Manifest) -> bool:
    """Whether perplexity was measured of any file."""
    evaluation = manifest.evaluation
    return evaluation is not None and any(
        evaluation.variant(record.file) is not None for record in manifest.gguf
    )


def quality_section(manifest: Manifest, *, of_files: bool) -> str:
    """All that was measured; in the card of the safetensors without what is of GGUF files."""
    evaluation = manifest.evaluation
    if evaluation is None:
        return (
            "## Quality\n\nQuality was not measured. To measure it, in the folder of the GGUF "
            "files: `reap2gguf evaluate .`"
        )
    records = manifest.gguf if of_files else ()
    # what each variant is called in the tables
    words = wording(manifest.pruning)
    labels = {"source": "source", "pruned": words.model}
    labels |= {record.file: code(record.label) for record in records}
    parts = ["## Quality"]
    if evaluation.text is not None:
        parts.append(_text(evaluation, evaluation.text))
    parts += _damage(manifest, evaluation, records)
    if of_files and QUALITY_PICTURE in manifest.pictures:
        parts.append(picture("KL divergence against size of the files", QUALITY_PICTURE))
    variants = [one for one in evaluation.variants if one.name in labels]
    if len(variants) > 1:
        parts += ["All figures of the text:", _variants_table(evaluation, variants, labels)]
    if quantized := _quantized_rows(evaluation, records):
        header = (f"file, from the {words.model} model", *_DIVERGENCE)
        parts += ["Quantizing alone:", table(header, quantized)]
    parts += _tasks(evaluation, labels)
    parts += _speeds(evaluation, labels)
    return "\n\n".join(parts)


def _text(evaluation: Evaluation, text: TextRecord) -> str:
    how = "llama.cpp" if evaluation.engine == "llama.cpp" else "reap2gguf, layer by layer"
    bos = ", each after the token for the beginning of a text" if text.has_bos else ""
    beside = "" if evaluation.engine == "llama.cpp" else f" {_BESIDE_LLAMA_CPP}"
    return (
        f"Measured on {inline(text.label)}: {text.n_chunks:,} chunks of {text.chunk_size:,} "
        f"tokens, of which {text.n_scored:,} tokens in the second halves were scored, as "
        f"llama-perplexity does{bos}. Computed by {how}, in {inline(evaluation.dtype)} on "
        f"{inline(evaluation.device)}. KL divergences are in nats; ± is one standard error."
        f"{beside}"
    )


def _damage(
    manifest: Manifest, evaluation: Evaluation, records: Sequence[GgufRecord]
) -> Iterator[str]:
    """What pruning and quantizing cost, apart, in plain words."""
    lines, words = [], wording(manifest.pruning)
    source, pruned = evaluation.variant("source"), evaluation.variant("pruned")
    pruning = evaluation.divergence("pruned", "source")
    if pruning is not None and source is not None and pruned is not None:
        lines.append(
            f"- **{words.title}** ({source.n_experts} to {pruned.n_experts} experts per layer): "
            f"perplexity goes from {figure(source.perplexity)} to {figure(pruned.perplexity)}; "
            f"{_in_words(pruning)}."
        )
    if manifest.source.gguf is not None and manifest.pruning.method != NO_METHOD:
        lines += _of_gguf_source(manifest, evaluation, records)
        records = ()
    reference = "pruned" if has_pruned(manifest) else "source"
    of_what = f"the {words.model} model" if has_pruned(manifest) else "the source"
    for record in records:
        found = evaluation.divergence(record.file, reference)
        if found is not None:
            lines.append(
                f"- **Quantizing** to {code(record.label)}, from {of_what}: {_in_words(found)}."
            )
    if lines:
        yield "\n".join(lines)
    if (
        pruning is not None
        and records
        and (compared := _compared(evaluation, pruning, records, words.act))
    ):
        yield compared


def _of_gguf_source(
    manifest: Manifest, evaluation: Evaluation, records: Sequence[GgufRecord]
) -> Iterator[str]:
    """What pruning a GGUF file cost: its blocks are taken as they are, or quantized again."""
    source, act = evaluation.variant("source"), wording(manifest.pruning).title
    for record in records:
        found = evaluation.divergence(record.file, "source")
        variant = evaluation.variant(record.file)
        if found is None or source is None or variant is None:
            continue
        what = f"**{act}**" if record.adopted else f"**{act} and quantizing again**"
        yield (
            f"- {what} ({source.n_experts} to {variant.n_experts} experts per layer), in "
            f"{code(record.label)}: perplexity goes from {figure(source.perplexity)} to "
            f"{figure(variant.perplexity)}; {_in_words(found)}."
        )


def _in_words(found: Divergence) -> str:
    return (
        f"mean KL divergence {figure(found.mean)}, the same top token for "
        f"{percent(found.same_top)} of the tokens"
    )


def _compared(
    evaluation: Evaluation, pruning: Divergence, records: Sequence[GgufRecord], act: str
) -> str:
    """Which of both costs more, by file; `act` is what was done to the experts."""
    means = {
        record.label: found.mean.value
        for record in records
        if (found := evaluation.divergence(record.file, "pruned")) is not None
    }
    if not means:
        return ""
    more = [label for label, mean in means.items() if mean > pruning.mean.value]
    if not more:
        return f"In every file, {act} costs more than quantizing."
    if len(more) == len(means):
        return f"In every file, quantizing costs more than {act}."
    names = ", ".join(map(code, more))
    return f"Quantizing costs more than {act} in {names}; in the other files, less."


_DIVERGENCE = (
    "KL mean",
    "KL median",
    "KL 90 %",
    "KL 99 %",
    "KL 99.9 %",
    "KL maximum",
    "same top token",
    "RMS of probability differences",
    "perplexity ratio",
)


def _divergence_cells(found: Divergence | None) -> tuple[str, ...]:
    if found is None:
        return (NOT_MEASURED,) * len(_DIVERGENCE)
    return (
        figure(found.mean),
        figure(found.median),
        figure(found.p90),
        figure(found.p99),
        figure(found.p999),
        f"{found.maximum:.4f}",
        percent(found.same_top),
        percent(found.rms_probability),
        figure(found.perplexity_ratio),
    )


def _variants_table(
    evaluation: Evaluation, variants: Sequence[VariantRecord], labels: Mapping[str, str]
) -> str:
    header = ("model, from the source", "size", "bits per weight", "perplexity", *_DIVERGENCE)
    rows = [
        (
            labels[one.name],
            size(one.n_bytes),
            f"{one.bits_per_weight:.2f}",
            figure(one.perplexity),
            *_divergence_cells(evaluation.divergence(one.name, "source")),
        )
        for one in variants
    ]
    return table(header, rows)


def _quantized_rows(evaluation: Evaluation, records: Sequence[GgufRecord]) -> list[tuple[str, ...]]:
    found = ((one, evaluation.divergence(one.file, "pruned")) for one in records)
    return [
        (code(one.label), *_divergence_cells(divergence))
        for one, divergence in found
        if divergence is not None
    ]


def _tasks(evaluation: Evaluation, labels: Mapping[str, str]) -> Iterator[str]:
    """A row per task and metric, a column per variant, with the difference from the source."""
    scores = [one for one in evaluation.tasks if one.variant in labels]
    if not scores:
        return
    by_key = {(one.task, one.metric, one.n_shots, one.variant): one for one in scores}
    variants = list(dict.fromkeys(one.variant for one in scores))
    keys = list(dict.fromkeys((one.task, one.metric, one.n_shots) for one in scores))
    rows = []
    for task, metric, n_shots in keys:
        found = {name: by_key.get((task, metric, n_shots, name)) for name in variants}
        n_items = max(one.n_items for one in found.values() if one is not None)
        is_share = all(0 <= one.score.value <= 1 for one in found.values() if one is not None)
        cells = [_score(found[name], found.get("source"), is_share) for name in variants]
        rows.append((inline(task), inline(metric), str(n_shots), f"{n_items:,}", *cells))
    names = [labels[name] for name in variants]
    yield "### Tasks"
    yield table(("task", "metric", "shots", "questions", *names), rows)
    if "source" in variants:
        yield "In brackets: the difference from the source; ± is one standard error."


def _score(one: TaskScore | None, source: TaskScore | None, is_share: bool) -> str:
    if one is None:
        return NOT_MEASURED
    text = percent(one.score) if is_share else figure(one.score)
    if source is None or source is one:
        return text
    change = one.score.value - source.score.value
    return f"{text} ({change * 100:+.1f})" if is_share else f"{text} ({change:+.4f})"


def _speeds(evaluation: Evaluation, labels: Mapping[str, str]) -> Iterator[str]:
    rows = [
        (
            labels[one.variant],
            inline(one.test),
            figure(one.tokens_per_second),
            f"{one.n_threads}",
            "GPU" if one.on_gpu else "CPU",
            size(one.peak_bytes),
        )
        for one in evaluation.speeds
        if one.variant in labels
    ]
    if rows:
        yield "### Speed in llama.cpp, on the machine of the evaluation"
        yield table(("file", "test", "tokens per second", "threads", "on", "memory"), rows)
