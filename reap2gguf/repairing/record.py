"""The files of a repair: each layer's new `down_proj`, and what the fit came to."""

from __future__ import annotations

from pathlib import Path

from reap2gguf.pruning.layer_files import LayerFiles, MadeLayer
from reap2gguf.repairing.fit import LayerFit

RepairedLayer = MadeLayer[LayerFit]  # repaired, or found better as it was


class RepairFolder(LayerFiles[LayerFit]):
    """The files of a repair."""

    def __init__(self, path: Path, key: str) -> None:
        super().__init__(path, key, LayerFit)
