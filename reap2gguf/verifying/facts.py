"""What a bundle says twice: the manifest compared with itself, with headers, and with the config.

Only headers are read here, no values. Each function yields violations; none raises for what a file
says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from gguf import LlamaFileType

from reap2gguf.bundle.layout import (
    CARD_FILE,
    IMATRIX_FILE,
    MANIFEST_FILE,
    MMPROJ_PREFIX,
    model_file,
    side_file,
)
from reap2gguf.bundle.manifest import NO_METHOD
from reap2gguf.checkpoint.quantized.keys import WRITTEN_AS_BF16
from reap2gguf.errors import RecipeError
from reap2gguf.ggml import UNWEIGHTED_TYPES
from reap2gguf.gguf_files.part_names import part_name
from reap2gguf.gguf_files.split import SplitHeader
from reap2gguf.messages import shown
from reap2gguf.models.side_values import side_files
from reap2gguf.options import DEQUANTIZE_CHOICES, DEVICES, DTYPES, MTP_CHOICES
from reap2gguf.pruning.methods import MERGING, OBSERVED, RECORDED, merges
from reap2gguf.pruning.quantization import pruned_quantization
from reap2gguf.quantizing.file_types import mixture_named
from reap2gguf.quantizing.recipe import Recipe, parse_recipe
from reap2gguf.quantizing.resolve import resolve
from reap2gguf.verifying.budget import check_budget
from reap2gguf.verifying.choice import asked_candidates, asked_methods, check_chosen_method
from reap2gguf.verifying.protected import check_asked, check_protected
from reap2gguf.verifying.report import Level, passed_file, passed_folder, passed_summary

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import GgufRecord, Manifest, PruningRecord, SideRecord
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.gguf_files.imatrix import Imatrix
    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.models.contract import MoeModel

# what becomes of an MTP block -> the option that asked for it
_MTP_OPTIONS = {"pruned": "prune", "kept": "prune", "dropped": "drop"}


def check_record(manifest: Manifest) -> Iterator[str]:
    """What a manifest says twice by itself: counts, kept experts, names, recipes.

    Its numbers are within their bounds: `bundle.bounds` has checked them when it was read.
    """
    pruning, calibration = manifest.pruning, manifest.calibration
    yield from _check_kept(pruning)
    methods = RECORDED if pruning.n_kept < pruning.n_experts else (NO_METHOD,)
    if pruning.method not in methods:
        yield _wrong("pruning.method", pruning.method, f"one of {', '.join(methods)}")
    yield from check_chosen_method(manifest)
    yield from check_budget(manifest)
    reads_rows = pruning.method in OBSERVED or pruning.merge is not None
    observed_here = reads_rows and pruning.observations_file is None
    if (pruning.merge is None) == merges(pruning.method):
        yield _wrong("pruning.merge", pruning.merge, f"a record just for {' and '.join(MERGING)}")
    if calibration.components and observed_here:
        held = manifest.choice.held_out if manifest.choice else None
        n_rows, n_tokens = (held.n_rows, held.n_tokens) if held else (0, 0)
        totals = (("rows", pruning.n_rows + n_rows), ("tokens", pruning.n_tokens + n_tokens))
        for what, total in totals:
            found = sum(getattr(part, what) for part in calibration.components)
            yield from _differs(f"pruning.n_{what}", total, found, "the sum of its components")
    files = [record.file for record in manifest.gguf]
    if len(set(files)) < len(files):
        yield _wrong("gguf", files, "each file once")
    for record in manifest.gguf:
        yield from _check_names(manifest, record)
    for side in manifest.side_files:
        yield from _differs(
            "side_files.file", side.file, side_file(MMPROJ_PREFIX, manifest.name), "its name"
        )


def check_options(manifest: Manifest) -> Iterator[str]:
    """The options that `--like` takes over, against what came of them."""
    options, pruning, calibration = manifest.options, manifest.pruning, manifest.calibration
    if options is None:
        return
    expected: dict[str, tuple[Any, ...]] = {
        "keep_experts": (None, pruning.n_kept),
        "name": (None, manifest.name),
        "method": asked_methods(manifest),
        "candidates": asked_candidates(manifest),
        "dequantize": DEQUANTIZE_CHOICES if WRITTEN_AS_BF16 in manifest.caveats else (None,),
        "mtp": MTP_CHOICES if pruning.mtp.state == "none" else (_MTP_OPTIONS[pruning.mtp.state],),
        "observations": (pruning.observations_file,),
        "imatrix": (None if calibration.is_of_observations else calibration.imatrix_file,),
        "imatrix_from": calibration.asked_from(pruning.method == NO_METHOD),
        "device": DEVICES[1:],
        "dtype": DTYPES[1:],
    }
    if calibration.max_length is not None:  # the rows were drawn by this build
        expected |= {
            "spec": (calibration.spec,),
            "max_length": (max(options.max_length, calibration.max_length),),  # of the context
            "seed": (calibration.seed,),
            "pack": (calibration.packed,),
        }
    n_tokens, n_chunks = calibration.imatrix_chunk_size, calibration.imatrix_chunks
    if calibration.imatrix_file is None and n_tokens is not None and n_chunks is not None:
        expected |= {
            "imatrix_text": (None, calibration.imatrix_text),
            "chunk": (max(options.chunk, n_tokens),),
            "imatrix_chunks": (None, max(options.imatrix_chunks or 0, n_chunks)),
        }
    yield from check_asked(pruning, options)
    for name, values in expected.items():
        if (found := getattr(options, name)) not in values:
            yield _wrong(f"options.{name}", found, " or ".join(map(str, values)))
    if options.compression is not None:
        ratio = Decimal(str(options.compression))  # as typed, as `choose_target` reads it
        kept = pruning.n_experts - math.floor(pruning.n_experts * ratio)
        yield from _differs("options.compression keeps", kept, pruning.n_kept, "pruning.n_kept")


def _check_kept(pruning: PruningRecord) -> Iterator[str]:
    n_kept = pruning.n_kept
    if not pruning.kept:
        yield _wrong("pruning.kept", {}, "the experts of every MoE layer")
    for layer, ids in pruning.kept.items():
        if len(ids) != n_kept:
            yield _wrong(f"pruning.kept of layer {layer}", f"{len(ids)} experts", f"{n_kept}")
        elif any(a >= b for a, b in pairwise(ids)):
            yield _wrong(f"pruning.kept of layer {layer}", list(ids), "ascending numbers")
    yield from check_protected(pruning)


def _check_names(manifest: Manifest, record: GgufRecord) -> Iterator[str]:
    """A file's name, those of its parts, and what its recipe says of it."""
    where = f"gguf {record.file}"
    expected = model_file(manifest.name, record.label)
    yield from _differs("gguf.file", record.file, expected, "its name and label")
    stem = record.file.removesuffix(".gguf")
    parts = [part_name(stem, number, len(record.parts)) for number in range(len(record.parts))]
    yield from _differs(f"{where}: parts", list(record.parts), parts, "its name")
    if record.adopted:
        made = {"recipe": record.recipe, "recipe_source": record.recipe_source}
        for what, found in made.items():
            yield from _differs(f"{where}: {what}", found, "", "an adopted file")
        return
    recipe = _recipe(record)
    if isinstance(recipe, str):
        yield recipe
        return
    for what in ("title", "file_type"):  # the label may be another one than the recipe's
        found = getattr(record, what)
        yield from _differs(f"{where}: {what}", found, getattr(recipe, what), "its recipe")


