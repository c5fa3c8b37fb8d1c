"""Writes a checkpoint of a real model's dimensions whose weights are holes in sparse files.

    python bench/sparse_checkpoint.py qwen3.5-35b-a3b /tmp/qwen3.5-35b-a3b
    reap2gguf plan /tmp/qwen3.5-35b-a3b --recipe unsloth-iq4km --compression 0.20

Headers, names and shapes are the published ones, so whatever reads headers alone (`plan`) can be
run at full size without the weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

from shapes.common import Shapes

SHARD_BYTES = 5 * 10**9
DTYPES = {"BF16": 2, "U8": 1}  # bytes of a value
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "tiny-qwen3-moe"


def every_shape() -> dict[str, Any]:
    """By name: a config, and what yields the names and shapes of its tensors."""
    files = sorted((Path(__file__).resolve().parent / "shapes").glob("*.py"))
    modules = [import_module(f"shapes.{file.stem}") for file in files]
    return {name: one for module in modules for name, one in vars(module).get("SHAPES", {}).items()}


SHAPES = every_shape()


def dtype_of(name: str) -> str:
    """What a tensor is stored as: the parts of MXFP4 are bytes."""
    return "U8" if name.endswith(("_blocks", "_scales")) else "BF16"


def write(config: dict, shapes: Shapes, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if "vision_config" in config:
        half = [0.5, 0.5, 0.5]
        images = {"image_mean": half, "image_std": half, "patch_size": 16}
        (folder / "preprocessor_config.json").write_text(json.dumps(images))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(EXAMPLE / name, folder / name)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = SHARD_BYTES
    for name, shape in shapes:
        n_bytes = DTYPES[dtype_of(name)] * prod(shape)
        if shards[-1] and n_bytes > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = shape
        room -= n_bytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        sparse_shard(folder / file_name, shard)
        weight_map |= dict.fromkeys(shard, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def sparse_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, position = {}, 0
    for name, shape in shapes.items():
        dtype = dtype_of(name)
        end = position + DTYPES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + position)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    config, shapes = SHAPES[arguments.shape]
    write(config, shapes(config), arguments.folder)


if __name__ == "__main__":
    main()
