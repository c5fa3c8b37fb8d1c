"""Streamed scores of variants of every kind against whole models of transformers in float64."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.weights import Weights
from reap2gguf.errors import EvaluationError, UsageError
from reap2gguf.evaluating import head_cut
from reap2gguf.evaluating.engine import evaluate_variants
from reap2gguf.evaluating.scores import Pair, ScoredRow, Scores, joined
from reap2gguf.evaluating.variants import Variant
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.gguf_source.weights import GgufWeights
from reap2gguf.models.table import describe
from reap2gguf.options import ComputeOptions, Resume
from reap2gguf.progress import CallbackProgress, Silent
from reap2gguf.pruning.view import PrunedView
from reap2gguf.pruning.write import write_pruned
from tests.exporting.files import export_weights, plain
from tests.families.granite import TinyGraniteMoeShared
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

SPECS: dict[str, Any] = {
    "qwen3": TinyQwen3Moe(hidden=256, width=256, dense_layers=(0,)),
    "qwen3, tied and fused": TinyQwen3Moe(hidden=256, width=256, fused=True, tied=True),
    "qwen3.5": TinyQwen35Moe(hidden=256, width=256),
    # logits are divided; rows are in another order in a file, and two matrices one in the folder
    "granite": TinyGraniteMoeShared(hidden=256, width=256, shared_width=256, tied=False),
}
FILES = ("Q8_0", "Q4_K_M")
PAIRS: list[Pair] = [
    ("source", "pruned"),
    ("source", "Q8_0"),
    ("pruned", "Q8_0"),
    ("pruned", "Q4_K_M"),
    ("source", "Q4_K_M"),
    ("folder", "pruned"),
    ("source", "other"),
]
CPU = ComputeOptions(device="cpu", threads=2)


def rows_of(vocab: int) -> list[ScoredRow]:
    """Rows of several lengths, of which some have few tokens that are scored."""
    draw = np.random.default_rng(5)
    shapes = ((40, 21), (40, 1), (9, 8), (33, 30), (2, 1), (12, 12))
    return [ScoredRow(draw.integers(0, vocab, length), first) for length, first in shapes]


def written(weights: Weights, folder: Path) -> Path:
    """The weights as a folder that transformers loads."""
    folder.mkdir()
    tensors = {name: weights.read_float32(name) for name in weights.tensors}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {**weights.config, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Case:
    """A source, two pruned forms of it as views, one as a folder, and two files."""

    def __init__(self, spec: Any, root: Path, stack: ExitStack) -> None:
        self.folder = spec.write(root / "model")
        source = stack.enter_context(Checkpoint.open(self.folder))
        model = describe(source)
        n_kept = model.facts.n_experts // 2
        kept = {
            layer: tuple(
                sorted((layer + 2 * number) % model.facts.n_experts for number in range(n_kept))
            )
            for layer in model.facts.moe_layers
        }
        view = PrunedView(source, model, kept)
        first = PrunedView(source, model, dict.fromkeys(kept, tuple(range(n_kept))))
        (root / "pruned").mkdir()
        write_pruned(view, root / "pruned", Silent())
        pruned = stack.enter_context(Checkpoint.open(root / "pruned"))
        files = export_weights(view, view.model, root, [plain(name) for name in FILES])
        ggufs = {
            name: GgufWeights(read_gguf_header(path), view.model, view.tensors)
            for name, path in files.items()
        }
        self.variants = [
            Variant("source", "source", source, model, 1, 16.0),
            Variant("other", "pruned", first, first.model, 1, 16.0),
            Variant("pruned", "pruned", view, view.model, 1, 16.0),
            Variant("folder", "pruned", pruned, describe(pruned), 1, 16.0),
            *(Variant(name, "gguf", one, one.model, 1, 8.0) for name, one in ggufs.items()),
        ]
        self.rows = rows_of(model.facts.vocab_size)
        self.root = root

    def scores(self, options: ComputeOptions = CPU) -> Scores:
        return evaluate_variants(self.variants, self.rows, PAIRS, options, Silent())

    def logits(self) -> dict[str, list[torch.Tensor]]:
        """Log-probabilities (n, V) of the scored tokens of each row, by transformers in float64."""
        found: dict[str, list[torch.Tensor]] = {}
        for variant in self.variants:
            folder = written(variant.weights, self.root / f"whole {variant.name}")
            whole: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float64, experts_implementation="eager"
            )
            with torch.inference_mode():
                found[variant.name] = [
                    whole(torch.from_numpy(row.tokens)[None])
                    .logits[0, row.first - 1 : -1]
                    .double()
                    .log_softmax(-1)
                    for row in self.rows
                ]
        return found


@contextmanager
def opened(name: str, root: Path) -> Iterator[Case]:
    with ExitStack() as stack:
        yield Case(SPECS[name], root, stack)


@pytest.fixture(scope="module", params=SPECS)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    with opened(request.param, tmp_path_factory.mktemp("evaluated")) as found:
        yield found


def test_scores_are_those_of_whole_models(case: Case) -> None:
    found, expected = case.scores(), case.logits()
    right = [torch.from_numpy(row.tokens[row.first :]) for row in case.rows]
    for name, scores in found.variants.items():
        nll = [
            -log.gather(1, tokens[:, None])[:, 0]
            for log, tokens in zip(expected[name], right, strict=True)
        ]
        np.testing.assert_allclose(scores.nll, torch.cat(nll), atol=1e-4)
        best = torch.cat([log.argmax(-1) for log in expected[name]])
        assert (scores.top == best.numpy()).all()
    for reference, other in PAIRS:
        kl = [
            (p.exp() * (p - q)).sum(-1)
            for p, q in zip(expected[reference], expected[other], strict=True)
        ]
        np.testing.assert_allclose(found.divergences[reference, other], torch.cat(kl), atol=1e-4)
    assert max(found.divergences["folder", "pruned"]) == 0.0
    assert max(found.divergences["source", "pruned"]) > 0.01


def equal(one: Scores, other: Scores) -> bool:
    """Whether all scores are the same, bit for bit."""
    return all(
        np.array_equal(one.variants[name].nll, other.variants[name].nll)
        and np.array_equal(one.variants[name].top, other.variants[name].top)
        for name in one.variants
    ) and all(
        np.array_equal(one.divergences[pair], other.divergences[pair]) for pair in one.divergences
    )


def test_rows_that_share_tokens_and_are_not_compared(case: Case) -> None:
    """One pass instead of four gives the same; and pairs leave such rows out."""
    vocab = case.variants[0].model.facts.vocab_size
    question = np.random.default_rng(3).integers(0, vocab, 30)
    apart = [ScoredRow(np.append(question, token), 30, is_compared=False) for token in range(4)]
    rows = [*case.rows, *joined(apart)]
    assert len(rows) == len(case.rows) + 1
    pairs = PAIRS[:2]
    found = evaluate_variants(case.variants, rows, pairs, CPU, Silent())
    alone = evaluate_variants(case.variants, case.rows, pairs, CPU, Silent())
    together = evaluate_variants(case.variants, [*case.rows, *apart], pairs, CPU, Silent())
    for name in found.variants:
        np.testing.assert_allclose(found.variants[name].nll, together.variants[name].nll, atol=1e-4)
    n_scored = len(alone.variants["source"].nll)
    part = found.part(0, len(case.rows))
    for pair in pairs:
        assert np.isnan(found.divergences[pair][n_scored:]).all()
        np.testing.assert_allclose(part.divergences[pair], alone.divergences[pair], atol=1e-4)


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 5}, {"spool": "disk"}])
def test_scores_do_not_depend_on_how(case: Case, options: dict[str, Any], tmp_path: Path) -> None:
    assert equal(case.scores(), case.scores(replace(CPU, scratch=tmp_path, **options)))


def test_small_blocks_and_batches(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_cut, "_MOST_BLOCK", {"cpu": 100})
    monkeypatch.setattr(head_cut, "_MOST_TOKENS", {"cpu": 3})
    small = case.scores()
    for name, scores in case.scores().variants.items():
        np.testing.assert_allclose(small.variants[name].nll, scores.nll, atol=1e-4)


class Killed(Exception):
    """The evaluation was stopped."""


@pytest.mark.parametrize("n_tasks", [3, 6, 9])
def test_an_interrupted_evaluation_goes_on(
    case: Case, n_tasks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = case.scores()
    monkeypatch.setattr("reap2gguf.observing.state.StateKeeper.is_due", lambda *_: True)
    options = replace(CPU, resume=Resume(tmp_path / "state", "key"))
    seen = 0

    def stop(event: Any) -> None:
        nonlocal seen
        seen += event.kind == "advance"
        if seen > n_tasks:
            raise Killed

    with pytest.raises(Killed):
        evaluate_variants(case.variants, case.rows, PAIRS, options, CallbackProgress(stop))
    notes: list[str] = []
    progress = CallbackProgress(
        lambda event: notes.append(event.text) if event.kind == "note" else None
    )
    again = evaluate_variants(case.variants, case.rows, PAIRS, options, progress)
    assert equal(again, whole)
    assert any("resuming" in note for note in notes)


def test_variants_of_other_models_are_refused(case: Case, tmp_path: Path) -> None:
    folder = TinyQwen3Moe(n_layers=3, hidden=256).write(tmp_path / "other")
    with Checkpoint.open(folder) as checkpoint:
        other = Variant("strange", "source", checkpoint, describe(checkpoint), 1, 16.0)
        with pytest.raises(EvaluationError, match="strange: n_layers is 3, but source has"):
            evaluate_variants([*case.variants, other], case.rows, [], CPU, Silent())


def test_nothing_to_score(case: Case) -> None:
    rows = [ScoredRow(np.arange(4), 4)]
    with pytest.raises(UsageError, match="no token is scored"):
        evaluate_variants(case.variants, rows, [], CPU, Silent())


def test_values_that_are_not_finite_are_said(tmp_path: Path) -> None:
    with opened("qwen3", tmp_path) as case:
        path = next((tmp_path / "pruned").glob("*.safetensors"))
        from safetensors.torch import load_file
        from safetensors.torch import save_file as save_torch

        tensors = load_file(path)
        tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = torch.inf
        save_torch(tensors, path, {"format": "pt"})
        with pytest.raises(EvaluationError, match=r"pruned: layer 1: .*q_proj.* holds NaN or"):
            case.scores()
