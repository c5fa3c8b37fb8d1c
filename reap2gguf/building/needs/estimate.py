"""What a build needs, what this machine has, and how long it takes: the figures of `plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from reap2gguf.building.needs.amount import Amount, amount_of
from reap2gguf.building.needs.disk import DiskNeeds, disk_needs
from reap2gguf.building.needs.machine import Machine, this_machine
from reap2gguf.building.needs.memory import (
    SweepNeeds,
    change_needs,
    choosing_needs,
    evaluation_needs,
    peak_ram,
    sweep_needs,
)
from reap2gguf.building.needs.rented import H100, as_gpu, gpu_factor, rented_machine
from reap2gguf.building.needs.scoring import planned_chunks
from reap2gguf.building.needs.seconds import Host, critical_path, stage_seconds
from reap2gguf.building.needs.sizes import Sizes
from reap2gguf.building.needs.speed import Speed, machine_speed
from reap2gguf.exporting.memory import ExportMemory, export_memory, export_pays_on_gpu
from reap2gguf.messages import duration, size

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import Texts
    from reap2gguf.building.plan import Plan
    from reap2gguf.bundle.manifest import CoverageRecord, ImportanceRecord

# stages
ALL = (
    *("texts", "observe", "weigh", "choose", "merge", "repair", "prune"),
    *("imatrix", "fit", "export", "verify", "evaluate"),
)
LONG = 12 * 3600.0  # seconds; a shorter way is looked for
_FEWER = (512, 256, 128, 64, 32)  # rows
_MENTIONED = 2**30  # bytes of hidden states, at least
_FOR_FILES = 2**31  # bytes of free memory that are not counted on to keep files


@dataclass(frozen=True)
class KnownCoverage:
    """The tokens that experts have before a build begins: by given files, and by earlier runs."""

    observed: CoverageRecord | None = None  # by which experts are ranked
    observed_lines: tuple[str, ...] = ()  # the same in words, with what it means for the choice
    importance: ImportanceRecord | None = None  # of the importance matrix, of those that stay


@dataclass(frozen=True)
class Reused:
    """What an earlier build left that this one does not do again.

    `recipes` are those whose files are still to be made; None: all of them.
    """

    stages: tuple[str, ...] = ()
    texts: Texts | None = None  # what the passes read, where that is known
    recipes: frozenset[str] | None = None
    written_bytes: int = 0  # of files that are there already
    is_up_to_date: bool = False  # whether the finished bundle is what the plan makes
    coverage: KnownCoverage = KnownCoverage()


@dataclass(frozen=True)
class Estimate:
    """A build of a plan on a machine. Sizes of files are exact; all else is an estimate."""

    plan: Plan
    sizes: Sizes
    machine: Machine
    host: Host
    amount: Amount
    sweeps: SweepNeeds
    evaluation: SweepNeeds | None  # of the stage that measures quality; None: it is left out
    choosing: SweepNeeds | None  # of the one that chooses a method; None: it was named
    repairing: SweepNeeds | None  # or merging; None: experts get no new weights
    disk: DiskNeeds
    reused: Reused
    has_device: bool = True  # whether the GPU that the figures are for is there

    @property
    def disk_bytes(self) -> int:
        """Everything on the disk in the end."""
        return self.disk.final_bytes

    @property
    def state_bytes(self) -> int:
        """More space, to save the progress of a calibration pass."""
        return self.disk.state_bytes

    @cached_property
    def memory_bytes(self) -> int:
        """The most RAM at a time; with a problem of a pass, that of the other stages."""
        pays = export_pays_on_gpu(self.plan.recipes, self.plan.options.compute.device)
        on_gpu = self.machine.device == "cuda" and pays
        found = peak_ram(self.plan, self.machine, self.sweeps, self._export.ram, on_gpu)
        return max([found, *(one.host_bytes for one in self._others)])

    @property
    def gpu_memory_bytes(self) -> int:
        """The most memory of the GPU at a time; 0 on a CPU."""
        if self.machine.device == "cpu":
            return 0
        own = self.sweeps.device_bytes + self._export.device
        return max([own, *(one.device_bytes for one in self._others)])

    @property
    def _others(self) -> Sequence[SweepNeeds]:
        """The stages that compute the model, beside the calibration passes."""
        stages = self.evaluation, self.choosing, self.repairing
        return [one for one in stages if one is not None]

    @cached_property
    def _export(self) -> ExportMemory:
        plan, machine = self.plan, self.machine
        device, has_gpu = plan.options.compute.device, machine.device == "cuda"
        return export_memory(plan.pruned, plan.recipes, device, machine.cores, has_gpu)

    @property
    def peak_bytes(self) -> int:
        """The most on the disk of the output at a time."""
        # stages overlap, and the progress of a pass is saved, only where there is space
        free = self.machine.disk_free_bytes + self.reused.written_bytes
        overlaps = self.host.cores > 1 and self.disk.overlapping_bytes <= free
        found = self.disk.peak_bytes(self._passes, overlaps)
        return found if found <= free else self.disk.room_bytes

    @property
    def work_bytes(self) -> int:
        """What lies beside the final files at the peak."""
        return self.peak_bytes - self.disk_bytes

    @property
    def seconds(self) -> float:
        """Seconds of the whole command: of its critical path, since stages overlap."""
        return critical_path(self.stages, self.host, self.export_waits)

    @property
    def export_waits(self) -> bool:
        """Whether a recipe asks for importance, so that no file is begun before all is known."""
        asks = any(recipe.asks_importance for recipe in self.plan.recipes)
        return asks and self.plan.computes_imatrix

    @cached_property
    def stages(self) -> Mapping[str, float]:
        """Seconds by stage; a stage that is reused takes none."""
        made = self.reused.recipes
        recipes = [one for one in self.plan.recipes if made is None or one.name in made]
        pays = export_pays_on_gpu(recipes, self.plan.options.compute.device)
        found = stage_seconds(
            self.plan, self.sizes, self.amount, self.disk, self.host, recipes, pays
        )
        return {name: 0.0 if name in self.reused.stages else found[name] for name in found}

    @property
    def _passes(self) -> Mapping[str, tuple[float, int]]:
        facts = self.plan.model.facts
        return {
            name: (self.stages[name], facts.n_blocks)
            for name in ("observe", "merge", "repair", "imatrix")
            if self.stages[name]
        }

    @property
    def n_scored_chunks(self) -> int:
        """Chunks of text by which quality is measured; 0 if it is not."""
        return planned_chunks(self.plan, self.amount)

    @property
    def hidden_where(self) -> str:
        """Where hidden states wait: device, host or disk; "" where nothing fits."""
        return "" if self.sweeps.budget is None else self.sweeps.budget.spool

    @property
    def mentions_hidden(self) -> bool:
        """Whether hidden states are so large that a user should know where they wait."""
        return self.sweeps.hidden_bytes >= _MENTIONED and bool(self.hidden_where)

    @property
    def fits(self) -> bool:
        """Whether this machine can run the build."""
        return not self.problems

    @cached_property
    def problems(self) -> Sequence[str]:
        """Why this machine cannot run the build, one sentence each."""
        found = []
        if not self.has_device:
            found.append("--device cuda: there is no GPU here; the figures are for an H100")
        if self.sweeps.problem:
            found.append(self.sweeps.problem)
        elif self.choosing is not None and self.choosing.problem:
            way = "pass fewer --candidates, or one --method"
            if self.plan.weighs:
                way = "pass a number as --compression"
            found.append(f"{self.choosing.problem}; or {way}")
        elif self.repairing is not None and self.repairing.problem:
            way = "choose another --method" if self.plan.merges else "pass --repair scale, or none"
            found.append(f"{self.repairing.problem}; or {way}")
        elif self.evaluation is not None and self.evaluation.problem:
            found.append(f"{self.evaluation.problem}; or pass --evaluate never")
        return [*found, *self._disk_problems()]

    def _disk_problems(self) -> list[str]:
        machine, unfetched = self.machine, self.plan.checkpoint.unfetched_bytes
        wanted = max(0, self.disk.room_bytes - self.reused.written_bytes)
        wanted = 0 if self.reused.is_up_to_date else wanted
        here = wanted + (unfetched if machine.is_one_disk else 0)
        found = []
        if here > machine.disk_free_bytes:
            besides = " with the weights from the Hub" if machine.is_one_disk and unfetched else ""
            found.append(
                f"not enough disk: {size(here)} are needed{besides}, and "
                f"{size(machine.disk_free_bytes)} are free; pass another --output, or free "
                f"{size(here - machine.disk_free_bytes)}"
            )
        elif unfetched > machine.cache_free_bytes:
            found.append(
                f"not enough disk for the Hub's cache: {size(unfetched)} of weights are still to "
                f"be fetched, and {size(machine.cache_free_bytes)} are free; set HF_HOME"
            )
        return found

    @property
    def lacks_disk(self) -> bool:
        """Whether a disk has too little space."""
        return bool(self._disk_problems())

    @cached_property
    def advice(self) -> Sequence[str]:
        """What would make the build possible, or much shorter; each was computed."""
        found = []
        if self.sweeps.problem and (length := self._shorter_rows()):
            found.append(f"--max-length {length} fits")
        if self.seconds > LONG and (fewer := self._fewer_rows()):
            found.append(fewer)
        return found

    def _shorter_rows(self) -> int | None:
        """The longest row, by halves, with which the passes fit."""
        length = self.amount.longest_row // 2
        while length >= 64:
            share = length / self.amount.longest_row
            n_tokens, chunks = self.amount.n_tokens, self.amount.n_chunk_tokens
            shorter = replace(
                self.amount,
                longest_row=length,
                n_tokens=int(n_tokens * share),
                n_chunk_tokens=int(chunks * share),
            )
            if not sweep_needs(self.plan, self.sizes, shorter, self.machine).problem:
                return length
            length //= 2
        return None

    def _fewer_rows(self) -> str | None:
        for n_rows in _FEWER:
            if n_rows >= self.amount.n_rows:
                continue
            other = self.with_amount(self.amount.scaled(n_rows))
            if other.seconds <= LONG or n_rows == _FEWER[-1]:
                return f"--samples {n_rows}: about {duration(other.seconds)}"
        return None

    def with_amount(self, amount: Amount) -> Estimate:
        """The same build with less text."""
        needs = _needs(self.plan, self.sizes, amount, self.machine)
        sweeps, evaluation, choosing, repairing, disk = needs
        return replace(
            self,
            amount=amount,
            sweeps=sweeps,
            evaluation=evaluation,
            choosing=choosing,
            repairing=repairing,
            disk=disk,
        )

    def rented(self, gpu: str) -> Estimate:
        """The same build from scratch on a usual rented machine with a GPU of a name in GPUS.

        Raises UsageError for another name.
        """
        return _rented(self.plan, self.sizes, self.amount, gpu)


def estimate(
    plan: Plan, reused: Reused, machine: Machine | None = None, speed: Speed | None = None
) -> Estimate:
    """Disk space, memory and time of a build; `machine` and `speed` are those of this machine.

    `reused` is what `find_reused` finds. The first call on a machine measures it, which takes well
    under a second.
    """
    options = plan.options
    if machine is None:
        machine = this_machine(options.compute, options.output, plan.source.folder)
    speed = machine_speed() if speed is None else speed
    has_device = machine.device == "cpu" or machine.gpu is not None
    if machine.device == "cuda" and machine.gpu is None:
        machine = replace(machine, gpu=as_gpu(H100))
    sizes, amount = Sizes(plan), amount_of(plan, reused.texts)
    needs = _needs(plan, sizes, amount, machine)
    sweeps = needs[0]
    host = Host(
        speed,
        machine.cores,
        None if machine.device == "cpu" or machine.gpu is None else gpu_factor(machine.gpu.name),
        max(0, machine.memory_free_bytes - sweeps.host_bytes - _FOR_FILES),
    )
    return Estimate(plan, sizes, machine, host, amount, *needs, reused, has_device)


def rented_estimate(plan: Plan, reused: Reused, gpu: str) -> Estimate:
    """What a plan needs on a usual rented machine, by the name of its GPU (`rented.GPUS`).

    Nothing is measured, and of `reused` only the texts count: a rented machine has no earlier
    build. Raises UsageError for a name that is not in the table.
    """
    return _rented(plan, Sizes(plan), amount_of(plan, reused.texts), gpu)


def _rented(plan: Plan, sizes: Sizes, amount: Amount, gpu: str) -> Estimate:
    machine, host = rented_machine(gpu)
    return Estimate(
        plan, sizes, machine, host, amount, *_needs(plan, sizes, amount, machine), Reused()
    )


def _needs(
    plan: Plan, sizes: Sizes, amount: Amount, machine: Machine
) -> tuple[SweepNeeds, SweepNeeds | None, SweepNeeds | None, SweepNeeds | None, DiskNeeds]:
    """What the passes take, what measuring quality, choosing and repairing (or merging) take, and
    the disk."""
    sweeps = sweep_needs(plan, sizes, amount, machine)
    evaluation = evaluation_needs(plan, sizes, planned_chunks(plan, amount), machine)
    choosing = choosing_needs(plan, sizes, amount, machine)
    repairing = change_needs(plan, sizes, amount, machine)
    others = evaluation, choosing, repairing
    return sweeps, *others, disk_needs(plan, amount, sweeps, *others)
