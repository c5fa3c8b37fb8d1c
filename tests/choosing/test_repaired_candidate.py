"""A choice with a repaired candidate: which one is repaired, and what is made of it."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.safetensors_header import read_header
from reap2gguf.choosing.figures import SOURCE
from reap2gguf.choosing.measure import Chooser, Measurement
from reap2gguf.choosing.repaired import why_not_repaired
from reap2gguf.choosing.texts import MeasuredText, scored_half
from reap2gguf.evaluating.engine import evaluate_variants
from reap2gguf.evaluating.scores import Scores
from reap2gguf.evaluating.variants import Variant
from reap2gguf.models.table import describe
from reap2gguf.options import ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.pruning.replaced import ReplacedView
from reap2gguf.pruning.view import PrunedView
from reap2gguf.pruning.write import write_pruned
from reap2gguf.repairing.limits import LEAST_ROWS
from tests.tiny import TinyQwen3Moe

CPU = ComputeOptions(device="cpu", threads=1)


def evaluate(asked: Measurement) -> Scores:
    return evaluate_variants(asked.variants, asked.rows, asked.pairs, CPU, Silent())


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    folder = TinyQwen3Moe(dtype=torch.float32, vocab=512).write(tmp_path / "model")
    return Checkpoint.open(folder)


def text_of(label: str, lengths: tuple[int, ...]) -> MeasuredText:
    draw = np.random.default_rng(len(lengths))
    return MeasuredText(label, [scored_half(draw.integers(0, 512, n)) for n in lengths])


def with_other_downs(view: PrunedView, folder: Path, factor: float) -> Path:
    """The down_proj tensors of a pruned model, multiplied."""
    (folder / "pruned").mkdir(parents=True)
    write_pruned(view, folder / "pruned", Silent())
    tensors = load_file(folder / "pruned" / "model.safetensors")
    (folder / "new").mkdir()
    found = {name: factor * one for name, one in tensors.items() if "down_proj" in name}
    save_file(found, folder / "new" / "model.safetensors")
    return folder / "new"


@pytest.mark.parametrize(("factor", "is_taken"), [(0.9, None), (50.0, False)])
def test_the_best_criterion_is_repaired_and_taken_or_dropped_by_the_same_rule(
    source: Checkpoint, tmp_path: Path, factor: float, is_taken: bool | None
) -> None:
    model = describe(source)
    kept = {
        "a": dict.fromkeys(model.facts.moe_layers, (0, 1, 2, 3)),
        "b": dict.fromkeys(model.facts.moe_layers, (4, 5, 6, 7)),
    }
    texts = text_of("held", (24, 9, 31)), text_of("other", (16, 16))
    chooser = Chooser(source, model, kept, *texts)
    plain, _ = chooser.choose(evaluate, None)
    repaired: list[PrunedView] = []

    def repair(view: PrunedView, stack: ExitStack) -> PrunedView:
        new = with_other_downs(view, tmp_path / "made", factor)
        path = new / "model.safetensors"
        stored = stack.enter_context(closing(Checkpoint(new, {}, read_header(path), (path,))))
        repaired.append(ReplacedView(view, stored))
        return repaired[0]

    found, seconds = chooser.choose(evaluate, repair)
    assert repaired[0].kept == kept[plain.chosen]
    name = f"{plain.chosen}+repair"
    assert list(seconds) == [name]
    assert [one.name for one in found.candidates] == ["a", "b", name]
    for one in plain.candidates:  # `behind` may be another: there is one candidate more
        assert found.candidate(one.name).held_out.divergence == one.held_out.divergence
    # measured as a model of its own, not as a view of the source
    view = repaired[0]
    alone = Measurement(source, model, {name: view}, *texts)
    (tmp_path / "whole").mkdir()
    write_pruned(view, tmp_path / "whole", Silent())
    view.close()
    with Checkpoint.open(tmp_path / "whole") as whole:
        other = Variant(name, "pruned", whole, describe(whole), 1, 1.0)
        variants = [alone.variants[0], other]
        scores = evaluate_variants(variants, alone.rows, alone.pairs, CPU, Silent())
    mean = scores.part(0, 3).divergences[SOURCE, name].mean()
    assert found.candidate(name).held_out.divergence.value == pytest.approx(mean, rel=1e-6)
    if is_taken is not None:
        assert (found.chosen == name) is is_taken
    source.close()


def test_a_model_that_cannot_be_repaired_is_measured_without(source: Checkpoint) -> None:
    model = describe(source)
    assert why_not_repaired(source, model, LEAST_ROWS) == ""
    why = why_not_repaired(source, model, LEAST_ROWS - 1)
    assert why.startswith("no candidate is repaired: --repair: the calibration has 15 rows")
    source.close()
