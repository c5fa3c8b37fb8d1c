"""Bounds on the numbers of a manifest: whoever reads one divides by them and counts up to them.

Whether they are those of the files beside the manifest is the business of `verifying`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Sized
from statistics import median
from typing import TYPE_CHECKING, Any

from reap2gguf.messages import shown
from reap2gguf.models.description import MAX_EXPERTS, MAX_EXPERTS_OF_ALL_LAYERS, MAX_LAYERS
from reap2gguf.pruning.methods import MERGING

if TYPE_CHECKING:
    from reap2gguf.bundle.choice import ChoiceRecord
    from reap2gguf.bundle.evaluation import Divergence, Estimate, Evaluation
    from reap2gguf.bundle.manifest import (
        CalibrationRecord,
        CoverageRecord,
        Manifest,
    )
    from reap2gguf.bundle.records import (
        ImportanceRecord,
        MergeRecord,
        PruningRecord,
        RepairRecord,
        SourceRecord,
    )

_MOST_TOKENS = 2**53  # that one expert saw
MOST_FILES = 20_000  # of a folder, or parts of a file
_MOST_RECORDS = 1000
_MOST_TENSORS = 200_000
_MOST_BITS = 64
_REPAIR_KINDS = ("ridge", "scale")
_LARGEST_FIGURE = 1e12  # of an evaluation: a larger rate or score is none
LARGEST_PERPLEXITY = 1e300  # an exponential: a broken model's is large
MTP_STATES = ("none", "pruned", "kept", "dropped")
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_LAYER = re.compile(r"0|[1-9][0-9]{0,4}", re.ASCII)


def kept_layers(values: Any, name: str = "kept") -> dict[int, tuple[int, ...]]:
    """Expert ids by layer, from JSON. Raises ValueError or TypeError if they are malformed.

    Counts are checked before any id is read.
    """
    found = _by_layer(values, name, "expert ids")
    return {layer_number(key): tuple(map(_expert_id, ids)) for key, ids in found.items()}


def expert_groups(values: Any) -> tuple[tuple[int, ...], ...]:
    """Groups of expert ids, from JSON. Raises ValueError or TypeError if they are malformed."""
    return tuple(tuple(map(_expert_id, group)) for group in _lists_of("groups", values))


def expert_shares(values: Any) -> tuple[tuple[float, ...], ...]:
    """The shares of experts in groups, from JSON. Raises as `expert_groups` does."""
    found = _lists_of("shares", values)
    for share in (share for group in found for share in group):
        if not isinstance(share, float | int):
            raise TypeError(f"{shown(share)} is no share of an expert")
        _figure("share", float(share), 0, 1)
    return tuple(tuple(map(float, group)) for group in found)


def _lists_of(name: str, values: Any) -> list[list[Any]]:
    """Lists of which there are not too many; what is in them is not read."""
    if not isinstance(values, list) or not all(isinstance(one, list) for one in values):
        raise TypeError(f"{name} is {shown(values)}, expected lists")
    at_most(name, values, MAX_EXPERTS)
    if sum(map(len, values)) > MAX_EXPERTS:
        raise ValueError(f"{name} holds too many experts for a layer")
    return values


def layer_tokens(values: Any) -> dict[int, tuple[int, ...]]:
    """Tokens of each expert by layer, from JSON. Raises as `kept_layers` does."""
    found = _by_layer(values, "tokens", "numbers of tokens")
    return {layer_number(key): tuple(map(_token_count, tokens)) for key, tokens in found.items()}


def _by_layer(values: Any, name: str, what: str) -> dict[str, list[Any]]:
    """Lists by layer of which there are not too many; what is in them is not read."""
    if not isinstance(values, dict):
        raise TypeError(f"{name} is {shown(values)}, expected {what} by layer")
    at_most(name, values, MAX_LAYERS + 1)
    if not all(isinstance(found, list) for found in values.values()):
        raise TypeError(f"{name} holds something else than lists of {what}")
    if (count := sum(map(len, values.values()))) > MAX_EXPERTS_OF_ALL_LAYERS:
        raise ValueError(
            f"{name} holds {count:,} {what}, expected at most {MAX_EXPERTS_OF_ALL_LAYERS:,}"
        )
    return values


def _token_count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MOST_TOKENS:
        raise ValueError(f"{shown(value)} is not a number of tokens")
    return value


def layer_number(key: str) -> int:
    """The number of a layer as JSON has it. Raises ValueError for other texts."""
    # int() also takes "-1", "1_0", " 1" and digits of other scripts
    if not _LAYER.fullmatch(key) or int(key) > MAX_LAYERS:
        raise ValueError(f"{shown(key)} is not the number of a layer")
    return int(key)


def _expert_id(value: Any) -> int:
    if type(value) is not int or not 0 <= value < MAX_EXPERTS:
        raise ValueError(f"{shown(value)} is not an expert id")
    return value


def at_most(name: str, values: Sized, most: int) -> None:
    """Raise ValueError for more than `most` values."""
    if len(values) > most:
        raise ValueError(f"{name} holds {len(values):,} values, expected at most {most:,}")


def check_bounds(manifest: Manifest) -> None:
    """Raise ValueError for a number that no bundle can have, such as no experts or no files."""
    _check_pruning(manifest.pruning)
    _check_source(manifest.source, manifest.pruning)
    _check_files(manifest)
    _check_calibration(manifest.calibration)
    _check_importance_of(manifest)
    if manifest.evaluation is not None:
        _check_evaluation(manifest.evaluation)
    if manifest.choice is not None:
        _check_choice(manifest.choice)


def _check_pruning(pruning: PruningRecord) -> None:
    mtp = pruning.mtp
    _within("n_experts", pruning.n_experts, 1, MAX_EXPERTS)
    _within("n_kept", pruning.n_kept, 1, pruning.n_experts)
    _within("experts_per_token", pruning.experts_per_token, 1, pruning.n_kept)
    _within("n_dropped_rows", pruning.n_dropped_rows, 0, pruning.n_rows)
    for name in ("hits_before", "hits_after"):
        _within(name, getattr(mtp, name), 0, mtp.n_tokens)
    if pruning.coverage is not None:
        _check_coverage(pruning.coverage)
    if mtp.state not in MTP_STATES:
        raise ValueError(f"mtp is {shown(mtp.state)}, expected one of {', '.join(MTP_STATES)}")
    check_kept("kept", pruning.kept, pruning.n_experts)
    if pruning.repair is not None:
        _check_repair(pruning.repair, pruning.kept)
    if pruning.merge is not None:
        _check_merge(pruning.merge, pruning)


def _check_source(source: SourceRecord, pruning: PruningRecord) -> None:
    if (earlier := source.earlier) is not None:
        _within("n_experts of the original", earlier.n_experts, pruning.n_experts, MAX_EXPERTS)
        check_kept("kept of the original", earlier.kept, earlier.n_experts)
    if (origin := source.gguf) is not None:
        _within("n_parameters of what is left", origin.n_parameters, 1, source.n_parameters)


def _check_files(manifest: Manifest) -> None:
    """Files in either folder; pruned safetensors are there unless the source is a GGUF file."""
    pruning, hf = manifest.pruning, manifest.hf
    if not manifest.gguf:
        raise ValueError("gguf is empty, expected the record of at least one file")
    for side in manifest.side_files:
        at_most("tensors", side.tensors, _MOST_TENSORS)
    for file in manifest.gguf:
        at_most("tensors", file.tensors, _MOST_TENSORS)
        at_most("parts", file.parts, MOST_FILES)
        if not 0 < file.bits_per_weight <= _MOST_BITS:
            raise ValueError(
                f"bits_per_weight is {shown(file.bits_per_weight)}, expected more than 0 and at "
                f"most {_MOST_BITS}"
            )
    if manifest.source.gguf is not None and hf is not None:
        raise ValueError("hf is a record, expected null: the source is a GGUF file")
    if hf is not None:
        _within("n_shards", hf.n_shards, 1, MOST_FILES)
    elif pruning.n_kept < pruning.n_experts and manifest.source.gguf is None:
        raise ValueError("hf is null, expected the record of the pruned safetensors")
    for file in manifest.gguf:
        most = 0 if manifest.source.gguf is None else len(file.tensors)
        _within("source_blocks", file.source_blocks, 0, most)


def _check_importance_of(manifest: Manifest) -> None:
    """What is said of the importance matrix, and of the experts that it was cut to."""
    calibration, pruning = manifest.calibration, manifest.pruning
    if calibration.imatrix_text_chunks:
        n_chunks = calibration.imatrix_chunks or 0
        _within("imatrix_chunks", n_chunks, 0, calibration.imatrix_text_chunks)
    _within("imatrix_unseen", calibration.imatrix_unseen, 0, MAX_EXPERTS_OF_ALL_LAYERS)
    if calibration.imatrix_coverage is not None:
        if not manifest.has_imatrix:
            raise ValueError("imatrix_coverage is of an unknown importance matrix, expected null")
        _check_importance(calibration.imatrix_coverage, calibration.imatrix_unseen)
    if (cut_from := calibration.imatrix_cut_from) is not None:
        if calibration.imatrix_file is None or not pruning.n_kept < pruning.n_experts:
            raise ValueError(f"imatrix_cut_from is {cut_from}, expected null: no matrix was cut")
        _within("imatrix_cut_from", cut_from, pruning.n_experts, pruning.n_experts)


def _check_repair(repair: RepairRecord, kept: Mapping[int, Sequence[int]]) -> None:
    if repair.kind not in _REPAIR_KINDS:
        raise ValueError(f"repair is {shown(repair.kind)}, expected ridge or scale")
    if not repair.layers or not repair.layers.keys() <= kept.keys():
        raise ValueError("repair names other layers than those whose experts were pruned")
    for layer, one in repair.layers.items():
        _figure("error_before", one.error_before, 0)
        _figure("error_after", one.error_after, 0, one.error_before)
        if one.alpha is not None:
            _figure("alpha", one.alpha, 0)
        if not _SHA256.fullmatch(one.sha256) if one.alpha is not None else one.sha256:
            raise ValueError(f"sha256 of layer {layer} of the repair is {shown(one.sha256)}")


def _check_merge(merge: MergeRecord, pruning: PruningRecord) -> None:
    """Every expert of a layer is in one group, which begins with the one that stays."""
    if merge.method not in MERGING or merge.method != pruning.method:
        raise ValueError(f"merge is by {shown(merge.method)}, expected {pruning.method}")
    if pruning.repair is not None:
        raise ValueError("repair and merge are both recorded, expected one of them")
    if not merge.layers or not merge.layers.keys() <= pruning.kept.keys():
        raise ValueError("merge names other layers than those whose experts were pruned")
    for layer, one in merge.layers.items():
        members = sorted(expert for group in one.groups for expert in group)
        first = [group[0] for group in one.groups if group]
        if members != list(range(pruning.n_experts)) or first != list(pruning.kept[layer]):
            raise ValueError(f"merge: the groups of layer {layer} do not fit the kept experts")
        if [*map(len, one.groups)] != [*map(len, one.shares)]:
            raise ValueError(f"merge: layer {layer} has other shares than experts")
        if not _SHA256.fullmatch(one.sha256):
            raise ValueError(f"sha256 of layer {layer} of the merge is {shown(one.sha256)}")


def _check_calibration(calibration: CalibrationRecord) -> None:
    """What is said of an importance matrix is said as a whole."""
    said = (
        calibration.imatrix_text,
        calibration.imatrix_chunks,
        calibration.imatrix_chunk_size,
    )
    if said.count(None) not in (0, len(said)):
        raise ValueError("imatrix_text, imatrix_chunks and imatrix_chunk_size are not all known")
    more = calibration.imatrix_file, calibration.imatrix_sha256
    if None in said and more != (None, None):
        raise ValueError("imatrix_file or imatrix_sha256 is known of an unknown importance matrix")
    if None not in said and more == (None, None):
        raise ValueError("imatrix_sha256 is null, expected the hash of the calibration text")


def _check_evaluation(evaluation: Evaluation) -> None:
    """Figures that cards and pictures can show; every variant and comparison is there once."""
    for variant in evaluation.variants:
        _within("n_experts", variant.n_experts, 1, MAX_EXPERTS)
        _figure("bits_per_weight", variant.bits_per_weight, 0, _MOST_BITS)
        _estimated("perplexity", variant.perplexity, 0, LARGEST_PERPLEXITY)
    for one in evaluation.comparisons:
        _check_divergence(one.divergence)
    for task in evaluation.tasks:
        _estimated("score", task.score, -_LARGEST_FIGURE)
    for speed in evaluation.speeds:
        _estimated("tokens_per_second", speed.tokens_per_second, 0)
    _once("variant", [one.name for one in evaluation.variants])
    _once("comparison", [(one.variant, one.reference) for one in evaluation.comparisons])
    _once("score", [(one.task, one.variant, one.metric) for one in evaluation.tasks])


def _check_choice(choice: ChoiceRecord) -> None:
    """Figures of candidates that cards can show."""
    for text in filter(None, (choice.held_out, choice.other)):
        _estimated("perplexity", text.perplexity, 0, LARGEST_PERPLEXITY)
    for one in choice.candidates:
        for figures in filter(None, (one.held_out, one.other)):
            _estimated("perplexity", figures.perplexity, 0, LARGEST_PERPLEXITY)
            _estimated("divergence", figures.divergence, -1)
            _estimated("behind", figures.behind, -1)


def _check_divergence(found: Divergence) -> None:
    # the mean is a sum of rounded numbers, so it may be just below 0
    for name in ("mean", "median", "p90", "p99", "p999"):
        _estimated(name, getattr(found, name), -1)
    _figure("maximum", found.maximum, -1)
    _estimated("same_top", found.same_top, 0, 1)
    _estimated("rms_probability", found.rms_probability, 0, 1)
    _estimated("perplexity_ratio", found.perplexity_ratio, 0, LARGEST_PERPLEXITY)


def _estimated(name: str, found: Estimate, low: float, high: float | None = None) -> None:
    _figure(name, found.value, low, high)
    most = LARGEST_PERPLEXITY if high == LARGEST_PERPLEXITY else None
    _figure(f"the error of {name}", found.error, 0, most)


def _figure(name: str, value: float, low: float, high: float | None = None) -> None:
    high = _LARGEST_FIGURE if high is None else high
    if not low <= value <= high:
        raise ValueError(f"{name} is {shown(value)}, expected a number from {low:g} to {high:g}")


def _once(what: str, keys: Sequence[object]) -> None:
    if len(set(keys)) < len(keys):
        raise ValueError(f"evaluation has the same {what} twice")


def _check_coverage(coverage: CoverageRecord) -> None:
    _within("fewest", coverage.fewest, 0, coverage.median)
    _within("n_thin", coverage.n_thin, 0, MAX_EXPERTS_OF_ALL_LAYERS)
    _within("n_unseen", coverage.n_unseen, 0, coverage.n_thin)
    _within("n_thin_kept", coverage.n_thin_kept, 0, coverage.n_thin)
    _within("n_unseen_kept", coverage.n_unseen_kept, 0, coverage.n_unseen)


def _check_importance(found: ImportanceRecord, n_unseen: int) -> None:
    """The tokens of an importance matrix, counted as they are; a layer has some experts."""
    if not all(found.tokens.values()):
        raise ValueError("tokens holds a layer without experts")
    every = [count for tokens in found.tokens.values() for count in tokens]
    if not every:
        raise ValueError("tokens is empty, expected those of each expert")
    for name, value, expected in (
        ("fewest", found.fewest, min(every)),
        ("median", found.median, int(median(every))),
        ("n_few", found.n_few, sum(count < found.few_below for count in every)),
        ("n_unseen", found.n_unseen, sum(count == 0 for count in every)),
        ("imatrix_unseen", n_unseen, sum(count == 0 for count in every)),
    ):
        if value != expected:
            raise ValueError(f"{name} is {shown(value)}, expected {expected:,} by the tokens")


def check_sizes(values: Mapping[str, Any]) -> None:
    """Raise ValueError for a manifest, as JSON, with more records than a bundle can have.

    Before any record is made: those of a million files would take minutes.
    """
    for name, most, found in _lists(values):
        if isinstance(found, Sized):
            at_most(name, found, most)


def _lists(values: Mapping[str, Any]) -> Iterator[tuple[str, int, Any]]:
    yield "gguf", _MOST_RECORDS, values["gguf"]
    yield "side_files", _MOST_RECORDS, values["side_files"]
    if values["hf"] is not None:
        yield "files", MOST_FILES, values["hf"]["files"]
    yield "components", _MOST_RECORDS, values["calibration"]["components"]
    yield "inputs", MOST_FILES, (values.get("options") or {}).get("inputs", ())


def check_kept(name: str, kept: Mapping[int, Sequence[int]], n_experts: int) -> None:
    """Raises ValueError if an expert is none of `n_experts`."""
    for layer, ids in kept.items():
        if ids and max(ids) >= n_experts:
            raise ValueError(
                f"{name} has expert {max(ids)} in layer {layer}, expected numbers below {n_experts}"
            )


def _within(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {shown(value)}, expected a number from {low:,} to {high:,}")
