"""Times the program's own sweeps on a synthetic checkpoint of a real model's layer shape.

    python bench/observe.py --shape qwen3-30b-a3b --layers 4 --tokens 262144 --max-length 2048

Weights are random, routing has its true width. For each sweep it prints tokens per second and
layer, and the peak of GPU and host memory. `--floor` adds the bare forward: the same layers and
batches with nothing watching, for the ratio.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from sparse_checkpoint import EXAMPLE, SHAPES

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.models import MoeModel, describe
from reap2gguf.observe.importance import ImportanceObserver
from reap2gguf.observe.saliency import SaliencyObserver
from reap2gguf.observe.sweep import SweepOptions, sweep
from reap2gguf.progress import Silent


class Floor:
    """Watches nothing: the forward alone."""

    real_tokens = None

    def __init__(self, model: MoeModel) -> None:
        self.n_layers = model.facts.n_layers

    def last_layer(self) -> int:
        return self.n_layers - 1

    def attach(self, index: int, layer: torch.nn.Module) -> None:
        """Nothing is attached."""

    def commit(self) -> None:
        """Nothing was seen."""

    discard = commit

    def finish(self, index: int) -> None:
        """Nothing is kept."""


OBSERVERS = {"floor": Floor, "observe": SaliencyObserver, "imatrix": ImportanceObserver}


def shortened(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The same config with fewer layers, a small vocabulary and no MTP block."""
    changes = {"num_hidden_layers": layers, "vocab_size": 4096, "mtp_num_hidden_layers": 0}
    text = config.get("text_config")
    if text is None:
        return config | {key: value for key, value in changes.items() if key in config}
    return config | {"text_config": text | changes}


def write_checkpoint(shape: str, layers: int, folder: Path) -> None:
    """Random bfloat16 weights under the model's own names, one shard a layer."""
    full, shapes = SHAPES[shape]
    config = shortened(full, layers)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, size in shapes(config):
        if name.startswith(("mtp.", "model.visual.")):
            continue
        weight = torch.randn(size, generator=generator, device=device) * 0.02
        if name.endswith("norm.weight"):
            weight += 1
        part = name.split(".layers.")[1].split(".")[0] if ".layers." in name else "ends"
        shards.setdefault(part, {})[name] = weight.to(torch.bfloat16).cpu()
    weight_map = {}
    for part, tensors in shards.items():
        save_file(tensors, folder / f"{part}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"{part}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes((EXAMPLE / "tokenizer.json").read_bytes())


def measure(name: str, folder: Path, rows: list[np.ndarray], layers: int) -> dict[str, Any]:
    """One sweep, timed as a whole: loading, computing and summing."""
    checkpoint = Checkpoint.open(folder)
    model = describe(checkpoint)
    observer: Any = OBSERVERS[name](model)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    begun = time.monotonic()
    sweep(checkpoint, model, rows, observer, SweepOptions(), name, Silent())
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.monotonic() - begun
    n_tokens = sum(map(len, rows))
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    return {
        "sweep": name,
        "seconds": round(seconds, 2),
        "tokens_per_second_and_layer": round(n_tokens * layers / seconds),
        "peak_gpu_gib": peak and round(peak, 2),
        "peak_host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=262144)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--floor", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to write, such as /dev/shm")
    arguments = parser.parse_args()
    generator = np.random.default_rng(0)
    n_rows = arguments.tokens // arguments.max_length
    rows = list(generator.integers(0, 4000, (n_rows, arguments.max_length)))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        write_checkpoint(arguments.shape, arguments.layers, Path(name))
        names = ["floor"] if arguments.floor else []
        # the first sweep also warms the machine up, so its figure is thrown away
        measure("floor", Path(name), rows[:2], arguments.layers)
        for sweep_name in [*names, "observe", "imatrix"]:
            figures = measure(sweep_name, Path(name), rows, arguments.layers)
            print(json.dumps({"shape": arguments.shape} | figures), flush=True)


if __name__ == "__main__":
    main()
