"""What is found in a safetensors folder: alone, and beside the pruned view it must hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from reap2gguf.pruning.view import PrunedView
from reap2gguf.pruning.write import write_pruned
from reap2gguf.verifying import folder_values, hf_folder
from reap2gguf.verifying.hf_folder import check_pruned
from tests.tiny import TinyQwen3Moe

FUSED = TinyQwen3Moe(fused=True)
EXPERTS = "model.layers.1.mlp.experts.down_proj"


def violations(folder: Path, name: str, change: Callable[[torch.Tensor], object]) -> list[str]:
    path = FUSED.write(folder) / "model.safetensors"
    tensors = load_file(path)
    change(tensors[name])
    save_file(tensors, path, {"format": "pt"})
    checkpoint, model, problems = hf_folder.open_folder(folder)
    assert checkpoint is not None
    assert model is not None
    assert not problems
    with checkpoint:
        return list(hf_folder.check_folder(checkpoint, model, Silent(), n_threads=3))


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_values, "_PART_BYTES", 4096)
    monkeypatch.setattr(folder_values, "_BLOCK_BYTES", 1024)


def test_a_padded_embedding_is_no_violation(tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    assert violations(tmp_path / "a", name, lambda rows: rows[250:].zero_()) == []


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", EXPERTS])
def test_an_empty_matrix_is_no_violation(name: str, tmp_path: Path) -> None:
    assert violations(tmp_path / "a", name, lambda rows: rows[:3].zero_()) == []
    assert violations(tmp_path / "b", name, lambda rows: rows.zero_()) == []


def test_infinity_behind_padding_is_found(tmp_path: Path) -> None:
    def change(rows: torch.Tensor) -> None:
        rows[:250] = 0
        rows[375, 5] = torch.inf

    (found,) = violations(tmp_path / "a", "model.embed_tokens.weight", change)
    assert "NaN or infinite" in found


def test_the_expert_of_a_nan_is_named(tmp_path: Path) -> None:
    (found,) = violations(tmp_path / "a", EXPERTS, lambda experts: experts[5, 3].fill_(torch.nan))
    assert found == f"a: {EXPERTS} holds NaN or infinite values for expert 5"


def written(tmp_path: Path, change: Callable[[Path], object], fused: bool = True) -> list[str]:
    """Violations of a pruned folder that was changed after it was written."""
    spec = TinyQwen3Moe(fused=fused)
    with Checkpoint.open(spec.write(tmp_path / "source")) as source:
        view = PrunedView(source, describe(source), dict.fromkeys((0, 1), (0, 2, 3, 7)))
        folder = tmp_path / "pruned"
        folder.mkdir()
        write_pruned(view, folder, Silent())
        change(folder)
        return check_pruned(folder, view, Silent(), n_threads=3)


def changed(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change


def test_a_folder_as_it_was_written_is_sound(tmp_path: Path) -> None:
    assert written(tmp_path, lambda _: None) == []


@pytest.mark.parametrize("name", [EXPERTS, "model.layers.1.mlp.gate.weight"])
def test_a_changed_entry_is_named_with_its_origin(name: str, tmp_path: Path) -> None:
    (found,) = written(tmp_path, changed(lambda tensors: tensors[name][2, 5].add_(1)))
    assert found == f"pruned: {name}: entry 2 differs from entry 3 of the source's {name}"


def test_swapped_experts_are_named_with_their_origin(tmp_path: Path) -> None:
    first, second = (f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in (1, 3))

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first], tensors[second] = tensors[second], tensors[first]

    found = written(tmp_path, changed(swap), fused=False)
    assert found[0] == (
        f"pruned: {first}: entry 0 differs from entry 0 of the source's "
        "model.layers.0.mlp.experts.2.up_proj.weight"
    )
    assert len(found) == 2


def test_a_tensor_of_another_type_is_found(tmp_path: Path) -> None:
    name = "model.layers.0.input_layernorm.weight"

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].float()

    (found,) = written(tmp_path, changed(widen))
    assert found == f"pruned: {name} is F32 [64], expected BF16 [64]"


def test_a_changed_config_is_found(tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))

    assert written(tmp_path, change) == ["pruned: config.json differs from the planned one"]


def test_small_files_that_are_no_copies_are_found(tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        (folder / "chat_template.jinja").write_text("another")

    missing, changed = sorted(written(tmp_path, change), reverse=True)
    assert missing == "pruned: tokenizer.json is missing"
    assert changed.startswith("pruned: chat_template.jinja is not a copy of ")


def test_a_folder_that_cannot_be_opened_is_a_violation(tmp_path: Path) -> None:
    (found,) = written(tmp_path, lambda folder: (folder / "model.safetensors").unlink())
    assert "neither model.safetensors nor" in found
