"""Generative tasks: models write programs, which may be run and judged; pass@1 of each model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from reap2gguf.atomic import make_folder, write_whole
from reap2gguf.bundle.evaluation import Estimate, TaskScore
from reap2gguf.errors import UsageError
from reap2gguf.evaluating.generation.answers import (
    Answer,
    Answers,
    answer_key,
    fingerprint,
    kept_answers,
)
from reap2gguf.evaluating.generation.folder_model import TransformersGenerator
from reap2gguf.evaluating.generation.generators import (
    FolderEngine,
    Generator,
    GeneratorOptions,
)
from reap2gguf.evaluating.generation.llama_model import LlamaGenerator
from reap2gguf.evaluating.generation.problems import (
    Problem,
    ProblemSet,
    SetName,
    load_problems,
)
from reap2gguf.evaluating.generation.programs import Program, program_for
from reap2gguf.evaluating.generation.prompts import Style, prompt_for
from reap2gguf.evaluating.generation.sandbox.checking import (
    Limits,
    Verdict,
    check,
    require_guards,
)
from reap2gguf.evaluating.generation.sandbox.jail import GUARDS
from reap2gguf.evaluating.generation.vllm_model import VllmGenerator, check_vllm
from reap2gguf.files import is_plain_name
from reap2gguf.machine import available_threads
from reap2gguf.messages import shell_word, shown
from reap2gguf.progress import Progress, Task, working_if_long

PASS_AT_1 = "pass@1"
ANSWERS = "answers.jsonl"
_MAX_TOKENS, _MAX_THINKING_TOKENS = 768, 16_384  # EvalPlus's; and of an answer with thoughts
_FOR_PROMPTS = 2048  # tokens; the longest problem has about 500, and a template its own
# What --run-code does, for its help and for those who read it running
RUN_CODE = (
    "runs programs that the models wrote, each in a process of its own, kept from the network, "
    "other files, other processes and signals, with limits of time, memory and disk"
)


@dataclass(frozen=True)
class GenerationVariant:
    """A model that answers: a GGUF file, or a checkpoint's folder."""

    name: str  # as in the evaluation: source, pruned, or the file's name
    path: Path


@dataclass(frozen=True)
class GenerationSpec:
    """What is asked of the models, and how."""

    sets: Sequence[SetName] = ("humaneval",)
    limit: int | None = None  # the first problems of each set; None: all
    style: Style | None = None  # None: as chat if the model has a template, else as completion
    max_tokens: int | None = None  # of an answer; None: 768, or 16,384 where the model thinks
    context: int | None = None  # tokens; None: what answers and prompts need
    generate_with: FolderEngine = "transformers"  # for folders
    threads: int | None = None  # for GGUF files; None: all
    gpu_layers: int = -1  # for GGUF files
    device: str = "auto"  # for folders in transformers
    run_code: bool = False  # whether to run what the models wrote, and judge it
    allow_unsandboxed: bool = False  # also where this machine cannot isolate it
    limits: Limits = field(default_factory=Limits)

    def generator_options(self) -> GeneratorOptions:
        """How models run. Raises UsageError for numbers that contradict each other."""
        default = _MAX_THINKING_TOKENS if self.style == "thinking" else _MAX_TOKENS
        max_tokens = default if self.max_tokens is None else self.max_tokens
        context = max_tokens + _FOR_PROMPTS if self.context is None else self.context
        if max_tokens < 1 or context <= max_tokens:
            raise UsageError(
                f"answers of {max_tokens:,} tokens in a context of {context:,}; expected at least "
                "1, and a context with room for the problem, too"
            )
        threads = available_threads() if self.threads is None else self.threads
        return GeneratorOptions(max_tokens, context, threads, self.gpu_layers, self.device)


