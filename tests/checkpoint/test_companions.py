"""The table of small files names the same files for each purpose as the lists before it."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.companions import Purpose, companions, serves
from reap2gguf.errors import CheckpointError

LISTS = {
    Purpose.PLAN: (
        "config.json generation_config.json model.safetensors.index.json tokenizer*.json "
        "special_tokens_map.json added_tokens.json *processor_config.json chat_template.* "
        "additional_chat_templates/*.jinja"
    ),
    Purpose.BUILD: "vocab.json *.txt *.model README.md LICENSE* NOTICE*",
    Purpose.BUNDLE: (
        "tokenizer*.json tokenizer.model special_tokens_map.json added_tokens.json vocab.json "
        "merges.txt chat_template.* generation_config.json *processor_config.json LICENSE* NOTICE*"
    ),
    # all that is copied is checked: chat_template.* too
    Purpose.ENTRY: "*.json *.jinja *.txt *.model README.md LICENSE* NOTICE* chat_template.*",
    Purpose.GGUF: (
        "tokenizer_config.json chat_template.json special_tokens_map.json added_tokens.json "
        "generation_config.json"
    ),
    Purpose.TEMPLATE: "chat_template.jinja *chat_templates/*.jinja",
}
NAMES = [
    "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "spiece.model", "special_tokens_map.json",
    "added_tokens.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "processor_config.json", "chat_template.json", "chat_template.jinja", "chat_template.txt",
    "chat_template.md", "additional_chat_templates/rag.jinja", "chat_templates/rag.jinja",
    "additional_chat_templates/rag.txt", "vocab.json", "vocab.txt", "merges.txt", "README.md",
    "LICENSE", "LICENSE.md", "NOTICE.txt", "other.json", "other.jinja", "other.md", "run.py",
    "model.safetensors", "pytorch_model.bin", "training/config.json", "training/LICENSE",
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


def test_what_is_copied_is_checked() -> None:
    copied = [name for name in NAMES if serves(name, Purpose.BUNDLE)]
    assert all(serves(name, Purpose.ENTRY) for name in copied)


def test_a_template_of_any_kind_may_not_lead_out(tiny: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    (tiny / "chat_template.md").symlink_to(secret)
    with pytest.raises(CheckpointError, match="a link that leads out of the checkpoint"):
        Checkpoint.open(tiny)
