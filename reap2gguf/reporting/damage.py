"""What pruning cost and what quantizing cost, apart: perplexity, divergence and its quantiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from reap2gguf.reporting.charts import Dot, DotRow, Legend, dot_rows, figure, legend
from reap2gguf.reporting.html import Html, absent, code, paragraph, section
from reap2gguf.reporting.numbers import plain, with_error
from reap2gguf.reporting.overview import damage_title
from reap2gguf.reporting.scales import log_scale
from reap2gguf.reporting.tables import Column, byte_size, count, measured, number, table, words

if TYPE_CHECKING:
    from reap2gguf.bundle.evaluation import Comparison, Divergence, Evaluation
    from reap2gguf.reporting.facts import Damage, ReportFacts

_ORDER: tuple[Damage, ...] = ("pruning", "quantizing", "both")
_EXPLAINED: dict[Damage, str] = {
    "pruning": "MODEL from source",
    "quantizing": "file from the model that was quantized",
    "both": "file from source: what one feels",
}
_QUANTILES = (("median", 50.0), ("p90", 90.0), ("p99", 99.0), ("p999", 99.9))


def damage(facts: ReportFacts) -> Html:
    """The section of perplexities and divergences."""
    evaluation = facts.evaluation
    if evaluation is None or not evaluation.variants:
        return section("damage", "What it cost", _not_measured(facts))
    return section(
        "damage",
        "What it cost",
        paragraph(_how(evaluation)),
        _divergences(facts, evaluation),
        _quantiles(facts, evaluation),
        _perplexities(facts, evaluation),
    )


def _not_measured(facts: ReportFacts) -> Html:
    return absent(
        f"What {facts.words.act} and quantizing cost was not measured for this bundle. ",
        code("reap2gguf evaluate"),
        " measures it; then make this report again.",
    )


def _how(evaluation: Evaluation) -> str:
    engine = (
        "by streaming every layer once through all variants"
        if evaluation.engine == "streamed"
        else "by llama.cpp itself"
    )
    text = evaluation.text
    if text is None:
        return f"Measured {engine}."
    bos = ", each with a BOS token" if text.has_bos else ""
    return (
        f"Measured {engine}, on {text.label}: {text.n_tokens:,} tokens in {text.n_chunks:,} chunks "
        f"of {text.chunk_size:,}{bos}. Scored are the {text.n_scored:,} tokens of the second "
        "halves, as llama-perplexity does. The KL divergence says how far the predicted "
        "probabilities of the next token are from those of the reference: 0 is no difference."
    )


def _explained(facts: ReportFacts, kind: Damage) -> str:
    return _EXPLAINED[kind].replace("MODEL", facts.words.model)


def ordered(facts: ReportFacts, evaluation: Evaluation) -> list[tuple[Damage, Comparison]]:
    """Comparisons by what lies between their variants, in the order of the record."""
    found = [(facts.damage(one), one) for one in evaluation.comparisons]
    return sorted(found, key=lambda pair: _ORDER.index(pair[0]))


def _divergences(facts: ReportFacts, evaluation: Evaluation) -> list[Html]:
    found = ordered(facts, evaluation)
    if not found:
        return [absent("The variants were not compared with one another.")]
    title = "KL divergence, mean"
    kinds = [kind for kind in _ORDER if any(kind == other for other, _ in found)]
    scale = log_scale([one.divergence.mean.value for _, one in found])
    rows = [_mean_row(facts, kind, one) for kind, one in found]
    return [
        figure(
            "divergence",
            title,
            legend([Legend(k, f"{damage_title(facts, k)}: {_explained(facts, k)}") for k in kinds]),
            dot_rows(title, rows, scale, "nats"),
            note="Bars are one standard error. The axis is logarithmic.",
        ),
        _divergence_table(facts, found),
    ]


def _mean_row(facts: ReportFacts, kind: Damage, one: Comparison) -> DotRow:
    mean, name = one.divergence.mean, facts.label(one.variant)
    tip = f"{name}: {damage_title(facts, kind)}\nmean KL divergence {with_error(mean)} nats"
    label = f"{name}, {damage_title(facts, kind)}"
    return DotRow(label, [Dot(mean.value, mean.error, kind, tip)], with_error(mean))


def _divergence_table(facts: ReportFacts, found: Sequence[tuple[Damage, Comparison]]) -> Html:
    columns = [
        Column("variant", is_number=False),
        Column("damage of", is_number=False),
        Column("KL divergence", note="mean, nats"),
        Column("same top token", note="%"),
        Column("RMS of probability", note="difference, %"),
        Column("perplexity", note="divided by the reference's"),
    ]
    rows = [
        [
            words(facts.label(one.variant)),
            words(damage_title(facts, kind)),
            measured(one.divergence.mean),
            measured(one.divergence.same_top, 100),
            measured(one.divergence.rms_probability, 100),
            measured(one.divergence.perplexity_ratio),
        ]
        for kind, one in found
    ]
    note = "± is one standard error, which takes scored tokens as independent of one another."
    title = f"{facts.words.title} damage and quantizing damage"
    return table(title, columns, rows, note)


def _quantiles(facts: ReportFacts, evaluation: Evaluation) -> list[Html]:
    found = ordered(facts, evaluation)
    if not found:
        return []
    title = "KL divergence, quantiles over tokens"
    values = [v for _, one in found for v in (*_values(one.divergence), one.divergence.maximum)]
    rows = [_quantile_row(facts, kind, one) for kind, one in found]
    return [
        figure(
            "quantiles",
            title,
            dot_rows(title, rows, log_scale(values), "nats"),
            note="From left to right: median, 90 %, 99 %, 99.9 %, and the maximum as a ring.",
        ),
        _quantile_table(facts, found),
    ]


def _quantile_row(facts: ReportFacts, kind: Damage, one: Comparison) -> DotRow:
    largest = one.divergence.maximum
    labels = ("median", "90 %", "99 %", "99.9 %")
    dots = [
        Dot(value, None, kind, _quantile_tip(facts, kind, one, label, value))
        for label, value in zip(labels, _values(one.divergence), strict=True)
    ]
    tip = _quantile_tip(facts, kind, one, "maximum", largest)
    dots.append(Dot(largest, None, f"{kind} hollow", tip))
    name = f"{facts.label(one.variant)}, {damage_title(facts, kind)}"
    return DotRow(name, dots, f"max {plain(largest, 3)}", is_joined=True)


def _quantile_table(facts: ReportFacts, found: Sequence[tuple[Damage, Comparison]]) -> Html:
    columns = [
        Column("variant", is_number=False),
        Column("damage of", is_number=False),
        *(Column("median" if share == 50 else f"{share:g} %") for _, share in _QUANTILES),
        Column("maximum"),
    ]
    cells = [
        [
            words(facts.label(one.variant)),
            words(damage_title(facts, kind)),
            *(measured(getattr(one.divergence, name)) for name, _ in _QUANTILES),
            number(one.divergence.maximum),
        ]
        for kind, one in found
    ]
    return table("Quantiles of the KL divergence, in nats", columns, cells)


def _values(divergence: Divergence) -> list[float]:
    return [getattr(divergence, name).value for name, _ in _QUANTILES]


def _quantile_tip(
    facts: ReportFacts, kind: Damage, one: Comparison, label: str, value: float
) -> str:
    meaning = {
        "median": "half of the tokens are at most this far",
        "maximum": "no token is farther",
    }.get(label, f"{label} of the tokens are at most this far")
    name = f"{facts.label(one.variant)}: {damage_title(facts, kind)}"
    return f"{name}\n{label}: {plain(value)} nats\n{meaning}"


def _perplexities(facts: ReportFacts, evaluation: Evaluation) -> Html:
    columns = [
        Column("variant", is_number=False),
        Column("perplexity"),
        Column("experts", note="per layer"),
        Column("size"),
        Column("bits per weight"),
    ]
    rows = [
        [
            words(facts.label(one.name)),
            measured(one.perplexity),
            count(one.n_experts),
            byte_size(one.n_bytes),
            number(one.bits_per_weight, f"{one.bits_per_weight:.2f}"),
        ]
        for one in evaluation.variants
    ]
    note = (
        "Lower is better. All variants saw the same tokens, so the ratio of two perplexities (see "
        "above) is known more exactly than either."
    )
    return table("Perplexity", columns, rows, note)