def run_generation(
    spec: GenerationSpec,
    variants: Sequence[GenerationVariant],
    folder: Path,
    progress: Progress,
) -> list[TaskScore]:
    """Let each model answer all problems, greedily, and judge the answers if `spec` says so.

    In `folder/VARIANT/`: `answers.jsonl`, from which an interrupted run resumes; for each set
    `SET.jsonl`, which `evaluate_functional_correctness` and `evalplus.evaluate` read; and with
    `run_code` `SET.results.jsonl`, why each failed. One model is in memory at a time, and none when
    programs run. Without `run_code` nothing is run and the list is empty.

    The scores are pass@1, whose standard error takes problems as independent. HumanEval+ and MBPP+
    give two: with EvalPlus's base tests (humaneval, mbpp), and with all (humaneval+, mbpp+). The
    base score of HumanEval+ is left out beside HumanEval's own.

    Raises UsageError if this machine cannot isolate programs and `allow_unsandboxed` is not given,
    if a folder does not fit into memory, or for an option that cannot be; DependencyError if a
    library is missing; SourceError if problems cannot be read; ArtifactError or CheckpointError for
    a broken model; OutputError if the folder cannot be written.
    """
    options = spec.generator_options()
    for variant in variants:
        if not is_plain_name(variant.name):
            raise UsageError(f"{shown(variant.name)} cannot name a variant; rename the file")
        if variant.path.is_dir() and spec.generate_with == "vllm":
            check_vllm()
    guards = _announced(spec, progress) if spec.run_code else ()
    sets = [load_problems(name, spec.limit) for name in dict.fromkeys(spec.sets)]
    scores: list[TaskScore] = []
    for variant in variants:
        place = folder / variant.name
        make_folder(place)
        programs = _written(spec, options, variant, sets, place, progress)
        for one in sets:
            _save_samples(place / f"{one.name}.jsonl", programs[one.name])
            if spec.run_code:
                title = f"Tests of {variant.name}, {one.name}"
                verdicts = _judged(spec, guards, title, programs[one.name], progress)
                _save_results(place / f"{one.name}.results.jsonl", programs[one.name], verdicts)
                scores += _scores(variant.name, one, verdicts, {other.name for other in sets})
    if not spec.run_code:
        progress.note(_how_to_evaluate(sets, folder))
    return scores


def _announced(spec: GenerationSpec, progress: Progress) -> tuple[str, ...]:
    """Say what running code means, and which guards hold here."""
    guards = require_guards(spec.limits, spec.allow_unsandboxed)
    missing = [name for name in GUARDS if name not in guards]
    lost = f"; on this machine NOT kept from: {', '.join(missing)}" if missing else ""
    progress.note(f"--run-code {RUN_CODE} (tried here: {', '.join(guards) or 'none'}{lost})")
    progress.note(f"limits of each program: 3 to 60 s of processor time, {spec.limits}")
    return guards


def _open(variant: GenerationVariant, engine: FolderEngine, options: GeneratorOptions) -> Generator:
    """Load a GGUF file in llama.cpp, or a folder in an engine for folders."""
    if not variant.path.is_dir():
        return LlamaGenerator(variant.path, options)
    if engine == "vllm":
        return VllmGenerator(variant.path, options)
    return TransformersGenerator(variant.path, options)


@dataclass(frozen=True)
class _Question:
    """A problem put to a model."""

    of: ProblemSet
    problem: Problem
    key: str


def _written(
    spec: GenerationSpec,
    options: GeneratorOptions,
    variant: GenerationVariant,
    sets: Sequence[ProblemSet],
    folder: Path,
    progress: Progress,
) -> Mapping[str, Sequence[Program]]:
    """The programs of a model by set; answers that are not there yet are made."""
    asked = {
        "model": fingerprint(variant.path),
        "engine": spec.generate_with if variant.path.is_dir() else "llama.cpp",
        "style": spec.style,
        "max_tokens": options.max_tokens,
        "context": options.context,
    }
    questions = [
        _Question(one, problem, answer_key({**asked, "set": one.name, "prompt": problem.prompt}))
        for one in sets
        for problem in one.problems
    ]
    with kept_answers(folder / ANSWERS) as answers:
        waiting = [one for one in questions if answers.get(one.key) is None]
        if waiting:
            with working_if_long(progress, f"Loading {variant.name}"):
                model = _open(variant, spec.generate_with, options)
            with closing(model):
                title = f"Answers of {variant.name}"
                with progress.task(title, len(questions), "answers") as task:
                    task.advance(len(questions) - len(waiting))
                    _answer(model, spec.style, waiting, answers, task)
        programs: dict[str, list[Program]] = {one.name: [] for one in sets}
        for question in questions:
            found = answers.get(question.key)
            assert found is not None, "every question has its answer by now"
            of = question.of
            programs[of.name].append(
                program_for(question.problem, of.is_of_evalplus, found.style, found.text)
            )
    return programs