def _recipe(record: GgufRecord) -> Recipe | str:
    """The recipe whose text a record holds, or the violation."""
    try:
        where = f"{MANIFEST_FILE}: recipe_source of {record.file}"
        return parse_recipe(record.recipe_source, record.recipe, where)
    except RecipeError as error:
        return str(error)


def check_recipe(
    record: GgufRecord, weights: Weights, model: MoeModel, has_imatrix: bool = True
) -> Iterator[str]:
    """A record's types against its recipe, applied to the pruned model again."""
    where = f"gguf {record.file}"
    recipe = "" if record.adopted else _recipe(record)
    if isinstance(recipe, str):
        return  # `check_record` has reported it
    facts = model.facts
    tensors = model.gguf_tensors(weights.tensors)
    try:
        resolved = resolve(recipe, tensors, facts, facts.n_experts, has_imatrix)
    except RecipeError as error:
        yield f"{MANIFEST_FILE}: recipe_source of {record.file}: {error}"
        return
    expected = {name: tensor_type.name for name, tensor_type in resolved.tensor_types().items()}
    if record.tensors != expected:
        names = sorted(record.tensors.keys() ^ expected.keys()) or sorted(
            name for name, found in record.tensors.items() if found != expected[name]
        )
        name = names[0]
        yield (
            f"{MANIFEST_FILE}: {where}: {shown(name)} is {record.tensors.get(name, 'absent')}, its "
            f"recipe gives {expected.get(name, 'no such tensor')} ({len(names)} such tensors)"
        )
    yield from _differs(
        f"{where}: source_blocks", record.source_blocks, resolved.n_sliced, "its recipe"
    )
    bits = round(resolved.bits_per_weight, 4)
    yield from _differs(f"{where}: bits_per_weight", record.bits_per_weight, bits, "its recipe")


