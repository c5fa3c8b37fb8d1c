"""How a build runs a stage: reuse, resume, cost, and the other processes of torchrun.

A stage is declared once, as a subclass of `Stage` in `stages.py`: its name, what it leaves on the
disk, the key of its inputs, and the function that computes it. `Run.do` does everything else. It
reuses a stage that was finished with the same key, resumes one that was interrupted, keeps what it
cost, and lets the other processes of a torchrun build compute with the first where a stage says so.
Those processes run the same list of stages as the first.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from reap2gguf.artifacts.made_with import check_versions, other_versions, versions
from reap2gguf.atomic import remove, write_whole
from reap2gguf.building.keys import BuildKeys
from reap2gguf.building.seals import Seal, Stamps, changed, read_seals, seal, stamps, unsealed
from reap2gguf.checkpoint.config import read_json
from reap2gguf.errors import CheckpointError
from reap2gguf.machine import peak_bytes, processes
from reap2gguf.options import ComputeOptions, Resume
from reap2gguf.progress import working

if TYPE_CHECKING:
    from reap2gguf.building.plan import Plan
    from reap2gguf.building.workdir import Workdir
    from reap2gguf.bundle.manifest import Manifest
    from reap2gguf.progress import Progress

T = TypeVar("T")
Result = TypeVar("Result")
_NOTHING = ""  # a key that no inputs have
_NO_KEY = "reused"  # sent to the other processes if a stage is not computed


@dataclass(frozen=True)
class StageCost:
    """What a stage took in this run; the peak is the process's so far."""

    name: str
    seconds: float
    peak_bytes: int
    reused: bool = False


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
        self.key = _NOTHING

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
        work = self.run.work
        made_with = versions(self.libraries)
        resume = Resume(work.root / f"{self.name}.state", self.key, made_with)
        return replace(
            self.run.plan.options.compute,
            scratch=work.root,
            resume=resume if self.run.keeps_states else None,
        )


AnyStage = TypeVar("AnyStage", bound=Stage[Any])


@dataclass
class Run:
    """A build that is running: its plan, its folders, and what its stages have cost so far."""

    plan: Plan
    work: Workdir
    progress: Progress
    order: Sequence[type[Stage[Any]]]  # a stage that is computed again undoes those after it
    keeps_states: bool = True  # whether the disk has room for what a sweep has done
    costs: list[StageCost] = field(default_factory=list)

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

    def prepare(self) -> None:
        """Make the folders, or find those of an interrupted build of the same source.

        For a model on the Hub, the small files that travel with it are fetched first.
        """
        self.plan.source.complete(self.progress.note)
        self.plan.checkpoint.report_to(self.progress)
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
            return stage
        stage.key = stage.make_key()
        is_marked = self._is_marked(stage)
        reused = is_marked and self._is_as_left(stage)
        if is_marked and not reused:
            self.progress.note(f"{stage.name}: its files have changed since, done again")
            self.marks.void(stage.name)
        if stage.is_sweep:
            self.agree(lambda: _NO_KEY if reused else stage.key)
        with self._counted(stage, reused):
            if not reused:
                self._begin(stage, undoes=stage.undoes or not is_marked)
                with working(self.progress, self._heading(stage)):
                    facts = stage.compute()
                outputs = () if stage.is_shared else stage.outputs
                kept = stamps(self.work.root, outputs)
                made_with = versions(stage.libraries)
                self.marks.finish(stage.name, stage.key, facts, kept, made_with)
            for state in self.work.root.glob(f"{stage.name}.state*"):
                remove(state)  # of a sweep whose result is there
        return stage

    def _heading(self, stage: Stage[Any]) -> str:
        names = [one.name for one in self.order]
        return f"Stage {names.index(stage.name) + 1}/{len(names)}: {stage.name}"

    def agree(self, decide: Callable[[], T]) -> T:
        """What the first process decides, in all of them."""
        if processes().size == 1:
            return decide()
        from reap2gguf.observing.compute.ranks import join

        return join().broadcast(decide() if self.is_first else None)

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
        names = [one.name for one in self.order if not one.is_shared]
        undone = names[names.index(stage.name) :] if undoes else []
        if not self.marks.was_begun(stage.name, stage.key):
            # after a kill, files of another attempt must not look like those of this one
            self.marks.begin(stage.name, _NOTHING, undone)
            stage.clear()
        self.marks.begin(stage.name, stage.key, undone)

    @contextmanager
    def _counted(self, stage: Stage[Any], reused: bool) -> Iterator[None]:
        """Keep what the work inside costs."""
        if reused:
            others = other_versions(stage.made_with(), versions(stage.libraries))
            reuse = f"{others}: reused (--fresh to redo it)" if others else "up to date, reused"
            self.progress.note(f"{stage.name}: {reuse}")
        start = time.monotonic()
        yield
        seconds = round(time.monotonic() - start, 2)
        self.costs.append(StageCost(stage.name, seconds, peak_bytes(), reused))


