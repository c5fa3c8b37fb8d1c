"""Evaluation: what pruning cost and what quantizing cost."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.api.opening import PathLike, ProgressLike, to_progress
from reap2gguf.errors import UsageError
from reap2gguf.evaluating.checks import check_options
from reap2gguf.evaluating.options import EvaluateOptions
from reap2gguf.files import is_plain
from reap2gguf.machine import processes
from reap2gguf.options import ComputeOptions, check_bool, check_path, given_or_new
from reap2gguf.outputs import claimed, drop_states, result_file

if TYPE_CHECKING:
    from reap2gguf.bundle.evaluation import Evaluation
    from reap2gguf.bundle.manifest import Manifest
    from reap2gguf.evaluating.opening import OpenVariants
    from reap2gguf.progress import Progress


def evaluate(
    model: PathLike,
    *variants: PathLike,
    source: PathLike | None = None,
    options: EvaluateOptions | None = None,
    output: PathLike | None = None,
    overwrite: bool = False,
    update: bool = False,
    compute: ComputeOptions | None = None,
    follow_links: bool = False,
    progress: ProgressLike = None,
) -> Evaluation:
    """Measure a model and its variants: on a text, on tasks, and by what llama.cpp says.

    `model` is a bundle, or the MODEL that `variants` were made from: pruned folders and GGUF files.
    With a bundle, its folder and files are the variants, and `source` is the MODEL that was pruned;
    None takes it from the Hub, if the bundle names it there. `options` say what is measured: by
    default perplexity and KL divergence on a text, in one pass over the layers of all variants.
    `output` is a JSON file to write; with it, an interrupted call resumes from what is kept beside
    it, in files whose names begin with `OUTPUT.state`. With `update`, the figures get into the
    bundle's manifest and cards, in place of earlier ones; what is not measured again stays there.

    Raises EvaluationError, CalibrationError, UsageError, OutputError, also if the output exists and
    is not to be overwritten, ArtifactError, DependencyError, and what opening a model raises.
    """
    check_bool("follow_links", follow_links)
    check_bool("update", update)
    options = given_or_new("options", options, EvaluateOptions)
    compute = given_or_new("compute", compute, ComputeOptions)
    target = None if output is None else check_path("output", output)
    given = [check_path("variant", path) for path in variants]
    is_first = processes().is_first
    if target is not None and is_first:
        _check_output(target, [model, *given, *([] if source is None else [source])], options)
    check_options(options, target)
    if update and (given or not _is_bundle(model)):
        raise UsageError(f"{model}: not a bundle; update writes into a bundle alone")
    reports = to_progress(progress)
    if update and is_first:
        from reap2gguf.building.measured import check_recordable

        check_recordable(Path(model).expanduser(), compute, reports)
    with ExitStack() as stack:
        stack.enter_context(claimed([target], overwrite))
        opened = _open(stack, model, given, source, follow_links, reports)
        found = _measured(opened, options, compute, target)
        if update and is_first:
            _record(Path(model).expanduser(), found, opened, compute)
        if target is not None and is_first:
            found.save(target)
            drop_states(target)
    return found


def _measured(
    opened: OpenVariants, options: EvaluateOptions, compute: ComputeOptions, target: Path | None
) -> Evaluation:
    from reap2gguf.evaluating.whole import WholeEvaluation

    tokenizer, progress = opened.tokenizer, opened.progress
    assert tokenizer is not None
    return WholeEvaluation(opened.variants, tokenizer, options, compute, target, progress).run()


def _record(bundle: Path, found: Evaluation, opened: OpenVariants, compute: ComputeOptions) -> None:
    """Write the figures into the bundle's manifest and cards."""
    from reap2gguf.building.measured import record_evaluation

    first = opened.variants[0]
    record_evaluation(bundle, found, (first.weights, first.model), compute, opened.progress)


def _check_output(target: Path, models: Sequence[PathLike], options: EvaluateOptions) -> None:
    """Raise UsageError if the output is an input, or lies in a folder of a bundle."""
    result_file(target, models, options.text)
    if _is_bundle(target.parent):
        raise UsageError(
            f"output {target}: is in a folder of a bundle, whose files are all verified; pass "
            "another output"
        )


def _is_bundle(model: PathLike) -> bool:
    from reap2gguf.bundle.layout import MANIFEST_FILE

    return is_plain(Path(model).expanduser() / MANIFEST_FILE)


def _open(
    stack: ExitStack,
    model: PathLike,
    variants: Sequence[Path],
    source: PathLike | None,
    follow_links: bool,
    progress: Progress,
) -> OpenVariants:
    """Open all that is to be evaluated. Raises UsageError if it cannot be told what is what."""
    from reap2gguf.evaluating.opening import OpenVariants

    opened = OpenVariants(stack, progress)
    if _is_bundle(model) and not variants:
        _open_bundle(opened, Path(model).expanduser(), source, follow_links)
        return opened
    if source is not None:
        raise UsageError(
            "source is for a bundle; pass the MODEL that was pruned first, and then its variants"
        )
    opened.source(str(model), follow_links)
    for path in variants:
        if path.is_dir():
            opened.folder(path)
        else:
            opened.gguf(path)
    return opened


def _open_bundle(
    opened: OpenVariants, folder: Path, source: PathLike | None, follow_links: bool
) -> None:
    from reap2gguf.bundle.opening import open_bundle

    bundle = open_bundle(folder)
    manifest = bundle.manifest
    if source is not None:
        opened.source(str(source), follow_links)
    elif (name := manifest.source.at_commit) is not None:
        opened.source(name)
    elif bundle.hf is None:
        raise UsageError(
            f"{folder}: holds GGUF files alone; pass the model that they were made from as --source"
        )
    else:
        opened.progress.note(
            f"{manifest.source.label} is not on the Hub; pass it as --source to measure what "
            "pruning cost"
        )
    if bundle.hf is not None:
        opened.folder(bundle.hf)
    elif _is_quantized(manifest, opened):
        kept = {layer: tuple(ids) for layer, ids in manifest.pruning.kept.items()}
        opened.sliced(kept, manifest.pruning.mtp.state != "dropped")
    for record in manifest.gguf:
        opened.gguf(bundle.gguf / record.first, record.file)


def _is_quantized(manifest: Manifest, opened: OpenVariants) -> bool:
    """Whether a bundle without safetensors has files that are not just the source's blocks.

    Then they are compared with the source without the experts that were removed, too.
    """
    if manifest.pruning.n_kept == manifest.pruning.n_experts:
        return False
    is_sliced = all(one.source_blocks == len(one.tensors) for one in manifest.gguf)
    return not is_sliced or opened.variants[0].weights.gguf is None
