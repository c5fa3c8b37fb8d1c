"""The files of a checkpoint that hold chat templates, bounded before another library reads them."""

from __future__ import annotations

from pathlib import Path

from reap2gguf.errors import CheckpointError

MAX_TEMPLATE_BYTES = 2**20  # the longest that models come with have some 20 kB
# the folder is chat_templates for transformers, additional_chat_templates for gguf-py
_PATTERNS = ("chat_template.jinja", "*chat_templates/*.jinja")


def check_template_files(folder: Path) -> None:
    """Raise CheckpointError if a chat template's file is too large to be one, or cannot be read."""
    for path in (path for pattern in _PATTERNS for path in sorted(folder.glob(pattern))):
        try:
            size = path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
        if size > MAX_TEMPLATE_BYTES:
            raise CheckpointError(
                f"{path}: {size:,} bytes, expected a chat template of at most "
                f"{MAX_TEMPLATE_BYTES:,}; take it away, or give the model's own"
            )