def check_hf_facts(manifest: Manifest, checkpoint: Checkpoint, model: MoeModel) -> Iterator[str]:
    """The manifest against the safetensors folder: its config, and the headers of its shards."""
    facts, pruning, hf = model.facts, manifest.pruning, manifest.hf
    yield from _of_model(manifest, model)
    if hf is None:
        return  # a bundle without safetensors
    found = {
        "n_shards": (hf.n_shards, len(checkpoint.shards)),
        "n_parameters": (hf.n_parameters, checkpoint.n_parameters),
        "n_bytes": (hf.n_bytes, checkpoint.n_bytes),
    }
    for what, (recorded, counted) in found.items():
        yield from _differs(f"hf.{what}", recorded, counted, "the safetensors")
    if facts.n_experts != pruning.n_kept:
        yield (
            f"{checkpoint.folder.name}: config.json says {facts.n_experts} experts, expected "
            f"{pruning.n_kept}"
        )
    shards = sorted(shard.name for shard in checkpoint.shards)
    listed = sorted(name for name in hf.files if name.endswith(".safetensors"))
    yield from _differs("the safetensors in hf.files", listed, shards, "the index")
    for name in sorted({CARD_FILE, "config.json"} - hf.files.keys()):
        yield f"{MANIFEST_FILE}: hf.files does not name {name}"
    yield from _check_config(checkpoint, model)
    yield from check_passed(manifest, len(checkpoint.stored.tensors))


def _check_config(checkpoint: Checkpoint, model: MoeModel) -> Iterator[str]:
    """The config must be one that pruning writes: to prune it to the same count changes nothing."""
    found, written = checkpoint.stored.config, model.pruned_config(model.facts.n_experts)
    if checkpoint.stored is not checkpoint:
        all_experts = tuple(range(model.facts.n_experts))
        kept = dict.fromkeys(model.facts.moe_layers, all_experts)
        written = pruned_quantization(written, found, model, kept)
    if found == written:
        return
    where = f"{checkpoint.folder.name}: config.json is not one that pruning writes, by "
    sections = [(found, written)]
    text, written_text = found.get("text_config"), written.get("text_config")
    if isinstance(text, dict) and isinstance(written_text, dict):
        sections.append((text, written_text))
    keys = sorted(
        {
            key
            for one, other in sections
            for key in one.keys() | other.keys()
            if key != "text_config" and (key in one, one.get(key)) != (key in other, other.get(key))
        }
    )
    yield where + ", ".join(map(shown, keys))


def _of_model(manifest: Manifest, model: MoeModel) -> Iterator[str]:
    """What the config of the pruned model, or of its source, says as well."""
    facts, pruning = model.facts, manifest.pruning
    yield from _differs(
        "source.architecture", manifest.source.architecture, facts.architecture, "config.json"
    )
    yield from _differs(
        "pruning.experts_per_token",
        pruning.experts_per_token,
        facts.experts_per_token,
        "config.json",
    )
    layers = sorted(pruning.kept)
    yield from _differs("the layers of pruning.kept", layers, sorted(facts.moe_layers), "the model")
    with_mtp = "pruned" if pruning.n_kept < pruning.n_experts else "kept"
    if (pruning.mtp.state == with_mtp) != facts.has_mtp:
        expected = with_mtp if facts.has_mtp else "none or dropped"
        yield _wrong("pruning.mtp.state", pruning.mtp.state, f"{expected}, as the model has it")
    in_gguf = pruning.mtp.in_gguf
    yield from _differs("pruning.mtp.in_gguf", in_gguf, model.mtp_in_gguf, "the architecture")


def check_source_facts(manifest: Manifest, source: Checkpoint, model: MoeModel) -> Iterator[str]:
    """The manifest against the model that was pruned: its config and its headers."""
    yield from _of_model(manifest, model)
    found = {
        "pruning.n_experts": (manifest.pruning.n_experts, model.facts.n_experts),
        "source.n_parameters": (manifest.source.n_parameters, source.n_parameters),
        "source.n_bytes": (manifest.source.n_bytes, source.n_stored_bytes),
    }
    for what, (recorded, counted) in found.items():
        yield from _differs(what, recorded, counted, "the source")


