"""Compares all methods of pruning by what they cost, and what `--method auto` makes of them.

    python bench/methods.py MODEL... --calibration TEXT --text EVALUATION

For each MODEL, `--subsets` disjoint calibrations are cut from TEXT: of n, calibration s has the
chunks s, s + n, s + 2n, ... of 512 tokens. On each of them MODEL is observed, pruned by every
method to each number of `--drop`, and measured on chunks spread over EVALUATION and on the embedded
texts of other domains. `auto` gets the same rows, holds some of them out, observes the others, and
chooses; what it chose is measured like the rest. All pruned models of one calibration are measured
in one sweep, as views: nothing is written. The tables have means over the calibrations, and the
standard errors of these means.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from reap2gguf.artifacts.observations import Observations
from reap2gguf.artifacts.texts import ObservationRows, Row
from reap2gguf.calibration.rows import chunk_text
from reap2gguf.calibration.spec import decide
from reap2gguf.choosing.holdout import hold_out
from reap2gguf.choosing.measure import Measurement
from reap2gguf.choosing.names import CANDIDATES
from reap2gguf.choosing.texts import MeasuredText, held_out_text, other_text, scored_half
from reap2gguf.evaluating.engine import evaluate_variants
from reap2gguf.evaluating.figures import perplexity
from reap2gguf.evaluating.opening import OpenVariants
from reap2gguf.evaluating.variants import Variant
from reap2gguf.observing.passes import observe
from reap2gguf.options import CalibrationOptions, ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.pruning.methods import METHODS
from reap2gguf.pruning.select import Kept, choose_target, select_experts
from reap2gguf.pruning.view import PrunedView
from reap2gguf.tokenizer.tokenizer import Tokenizer

CHUNK = 512
AUTO = "auto"
TEXTS = ("evaluation", "other domain")


@dataclass
class Measured:
    """What one calibration gives: by (experts dropped, method) and text, perplexity and mean KL."""

    base: dict[str, float] = field(default_factory=dict)  # perplexity of the source, by text
    found: dict[tuple[int, str], dict[str, tuple[float, float]]] = field(default_factory=dict)
    chosen: dict[int, str] = field(default_factory=dict)  # by experts dropped


@dataclass(frozen=True)
class Bench:
    """A model, its tokenizer and the texts."""

    source: Variant
    tokenizer: Tokenizer
    arguments: argparse.Namespace
    compute: ComputeOptions

    def calibration(self, subset: int) -> ObservationRows:
        """The rows of one calibration."""
        path = Path(self.arguments.calibration)
        chunks = chunk_text(path.read_text(), self.tokenizer, CHUNK, path.name)
        whole = len(chunks) // self.arguments.subsets * self.arguments.subsets
        rows = chunks[subset : whole : self.arguments.subsets]
        return ObservationRows(path.name, f"subset {subset}", rows)

    def observed(self, rows: ObservationRows) -> Observations:
        model = self.source.model
        return observe(self.source.weights, model, rows, self.compute, Silent())  # type: ignore[arg-type]

    def texts(self) -> dict[str, MeasuredText]:
        """Both texts, of which nothing is used to choose but the second one, by `auto`."""
        path, vocabulary = Path(self.arguments.text), self.source.model.facts.vocab_size
        chunks = chunk_text(path.read_text(), self.tokenizer, CHUNK, path.name)
        count = min(self.arguments.chunks, len(chunks))
        spread = [chunks[number * len(chunks) // count] for number in range(count)]
        return {
            TEXTS[0]: MeasuredText(path.name, [scored_half(row) for row in spread]),
            TEXTS[1]: self._other(vocabulary),
        }

    def _other(self, vocabulary: int) -> MeasuredText:
        calibration = decide(CalibrationOptions(self.arguments.calibration))
        found = other_text(None, calibration, self.tokenizer, vocabulary, CHUNK)
        assert found is not None
        return found

    def run(self, subset: int) -> Measured:
        """All methods on one calibration."""
        rows, found = self.calibration(subset), Measured()
        kept: dict[tuple[int, str], Kept] = {}
        seen = self.observed(rows)
        for drop in self.arguments.drop:
            for method in METHODS:
                kept[drop, method] = self.selected(seen, method, drop)
        split = hold_out(rows)
        seen = self.observed(split.seen)
        for drop in self.arguments.drop:
            method = self.chosen(seen, split.held, drop)
            found.chosen[drop] = method
            kept[drop, AUTO] = self.selected(seen, method, drop)
        self.measure(kept, found)
        return found

    def selected(self, seen: Observations, method: str, drop: int) -> Kept:
        facts = self.source.model.facts
        target = choose_target(facts, facts.n_experts - drop, None)
        return select_experts(seen, method, target, facts)

    def chosen(self, seen: Observations, held: Sequence[Row], drop: int) -> str:
        candidates = {name: self.selected(seen, name, drop) for name in CANDIDATES}
        texts = held_out_text("calibration", held), self._other(self.source.model.facts.vocab_size)
        weights, model = self.source.weights, self.source.model
        asked = Measurement(weights, model, candidates, *texts)
        scores = evaluate_variants(asked.variants, asked.rows, asked.pairs, self.compute, Silent())
        return asked.choice(scores).chosen

    def measure(self, kept: Mapping[tuple[int, str], Kept], found: Measured) -> None:
        """Put perplexities and divergences of all pruned models into `found`."""
        weights, model = self.source.weights, self.source.model
        variants = [self.source]
        for (drop, method), experts in kept.items():
            view = PrunedView(weights, model, experts)
            variants.append(Variant(f"{drop} {method}", "pruned", view, view.model, 1, 1.0))
        texts = self.texts()
        rows = [row for text in texts.values() for row in text.rows]
        pairs = [(self.source.name, one.name) for one in variants[1:]]
        scores = evaluate_variants(variants, rows, pairs, self.compute, Silent())
        first = 0
        for name, text in texts.items():
            part = scores.part(first, first + len(text.rows))
            first += len(text.rows)
            found.base[name] = perplexity(part.variants[self.source.name].nll).value
            for drop, method in kept:
                variant = f"{drop} {method}"
                value = perplexity(part.variants[variant].nll).value
                apart = float(part.divergences[self.source.name, variant].mean())
                found.found.setdefault((drop, method), {})[name] = value - found.base[name], apart


def mean(values: Sequence[float]) -> str:
    """A mean and its standard error."""
    average = float(np.mean(values))
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{average:.3f} ± {error:.3f}"


def table(measured: Sequence[Measured], drop: int) -> Iterator[str]:
    """The methods at one ratio, from the least damage on the evaluation text to the most."""
    yield "| method | perplexity + | of REAP's | KL | other domain: perplexity + | KL |"
    yield "|---|---|---|---|---|---|"
    methods = [method for dropped, method in measured[0].found if dropped == drop]

    def values(method: str, text: str, which: int) -> list[float]:
        return [one.found[drop, method][text][which] for one in measured]

    reap = np.mean(values("reap", TEXTS[0], 0))
    for method in sorted(methods, key=lambda name: float(np.mean(values(name, TEXTS[0], 0)))):
        name = method
        if method == AUTO:
            name = f"**auto** ({', '.join(one.chosen[drop] for one in measured)})"
        cells = [mean(values(method, text, which)) for text in TEXTS for which in (0, 1)]
        share = float(np.mean(values(method, TEXTS[0], 0)) / reap)
        yield f"| {name} | {cells[0]} | {share:.2f} | {' | '.join(cells[1:])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--drop", type=int, nargs="+", default=[4, 8, 10])
    parser.add_argument("--subsets", type=int, default=3)
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    compute = ComputeOptions(device=arguments.device, dtype="float32", threads=arguments.threads)
    for model in arguments.models:
        begun = time.monotonic()
        with ExitStack() as stack:
            opened = OpenVariants(stack, Silent())
            opened.source(model)
            bench = Bench(opened.variants[0], Tokenizer(Path(model)), arguments, compute)
            measured = [bench.run(subset) for subset in range(arguments.subsets)]
        base = ", ".join(f"{text} {measured[0].base[text]:.3f}" for text in TEXTS)
        print(f"\n{Path(model).name}: perplexity of the source: {base}")
        for drop in arguments.drop:
            print(f"\n{drop} of {bench.source.model.facts.n_experts} experts dropped\n")
            print("\n".join(table(measured, drop)))
        print(f"\n{time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
