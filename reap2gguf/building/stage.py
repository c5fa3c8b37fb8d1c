"""How a build runs a stage: reuse, resume, cost, and the other processes of torchrun.

A stage is declared once, as a subclass of `Stage` (`stages.py`, `*_stage.py`): its name, what it
leaves on the disk, the key of its inputs, and the function that computes it. `Run.do` does
everything else, and `together.py` for stages that overlap. It reuses a stage that was finished with
the same key, resumes one that was interrupted, keeps what it cost, and lets the other processes of
a torchrun build compute with the first where a stage says so. Those processes run the same list of
stages as the first.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from reap2gguf.artifacts.made_with import other_versions, versions
from reap2gguf.atomic import make_folder, remove
from reap2gguf.building.keys import BuildKeys
from reap2gguf.building.marks import NOTHING, StageMarks
from reap2gguf.building.seals import Seal, Stamps, changed, seal, stamps, unsealed
from reap2gguf.building.workdir import Room
from reap2gguf.errors import OutputError
from reap2gguf.machine import peak_bytes, processes
from reap2gguf.options import ComputeOptions, Resume
from reap2gguf.progress import working
from reap2gguf.stoppable import Joint, StoppableProgress

if TYPE_CHECKING:
    from reap2gguf.building.plan import Plan
    from reap2gguf.building.workdir import Workdir
    from reap2gguf.bundle.manifest import Manifest
    from reap2gguf.fitting.probing import ProbedText
    from reap2gguf.observing.sweep_plan import HasRoom
    from reap2gguf.progress import Progress

T = TypeVar("T")
Result = TypeVar("Result")
_NO_KEY = "reused"  # sent to the other processes if a stage is not computed


@dataclass(frozen=True)
class StageCost:
    """What a stage took in this run; the peak is the process's so far.

    Stages may overlap, so the sum of their seconds may be more than the build took. A stage that
    only waits for another one takes no seconds.
    """

    name: str
    seconds: float
    peak_bytes: int
    reused: bool = False
    began: float = 0.0  # seconds after the first stage


@dataclass(frozen=True)
class BuildResult:
    """Where a finished build lies, and what it cost.

    `stages` is empty where the bundle was up to date and nothing was done.
    """

    hf_folder: Path | None  # None: nothing was pruned, so the source's safetensors serve
    gguf_folder: Path
    manifest: Manifest
    stages: Sequence[StageCost]

    @classmethod
    def of(cls, work: Workdir, manifest: Manifest, costs: Sequence[StageCost] = ()) -> BuildResult:
        """The result in its final folders."""
        hf = None if manifest.hf is None else work.final_hf
        return cls(hf, work.final_gguf, manifest, tuple(costs))


class Stage(ABC, Generic[Result]):
    """One stage of a build: what it is called, leaves, depends on and does.

    `compute` may find files of an interrupted attempt with the same key, and resumes from them.
    """

    name: ClassVar[str]
    is_shared: ClassVar[bool] = False  # its file is named by its key, for all builds of an output
    is_sweep: ClassVar[bool] = False  # every process of a torchrun build computes its share
    libraries: ClassVar[Sequence[str]] = ()  # whose versions are recorded beside its result
    undoes: ClassVar[bool] = True  # whether stages after it are done again where its files changed

    def __init__(self, run: Run) -> None:
        self.run = run
        self.key = NOTHING
        self.seconds_waited = 0.0  # in `wait_for`
        # to be called by a sweep that has divided the memory: starts stages beside it
        self.beside: Callable[[HasRoom], None] = lambda has_room: None

    @classmethod
    def is_asked(cls, plan: Plan) -> bool:
        """Whether a build with this plan may have the stage: others are not counted in headings."""
        return True

    @abstractmethod
    def make_key(self) -> str:
        """A hash of all that its result depends on."""

    @property
    @abstractmethod
    def outputs(self) -> Sequence[Path]:
        """Files or folders that are there when it is done."""

    @abstractmethod
    def compute(self) -> Mapping[str, Any]:
        """Do the work and write the outputs; facts for later stages, as plain JSON."""

    @abstractmethod
    def load(self) -> Result:
        """What it left, for later stages."""

    def clear(self) -> None:
        """Remove what an attempt with other inputs has left."""

    @property
    def after(self) -> Sequence[Stage[Any]]:
        """Stages that must be done before it begins, where it runs beside others."""
        return ()

    @property
    def held_bytes(self) -> int:
        """The most that it holds in RAM, where it may run beside a sweep."""
        return 0

    def wait_for(self, *stages: Stage[Any]) -> None:
        """Wait until other stages that run beside this one are done; Stopped if the run ends."""
        begun = time.monotonic()
        self.run.joint.wait([stage.name for stage in stages])
        self.seconds_waited += time.monotonic() - begun

    @cached_property
    def result(self) -> Result:
        """What it left, loaded once."""
        return self.load()

    @property
    def facts(self) -> Mapping[str, Any]:
        """What `compute` returned, now or in an earlier run."""
        return self.run.marks.facts(self.name)

    def made_with(self) -> Mapping[str, str]:
        """The versions that made its result, as recorded beside it; none if that is not known."""
        return self.run.marks.made_with(self.name)

    def is_intact(self) -> bool:
        """Whether its outputs are as it left them, beyond their sizes and times of change.

        If not, it is done again; VerificationError if that cannot help.
        """
        return True

    @property
    def compute_options(self) -> ComputeOptions:
        """Where and how to compute, and where to keep what a sweep has done between layers."""
        folder = self.run.scratch
        made_with = versions(self.libraries)
        resume = Resume(folder / f"{self.name}.state", self.key, made_with)
        return replace(
            self.run.plan.options.compute,
            scratch=folder,
            resume=resume if self.run.room.keeps_states else None,
        )


AnyStage = TypeVar("AnyStage", bound=Stage[Any])


@dataclass
class Run:
    """A build that is running: its plan, its folders, and what its stages have cost so far."""

    plan: Plan
    work: Workdir
    progress: Progress
    order: Sequence[type[Stage[Any]]]  # a stage that is computed again undoes those after it
    room: Room = field(default_factory=Room)  # on the disk
    costs: list[StageCost] = field(default_factory=list)
    joint: Joint = field(default_factory=Joint)  # of the stages that run now
    held: ExitStack = field(default_factory=ExitStack)  # closes files that stages have opened
    # the text that probes are measured on; set where the build runs: what evaluates loads torch
    probe_text: Callable[[], ProbedText] | None = None

    def __post_init__(self) -> None:
        self.listener = self.progress
        self.progress = StoppableProgress(self.listener, self.joint)
        self._begun = time.monotonic()
        self._computing: list[str] = []  # names of stages
        self._ending = threading.Lock()

    @cached_property
    def keys(self) -> BuildKeys:
        return BuildKeys(self.plan)

    @cached_property
    def marks(self) -> StageMarks:
        """Which stages are done. Use it only after `prepare`."""
        return StageMarks(self.work.root / "stages.json")

    @property
    def is_first(self) -> bool:
        """Whether this process writes and reports; the others only help it to compute."""
        return processes().is_first

    def settle(self, plan: Plan) -> Plan:
        """Continue with a plan of which more is known; keys that are made from now on use it."""
        self.plan = plan
        self.keys = self.keys.of(plan)
        return plan

    def prepare(self) -> None:
        """Make the folders, or find those of an interrupted build of the same source.

        For a model on the Hub, the small files that travel with it are fetched first.
        """
        self.plan.source.complete(self.progress.note)
        self.plan.checkpoint.report_to(self.listener)
        source, fingerprint = self.plan.source.label, self.keys.fingerprint
        identity = {"source": source, "fingerprint": fingerprint}
        self.work.prepare(identity, self.plan.options.fresh)

    def seal(
        self, outputs: Sequence[Path], before: Stamps | None = None
    ) -> Mapping[str, Mapping[str, Any]]:
        """The seals of outputs as plain JSON; `before` is their stamps when they were read."""
        kept = stamps(self.work.root, outputs) if before is None else before
        threads = self.plan.options.compute.threads
        sealed = seal(self.work.root, kept, threads, self.progress, self.marks.written_seals())
        return {name: asdict(one) for name, one in sealed.items()}

    def unsealed(self, seals: Mapping[str, Seal]) -> list[str]:
        """The files of a stage that do not have their seals."""
        threads = self.plan.options.compute.threads
        return unsealed(self.work.root, seals, threads, self.progress)

    def do(self, stage: AnyStage) -> AnyStage:
        """Compute a stage, or find it done; its result is loaded when it is asked for."""
        if not self.is_first:
            if stage.is_sweep and (key := self.agree(lambda: _NO_KEY)) != _NO_KEY:
                stage.key = key
                stage.compute()
        elif self.open(stage):
            self.compute(stage)
        return stage

    def open(self, stage: Stage[Any]) -> bool:
        """Find a stage done, or mark it as begun; whether it has to be computed."""
        stage.key = stage.make_key()
        is_marked = self._is_marked(stage)
        reused = is_marked and self._is_as_left(stage)
        if is_marked and not reused:
            self.progress.note(f"{stage.name}: its files have changed since, done again")
            self.marks.void(stage.name)
        if stage.is_sweep:
            self.agree(lambda: _NO_KEY if reused else stage.key)
        if reused:
            others = other_versions(stage.made_with(), versions(stage.libraries))
            reuse = f"{others}: reused (--fresh to redo it)" if others else "up to date, reused"
            self.progress.note(f"{stage.name}: {reuse}")
            self._end(stage, time.monotonic(), reused)
        else:
            self._begin(stage, undoes=stage.undoes or not is_marked)
        return not reused

    def compute(self, stage: Stage[Any]) -> None:
        """Compute a stage that was opened, and mark it as finished."""
        begun = time.monotonic()
        stage.seconds_waited = 0.0
        with working(self.progress, self._heading(stage)):
            self._computing.append(stage.name)
            facts = stage.compute()
        self._computing.remove(stage.name)
        outputs = () if stage.is_shared else stage.outputs
        kept = stamps(self.work.root, outputs)
        made_with = versions(stage.libraries)
        self.marks.finish(stage.name, stage.key, facts, kept, made_with)
        self._end(stage, begun)

    def _end(self, stage: Stage[Any], begun: float, reused: bool = False) -> None:
        """A stage's result is there: keep what it has cost."""
        for state in self.work.root.glob(f"{stage.name}.state*"):
            remove(state)  # of a sweep whose result is there
        seconds = round(time.monotonic() - begun - stage.seconds_waited, 2)
        began = round(begun - self._begun, 2)
        names = [one.name for one in self.order]
        with self._ending:  # a list that grows while it is sorted raises ValueError
            self.costs.append(StageCost(stage.name, seconds, peak_bytes(), reused, began))
            self.costs.sort(key=lambda cost: names.index(cost.name))

    def _heading(self, stage: Stage[Any]) -> str:
        names = [one.name for one in self.order if one.is_asked(self.plan)]
        heading = f"Stage {names.index(stage.name) + 1}/{len(names)}: {stage.name}"
        beside = sorted(self._computing, key=names.index)
        return f"{heading}, beside {' and '.join(beside)}" if beside else heading

    def agree(self, decide: Callable[[], T]) -> T:
        """What the first process decides, in all of them."""
        if processes().size == 1:
            return decide()
        from reap2gguf.observing.compute.ranks import join

        return join().broadcast(decide() if self.is_first else None)

    @cached_property
    def scratch(self) -> Path:
        """Where a sweep keeps what waits and what it has done, in this process.

        Of a process on another machine, which does not have the work folder, a folder of its own.
        """
        if self.is_first or self.work.root.is_dir():
            return self.work.root
        try:
            make_folder(self.work.peer)
        except OutputError as error:  # it needs none, unless activations have to wait on the disk
            self.progress.note(str(error))
        return self.work.peer

    def check_same_model(self) -> None:
        """Refuse processes that see different checkpoints; PeerError in all of them."""
        if processes().size > 1:
            from reap2gguf.observing.compute.ranks import check_same_model

            check_same_model(self.keys.fingerprint)

    def dismiss(self) -> None:
        """Release the other processes, which all call this: what follows is the first one's."""
        if processes().size > 1:
            from reap2gguf.observing.compute.ranks import release

            release()
            if not self.is_first:
                self.work.drop_peer()

    def _is_marked(self, stage: Stage[Any]) -> bool:
        """Whether a stage was finished with these inputs and its outputs are there."""
        if not all(path.exists() and not path.is_symlink() for path in stage.outputs):
            return False
        if stage.is_shared and not self.work.is_fresh:
            return True  # whichever build made it
        return self.marks.is_done(stage.name, stage.key)

    def _is_as_left(self, stage: Stage[Any]) -> bool:
        """Whether nobody has written to a finished stage's outputs since."""
        if stage.is_shared:
            return True  # its file has a checksum of its own, which is compared when it is read
        return not changed(self.work.root, self.marks.stamps(stage.name)) and stage.is_intact()

    def _begin(self, stage: Stage[Any], undoes: bool) -> None:
        """Resume a stage, or start from scratch if its inputs or its files have changed."""
        if stage.is_shared:
            return
        if self.marks.is_under_way(stage.name, stage.key):
            return  # it has undone the stages after it when it was begun first
        names = [one.name for one in self.order if not one.is_shared]
        undone = names[names.index(stage.name) :] if undoes else []
        if not self.marks.was_begun(stage.name, stage.key):
            # after a kill, files of another attempt must not look like those of this one
            self.marks.begin(stage.name, NOTHING, undone)
            stage.clear()
        self.marks.begin(stage.name, stage.key, undone)


def needed(found: T | None) -> T:
    """What a stage reads of the texts; a plan that has the stage has it too."""
    assert found is not None
    return found
