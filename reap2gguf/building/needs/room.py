"""The check of a build that starts: a device, and disk space, before anything is read."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

from reap2gguf.atomic import output_errors
from reap2gguf.building.exact import tokens_at_most
from reap2gguf.building.needs.amount import most_of
from reap2gguf.building.needs.disk import DiskNeeds, disk_needs
from reap2gguf.building.needs.machine import this_machine
from reap2gguf.building.needs.memory import (
    change_needs,
    choosing_needs,
    evaluation_needs,
    sweep_needs,
)
from reap2gguf.building.needs.scoring import planned_chunks
from reap2gguf.building.needs.sizes import Sizes
from reap2gguf.building.workdir import Room
from reap2gguf.errors import OutputError
from reap2gguf.messages import size

if TYPE_CHECKING:
    from reap2gguf.building.plan import Plan
    from reap2gguf.building.workdir import Workdir
    from reap2gguf.options import ComputeOptions
    from reap2gguf.progress import Progress


def check_device(compute: ComputeOptions) -> None:
    """Raise UsageError if a GPU is asked for and torch finds none."""
    if compute.device == "cuda":
        from reap2gguf.observing.sweep_plan import resolve_device

        resolve_device(compute)


def room_needs(plan: Plan) -> DiskNeeds:
    """Upper bounds of the disk space of a build, without a look at its texts."""
    compute, output = plan.options.compute, plan.options.output
    machine = this_machine(compute, output, plan.source.folder)
    if machine.gpu is None:
        machine = replace(machine, device="cpu")
    amount = most_of(plan, tokens_at_most(plan))
    sizes, n_chunks = Sizes(plan), planned_chunks(plan, amount)
    sweeps = sweep_needs(plan, sizes, amount, machine)
    evaluation = evaluation_needs(plan, sizes, n_chunks, machine)
    choosing = choosing_needs(plan, sizes, amount, machine)
    repairing = change_needs(plan, sizes, amount, machine)
    return disk_needs(plan, amount, sweeps, evaluation, choosing, repairing)


def check_room(plan: Plan, work: Workdir, progress: Progress) -> Room:
    """What the disk also has space for.

    Raises OutputError with the numbers if it does not even have space for the build. What an
    interrupted build left counts as written.
    """
    needs = room_needs(plan)
    if plan.options.check_space:
        work.check_room(needs.room_bytes)
        _check_cache(plan, work, needs.room_bytes)
    room = work.free_bytes() + work.written_bytes()
    keeps_states = room >= needs.room_bytes + needs.state_bytes
    if not keeps_states:
        progress.note(
            f"not enough disk space to save progress between layers ({size(needs.state_bytes)} "
            "more needed); an interrupted calibration pass restarts from layer 0"
        )
    keeps_beside = keeps_states and room >= needs.overlapping_bytes
    # on a GPU the second pass is short: what a kill would lose is less than what waiting costs
    is_short = plan.options.compute.likely_device == "cuda"
    has_room = room >= needs.overlapping_bytes - needs.states_bytes
    overlaps = keeps_beside or (is_short and has_room)
    if keeps_states and overlaps and not keeps_beside:
        progress.note(
            "the importance pass saves no progress between layers: the disk has no space for it "
            "beside the files that are written meanwhile"
        )
    return Room(keeps_states, overlaps, keeps_beside)


def _check_cache(plan: Plan, work: Workdir, n_bytes: int) -> None:
    """OutputError if the Hub's cache has no space for the weights that are not fetched yet."""
    unfetched, cache = plan.checkpoint.unfetched_bytes, plan.source.folder
    if not unfetched:
        return
    with output_errors(cache):
        free = shutil.disk_usage(cache).free
        is_shared = cache.stat().st_dev == work.output.stat().st_dev
    wanted = unfetched + (n_bytes - work.written_bytes() if is_shared else 0)
    if wanted > free:
        besides = " and the build writes its files there too" if is_shared else ""
        raise OutputError(
            f"{cache}: {unfetched:,} bytes of weights are not downloaded yet{besides}; "
            f"{wanted:,} bytes are needed on that disk, and {free:,} are free; free space, set "
            "HF_HOME to a folder on another disk, or pass --no-space-check"
        )
