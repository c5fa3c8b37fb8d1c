"""Exports of checkpoints for these tests, and llama.cpp's own quantizer to compare them with."""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import llama_cpp  # before the package's libggml: two builds share the name of one library
import numpy as np
from gguf import GGUFReader

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.weights import Weights
from reap2gguf.exporting.header_facts import HeaderNames
from reap2gguf.exporting.model_files import WeightedBy, export_model
from reap2gguf.gguf_files.imatrix import Imatrix, ImatrixEntry
from reap2gguf.models.contract import MoeModel
from reap2gguf.models.description import GgufTensor
from reap2gguf.models.roles import spots
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from reap2gguf.quantizing.recipe import Recipe
from reap2gguf.quantizing.resolve import resolve
from tests.tiny import EXAMPLE

Stored = dict[str, tuple[str, bytes]]


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: object) -> None:
    pass


llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))


def plain(file_type: str) -> Recipe:
    """A recipe of a file type and no rules."""
    return Recipe(file_type, file_type, file_type, file_type, (), "")


def export_files(
    folder: Path,
    target: Path,
    recipes: Iterable[Recipe],
    imatrix: Imatrix | None = None,
    n_threads: int = 2,
) -> dict[str, Path]:
    """One GGUF per recipe, written in one pass; by the recipe's name."""
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        return export_weights(checkpoint, model, target, recipes, imatrix, n_threads)


def export_weights(
    weights: Weights,
    model: MoeModel,
    target: Path,
    recipes: Iterable[Recipe],
    imatrix: Imatrix | None = None,
    n_threads: int = 2,
) -> dict[str, Path]:
    """The same of weights that are opened already."""
    recipes = list(recipes)
    paths = {recipe.name: target / f"{recipe.name}.gguf" for recipe in recipes}
    tensors = model.gguf_tensors(weights.tensors)
    files = {
        paths[recipe.name]: resolve(
            recipe, tensors, model.facts, model.facts.n_experts, imatrix is not None
        )
        for recipe in recipes
    }
    weighted_by = None if imatrix is None else WeightedBy(imatrix)
    export_model(weights, model, HeaderNames("Tiny"), files, weighted_by, n_threads, Silent())
    return paths


def gguf_tensors(folder: Path) -> tuple[GgufTensor, ...]:
    with Checkpoint.open(folder) as checkpoint:
        return describe(checkpoint).gguf_tensors(checkpoint.tensors)


def random_imatrix(tensors: Iterable[GgufTensor], seed: int = 0) -> Imatrix:
    """Sums for every matrix that llama-imatrix would see; its last expert saw no token."""
    generator = np.random.default_rng(seed)
    entries = {}
    for tensor in tensors:
        if tensor.always_f32 or not tensor.name.startswith("blk."):
            continue
        counts = generator.integers(1, 500, tensor.n_matrices)
        if len(counts) > 1:
            counts[-1] = 0
        spread = generator.lognormal(0, 2, (tensor.n_matrices, tensor.n_columns))
        sums = (spread * counts[:, None]).astype(np.float32)
        entries[tensor.name] = ImatrixEntry(tensor.name, sums, counts.astype(np.int64))
    return Imatrix(entries, "random", 8, 512)


def mean_squares(imatrix: Imatrix) -> dict[str, np.ndarray]:
    """What llama-quantize makes of an imatrix file: sums over counts, ones where none."""
    found = {}
    for name, entry in imatrix.entries.items():
        rows = [
            sums / np.float32(count) if count else np.ones_like(sums)
            for sums, count in zip(entry.sums, entry.counts, strict=True)
        ]
        found[name] = np.concatenate(rows).astype(np.float32)
    return found


def llama_quantize(
    source: Path,
    target: Path,
    file_type: int,
    importance: Mapping[str, np.ndarray] | None = None,
    recipe: Recipe | None = None,
) -> bool:
    """Quantize with llama.cpp; False if it refuses."""
    found = {} if recipe is None else types_by_rule(source, recipe)
    overrides = [(f"^{re.escape(name)}$", kind) for name, kind in found.items()]
    params = _quantize_params(file_type, importance, overrides)
    return llama_cpp.llama_model_quantize(bytes(source), bytes(target), params) == 0


_PLANNED = re.compile(
    r"\[ *\d+/ *\d+\] (\S+) +- \[.*?\], type = *(\w+), size = [^\n(]*(?:\((\w+)\))?"
)


def types_of_llama_cpp(
    source: Path,
    file_type: int,
    importance: Mapping[str, np.ndarray] | None,
    patterns: Sequence[tuple[str, int]] = (),
    **options: object,
) -> dict[str, str]:
    """The types that llama.cpp would quantize to: it says them, and quantizes nothing.

    `patterns` are regular expressions with types; `options` are fields of its parameters.
    """
    said: list[str] = []

    @llama_cpp.llama_log_callback
    def listen(level: int, text: bytes, data: object) -> None:
        said.append(text.decode("utf-8", "replace"))

    params = _quantize_params(file_type, importance, patterns)
    params.dry_run = True
    for name, value in options.items():
        setattr(params, name, value)
    llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
    try:
        assert llama_cpp.llama_model_quantize(bytes(source), b"", params) == 0
    finally:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    found = _PLANNED.findall("".join(said))
    return {name: (to or was).upper() for name, was, to in found}


def _quantize_params(
    file_type: int,
    importance: Mapping[str, np.ndarray] | None = None,
    overrides: Sequence[tuple[str, int]] = (),
) -> llama_cpp.llama_model_quantize_params:
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = 2
    params.ftype = file_type
    if importance is not None:
        data = [
            llama_cpp.llama_model_imatrix_data(
                name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size
            )
            for name, values in importance.items()
        ]
        data.append(llama_cpp.llama_model_imatrix_data())
        params.imatrix = (llama_cpp.llama_model_imatrix_data * len(data))(*data)
    if overrides:
        listed = [
            llama_cpp.llama_model_tensor_override(pattern.encode(), kind)
            for pattern, kind in overrides
        ]
        listed.append(llama_cpp.llama_model_tensor_override())
        params.tt_overrides = (llama_cpp.llama_model_tensor_override * len(listed))(*listed)
    return params


def types_by_rule(source: Path, recipe: Recipe) -> dict[str, int]:
    """The type of every tensor of a file for which a recipe has a rule: that of the first one."""
    names = [tensor.name for tensor in GGUFReader(source).tensors]
    return {
        name: rule.tensor_type
        for name, place in spots(names).items()
        for rule in reversed(recipe.rules)
        if rule.selector.fits(place)
    }


def stored(path: Path) -> Stored:
    """Type and bytes of every tensor, by gguf-py's reader."""
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in GGUFReader(path).tensors}


def write_small_tokenizer(folder: Path) -> int:
    """Replace a checkpoint's tokenizer by one of the example's first tokens; the vocabulary."""
    tokenizer = json.loads((EXAMPLE / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    kept = sorted(vocab, key=lambda token: vocab[token])[:288]  # all bytes, and a few pairs
    known = {token: i for i, token in enumerate(kept)}
    pairs = tokenizer["model"]["merges"]
    merges = [pair for pair in pairs if {*pair, "".join(pair)} <= known.keys()]
    tokenizer["model"] |= {"vocab": known, "merges": merges}
    for i, token in enumerate(tokenizer["added_tokens"]):
        token["id"] = len(kept) + i
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return len(kept) + len(tokenizer["added_tokens"])


def left(folder: Path) -> list[str]:
    """Names of the files that an export left in a folder."""
    return sorted(path.name for path in folder.iterdir() if path.is_file())
