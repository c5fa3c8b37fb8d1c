"""What lies in a checkpoint folder, looked at before any of it is opened.

Tokenizers are read by transformers and gguf-py, and small files are copied into what will be
published. So every entry that any of them reads is checked here, once, by what it is.
"""

from __future__ import annotations

from collections.abc import Container
from fnmatch import fnmatchcase
from pathlib import Path

from reap2gguf.checkpoint.config import MAX_TOKENIZER_BYTES
from reap2gguf.errors import CheckpointError
from reap2gguf.files import leads_out, what_it_is

_READ = (
    "*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "README.md", "LICENSE*", "NOTICE*",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"


def check_entries(folder: Path, elsewhere: Container[str] = ()) -> None:
    """Refuse a checkpoint folder in which something is no file of its own.

    Raises CheckpointError for a link that leads elsewhere, a pipe, a socket or a device where a
    file is expected, and a small file that is large. A link to nothing will do for a file whose
    name is in `elsewhere`: it will be fetched.
    """
    for place in (folder, folder / _TEMPLATES):
        try:
            entries = sorted(place.iterdir()) if place.is_dir() else []
        except OSError as error:
            raise CheckpointError(f"{place}: cannot be read ({error.strerror})") from error
        if place != folder and leads_out(place, folder):
            raise CheckpointError(f"{place}: {_LINK_ADVICE}")
        for entry in entries:
            if any(fnmatchcase(entry.name, pattern) for pattern in _READ):
                _check_entry(entry, folder, entry.name in elsewhere)


_LINK_ADVICE = (
    "a link that leads out of the checkpoint; what it leads to would be read and published with "
    "it, so put a copy or a hard link in its place"
)


def _check_entry(entry: Path, folder: Path, can_be_had: bool) -> None:
    if leads_out(entry, folder):
        raise CheckpointError(f"{entry}: {_LINK_ADVICE}")
    try:
        kind = what_it_is(entry)
        size = entry.stat().st_size
    except FileNotFoundError as error:
        if can_be_had:
            return
        raise CheckpointError(f"{entry}: a link to nothing; download the file again") from error
    except OSError as error:
        raise CheckpointError(f"{entry}: cannot be read ({error.strerror})") from error
    if kind and kind != "a folder":  # a folder of licences is none of our business
        raise CheckpointError(f"{entry}: is {kind}, expected a file")
    if size > MAX_TOKENIZER_BYTES and entry.suffix != ".safetensors":
        raise CheckpointError(
            f"{entry}: {size:,} bytes, expected at most {MAX_TOKENIZER_BYTES:,}; is this the right "
            "file?"
        )
