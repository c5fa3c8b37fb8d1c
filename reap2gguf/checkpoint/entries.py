"""Checks the entries of a checkpoint folder before any of them is opened.

transformers and gguf-py read tokenizers, and small files are copied into the bundle that will be
published. So every entry that any of them reads is checked here once: that it is a file of the
folder itself, and not too large.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from reap2gguf.checkpoint.companions import TEMPLATES_FOLDER, Purpose, serves
from reap2gguf.checkpoint.config import MAX_TOKENIZER_BYTES
from reap2gguf.errors import CheckpointError
from reap2gguf.files import leads_out, what_it_is

_WEIGHTS = ".safetensors"
_LINK_ADVICE = (
    "a link that leads out of the checkpoint; its target would be read and published with the "
    "model, so replace it with a copy or a hard link"
)


def check_entries(folder: Path, elsewhere: Container[str] = ()) -> None:
    """Refuse a checkpoint folder with an entry that is not a file of its own.

    Raises CheckpointError for a link that leads elsewhere, for a pipe, socket or device in place of
    a file, and for a companion file that is too large. A broken link is accepted for a file whose
    name is in `elsewhere`: it will be fetched.
    """
    for place in (folder, folder / TEMPLATES_FOLDER):
        try:
            entries = sorted(place.iterdir()) if place.is_dir() else []
        except OSError as error:
            raise CheckpointError(f"{place}: cannot be read ({error.strerror})") from error
        if place != folder and leads_out(place, folder):
            raise CheckpointError(f"{place}: {_LINK_ADVICE}")
        for entry in entries:
            if entry.name.endswith(_WEIGHTS) or serves(entry.name, Purpose.ENTRY):
                _check_entry(entry, folder, entry.name in elsewhere)


def _check_entry(entry: Path, folder: Path, is_elsewhere: bool) -> None:
    if leads_out(entry, folder):
        raise CheckpointError(f"{entry}: {_LINK_ADVICE}")
    try:
        kind = what_it_is(entry)
        size = entry.stat().st_size
    except FileNotFoundError as error:
        if is_elsewhere:
            return
        raise CheckpointError(f"{entry}: a broken link; download the file again") from error
    except OSError as error:
        raise CheckpointError(f"{entry}: cannot be read ({error.strerror})") from error
    if kind and kind != "a folder":  # nothing reads a folder, such as one of licences
        raise CheckpointError(f"{entry}: is {kind}, expected a file")
    if size > MAX_TOKENIZER_BYTES and entry.suffix != _WEIGHTS:
        raise CheckpointError(
            f"{entry}: {size:,} bytes, expected at most {MAX_TOKENIZER_BYTES:,}; is this the right "
            "file?"
        )
