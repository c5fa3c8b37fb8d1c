"""Checks the entries of a checkpoint folder before any of them is opened.

transformers and gguf-py read tokenizers, and small files are copied into the bundle that will be
published. So every entry that any of them reads is checked here once: that it is a file of the
folder itself, and not too large. `companions.py` has the list, for the check and for the copies.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from reap2gguf.checkpoint.companions import is_companion, is_templates_folder
from reap2gguf.checkpoint.config import MAX_TOKENIZER_BYTES
from reap2gguf.errors import CheckpointError
from reap2gguf.files import LINK_ADVICE, leads_away, what_it_is

_WEIGHTS = ".safetensors"
_WEIGHTS_ADVICE = f"{LINK_ADVICE}, or pass --follow-links if you trust where it leads"


def check_entries(folder: Path, elsewhere: Container[str] = (), follow_links: bool = False) -> None:
    """Refuse a checkpoint folder with an entry that is not a file of its own.

    Raises CheckpointError for a link that is not of the Hub's cache, for a pipe, socket or device
    in place of a file, and for a companion file that is too large. With `follow_links`, weights may
    be links. A broken link is accepted for a file whose name is in `elsewhere`: it will be fetched.
    """
    for entry in _sorted_entries(folder):
        if is_weights(entry.name):
            _check_entry(entry, entry.name in elsewhere, follow_links)
        elif is_companion(entry.name):
            _check_entry(entry, entry.name in elsewhere)
        elif is_templates_folder(entry.name) and entry.is_dir():
            if leads_away(entry):
                raise CheckpointError(f"{entry}: {LINK_ADVICE}")
            for template in _sorted_entries(entry):
                if is_companion(f"{entry.name}/{template.name}"):
                    _check_entry(template)


def is_weights(name: str) -> bool:
    """Whether a file of that name may hold weights."""
    return name.endswith(_WEIGHTS)


def _sorted_entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror})") from error


def _check_entry(entry: Path, is_elsewhere: bool = False, follow_links: bool = False) -> None:
    try:
        kind = what_it_is(entry)
        size = entry.stat().st_size
    except FileNotFoundError as error:
        if is_elsewhere:
            return
        raise CheckpointError(f"{entry}: a broken link; download the file again") from error
    except OSError as error:
        raise CheckpointError(f"{entry}: cannot be read ({error.strerror})") from error
    if leads_away(entry) and not follow_links:
        advice = _WEIGHTS_ADVICE if is_weights(entry.name) else LINK_ADVICE
        raise CheckpointError(f"{entry}: {advice}")
    if kind and kind != "a folder":  # nothing reads a folder, such as one of licences
        raise CheckpointError(f"{entry}: is {kind}, expected a file")
    if size > MAX_TOKENIZER_BYTES and not is_weights(entry.name):
        raise CheckpointError(
            f"{entry}: {size:,} bytes, expected at most {MAX_TOKENIZER_BYTES:,}; is this the right "
            "file?"
        )
