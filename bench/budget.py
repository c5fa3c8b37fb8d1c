"""Fewer experts or fewer bits: what is predicted by the table and as measured, and what is true.

    python bench/budget.py MODEL OBSERVATIONS IMATRIX TEXT --sizes 5270048,4600000 --chunks 60

For each size and number of experts, `recipes budget` predicts the damage by both ways of
`--sensitivity`. Then the file that a build makes of that number is made (types chosen for the size
with `--sensitivity measured`, on the pruned model) and evaluated on TEXT beside MODEL in BF16: its
KL divergence is what the prediction was of. The choice of a way is the number that it predicts to
lose least. TEXT should not be the one that pruning is measured on, which is the held-out text.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import reap2gguf
from reap2gguf import BudgetResult, ComputeOptions, EvaluateOptions
from reap2gguf.machine import available_threads

WAYS = ("table", "measured")


class Compared:
    """A model with what ranks its experts, and files of it in a temporary folder."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.model, self.imatrix = arguments.model, arguments.imatrix
        self.observations, self.text = arguments.observations, arguments.text
        self.chunks, self.folder = arguments.chunks, folder
        self.compute = ComputeOptions(arguments.device, threads=arguments.threads)
        counts = arguments.keep_experts
        self.counts = None if counts is None else [int(one) for one in counts.split(",")]

    def budget(self, size: int, way: str) -> BudgetResult:
        return reap2gguf.weigh_budget(
            self.model,
            observations=self.observations,
            imatrix=self.imatrix,
            target_size=size,
            keep_experts=self.counts,
            sensitivity=way,
            cache=self.folder,
            compute=self.compute,
        )

    def file(self, size: int, count: int, is_whole: bool) -> Path:
        """The file of a size with so many experts, as a build makes it."""
        model, imatrix = self.model, self.imatrix
        if not is_whole:
            model, imatrix = self.folder / f"e{count}", self.folder / f"e{count}.imatrix.gguf"
            if not model.exists():
                reap2gguf.prune(self.model, self.observations, model, keep_experts=count)
                reap2gguf.slice_imatrix(self.imatrix, model, imatrix)
        path = self.folder / f"{size}-{count}.gguf"
        recipe = path.with_suffix(".toml")
        options = {"imatrix": imatrix, "threads": self.compute.threads}
        device = self.compute.device
        options["overwrite"] = True  # of an earlier run in the same folder
        reap2gguf.fit_recipe(model, recipe, target_size=size, device=device, **options)
        return reap2gguf.quantize(model, str(recipe), path, **options).path

    def divergences(self, files: Sequence[Path]) -> dict[Path, float]:
        """Of each file from MODEL in BF16."""
        options = EvaluateOptions(text=str(self.text), chunks=self.chunks)
        folders = [one for one in sorted(self.folder.iterdir()) if one.is_dir()]
        found = reap2gguf.evaluate(
            self.model, *folders, *files, options=options, compute=self.compute
        )
        source = found.variants[0].name
        means = {
            one.variant: one.divergence.mean.value
            for one in found.comparisons
            if one.reference == source
        }
        return {path: means[path.name] for path in files}


def compared(made: Compared, size: int) -> None:
    """Print a table of a size."""
    budgets = {way: made.budget(size, way) for way in WAYS}
    first = budgets[WAYS[0]].candidates
    fitting = [one.n_experts for one in first if one.quantizing is not None]
    most = first[0].n_experts
    files = {count: made.file(size, count, count == most) for count in fitting}
    apart = made.divergences([*files.values()])
    true = {count: apart[path] for count, path in files.items()}
    print(f"size {size:,}\nexperts | bits | pruning | " + " | ".join(WAYS) + " | true")
    for rows in zip(*(budgets[way].candidates for way in WAYS), strict=True):
        one = rows[0]
        if one.n_experts in true:
            damages = " | ".join(f"{row.damage:.4f}" for row in rows)
            bits, found = one.bits_per_weight, true[one.n_experts]
            print(f"{one.n_experts} | {bits:.2f} | {one.pruning:.4f} | {damages} | {found:.4f}")
    for way, budget in budgets.items():
        print(f"{way}: {_verdict(budget, true)}")


def _verdict(budget: BudgetResult, true: Mapping[int, float]) -> str:
    """What a way chooses, and how far its predictions are from what is true."""
    chosen, best = budget.best.n_experts, min(true, key=lambda count: true[count])
    logs = [math.log(one.damage / true[one.n_experts]) for one in budget.candidates
            if one.n_experts in true]  # fmt: skip
    spread = math.sqrt(sum(one * one for one in logs) / len(logs))
    return (
        f"chooses {chosen}, which has {true[chosen]:.4f}; the best is {best} with "
        f"{true[best]:.4f}; predicted {math.exp(min(logs)):.2f} to {math.exp(max(logs)):.2f} times "
        f"what is true, off by a factor of {math.exp(spread):.2f} (root mean square)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "observations", "imatrix", "text"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--sizes", required=True, help="bytes, with commas")
    parser.add_argument("--keep-experts", help="numbers, with commas")
    parser.add_argument("--chunks", type=int, default=60)
    parser.add_argument("--folder", type=Path, help="keeps what is made, for another run")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=available_threads())
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        made = Compared(arguments, folder)
        for size in map(int, arguments.sizes.split(",")):
            compared(made, size)


if __name__ == "__main__":
    main()
