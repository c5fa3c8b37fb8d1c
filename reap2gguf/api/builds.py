"""Whole builds: plan, estimate, build and verify."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.api.opening import PathLike, ProgressLike, to_progress
from reap2gguf.errors import UsageError
from reap2gguf.files import is_gguf
from reap2gguf.options import (
    DEVICES,
    AddOptions,
    BuildOptions,
    CheckQuants,
    ComputeOptions,
    check_bool,
    check_choice,
    check_path,
    check_quants_of,
    check_threads,
)
from reap2gguf.progress import working
from reap2gguf.quantizing.named import check_labels

if TYPE_CHECKING:
    from reap2gguf.building.needs.estimate import Estimate
    from reap2gguf.building.plan import Plan
    from reap2gguf.building.stage import BuildResult
    from reap2gguf.progress import Progress
    from reap2gguf.verifying.context import Strictness
    from reap2gguf.verifying.report import VerifyReport


def plan(options: BuildOptions, *, progress: ProgressLike = None) -> Plan:
    """Decide what `build` will do, from headers alone.

    Weights are read only where the config says that the output matrix is the embedding and
    `lm_head.weight` is stored as well: the two are compared.

    Raises SourceError, CheckpointError, UnsupportedModelError, RecipeError, CalibrationError or
    UsageError.
    """
    reports = to_progress(progress)
    with working(reports, f"Reading {options.model or 'the example'}"):
        from reap2gguf.building.plan import make_plan

        return make_plan(options, reports.note)


def estimate(
    options: BuildOptions | Plan, *, gpu: str | None = None, progress: ProgressLike = None
) -> Estimate:
    """What a build needs: disk, memory and the time of each stage, on this machine.

    With `gpu`, on a usual rented machine with such a GPU: L4, L40S, A100-80GB, H100 or H200. What
    an earlier build left is subtracted on this machine. Small texts are tokenized, and the first
    call measures the machine; together that takes about a second. Raises what `plan` raises, and
    UsageError for another GPU.
    """
    from reap2gguf.building.needs.estimate import estimate as of_plan
    from reap2gguf.building.needs.estimate import rented_estimate
    from reap2gguf.building.needs.reuse import find_reused

    decided = plan(options, progress=progress) if isinstance(options, BuildOptions) else options
    reused = find_reused(decided)
    return of_plan(decided, reused) if gpu is None else rented_estimate(decided, reused, gpu)


def build(options: BuildOptions | Plan, *, progress: ProgressLike = None) -> BuildResult | None:
    """Prune, quantize, verify and bundle a model; an interrupted build is resumed.

    Returns None in a process of torchrun that is not the first. Raises what `plan` raises,
    OutputError, ObservationError, and VerificationError if what was written differs from the plan.
    """
    from reap2gguf.building.pipeline import build as run

    decided = plan(options, progress=progress) if isinstance(options, BuildOptions) else options
    return run(decided, to_progress(progress))


def options_like(bundle: PathLike, **changes: Any) -> BuildOptions:
    """The options that an earlier bundle was built with; `changes` are fields to set otherwise.

    `bundle` is its folder or its reap2gguf.json. A model on the Hub is taken at its commit; a local
    one, and local texts, are taken from the current folder or have to be among the changes.
    Raises ArtifactError if it records no options, UsageError if an input is missing.
    """
    from reap2gguf.building.likeness import read_likeness

    return read_likeness(check_path("bundle", bundle)).build_options(**changes)


def add(
    bundle: PathLike,
    *files: PathLike,
    recipes: str | Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
    source: PathLike | None = None,
    exact: bool = False,
    threads: int | None = None,
    device: str = "auto",
    check_quants: CheckQuants | str = CheckQuants.SAMPLE,
    progress: ProgressLike = None,
) -> BuildResult:
    """Add GGUF files to a finished bundle; nothing is observed, pruned or swept again.

    One file is written for each recipe, from the bundle's own safetensors and importance matrix.
    `files` are GGUF files of the same model, which are verified and then taken over as they are.
    A bundle without safetensors needs `source`, the MODEL that it was made from.
    `exact` quantizes what was written again and compares the bytes. `device` is what quantizes:
    "cpu", "cuda", or "auto", a GPU if there is one and much to do. `check_quants` says how much of
    what the compiled kernels quantize is compared with libggml's bytes while it is written: "all",
    "sample" (one super-block in a thousand) or "none". Raises UsageError if it is not a bundle or
    a GPU is asked for and there is none, RecipeError, OutputError, and VerificationError if a file
    of the bundle is not as it was built, or a new one is wrong: then the bundle is as it was.
    """
    from reap2gguf.building.add import add as run

    paths = tuple(check_path("files", path) for path in files)
    where = check_path("bundle", bundle)
    compute = ComputeOptions(
        device, threads=check_threads(threads), check_quants=check_quants_of(check_quants)
    )
    given = (recipes,) if isinstance(recipes, str) else tuple(recipes)
    model = None if source is None else str(source)
    options = AddOptions(
        where,
        given,
        paths,
        check_labels(labels or {}),
        model,
        exact,
        compute,
    )
    return run(options, to_progress(progress))


def make_bundle(
    folder: PathLike,
    *files: PathLike,
    source: PathLike | None = None,
    imatrix: PathLike | None = None,
    observations: PathLike | None = None,
    text: PathLike | None = None,
    output: PathLike = "build",
    name: str | None = None,
    labels: Mapping[str, str] | None = None,
    threads: int | None = None,
    progress: ProgressLike = None,
) -> BuildResult:
    """Make a bundle of what `prune`, `quantize`, `imatrix` and `observe` made, after verifying it.

    `folder` is one that `prune` wrote, with `source`, the MODEL that it was made from; or a model
    that was not pruned. `files` are GGUF files of it. Files are linked into the bundle, and stay
    where they are. Raises UsageError, ArtifactError for a part of another model, VerificationError
    for a file that does not hold what it should, OutputError, and what opening a model raises.
    """
    from reap2gguf.building.bundle_options import BundleOptions
    from reap2gguf.building.bundling import bundle as run

    options = BundleOptions(
        check_path("folder", folder),
        tuple(check_path("files", path) for path in files),
        None if source is None else str(source),
        None if imatrix is None else check_path("imatrix", imatrix),
        None if observations is None else check_path("observations", observations),
        None if text is None else check_path("text", text),
        check_path("output", output),
        name,
        check_labels(labels or {}),
        check_threads(threads),
    )
    return run(options, to_progress(progress))


def verify(
    *paths: PathLike,
    source: PathLike | None = None,
    exact: bool = False,
    device: str = "auto",
    threads: int | None = None,
    progress: ProgressLike = None,
) -> VerifyReport:
    """Check a bundle, or a safetensors folder and GGUF files made from it.

    GGUF files alone are compared with the GGUF file that they were made from, the `source`; with
    none, only their headers are checked, and that all values are finite.
    With `source`, the MODEL that was pruned, a bundle is compared with it byte for byte. Types
    that compiled kernels make quickly are quantized again and compared by bytes; with `exact` all
    types must have the bytes that are made again, which takes as long as the export did. `device`
    is auto, cpu or cuda; auto quantizes on a GPU for much work only. The report lists what is
    wrong, how strictly each file was compared, and what could not be checked. Raises UsageError if
    the paths are neither, and what opening a model raises for `source`.
    """
    from reap2gguf.verifying.bundle import verify_paths
    from reap2gguf.verifying.context import Strictness

    check_bool("exact", exact)
    check_choice("device", device, DEVICES)
    given, n_threads = [check_path("path", path) for path in paths], check_threads(threads)
    reports = to_progress(progress)
    if source is None and given and all(os.path.isfile(path) and is_gguf(path) for path in given):
        from reap2gguf.verifying.alone import verify_alone

        return verify_alone(given, n_threads, reports)
    if source is None:
        return verify_paths(given, n_threads, reports, Strictness(exact, device=device))
    from reap2gguf.verifying.opening import open_source

    if not any(path.is_dir() for path in given):
        how = Strictness(exact, device=device), n_threads, reports
        return _verify_files(given, str(source), *how)
    with open_source(str(source), reports) as opened:
        return verify_paths(given, n_threads, reports, Strictness(exact, opened, device=device))


def _verify_files(
    paths: Sequence[Path], source: str, strictness: Strictness, n_threads: int, progress: Progress
) -> VerifyReport:
    """Compare GGUF files with the GGUF file that they were pruned from, or quantized."""
    from reap2gguf.gguf_source.checkpoint import GgufCheckpoint
    from reap2gguf.hub.opened import open_model
    from reap2gguf.verifying.of_gguf import verify_files

    with open_model(source, progress) as opened:
        if not isinstance(opened.checkpoint, GgufCheckpoint):
            raise UsageError(
                f"{source}: is not a GGUF file; with GGUF files alone, expected the GGUF file that "
                "they were made from; or pass a bundle folder, or a safetensors folder and its "
                "GGUF files"
            )
        return verify_files(paths, opened.checkpoint, strictness, n_threads, progress)
