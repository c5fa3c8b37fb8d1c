"""The table of small files names the same files for each purpose as the lists before it."""

from __future__ import annotations

import os
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from reap2gguf.atomic import copy_whole
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.companions import Purpose, companions, is_companion, serves
from reap2gguf.errors import CheckpointError, OutputError
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from reap2gguf.pruning.view import PrunedView
from reap2gguf.pruning.write import companion_files, write_pruned

LISTS = {
    Purpose.PLAN: (
        "config.json generation_config.json model.safetensors.index.json tokenizer*.json "
        "reap2gguf.json tokenizer.model tiktoken.model "
        "special_tokens_map.json added_tokens.json *processor_config.json "
        "chat_template.jinja chat_template.json additional_chat_templates/*.jinja"
    ),
    Purpose.BUILD: "vocab.json *.txt *.model README.md LICENSE* NOTICE*",
    Purpose.BUNDLE: (
        "tokenizer*.json tokenizer.model tiktoken.model special_tokens_map.json added_tokens.json "
        "vocab.json "
        "merges.txt generation_config.json *processor_config.json LICENSE* NOTICE* "
        "chat_template.jinja chat_template.json"
    ),
    Purpose.READ: "*.json *.jinja *.tiktoken *.spm *.codes *.vocab *.bpe",
    Purpose.GGUF: (
        "tokenizer_config.json chat_template.json special_tokens_map.json added_tokens.json "
        "generation_config.json"
    ),
    Purpose.TEMPLATE: "chat_template.jinja *chat_templates/*.jinja",
}
NAMES = [
    "config.json", "reap2gguf.json", "generation_config.json", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "tiktoken.model",
    "special_tokens_map.json", "added_tokens.json", "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json", "chat_template.json", "chat_template.jinja", "chat_template.txt",
    "chat_template.md", "additional_chat_templates/rag.jinja", "chat_templates/rag.jinja",
    "additional_chat_templates/rag.txt", "vocab.json", "vocab.txt", "merges.txt", "README.md",
    "LICENSE", "LICENSE.md", "NOTICE.txt", "other.json", "other.jinja", "other.md", "run.py",
    "qwen.tiktoken", "model.safetensors", "pytorch_model.bin", "training/config.json",
    "training/LICENSE",
]  # fmt: skip


def listed(name: str, patterns: str) -> bool:
    return any(
        name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)
        for pattern in patterns.split()
    )


@pytest.mark.parametrize("purpose", list(LISTS), ids=lambda purpose: purpose.name)
def test_each_purpose_has_its_files(purpose: Purpose, tmp_path: Path) -> None:
    expected = {name for name in NAMES if listed(name, LISTS[purpose])}
    assert {name for name in NAMES if serves(name, purpose)} == expected
    for name in NAMES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = companions(tmp_path, purpose)
    assert [str(path.relative_to(tmp_path)) for path in found] == sorted(expected)


@pytest.mark.parametrize("name", [name for name in NAMES if is_companion(name)])
def test_no_file_of_any_purpose_may_be_a_link(name: str, tiny: Path, tmp_path: Path) -> None:
    """Whatever the table says is fetched, read or copied is checked, by the same table."""
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (tiny / name).parent.mkdir(exist_ok=True)
    (tiny / name).unlink(missing_ok=True)
    (tiny / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}: a link, which is not followed"):
        Checkpoint.open(tiny)


def test_all_purposes_are_checked() -> None:
    assert {name for name in NAMES if any(serves(name, purpose) for purpose in Purpose)} == {
        name for name in NAMES if is_companion(name)
    }


def test_other_files_that_begin_like_a_template_are_not_copied(tiny: Path, tmp_path: Path) -> None:
    """Nothing reads such a file, so a link there is neither refused nor followed."""
    secret = tmp_path / "secret"
    secret.write_text("hf_token")
    for name in ("chat_template.bak", "chat_template.md", "chat_template.jinja.orig"):
        (tiny / name).symlink_to(secret)
    Checkpoint.open(tiny).close()
    assert not [file for file in companion_files(tiny) if file.is_symlink()]


@pytest.mark.parametrize("name", ["additional_chat_templates", "my_chat_templates"])
def test_a_folder_of_templates_may_not_be_a_link(name: str, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tiny / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{name}: a link, which is not followed"):
        Checkpoint.open(tiny)


def test_a_link_that_is_put_there_after_the_check_is_not_followed(
    tiny: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hf_token")
    checkpoint = Checkpoint.open(tiny)
    view = PrunedView(checkpoint, describe(checkpoint), {0: (0, 1, 2), 1: (0, 1, 2)})
    (tiny / "chat_template.jinja").unlink()
    (tiny / "chat_template.jinja").symlink_to(secret)
    (tmp_path / "out").mkdir()
    with checkpoint, pytest.raises(OutputError, match="a link, which is not followed"):
        write_pruned(view, tmp_path / "out", Silent())
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_a_pipe_that_is_put_there_after_the_check_does_not_block(
    tiny: Path, tmp_path: Path
) -> None:
    (tiny / "chat_template.jinja").unlink()
    os.mkfifo(tiny / "chat_template.jinja")
    with pytest.raises(OutputError, match="a pipe, expected a file"):
        copy_whole(tiny / "chat_template.jinja", tmp_path / "copy")
