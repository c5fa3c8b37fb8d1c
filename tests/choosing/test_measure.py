"""What candidates cost, against whole models of transformers in float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.choosing.measure import Chooser, Measurement
from reap2gguf.choosing.texts import MeasuredText, scored_half
from reap2gguf.evaluating.engine import evaluate_variants
from reap2gguf.evaluating.scores import Scores
from reap2gguf.models.table import describe
from reap2gguf.options import ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.pruning.view import PrunedView
from reap2gguf.pruning.write import write_pruned
from tests.tiny import TinyQwen3Moe


def log_probabilities(folder: Path, text: MeasuredText) -> torch.Tensor:
    """Those of every token at every scored place of a text, (S, V)."""
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    found = []
    with torch.no_grad():
        for row in text.rows:
            logits = model(torch.from_numpy(row.tokens)[None]).logits[0].double()
            found.append(torch.log_softmax(logits, dim=-1)[row.positions])
    return torch.cat(found)


def test_figures_are_those_of_whole_models(tmp_path: Path) -> None:
    folder = TinyQwen3Moe(dtype=torch.float32).write(tmp_path / "model")
    draw = np.random.default_rng(3)
    texts = [
        MeasuredText(label, [scored_half(draw.integers(0, 256, n)) for n in lengths])
        for label, lengths in (("held", (24, 9, 31)), ("other", (16, 16)))
    ]
    with Checkpoint.open(folder) as source:
        model = describe(source)
        kept = {
            "first": dict.fromkeys(model.facts.moe_layers, (0, 1, 2, 3)),
            "last": dict.fromkeys(model.facts.moe_layers, (4, 5, 6, 7)),
            "same": dict.fromkeys(model.facts.moe_layers, (0, 1, 2, 3)),
        }
        compute = ComputeOptions(device="cpu", threads=1)

        def evaluate(asked: Measurement) -> Scores:
            assert [one.name for one in asked.variants] == ["source", "first", "last"]
            return evaluate_variants(asked.variants, asked.rows, asked.pairs, compute, Silent())

        found, seconds = Chooser(source, model, kept, *texts).choose(evaluate, None)
        assert not seconds
        for name in ("first", "last"):
            (tmp_path / name).mkdir()
            view = PrunedView(source, model, kept[name])
            write_pruned(view, tmp_path / name, Silent())
    for part, text in zip((0, 1), texts, strict=True):
        before = log_probabilities(folder, text)
        right = torch.from_numpy(np.concatenate([row.right for row in text.rows]))
        for name in ("first", "last"):
            after = log_probabilities(tmp_path / name, text)
            divergence = float((before.exp() * (before - after)).sum(-1).mean())
            perplexity = float(torch.exp(-after.gather(1, right[:, None]).mean()))
            record = found.candidate(name)
            figures = record.held_out if part == 0 else record.other
            assert figures is not None
            assert figures.divergence.value == pytest.approx(divergence, rel=2e-4)
            assert figures.perplexity.value == pytest.approx(perplexity, rel=1e-4)
    assert found.candidate("same").held_out == found.candidate("first").held_out
