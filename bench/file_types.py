"""Every file type of a model, tensor by tensor, beside what llama.cpp makes of the same model.

python bench/file_types.py MODEL IMATRIX [--mtp drop] [--only FILE_TYPE ...]: MODEL is a checkpoint
folder, IMATRIX llama-imatrix's file of it, which has no entries of an MTP block. Prints a line per
file type: tensors of equal type, and of equal bytes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import llama_quantize  # before the package's libggml: two builds share the name of one library
from gguf import GGUFReader

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import Reap2ggufError
from reap2gguf.exporting.header_facts import HeaderNames
from reap2gguf.exporting.model_files import WeightedBy, export_model
from reap2gguf.gguf_files.imatrix import Imatrix, load_imatrix
from reap2gguf.machine import available_threads
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from reap2gguf.quantizing.file_types import MIXTURES
from reap2gguf.quantizing.recipe import Recipe
from reap2gguf.quantizing.resolve import resolve


def export(
    folder: Path, keep_mtp: bool, target: Path, recipe: Recipe, imatrix: Imatrix | None
) -> None:
    """Write one file of a checkpoint."""
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint, keep_mtp)
        tensors = model.gguf_tensors(checkpoint.tensors)
        resolved = resolve(recipe, tensors, model.facts, model.facts.n_experts, imatrix is not None)
        weighted_by = None if imatrix is None else WeightedBy(imatrix)
        names, threads = HeaderNames("Model"), available_threads()
        export_model(checkpoint, model, names, {target: resolved}, weighted_by, threads, Silent())


def stored(path: Path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of every tensor, by gguf-py's reader."""
    tensors = GGUFReader(path).tensors
    return {one.name: (one.tensor_type.name, one.data.tobytes()) for one in tensors}


def compare(folder: Path, keep_mtp: bool, imatrix: Imatrix, work: Path, name: str) -> str:
    """A line about one file type."""
    ours, theirs, bf16 = (work / f"{one}.gguf" for one in ("ours", "theirs", "bf16"))
    recipe = Recipe(name, name, name, name, (), "")
    try:
        export(folder, keep_mtp, ours, recipe, imatrix)
    except Reap2ggufError as error:
        return f"not made here: {error}"
    try:
        llama_quantize.quantize(bf16, theirs, recipe, imatrix, available_threads())
    except RuntimeError:
        return "llama.cpp makes no such file"
    found, wanted = stored(ours), stored(theirs)
    types = sum(found[one][0] == kind for one, (kind, _) in wanted.items())
    same = [one for one, value in wanted.items() if found[one] == value]
    n_bytes = sum(len(raw) for _, raw in wanted.values())
    differ = sum(
        len(raw) if len(raw) != len(found[one][1]) else sum(map(int.__ne__, raw, found[one][1]))
        for one, (_, raw) in wanted.items()
        if one not in same
    )
    line = f"types {types} of {len(wanted)}, bytes of {len(same)} of {len(wanted)} tensors"
    return f"{line}, {differ:,} of {n_bytes:,} bytes differ" if differ else line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("imatrix", type=Path)
    parser.add_argument("--mtp", choices=("keep", "drop"), default="keep")
    parser.add_argument("--only", nargs="+", default=[*MIXTURES], metavar="FILE_TYPE")
    asked = parser.parse_args()
    imatrix, keep_mtp = load_imatrix(asked.imatrix), asked.mtp == "keep"
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        bf16 = Recipe("BF16", "BF16", "BF16", "BF16", (), "")
        export(asked.model, keep_mtp, work / "bf16.gguf", bf16, None)
        for name in asked.only:
            print(f"{name}: {compare(asked.model, keep_mtp, imatrix, work, name)}", flush=True)


if __name__ == "__main__":
    main()