def check_passed(manifest: Manifest, n_stored: int | None) -> Iterator[str]:
    """The record of what the build verified, which the card quotes.

    `n_stored` counts the tensors of the safetensors; None if the bundle has none.
    """
    found = manifest.verification.get("passed")
    passed = found if isinstance(found, list) else []
    change = manifest.pruning.change
    changed = (0, "") if change is None else (change.n_tensors, change.what)
    lines = [] if n_stored is None else [[passed_folder(n_stored, *changed)]]
    records: list[GgufRecord | SideRecord] = [*manifest.gguf, *manifest.side_files]
    for record in records:
        levels = (Level.VALUES, Level.EXACT)  # a build chooses by the size of a file
        lines.append([passed_file(record.file, len(record.tensors), level) for level in levels])
    if len(passed) != len(lines) or any(
        one not in allowed for one, allowed in zip(passed, lines, strict=True)
    ):
        wanted = [allowed[0] for allowed in lines]
        yield _wrong("verification.passed", found, f"lines such as {shown(wanted)}")
    summary = manifest.verification.get("summary")
    if summary != "1 checks passed" or len(passed) != 1:  # as it was once written
        yield from _differs("verification.summary", summary, passed_summary(passed), "its lines")


def check_gguf_facts(
    manifest: Manifest, record: GgufRecord, header: GgufHeader, imatrix: Imatrix | None
) -> Iterator[str]:
    """The manifest against the header of a model's GGUF file, or of its first part.

    `gguf_header` compares the keys that follow from names, kept experts and model.
    """
    try:
        mixture_named(record.file_type)
    except RecipeError as error:
        yield f"{MANIFEST_FILE}: gguf {record.file}: {error}"
    if not record.adopted:
        yield from _check_imatrix_keys(manifest, record, header, imatrix)
    yield from _check_size(header, record.n_bytes, record.file)


def _check_imatrix_keys(
    manifest: Manifest, record: GgufRecord, header: GgufHeader, imatrix: Imatrix | None
) -> Iterator[str]:
    """What a header says of the importance matrix, if any of its types was weighted by it."""
    prefix = "quantize.imatrix."
    is_weighted = not set(UNWEIGHTED_TYPES).issuperset(record.tensors.values())
    if not is_weighted or not manifest.has_imatrix:
        if found := sorted(key for key in header.metadata if key.startswith(prefix)):
            why = "no tensor that an imatrix weights" if manifest.has_imatrix else "no imatrix"
            yield f"{header.path.name}: has {found[0]}, but {why}"
        return
    calibration = manifest.calibration
    expected: dict[str, Any] = {
        f"{prefix}file": IMATRIX_FILE,
        f"{prefix}dataset": calibration.imatrix_text,
        f"{prefix}chunks_count": calibration.imatrix_chunks,
    }
    if imatrix is not None:
        expected[f"{prefix}entries_count"] = len(imatrix.entries)
    yield from _check_keys(header, expected)


def check_side_facts(manifest: Manifest, record: SideRecord, header: GgufHeader) -> Iterator[str]:
    """The manifest against the header of a side file, such as a vision projector."""
    yield from _check_keys(header, {"general.file_type": LlamaFileType.MOSTLY_F16.value})
    yield from _check_size(header, record.n_bytes, record.file)


def check_side_records(manifest: Manifest, weights: Weights, model: MoeModel) -> Iterator[str]:
    """The side files of a manifest against those that the model has."""
    sides = {side_file(side.prefix, manifest.name): side for side in side_files(model, weights)}
    found = [record.file for record in manifest.side_files]
    yield from _differs("side_files", found, list(sides), "the model")
    for record in manifest.side_files:
        side = sides.get(record.file)
        if side is None:
            continue
        yield from _differs(f"{record.file}: title", record.title, side.title, "the model")
        types = {name: tensor_type.name for name, tensor_type in side.tensor_types().items()}
        if record.tensors != types:
            yield f"{MANIFEST_FILE}: {record.file}: its tensors are not those of the model"


def _check_size(header: GgufHeader, n_bytes: int, file: str) -> Iterator[str]:
    """A file, or all its parts together, must have its recorded size."""
    parts: Sequence[GgufHeader] = header.parts if isinstance(header, SplitHeader) else (header,)
    total = sum(part.n_bytes for part in parts)
    yield from _differs(f"gguf {file}: n_bytes", n_bytes, total, "the file")


def _check_keys(header: GgufHeader, expected: Mapping[str, Any]) -> Iterator[str]:
    for key, wanted in expected.items():
        found = header.metadata.get(key)
        if type(found) is not type(wanted) or found != wanted:
            shown_value = shown(found) if key in header.metadata else "missing"
            yield f"{header.path.name}: {key} is {shown_value}, expected {shown(wanted)}"


def _differs(what: str, found: Any, expected: Any, whose: str) -> Iterator[str]:
    """A violation if the manifest's value is not that of `whose`."""
    if found != expected:
        yield f"{MANIFEST_FILE}: {what} is {shown(found)}, expected {shown(expected)} by {whose}"


def _wrong(what: str, found: Any, expected: str) -> str:
    return f"{MANIFEST_FILE}: {what} is {shown(found)}, expected {expected}"
