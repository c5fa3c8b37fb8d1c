"""The bundled example, as a folder of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reap2gguf.outputs import claimed, output_path
from reap2gguf.resources import write_example

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.api.opening import PathLike


def example(output: PathLike) -> Path:
    """Write the bundled example, a trained Qwen3-MoE of 14.4 M parameters, to a new folder.

    Works offline; the hash of every file is checked. Returns the folder. Raises OutputError if it
    exists or cannot be written, SourceError if this installation is damaged.
    """
    folder = output_path(output)
    with claimed([folder]):
        write_example(folder)
    return folder
