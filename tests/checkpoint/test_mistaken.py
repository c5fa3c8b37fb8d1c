"""What is passed by mistake in place of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"base_model_name_or_path": "Qwen/Qwen3-30B-A3B"}, "an adapter of 'Qwen/Qwen3-30B-A3B'"),
        ({"base_model_name_or_path": None}, "an adapter of another model"),
        ({}, "an adapter of another model"),
        ({"base_model_name_or_path": ["x"]}, "an adapter of another model"),
    ],
)
def test_an_adapter_names_its_base_model(tmp_path: Path, config: Any, words: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    message = refusal(tmp_path)
    assert words in message
    assert "merge_and_unload" in message


def test_a_broken_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    assert "an adapter of another model" in refusal(tmp_path)


def test_a_long_name_of_a_base_model(tmp_path: Path) -> None:
    config = {"base_model_name_or_path": "x" * 10**6 + "\x1b[2J"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert len(refusal(tmp_path)) < 1000


def test_a_folder_of_gguf_files(tmp_path: Path) -> None:
    (tmp_path / "x-Q4_K_M.gguf").write_bytes(b"GGUF")
    assert "it holds GGUF files; pass one of them" in refusal(tmp_path)


def test_a_models_folder_in_the_hubs_cache(tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    assert "pass owner/name, or the folder of a commit in snapshots/" in refusal(tmp_path)


def test_any_other_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path) == (
        f"{tmp_path}: no config.json; this is not a Hugging Face checkpoint"
    )
