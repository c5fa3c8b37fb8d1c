"""Times `recipes fit` at a real model's shape: the error table, and the solution.

    python bench/fit.py FOLDER --device cuda
    python bench/fit.py FOLDER --shape qwen3.5-35b-a3b --layers 4 --threads 2 --device cpu
    python bench/fit.py --solver

FOLDER receives a checkpoint of the shape with a few layers and random weights, unless an earlier
run left one there: 6.7 GB for 4 layers of Qwen3.5-35B-A3B, of which every fourth has another kind.
Its table is measured, and the time of the whole model's is that of the layers, times all layers by
those that were measured, and that of embedding and output, whose samples do not grow with them.
With layers in the whole model's proportions, that is what the model takes. What is done once is
counted once: tables of the IQ types, comparing kernels with libggml, compiling them for a GPU. Then
the problem of the whole model is solved, layers being copies with 10 % of noise.

`--solver` solves a random problem of 40 layers, 12 tensors and 20 types for five sizes instead.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sparse_checkpoint import SHAPES

from reap2gguf.fitting.errors_table import TYPES, Where, measure
from reap2gguf.fitting.fitted import free_tensors, tensor_bytes
from reap2gguf.fitting.knapsack import choose
from reap2gguf.fitting.sensitivity import sensitivities
from reap2gguf.machine import available_threads
from reap2gguf.progress import Silent

LAYERS, ROLES, FORMS = 40, 12, 20  # of the random problem


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.perf_counter()
    found = function()
    return found, time.perf_counter() - begun


def solve(sizes: npt.NDArray[np.int64], damages: npt.NDArray[np.float64], bits: float) -> None:
    """Choose for a budget of `bits` of 16 per weight, and print a line."""
    budget = int(sizes.max(axis=1).sum() * bits / 16)
    found, seconds = timed(lambda: choose(sizes, damages, budget))
    print(
        f"solver, {len(sizes)} tensors, {bits:.2f} bits per weight: {seconds:.2f} s, at most "
        f"{100 * found.gap:.3f} % above the least damage, {100 * found.n_bytes / budget:.4f} % used"
    )


def random_problem() -> None:
    """Every tensor with all types of 1.5 to 16 bits, and an error that a bit halves twice."""
    random = np.random.default_rng(0)
    bits = np.sort(np.append(random.uniform(1.5, 9, FORMS - 1), 16))
    weights = np.exp2(random.integers(18, 29, ROLES)).repeat(LAYERS)
    sizes = (weights[:, None] * bits / 8).astype(np.int64)
    spread = random.lognormal(0, 0.5, (len(weights), 1)) * random.lognormal(0, 0.1, sizes.shape)
    damages = spread * np.exp2(-2 * bits)
    for target in (2.3, 3.0, 4.25, 5.0, 6.5):
        solve(sizes, damages, target)


def measured_model(arguments: argparse.Namespace) -> None:
    from export import random_imatrix
    from synthetic import write_apart

    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.exporting.row_ranges import BlockMaker
    from reap2gguf.models.table import describe
    from reap2gguf.quantizing.quantizer import load_quantizer

    folder: Path = arguments.folder
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_apart(arguments.shape, arguments.layers, folder, same_layers=True)
    config = SHAPES[arguments.shape][0]
    n_all = config.get("text_config", config)["num_hidden_layers"]
    where = Where(arguments.device, arguments.threads)
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        free = free_tensors(model.gguf_tensors(checkpoint.tensors))
        host = BlockMaker(checkpoint, load_quantizer(0), random_imatrix(checkpoint).entries)
        ends = [one for one in free if not one.name.startswith("blk.")]
        layers = [one for one in free if one.name.startswith("blk.")]
        # what is done once: kernels are compiled, compared with libggml, and loaded
        first = [ends[0], layers[0]]  # without importance, and with it
        _, once = timed(lambda: measure(host, first, TYPES, where, Silent(), {}))
        found, of_ends = timed(lambda: measure(host, ends, TYPES, where, Silent(), {}))
        errors, of_layers = timed(lambda: measure(host, layers, TYPES, where, Silent(), {}))
    n_measured = model.facts.n_layers
    whole = once + of_ends + of_layers * n_all / n_measured
    print(
        f"{arguments.shape}, {arguments.device}, {arguments.threads} threads: first tensors "
        f"{once:.1f} s, ends {of_ends:.1f} s, {len(layers)} tensors of {n_measured} layers "
        f"{of_layers:.1f} s; "
        f"{len(layers) * n_all // n_measured + len(ends)} tensors of {n_all} layers: {whole:.0f} s"
    )
    solve_model(free, {**found, **errors}, n_all // n_measured)


def solve_model(free: list[Any], errors: Any, n_copies: int) -> None:
    """The problem of the whole model, for several sizes."""
    random = np.random.default_rng(0)
    weights = sensitivities(one.name for one in free)
    rows = [one for one in free for _ in range(n_copies if one.name.startswith("blk.") else 1)]
    sizes = np.array([[tensor_bytes(one, form) for form in TYPES] for one in rows])
    damages = np.array(
        [
            [weights[one.name] * errors[one.name].get(form.name, np.inf) for form in TYPES]
            for one in rows
        ]
    )
    damages *= random.lognormal(0, 0.1, (len(rows), 1))
    for target in (2.5, 3.0, 4.25, 5.0, 6.5):
        solve(sizes, damages, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3.5-35b-a3b")
    parser.add_argument("--layers", type=int, default=4, help="to be measured")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=available_threads())
    parser.add_argument("--solver", action="store_true", help="solve a random problem only")
    arguments = parser.parse_args()
    if arguments.solver:
        random_problem()
    elif arguments.folder is None:
        parser.error("pass a folder, or --solver")
    else:
        measured_model(arguments)


if __name__ == "__main__":
    main()
