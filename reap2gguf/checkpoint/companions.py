"""The small files beside a checkpoint's weights: which there are, and what each is for.

One table for the whole program: what is fetched, read, copied and published. Every file that any
pattern names is checked before anything is opened (`entries.py`), so nothing can be copied that was
not checked. A pattern is a shell pattern on the name inside the folder; a file in a subfolder
matches only a pattern with that subfolder.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Flag, auto
from fnmatch import fnmatchcase
from pathlib import Path

TEMPLATES_FOLDER = "additional_chat_templates"  # for transformers and gguf-py


class Purpose(Flag):
    """What a small file is for."""

    PLAN = auto()  # fetched from the Hub before a plan is made
    BUILD = auto()  # fetched from the Hub when a build starts
    BUNDLE = auto()  # copied into the pruned checkpoint
    READ = auto()  # a library may open it
    GGUF = auto()  # JSON that gguf-py reads for a tokenizer; it may hold a chat template
    TEMPLATE = auto()  # holds one chat template


_PLANNED = Purpose.PLAN | Purpose.BUNDLE
_LICENCE = Purpose.BUILD | Purpose.BUNDLE
_COMPANIONS = {
    "config.json": Purpose.PLAN,
    "model.safetensors.index.json": Purpose.PLAN,
    "adapter_config.json": Purpose.PLAN,  # to say that it is there; never in the bundle
    "reap2gguf.json": Purpose.PLAN,  # of a model that this program has pruned before
    "generation_config.json": _PLANNED | Purpose.GGUF,
    "tokenizer_config.json": _PLANNED | Purpose.GGUF,
    "special_tokens_map.json": _PLANNED | Purpose.GGUF,
    "added_tokens.json": _PLANNED | Purpose.GGUF,
    "tokenizer*.json": _PLANNED,
    "tiktoken.model": _PLANNED,  # in place of tokenizer.json
    "*processor_config.json": _PLANNED,
    "chat_template.json": _PLANNED | Purpose.GGUF,
    "chat_template.jinja": _PLANNED | Purpose.TEMPLATE,
    f"{TEMPLATES_FOLDER}/*.jinja": Purpose.PLAN | Purpose.TEMPLATE,
    "*chat_templates/*.jinja": Purpose.TEMPLATE,  # other versions of transformers: other names
    # the vocabulary once more, as slow tokenizers read it; a plan needs tokenizer.json alone
    "vocab.json": _LICENCE,
    "merges.txt": _LICENCE,
    "tokenizer.model": _LICENCE,
    "*.txt": Purpose.BUILD,
    "*.model": Purpose.BUILD,
    "README.md": Purpose.BUILD,
    "LICENSE*": _LICENCE,
    "NOTICE*": _LICENCE,
    # any other file that a library may open, such as the vocabulary of a slow tokenizer
    "*.json": Purpose.READ,
    "*.jinja": Purpose.READ,
    "*.tiktoken": Purpose.READ,
    "*.spm": Purpose.READ,
    "*.codes": Purpose.READ,
    "*.vocab": Purpose.READ,
    "*.bpe": Purpose.READ,
}


def serves(name: str, purpose: Purpose) -> bool:
    """Whether a file of that name is for `purpose`; the name is relative to the checkpoint."""
    return any(_matches(name, pattern) for pattern in _patterns(purpose))


def is_companion(name: str) -> bool:
    """Whether a file of that name is read or copied for any purpose."""
    return any(_matches(name, pattern) for pattern in _COMPANIONS)


def is_templates_folder(name: str) -> bool:
    """Whether files in a subfolder of that name are companions."""
    return is_companion(f"{name}/x.jinja")


def companions(folder: Path, purpose: Purpose) -> list[Path]:
    """What a folder holds for `purpose`, sorted; not only plain files."""
    return sorted({path for pattern in _patterns(purpose) for path in folder.glob(pattern)})


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def _patterns(purpose: Purpose) -> Iterator[str]:
    return (pattern for pattern, purposes in _COMPANIONS.items() if purpose in purposes)