def _answer(
    model: Generator,
    wanted: Style | None,
    questions: Sequence[_Question],
    answers: Answers,
    task: Task,
) -> None:
    """Ask a model and keep each answer as it comes."""
    style: Style = wanted or ("chat" if model.has_template else "completion")
    if style != "completion" and not model.has_template:
        raise UsageError(
            f"the model has no chat template, which the style {style} needs; leave the style out, "
            "or pass completion"
        )
    prompts = [prompt_for(one.problem, one.of.name, style, model) for one in questions]
    # vLLM answers many at once: all prompts are there before the first answer
    for question, text in zip(questions, model.complete(prompts), strict=True):
        answers.add(Answer(question.key, question.problem.task_id, style, text))
        task.advance()


def _judged(
    spec: GenerationSpec,
    guards: Sequence[str],
    title: str,
    programs: Sequence[Program],
    progress: Progress,
) -> list[Mapping[str, Verdict]]:
    """The verdicts of each program, by task; as many programs at a time as processors."""

    def judge(program: Program) -> Mapping[str, Verdict]:
        found: dict[str, Verdict] = {}
        for task, test in program.problem.tests.items():
            # all tests count: one that fails decides
            if all(one.passed for one in found.values()):
                found[task] = check(program.code, test, spec.limits, guards)
            else:
                found[task] = Verdict(False, "failed: an easier test")
        return found

    with (
        progress.task(title, len(programs), "programs") as task,
        ThreadPoolExecutor(available_threads(), "judging") as pool,
    ):
        waiting = [pool.submit(judge, program) for program in programs]
        try:
            for one in as_completed(waiting):
                one.result()
                task.advance()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [one.result() for one in waiting]


def _scores(
    variant: str, of: ProblemSet, verdicts: Sequence[Mapping[str, Verdict]], sets: set[SetName]
) -> list[TaskScore]:
    """pass@1 of each task of a set; the base tests of HumanEval+ are HumanEval's."""
    return [
        TaskScore(task, variant, PASS_AT_1, pass_at_1([one[task].passed for one in verdicts]), n)
        for task in of.tasks
        if (n := len(verdicts)) and (task == of.name or task not in sets)
    ]


def pass_at_1(passed: Sequence[bool]) -> Estimate:
    """The share of problems that one answer each has solved."""
    n = len(passed)
    share = sum(passed) / n
    return Estimate(share, math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else 0.0)


def _save_samples(path: Path, programs: Sequence[Program]) -> None:
    write_whole(path, "".join(json.dumps(one.sample) + "\n" for one in programs))


def _save_results(
    path: Path, programs: Sequence[Program], verdicts: Sequence[Mapping[str, Verdict]]
) -> None:
    lines = [
        {
            **program.sample,
            **{task: {"passed": v.passed, "result": v.reason} for task, v in found.items()},
        }
        for program, found in zip(programs, verdicts, strict=True)
    ]
    write_whole(path, "".join(json.dumps(one) + "\n" for one in lines))


def _how_to_evaluate(sets: Sequence[ProblemSet], folder: Path) -> str:
    """The commands of others that judge what was written."""
    commands = {
        "humaneval": "evaluate_functional_correctness",
        "humaneval+": "evalplus.evaluate --dataset humaneval --samples",
        "mbpp+": "evalplus.evaluate --dataset mbpp --samples",
    }
    lines = [
        f"`{commands[one.name]} {shell_word(folder)}/VARIANT/{one.name}.jsonl`" for one in sets
    ]
    return (
        "programs are written and not run; pass --run-code to judge them here, in isolation, or "
        f"on another machine: {', '.join(lines)}"
    )