@dataclass(frozen=True)
class Mark:
    """A stage that was begun with the inputs of a key, and its facts for later stages."""

    key: str
    is_done: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)
    stamps: Stamps = field(default_factory=dict)  # of its outputs when it was finished
    made_with: Mapping[str, str] = field(default_factory=dict)  # versions of libraries


class StageMarks:
    """The marks of one build, read once and written whole at each change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._marks = _read_marks(path)

    def is_done(self, stage: str, key: str) -> bool:
        """Whether `stage` was finished with these inputs."""
        mark = self._marks.get(stage)
        return mark is not None and mark.is_done and mark.key == key

    def was_begun(self, stage: str, key: str) -> bool:
        """Whether `stage` was begun with these inputs, so that it can be resumed."""
        mark = self._marks.get(stage)
        return mark is not None and mark.key == key

    def begin(self, stage: str, key: str, undone: Sequence[str]) -> None:
        """A stage begins; the stages in `undone` are no longer done."""
        kept = {name: mark for name, mark in self._marks.items() if name not in undone}
        self._write(kept | {stage: Mark(key)})

    def finish(
        self,
        stage: str,
        key: str,
        facts: Mapping[str, Any],
        kept: Stamps,
        made_with: Mapping[str, str],
    ) -> None:
        """A stage is finished with these inputs; `facts` is plain JSON."""
        self._write(self._marks | {stage: Mark(key, True, facts, kept, made_with)})

    def void(self, stage: str) -> None:
        """A stage's outputs are not what it left: it cannot be resumed either."""
        self._write(self._marks | {stage: Mark(_NOTHING)})

    def stamps(self, stage: str) -> Stamps:
        """The stamps of a finished stage's outputs."""
        return self._marks[stage].stamps

    def written_seals(self) -> dict[str, Seal]:
        """The hashes that finished stages made of files while they wrote them."""
        found: dict[str, Seal] = {}
        for mark in self._marks.values():
            found |= read_seals(mark.facts.get("written"))
        return found

    def made_with(self, stage: str) -> Mapping[str, str]:
        """The versions of the libraries that made a finished stage."""
        return self._marks[stage].made_with if stage in self._marks else {}

    def facts(self, stage: str) -> Mapping[str, Any]:
        """The facts of a finished stage."""
        return self._marks[stage].facts

    def _write(self, marks: dict[str, Mark]) -> None:
        write_whole(self._path, json.dumps({name: asdict(mark) for name, mark in marks.items()}))
        self._marks = marks


def _read_marks(path: Path) -> dict[str, Mark]:
    """The marks in a file; none if it is not there or damaged, so that stages are done again."""
    if not path.is_file():
        return {}
    try:
        return {name: _mark(**values) for name, values in read_json(path).items()}
    except (CheckpointError, TypeError, ValueError, AttributeError):
        return {}


def _mark(
    key: str,
    is_done: bool,
    facts: Mapping[str, Any],
    stamps: Mapping[str, Sequence[int]],
    made_with: Mapping[str, str],
) -> Mark:
    kept = {name: (int(n_bytes), int(ns)) for name, (n_bytes, ns) in stamps.items()}
    return Mark(key, is_done, facts, kept, check_versions(made_with))
