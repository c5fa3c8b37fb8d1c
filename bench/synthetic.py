"""Checkpoints of a real model's layer shape with fewer layers and random weights, for timing."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sparse_checkpoint import EXAMPLE, SHAPES, dtype_of

VOCABULARY = 4096  # of the example's tokenizer


def shortened(config: dict[str, Any], layers: int, **others: int) -> dict[str, Any]:
    """The same config with fewer layers, a small vocabulary and no MTP block, and `others`."""
    changes = {"num_hidden_layers": layers, "vocab_size": VOCABULARY}
    changes |= dict.fromkeys(("mtp_num_hidden_layers", "num_nextn_predict_layers"), 0) | others
    text = config.get("text_config")
    if text is None:
        return config | {key: value for key, value in changes.items() if key in config}
    return config | {"text_config": text | changes}


def write_checkpoint(
    shape: str, layers: int, folder: Path, same_layers: bool = False, **others: int
) -> None:
    """Random bfloat16 weights under the model's own names, one shard a layer.

    `same_layers`: all layers of one kind have the same weights, which is quick to write.
    `others` are config values to change, such as num_experts.
    """
    full, shapes = SHAPES[shape]
    config = shortened(full, layers, **others)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, size in shapes(config):
        if not name.startswith(("mtp.", "model.visual.")):
            part = name.split(".layers.")[1].split(".")[0] if ".layers." in name else "ends"
            parts.setdefault(part, {})[name] = size
    weight_map: dict[str, str] = {}
    made: dict[tuple[Any, ...], list[torch.Tensor]] = {}
    with ThreadPoolExecutor(16) as pool:
        writing = []
        for part, sizes in parts.items():
            path = folder / f"{part}.safetensors"
            kind = (part if not same_layers else len(sizes), *sizes.values())
            if kind not in made:
                made[kind] = [weight(name, size, generator) for name, size in sizes.items()]
            tensors = dict(zip(sizes, made[kind] if same_layers else made.pop(kind), strict=True))
            if same_layers:
                writing.append(pool.submit(write_shard, path, tensors))
            else:
                save_file(tensors, path)
            weight_map |= dict.fromkeys(tensors, path.name)
        for one in writing:
            one.result()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((EXAMPLE / name).read_bytes())


def write_apart(*arguments: Any, **others: Any) -> None:
    """`write_checkpoint` in a process of its own, which gives back its memory of a GPU."""
    process = get_context("spawn").Process(target=write_checkpoint, args=arguments, kwargs=others)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"writing the checkpoint failed with {process.exitcode}")


def write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file, without a copy of the tensors."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.view(torch.uint8).numpy().reshape(-1).data)


def weight(name: str, size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Values of the spread that trained weights have; norms lie around one.

    The parts of MXFP4 are any codes, and exponents with which these have such a spread.
    """
    if dtype_of(name) == "U8":
        low, high = (0, 256) if name.endswith("_blocks") else (119, 122)
        codes = torch.randint(
            low, high, size, dtype=torch.uint8, generator=generator, device=generator.device
        )
        return codes.cpu()
    values = torch.empty(size, dtype=torch.bfloat16, device=generator.device)
    values.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.02, generator=generator)
    return values.cpu()
