"""Evaluation: what pruning cost and what quantizing cost."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.api.opening import PathLike, ProgressLike, to_progress
from reap2gguf.errors import UsageError
from reap2gguf.files import is_plain
from reap2gguf.machine import processes
from reap2gguf.options import (
    ComputeOptions,
    Resume,
    check_bool,
    check_number,
    check_path,
    given_or_new,
)
from reap2gguf.outputs import drop_states, output_file
from reap2gguf.progress import working

if TYPE_CHECKING:
    from reap2gguf.bundle.evaluation import Evaluation
    from reap2gguf.evaluating.opening import OpenVariants
    from reap2gguf.evaluating.texts import EvaluationText
    from reap2gguf.progress import Progress


def evaluate(
    model: PathLike,
    *variants: PathLike,
    source: PathLike | None = None,
    text: str = "held-out",
    chunk: int = 512,
    chunks: int | None = None,
    output: PathLike | None = None,
    compute: ComputeOptions | None = None,
    follow_links: bool = False,
    progress: ProgressLike = None,
) -> Evaluation:
    """Measure a model and its variants on a text, all of them in one pass over the layers.

    `model` is a bundle, or the MODEL that `variants` were made from: pruned folders and GGUF files.
    With a bundle, its folder and files are the variants, and `source` is the MODEL that was pruned;
    None takes it from the Hub, if the bundle names it there. `text` is `held-out` (shipped),
    `wikitext2` (from the Hub) or a file, of which the first `chunks` chunks of `chunk` tokens are
    scored, as by llama-perplexity. `output` is a JSON file to write; with it, an interrupted call
    resumes from the layer that `OUTPUT.state` holds.

    Raises EvaluationError, CalibrationError, UsageError, OutputError, ArtifactError, and what
    opening a model raises.
    """
    check_bool("follow_links", follow_links)
    check_number("chunk", chunk, 8)
    if chunks is not None:
        check_number("chunks", chunks, 2)
    compute = given_or_new("compute", compute, ComputeOptions)
    target = None if output is None else check_path("output", output)
    if target is not None and processes().is_first:
        output_file(target)
    given = [check_path("variant", path) for path in variants]
    shown = to_progress(progress)
    with ExitStack() as stack:
        opened = _open(stack, model, given, source, follow_links, shown)
        from reap2gguf.evaluating import texts
        from reap2gguf.evaluating.engine import evaluate_variants
        from reap2gguf.evaluating.measure import evaluation_of_scores
        from reap2gguf.evaluating.opening import pairs_of
        from reap2gguf.tokenizer.tokenizer import Tokenizer

        label, content = texts.read_text(str(text), shown.note)
        first = opened.variants[0].model.facts
        with working(shown, f"Reading {label}"):
            assert opened.tokenizer is not None
            tokenizer = Tokenizer(opened.tokenizer)
            size = min(chunk, first.context_length)
            cut = texts.cut_text(label, content, tokenizer, first.vocab_size, size, chunks)
        if target is not None:
            compute = _resuming(compute, target, opened, cut)
        every = opened.variants
        scores = evaluate_variants(every, cut.rows, pairs_of(every), compute, shown)
        found = evaluation_of_scores(every, cut, scores, compute)
    if target is not None and processes().is_first:
        found.save(target)
        drop_states(target)
    return found


def _open(
    stack: ExitStack,
    model: PathLike,
    variants: Sequence[Path],
    source: PathLike | None,
    follow_links: bool,
    progress: Progress,
) -> OpenVariants:
    """Open all that is to be evaluated. Raises UsageError if it cannot be told what is what."""
    from reap2gguf.bundle.layout import MANIFEST_FILE
    from reap2gguf.evaluating.opening import OpenVariants

    opened = OpenVariants(stack, progress)
    folder = Path(model).expanduser()
    if is_plain(folder / MANIFEST_FILE) and not variants:
        _open_bundle(opened, folder, source, follow_links)
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
    elif manifest.source.revision is not None:
        opened.source(f"{manifest.source.label}@{manifest.source.revision}")
    elif bundle.hf is None:
        raise UsageError(
            f"{folder}: holds GGUF files alone; pass the model that they were made from as source"
        )
    else:
        opened.progress.note(
            f"{manifest.source.label} is not on the Hub; pass it as --source to measure what "
            "pruning cost"
        )
    if bundle.hf is not None:
        opened.folder(bundle.hf)
    for record in manifest.gguf:
        opened.gguf(bundle.gguf / record.first)


def _resuming(
    compute: ComputeOptions, output: Path, opened: OpenVariants, text: EvaluationText
) -> ComputeOptions:
    """Keep the progress of an evaluation that writes `output` beside it."""
    from reap2gguf.artifacts.made_with import COMPUTING, versions
    from reap2gguf.building.keys import stage_key

    what = [(one.name, one.identity) for one in opened.variants]
    key = stage_key(what, text.tokens_sha256, compute.likely_device, compute.likely_dtype)
    path = output.with_name(f"{output.name}.state")
    return replace(compute, scratch=output.parent, resume=Resume(path, key, versions(COMPUTING)))
