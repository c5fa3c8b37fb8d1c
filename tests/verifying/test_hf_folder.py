"""What counts as empty in a safetensors folder: a tensor or an expert, not a stretch of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reap2gguf.verifying import hf_folder
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
    return list(hf_folder._check_tensor(checkpoint, model, name, lambda _: None))


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_folder, "_MAX_VALUES", 1024)


def test_a_padded_embedding_is_no_violation(tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    assert violations(tmp_path / "a", name, lambda rows: rows[2000:].zero_()) == []


def test_an_empty_matrix_is_one(tmp_path: Path) -> None:
    (found,) = violations(tmp_path / "a", "model.embed_tokens.weight", lambda rows: rows.zero_())
    assert found == "a: model.embed_tokens.weight holds nothing but zeros"


def test_an_empty_expert_is_one(tmp_path: Path) -> None:
    (found,) = violations(tmp_path / "a", EXPERTS, lambda experts: experts[3].zero_())
    assert found == f"a: {EXPERTS} holds nothing but zeros for expert 3"


def test_infinity_behind_padding_is_found(tmp_path: Path) -> None:
    def change(rows: torch.Tensor) -> None:
        rows[:2000] = 0
        rows[3000, 5] = torch.inf

    (found,) = violations(tmp_path / "a", "model.embed_tokens.weight", change)
    assert "NaN or infinite" in found
