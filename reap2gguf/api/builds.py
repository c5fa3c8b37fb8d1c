"""Whole builds: plan, estimate, build and verify."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reap2gguf.api.opening import PathLike, ProgressLike, to_progress
from reap2gguf.options import BuildOptions, check_bool, check_path, check_threads

if TYPE_CHECKING:
    from reap2gguf.building.needs.estimate import Estimate
    from reap2gguf.building.pipeline import BuildResult
    from reap2gguf.building.plan import Plan
    from reap2gguf.verifying.report import VerifyReport


def plan(options: BuildOptions, *, progress: ProgressLike = None) -> Plan:
    """Decide what `build` will do, from headers alone.

    Weights are read only where the config says that the output matrix is the embedding and
    `lm_head.weight` is stored as well: the two are compared.

    Raises SourceError, CheckpointError, UnsupportedModelError, RecipeError, CalibrationError or
    UsageError.
    """
    from reap2gguf.building.plan import make_plan

    return make_plan(options, to_progress(progress).note)


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


def verify(
    *paths: PathLike,
    source: PathLike | None = None,
    exact: bool = False,
    threads: int | None = None,
    progress: ProgressLike = None,
) -> VerifyReport:
    """Check a bundle, or a safetensors folder and GGUF files made from it.

    With `source`, the MODEL that was pruned, the bundle is compared with it byte for byte. `exact`
    quantizes every tensor again and compares the bytes, which takes as long as the export did. The
    report lists what is wrong, how strictly each file was compared, and what could not be checked.
    Raises UsageError if the paths are neither, and what opening a model raises for `source`.
    """
    from reap2gguf.verifying.bundle import verify_paths
    from reap2gguf.verifying.context import Strictness

    check_bool("exact", exact)
    given, n_threads = [check_path("path", path) for path in paths], check_threads(threads)
    shown = to_progress(progress)
    if source is None:
        return verify_paths(given, n_threads, shown, Strictness(exact))
    from reap2gguf.verifying.against_source import open_source

    with open_source(str(source), shown) as opened:
        return verify_paths(given, n_threads, shown, Strictness(exact, opened))
