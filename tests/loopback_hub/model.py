"""A tiny model as a repository of the Hub: a file of weights a layer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from safetensors.torch import save_file

from reap2gguf.hub import retry
from tests.loopback_hub.repository import COMMIT
from tests.loopback_hub.server import Hub
from tests.tiny import TinyQwen3Moe

MODEL = TinyQwen3Moe(n_layers=4, hidden=32, width=16, head_dim=8, dense_width=32)
ENDS = "model-00005-of-00005.safetensors"


def layered_files(folder: Path) -> dict[str, bytes]:
    """A checkpoint of a shard a layer and one for both ends, with what travels with it."""
    MODEL.write(folder)
    (folder / "model.safetensors").unlink()
    by_shard: dict[str, dict[str, Any]] = {}
    for name, tensor in MODEL.tensors().items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 4
        by_shard.setdefault(f"model-{layer + 1:05d}-of-00005.safetensors", {})[name] = tensor
    for shard, tensors in by_shard.items():
        save_file(tensors, folder / shard, {"format": "pt"})
    weight_map = {name: shard for shard, tensors in by_shard.items() for name in tensors}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    (folder / "LICENSE").write_text("free")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    (folder / "vocab.json").write_text("{}")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def whole(hub: Hub, name: str) -> list[str]:
    """Requests for a whole file, or the rest of one."""
    return [
        asked
        for asked in hub.asked(f"GET /owner/name/resolve/{COMMIT}/{name}")
        if "bytes=" not in asked or asked.endswith("-")
    ]


def shard_of(layer: int) -> str:
    return f"model-{layer + 1:05d}-of-00005.safetensors"


@contextmanager
def serving(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A Hub that has the model, asked again at once where that fails, for this process."""
    monkeypatch.setattr(retry, "_FIRST_WAIT", 0.01)
    with Hub(dict(files)) as hub:
        hub.serve(monkeypatch, cache)
        yield hub
    huggingface_hub.close_session()
