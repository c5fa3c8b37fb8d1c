"""Tasks of lm-eval for all variants at once.

lm-eval evaluates one model at a time and asks it as it goes. Here all questions of all tasks are
asked first: they become rows of tokens, which one sweep scores for all variants; then lm-eval
evaluates each variant with the answers that were found. Filters, normalisation, aggregation, groups
and standard errors are lm-eval's own.

    spec = TaskSpec.of("mmlu,arc_easy,hellaswag", limit=250)

    def score(rows: Sequence[ScoredRow]) -> Scores:
        return evaluate_variants(variants, rows, (), options, progress)

    tasks = run_tasks(spec, source_folder, score, [one.name for one in variants], progress)

Rows with the same tokens but for the last one follow each other (the letters that answer a question
of MMLU): a scorer may compute what they share once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from reap2gguf.errors import EvaluationError, Reap2ggufError
from reap2gguf.evaluating.tasks.definitions import definitions_of
from reap2gguf.evaluating.tasks.encoding import Encoded, encode, encoder_of
from reap2gguf.evaluating.tasks.harness import harness
from reap2gguf.evaluating.tasks.loading import Loaded, load_tasks
from reap2gguf.evaluating.tasks.replay import answers_of, keep_requests, play
from reap2gguf.hub.errors import first_line

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.bundle.evaluation import TaskScore
    from reap2gguf.evaluating.scores import ScoredRow, Scores
    from reap2gguf.evaluating.tasks.spec import TaskSpec
    from reap2gguf.progress import Progress


def run_tasks(
    spec: TaskSpec,
    tokenizer_folder: Path,
    score: Callable[[Sequence[ScoredRow]], Scores],
    variant_names: Sequence[str],
    progress: Progress,
) -> list[TaskScore]:
    """The scores of every task and group: all of the first variant, then of the next.

    `tokenizer_folder` is a checkpoint's, whose tokenizer all variants share; its config says how
    long a row may be. `score` is called once, with all rows; what it returns must have every
    variant. Groups come before their members, and `TaskScore.group` names the group that a task is
    in. Memory: lm-eval's questions, and 8 bytes per token of all rows (MMLU without examples: about
    100 MB); nothing is written but the cache of data sets.

    Raises DependencyError without lm-eval, and what `load_tasks`, `encoder_of`, `encode` and `play`
    raise: UsageError, EvaluationError, CheckpointError, OutputError.
    """
    with harness(allows_code=spec.allows_code):
        encoder = encoder_of(tokenizer_folder, spec.max_length)
        loaded = load_tasks(spec, progress)
        encoded = _ask(loaded, encoder, spec, progress)
        definitions = definitions_of(loaded)
    scores = score(encoded.rows)
    found: list[TaskScore] = []
    with (
        harness(allows_code=spec.allows_code),
        progress.task("Scoring tasks", len(variant_names), "variants") as bar,
    ):
        keep_requests(loaded)
        for name in variant_names:
            bar.at(name)
            answers = answers_of(encoded, scores, name)
            for one in play(loaded, encoded, answers, name, spec.limit, progress):
                found.append(replace(one, definition=definitions[one.task]))
            bar.advance()
    return found


def _ask(loaded: Loaded, encoder: Any, spec: TaskSpec, progress: Progress) -> Encoded:
    """All questions of all tasks as rows."""
    encoded = Encoded()
    with progress.task("Writing questions", len(loaded.tasks), "tasks") as bar:
        for name, task in loaded.tasks.items():
            bar.at(name)
            _build_requests(name, task, spec.limit)
            n_cut = encode(encoder, name, task.instances, encoded)
            if n_cut:
                progress.note(
                    f"{name}: the beginning of {n_cut:,} of {len(task.instances):,} requests is "
                    f"left out, since they are longer than {encoder.max_length:,} tokens"
                )
            bar.advance()
    encoded.sort()
    progress.note(
        f"{encoded.n_requests:,} answers of {len(loaded.tasks):,} tasks are {len(encoded.rows):,} "
        f"rows of {encoded.n_tokens:,} tokens"
    )
    return encoded


def _build_requests(name: str, task: Any, limit: int | None) -> None:
    """Build a task's questions, as lm-eval's `evaluate` does."""
    try:
        task.build_all_requests(limit=limit)
    except Reap2ggufError:
        raise
    except Exception as error:  # a task's templates can raise any error
        raise EvaluationError(
            f"{name}: its questions cannot be written ({type(error).__name__}: "
            f"{first_line(error)}); correct its file, or leave it out"
        ) from error
