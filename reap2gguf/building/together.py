"""Stages that overlap: the sweep in the calling thread, each other one in a thread beside it.

All stages are opened in their order before any of them computes, so that what one undoes is undone
before the next one begins. Then they run, and each waits where it needs what another one makes. A
kill leaves each stage as if it had run alone: those that were not finished are resumed.

The sweep keeps its memory: stages run beside it only as far as they fit into what it leaves, and
after it if they do not. With one thread, or where the disk has too little space for the GGUF files
beside what the sweep keeps there, stages run one after the other.

Memory: the sweep's budget; without a sweep, the sum of what the stages hold (`Stage.held_bytes`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from reap2gguf.stoppable import Stopped

if TYPE_CHECKING:
    from reap2gguf.building.stage import Run, Stage
    from reap2gguf.observing.sweep_plan import HasRoom


def do_together(run: Run, leader: Stage[Any], *others: Stage[Any]) -> None:
    """Compute stages, or find them done: `leader` in this thread, and others beside it.

    All processes of torchrun call this, and those that are not the first take part in `leader`
    alone. Raises the first error of any stage, when all others have stopped.
    """
    if not run.is_first:
        run.do(leader)
        run.dismiss()
        return
    names = [one.name for one in run.order]
    stages = sorted([leader, *others], key=lambda stage: names.index(stage.name))
    if _one_by_one(run):
        for stage in stages:
            run.do(stage)
            if stage is leader:
                run.dismiss()
        return
    _beside(run, stages, leader)


def do_after(run: Run, *stages: Stage[Any]) -> None:
    """The same in the first process alone, for stages that follow the sweep."""
    if _one_by_one(run):
        for stage in stages:
            run.do(stage)
    else:
        _beside(run, stages, None)


def _one_by_one(run: Run) -> bool:
    return run.plan.options.compute.threads == 1 or not run.room.overlaps


def _beside(run: Run, stages: Sequence[Stage[Any]], leader: Stage[Any] | None) -> None:
    found = [stage for stage in stages if run.open(stage)]
    run.joint.begin([stage.name for stage in found])
    _Threads(run, [stage for stage in found if stage is not leader], leader is not None).work(
        leader if leader in found else None
    )


class _Threads:
    """The threads of stages that run beside the leader."""

    def __init__(self, run: Run, stages: Sequence[Stage[Any]], has_others: bool) -> None:
        """`has_others`: the other processes of torchrun have not been dismissed yet."""
        self._run = run
        self._has_others = has_others
        self._waiting = deque(stages)  # to be started, in this order
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def work(self, leader: Stage[Any] | None) -> None:
        """Run all stages; raises the first error when no thread is left."""
        try:
            if leader is not None:
                leader.beside = self._start
                self._compute(leader)
            if self._has_others:
                self._run.dismiss()
            self._start(lambda n_bytes: True)
            self._run.joint.wait(self._run.joint.running)
        except BaseException as error:  # noqa: BLE001 - the first is raised by `work`
            self._fail(error)
        is_failed = bool(self._errors)
        # a thread that waits for a download would not hear of the end
        with self._run.plan.checkpoint.without_fetching() if is_failed else nullcontext():
            for thread in self._threads:
                if thread.ident is not None:  # it could be started
                    thread.join()
        if self._errors:
            raise _first(self._errors)

    def _start(self, has_room: HasRoom) -> None:
        """Start the stages that wait, as far as there is room for them together."""
        held = 0
        while self._waiting and has_room(held + self._waiting[0].held_bytes):
            stage = self._waiting.popleft()
            held += stage.held_bytes
            thread = threading.Thread(target=self._compute_beside, args=(stage,), name=stage.name)
            self._threads.append(thread)
            thread.start()

    def _compute_beside(self, stage: Stage[Any]) -> None:
        try:
            stage.wait_for(*stage.after)
            self._compute(stage)
        except BaseException as error:  # noqa: BLE001 - the first is raised by `work`
            self._fail(error)

    def _compute(self, stage: Stage[Any]) -> None:
        self._run.compute(stage)
        self._run.joint.end(stage.name)

    def _fail(self, error: BaseException) -> None:
        self._errors.append(error)
        self._run.joint.stop()


def _first(errors: Sequence[BaseException]) -> BaseException:
    """The error that the others follow from."""
    causes = [one for one in errors if not isinstance(one, Stopped | CancelledError)]
    return causes[0] if causes else errors[0]
