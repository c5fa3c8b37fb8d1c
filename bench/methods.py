"""Compares all methods of pruning by what they cost, and what `--method auto` makes of them.

    python bench/methods.py MODEL... --calibration TEXT --text EVALUATION

For each MODEL, `--subsets` disjoint calibrations are cut from TEXT: of n, calibration s has the
chunks s, s + n, s + 2n, ... of 512 tokens. On each of them MODEL is observed, pruned by every
method to each number of `--drop`, and measured on chunks spread over EVALUATION and on the embedded
texts of other domains. `auto` gets the same rows, holds some of them out, observes the others,
repairs the best criterion and chooses; what it chose is measured like the rest. All pruned models
of one calibration are measured in one sweep, as views. The tables have means over the calibrations,
and the standard errors of these means.

`--main-only` numbers of `--drop` get the methods of MAIN alone, and `--methods` names those that
all get, without `auto`. Methods that merge experts do so on the same rows; `ream C=4` is REAM with
groups of at most 4 experts in place of 16.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from reap2gguf.artifacts.observations import Observations
from reap2gguf.artifacts.texts import ObservationRows
from reap2gguf.calibration.rows import chunk_text
from reap2gguf.calibration.spec import decide
from reap2gguf.choosing.holdout import hold_out
from reap2gguf.choosing.measure import Chooser, Measurement
from reap2gguf.choosing.names import AUTO, CANDIDATES, REPAIRED, criteria_of, split_name
from reap2gguf.choosing.texts import MeasuredText, held_out_text, other_text, scored_half
from reap2gguf.evaluating.engine import evaluate_variants
from reap2gguf.evaluating.figures import perplexity
from reap2gguf.evaluating.opening import OpenVariants
from reap2gguf.evaluating.scores import Scores
from reap2gguf.evaluating.variants import Variant
from reap2gguf.merging.folder import MergeFolder, view_of
from reap2gguf.merging.layer import MergeSpec
from reap2gguf.merging.sweep import merge
from reap2gguf.observing.passes import observe
from reap2gguf.options import CalibrationOptions, ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.pruning.methods import FROM_WEIGHTS, GROUP_SIZE, METHODS, merges
from reap2gguf.pruning.replaced import ReplacedView
from reap2gguf.pruning.select import Kept, choose_target, keep_best, select_experts
from reap2gguf.pruning.view import PrunedView
from reap2gguf.pruning.weight_scores import weight_scores
from reap2gguf.repairing.layer import RepairKind
from reap2gguf.repairing.limits import repaired_layers
from reap2gguf.repairing.record import RepairFolder
from reap2gguf.repairing.sweep import repair
from reap2gguf.tokenizer.tokenizer import Tokenizer

CHUNK = 512
TEXTS = ("evaluation", "other domain")
SUM = "weighted_ean_sum"
MAIN = (
    *("reap", SUM, "weighted_frequency", "frequency", "ean_sum", "ean_mean", "msan", "mix50"),
    *("aimer", "ream", "ream C=4", "hc_smoe"),
)
Name = tuple[int, str]  # experts dropped, and the method


@dataclass
class Measured:
    """What one calibration gives: by (experts dropped, method) and text, perplexity and mean KL."""

    base: dict[str, float] = field(default_factory=dict)  # perplexity of the source, by text
    found: dict[Name, dict[str, tuple[float, float]]] = field(default_factory=dict)
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
        return observe(self.source.weights, self.source.model, rows, self.compute, Silent())

    def texts(self) -> dict[str, MeasuredText]:
        """Both texts, of which nothing is used to choose but the second one, by `auto`."""
        path = Path(self.arguments.text)
        chunks = chunk_text(path.read_text(), self.tokenizer, CHUNK, path.name)
        count = min(self.arguments.chunks, len(chunks))
        spread = [chunks[number * len(chunks) // count] for number in range(count)]
        return {
            TEXTS[0]: MeasuredText(path.name, [scored_half(row) for row in spread]),
            TEXTS[1]: self.other(),
        }

    def other(self) -> MeasuredText:
        calibration = decide(CalibrationOptions(self.arguments.calibration))
        vocabulary = self.source.model.facts.vocab_size
        found = other_text(None, calibration, self.tokenizer, vocabulary, CHUNK)
        assert found is not None
        return found

    def run(self, subset: int) -> Measured:
        """All methods on one calibration."""
        rows, found = self.calibration(subset), Measured()
        with ExitStack() as stack:
            views: dict[Name, PrunedView] = {}
            seen, split = self.observed(rows), hold_out(rows)
            of_auto = self.observed(split.seen)
            for drop in self.arguments.drop:
                for method in self.methods(drop):
                    if merges(method.partition(" ")[0]):
                        views[drop, method] = self.merged(rows, method, drop, stack)
                    else:
                        views[drop, method] = self.view(self.selected(seen, method, drop))
                if self.arguments.methods:
                    continue
                best = views[drop, SUM]
                views[drop, f"{SUM}{REPAIRED}"] = self.repaired(best, rows, stack)
                views[drop, f"{SUM}+scale"] = self.repaired(best, rows, stack, "scale")
                name, views[drop, AUTO] = self.chosen(of_auto, split.seen, split.held, drop, stack)
                found.chosen[drop] = name
            self.measure(views, found)
        return found

    def methods(self, drop: int) -> Sequence[str]:
        """The methods that a number of experts is dropped by."""
        if self.arguments.methods:
            return tuple(self.arguments.methods)
        return MAIN if drop in self.arguments.main_only else (*METHODS, "ream C=4")

    def merged(self, rows: ObservationRows, name: str, drop: int, stack: ExitStack) -> PrunedView:
        """The model whose experts are merged; after the method, its name may have a group size."""
        method, _, size = name.partition(" C=")
        weights, model = self.source.weights, self.source.model
        target = choose_target(model.facts, model.facts.n_experts - drop, None)
        files = MergeFolder(Path(stack.enter_context(TemporaryDirectory())), "bench")
        spec = MergeSpec(method, target, int(size or GROUP_SIZE))
        layers = merge(weights, model, rows.rows, spec, files, self.compute, Silent())
        view = view_of(weights, model, layers, files)
        stack.callback(view.close)
        return view

    def view(self, kept: Kept) -> PrunedView:
        return PrunedView(self.source.weights, self.source.model, kept)

    def selected(self, seen: Observations, method: str, drop: int) -> Kept:
        model = self.source.model
        target = choose_target(model.facts, model.facts.n_experts - drop, None)
        if method in FROM_WEIGHTS:
            weights, threads = self.source.weights, self.compute.threads
            scores = weight_scores(weights, model, method, Silent(), threads)
            return keep_best(scores, target, model.facts)
        return select_experts(seen, method, target, model.facts)

    def repaired(
        self,
        view: PrunedView,
        rows: ObservationRows,
        stack: ExitStack,
        kind: RepairKind = "ridge",
    ) -> PrunedView:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        files = RepairFolder(folder, "bench")
        repair(view, rows.rows, kind, files, self.compute, Silent())
        stored = files.open(repaired_layers(view.model))
        stack.callback(stored.close)
        return ReplacedView(view, stored)

    def chosen(
        self,
        seen: Observations,
        rows: ObservationRows,
        held: Sequence[np.ndarray],
        drop: int,
        stack: ExitStack,
    ) -> tuple[str, PrunedView]:
        """What `auto` takes, and the model that it makes."""
        kept = {name: self.selected(seen, name, drop) for name in criteria_of(CANDIDATES)}
        texts = held_out_text("calibration", held), self.other()
        chooser = Chooser(self.source.weights, self.source.model, kept, *texts)
        made: list[PrunedView] = []

        def repaired(view: PrunedView, _: ExitStack) -> PrunedView:
            made.append(self.repaired(view, rows, stack))
            return made[0]

        record, _ = chooser.choose(self.evaluated, repaired)
        method, is_repaired = split_name(record.chosen)
        return record.chosen, made[0] if is_repaired else self.view(kept[method])

    def evaluated(self, asked: Measurement) -> Scores:
        where = self.compute
        return evaluate_variants(asked.variants, asked.rows, asked.pairs, where, Silent())

    def measure(self, views: Mapping[Name, PrunedView], found: Measured) -> None:
        """Put perplexities and divergences of all pruned models into `found`."""
        same = {name: first_alike(views, name) for name in views}
        names = {name: f"{name[0]} {name[1]}" for name in dict.fromkeys(same.values())}
        texts = self.texts()
        both = list(texts.values())
        asked = Measurement(
            self.source.weights,
            self.source.model,
            {text: views[name] for name, text in names.items()},
            both[0],
            both[1],
        )
        scores, first = self.evaluated(asked), 0
        for name, text in texts.items():
            part = scores.part(first, first + len(text.rows))
            first += len(text.rows)
            base = found.base[name] = perplexity(part.variants["source"].nll).value
            for one in views:
                variant = names[same[one]]
                value = perplexity(part.variants[variant].nll).value
                apart = float(part.divergences["source", variant].mean())
                found.found.setdefault(one, {})[name] = value - base, apart


def first_alike(views: Mapping[Name, PrunedView], name: Name) -> Name:
    """The first of the views with the same experts and weights."""
    own = views[name]
    if own.replaced:
        return name
    return next(other for other, one in views.items() if not one.replaced and one.kept == own.kept)


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
        name = f"`{method}`"
        if method == AUTO:
            taken = list(dict.fromkeys(one.chosen[drop] for one in measured))
            name = f"**`auto`** ({', '.join(taken)})"
        cells = [mean(values(method, text, which)) for text in TEXTS for which in (0, 1)]
        share = float(np.mean(values(method, TEXTS[0], 0)) / reap)
        yield f"| {name} | {cells[0]} | {share:.2f} | {' | '.join(cells[1:])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--drop", type=int, nargs="+", default=[4, 8, 10])
    parser.add_argument("--main-only", type=int, nargs="*", default=[])
    parser.add_argument("--methods", nargs="*", default=[])
    parser.add_argument("--runs", type=int, help="of the subsets; all of them by default")
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
            measured = [bench.run(number) for number in range(arguments.runs or arguments.subsets)]
        base = ", ".join(f"{text} {measured[0].base[text]:.3f}" for text in TEXTS)
        print(f"\n{Path(model).name}: perplexity of the source: {base}")
        for drop in arguments.drop:
            print(f"\n{drop} of {bench.source.model.facts.n_experts} experts dropped\n")
            print("\n".join(table(measured, drop)))
        print(f"\n{time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
