"""GGUF files of tiny models for these tests, and which experts of them stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.gguf_files.split import plan_split, write_part
from reap2gguf.models.contract import MoeModel
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from reap2gguf.pruning.view import PrunedView
from tests.exporting.files import export_files, export_weights, plain


def kept_of(model: MoeModel, n_dropped: int = 1) -> dict[int, tuple[int, ...]]:
    """In each layer others: `n_dropped` of each group of the router go, a run and single ones."""
    facts = model.facts
    each = facts.n_experts // facts.n_groups
    found = {}
    for layer in facts.moe_layers:
        gone = {(layer + 2 * step) % each for step in range(n_dropped)}
        found[layer] = tuple(one for one in range(facts.n_experts) if one % each not in gone)
    return found


def exported(tiny: Any, folder: Path, file_type: str) -> Path:
    """The GGUF file of a tiny model; its safetensors are in `folder`/model."""
    source = tiny.write(folder / "model")
    return export_files(source, folder, [plain(file_type)])[file_type]


def exported_after_pruning(
    folder: Path, kept: dict[int, tuple[int, ...]], target: Path, file_type: str
) -> Path:
    """The GGUF file of a folder's model, pruned as safetensors are."""
    with Checkpoint.open(folder) as checkpoint:
        view = PrunedView(checkpoint, describe(checkpoint), kept)
        return export_weights(view, view.model, target, [plain(file_type)])[file_type]


def in_parts(path: Path, folder: Path, max_bytes: int) -> list[Path]:
    """A GGUF file cut as llama.cpp cuts it."""
    folder.mkdir()
    plan = plan_split(path, max_bytes)
    with Silent().task("", 0, "") as task:
        return [write_part(plan, part, folder, task)[0] for part in plan.parts]
