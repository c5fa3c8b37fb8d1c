"""A build under way: its plan and folders, and what its stages have cost so far."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

from reap2gguf.atomic import disk_errors_told, remove
from reap2gguf.building.estimate import estimate
from reap2gguf.building.keys import BuildKeys, sweep_key
from reap2gguf.building.plan import Plan
from reap2gguf.building.workdir import Workdir
from reap2gguf.errors import OutputError
from reap2gguf.machine import peak_bytes, processes
from reap2gguf.options import ComputeOptions, Resume
from reap2gguf.progress import Progress
from reap2gguf.pruning.select import Kept


@dataclass(frozen=True)
class StageCost:
    """What a stage took in this run; the peak is the process's so far."""

    name: str
    seconds: float
    peak_bytes: int
    reused: bool = False


@dataclass
class Running:
    """A running build: the plan, its folders, and what the stages have cost so far."""

    plan: Plan
    work: Workdir
    progress: Progress
    keeps_states: bool = True  # whether the disk has room for what a sweep has done
    costs: list[StageCost] = field(default_factory=list)

    @cached_property
    def keys(self) -> BuildKeys:
        return BuildKeys(self.plan)

    def prepare(self) -> None:
        """Make the folders, or find those of an interrupted build of the same source.

        Of a model on the Hub, the small files that travel with it are fetched before.
        """
        self.plan.source.complete(self.progress.note)
        self.plan.checkpoint.report_to(self.progress)
        source, fingerprint = self.plan.source.label, self.keys.fingerprint
        identity = {"source": source, "fingerprint": fingerprint}
        self.work.prepare(identity, self.plan.options.fresh)

    def check_room(self) -> None:
        """OutputError if the disk has too little room; whether it has enough for states."""
        needs = estimate(self.plan, has_gpu=False)
        if self.plan.options.check_space:
            self.work.check_room(needs.disk_bytes)
            self._check_cache(needs.disk_bytes)
        room = self.work.free_bytes() + self.work.written_bytes()
        self.keeps_states = room >= needs.disk_bytes + needs.state_bytes
        if not self.keeps_states:
            self.progress.note(
                f"with {needs.state_bytes:,} more bytes on the disk, an interrupted sweep would go "
                "on from its last layer; now it begins anew"
            )
        if replaced := self.work.earlier_files():
            names = ", ".join(replaced)
            self.progress.note(f"an earlier build of this name will be replaced: {names}")

    def _check_cache(self, n_bytes: int) -> None:
        """OutputError if the Hub's cache has no room for the weights that are still to come."""
        coming, cache = self.plan.checkpoint.unfetched_bytes, self.plan.source.folder
        if not coming:
            return
        with disk_errors_told(cache):
            free = shutil.disk_usage(cache).free
            is_shared = cache.stat().st_dev == self.work.output.stat().st_dev
        wanted = coming + (n_bytes - self.work.written_bytes() if is_shared else 0)
        if wanted > free:
            besides = " and the build writes the rest of it" if is_shared else ""
            raise OutputError(
                f"{cache}: {coming:,} bytes of weights are still to be fetched{besides}; "
                f"{wanted:,} bytes are needed on that disk, and {free:,} are free; free some, set "
                "HF_HOME to a folder on another disk, or pass --no-space-check"
            )

    @contextmanager
    def stage(self, name: str, reused: bool = False) -> Iterator[None]:
        if reused:
            self.progress.note(f"{name}: done before with the same inputs, reused")
        begun = time.monotonic()
        yield
        seconds = round(time.monotonic() - begun, 2)
        self.costs.append(StageCost(name, seconds, peak_bytes(), reused))

    def drop_states(self, name: str) -> None:
        """Remove what a sweep kept, now that its result is."""
        for file in self.work.root.glob(f"{name}.state*"):
            remove(file)

    def computing(self, name: str, key: str) -> ComputeOptions:
        """How to sweep, and where to keep what is done between layers."""
        resume = Resume(self.work.root / f"{name}.state", sweep_key(key))
        return replace(
            self.plan.options.compute,
            scratch=self.work.root,
            resume=resume if self.keeps_states else None,
        )


def tell_others(word: bool | tuple[str, Kept]) -> None:
    """Say to the processes that follow whether the next sweep takes place."""
    if processes().size > 1:
        from reap2gguf.observing.compute.ranks import join

        join().tell(word)
