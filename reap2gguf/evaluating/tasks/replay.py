"""Found log-likelihoods, played back through lm-eval's own evaluation, variant by variant."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from reap2gguf.bundle.evaluation import Estimate, TaskScore
from reap2gguf.errors import EvaluationError
from reap2gguf.evaluating.tasks.encoding import Encoded, Request, key_of
from reap2gguf.hub.errors import first_line
from reap2gguf.messages import shown

if TYPE_CHECKING:
    from reap2gguf.evaluating.scores import Scores
    from reap2gguf.evaluating.tasks.loading import Loaded, Task
    from reap2gguf.progress import Progress

Answer = tuple[float, bool]  # log-likelihood in nats, and whether greedy decoding gives it
DRAWS = 1000  # of lm-eval's bootstrap, for metrics whose error has no formula
_OWN_DRAWS = 200  # for metrics for which lm-eval gives no error
_SEED = 1234
_UNKNOWN = "N/A"


def answers_of(encoded: Encoded, scores: Scores, variant: str) -> list[Answer]:
    """The answer of each row. Raises EvaluationError if a likelihood is not finite."""
    found = scores.variants[variant]
    expected = sum(row.n_scored for row in encoded.rows)
    if found.nll.shape != (expected,) or found.top.shape != (expected,):
        raise EvaluationError(f"{variant}: {len(found.nll):,} scored tokens, expected {expected:,}")
    if not np.isfinite(found.nll).all():
        raise EvaluationError(
            f"{variant}: log-likelihoods of tasks are not finite; the weights may be damaged, or "
            "values overflow in bfloat16, then use --dtype float32"
        )
    answers = []
    for row, span in zip(encoded.rows, scores.spans(), strict=True):
        is_greedy = bool((found.top[span] == row.tokens[row.first :]).all())
        answers.append((-float(found.nll[span].sum()), is_greedy))
    return answers


@cache
def _player_class() -> type[Any]:
    """The class, made when it is needed: lm-eval is an optional library."""
    from lm_eval.api.model import LM

    class Player(LM):  # type: ignore[misc]
        """A model of lm-eval whose answers were found before."""

        def __init__(self, encoded: Encoded, answers: Sequence[Answer]) -> None:
            super().__init__()
            self._encoded = encoded
            self._answers = answers

        def loglikelihood(self, requests: Sequence[Request]) -> list[Answer]:
            return [self._answers[self._encoded.answers[key_of(one)][0]] for one in requests]

        def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
            rows = (self._encoded.answers[key_of(one)] for one in requests)
            return [sum(self._answers[number][0] for number in numbers) for numbers in rows]

        def generate_until(self, requests: Sequence[Request]) -> list[str]:
            raise EvaluationError("a streamed evaluation cannot generate text")

    return Player


def keep_requests(loaded: Loaded) -> None:
    """Let `evaluate` use the requests that are built, and not build them for each variant again.

    Examples before questions are drawn at random: built again, questions would be others.
    """
    for task in loaded.tasks.values():
        task.build_all_requests = _clearing(task)


def _clearing(task: Task) -> Any:
    def clear_answers(**_: Any) -> None:
        for request in task.instances:
            request.resps, request.filtered_resps = [], {}

    return clear_answers


def play(
    loaded: Loaded,
    encoded: Encoded,
    answers: Sequence[Answer],
    variant: str,
    limit: int | None,
    progress: Progress,
) -> list[TaskScore]:
    """All scores of one variant. See `harness`; `keep_requests` was called before.

    `limit`: questions of each task that were asked.

    Raises EvaluationError if a task fails on the answers, or a score is not a finite number.
    """
    model = _player_class()(encoded, answers)
    results = _evaluate(model, {"tasks": loaded.tasks, "groups": loaded.groups}, limit)
    metrics: dict[str, dict[str, Any]] = results["results"]
    if _add_errors(loaded, model, metrics, limit, progress):
        for name in reversed([name for name, _ in loaded.in_order() if name in loaded.groups]):
            metrics[name] = loaded.groups[name].aggregate(metrics)
    return [
        score
        for name, group in loaded.in_order()
        for score in _scores(name, group, metrics.get(name, {}), variant, _n_shots(loaded, name))
    ]


def _evaluate(
    model: Any, tasks: Mapping[str, Any], limit: int | None, *, has_items: bool = False
) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    try:
        found = evaluate(
            lm=model,
            task_dict=tasks,
            limit=limit,
            bootstrap_iters=DRAWS,
            log_samples=has_items,
            confirm_run_unsafe_code=True,  # a file that has such code was refused, or is allowed
        )
    except EvaluationError:
        raise
    except Exception as error:  # a task can raise any error
        raise EvaluationError(
            f"tasks: lm-eval fails on the answers ({type(error).__name__}: {first_line(error)}); "
            "evaluate the tasks one by one to find which"
        ) from error
    assert found is not None, "there is one process for lm-eval"
    return dict(found)


def _add_errors(
    loaded: Loaded,
    model: Any,
    metrics: dict[str, dict[str, Any]],
    limit: int | None,
    progress: Progress,
) -> bool:
    """Standard errors where lm-eval gives none: of perplexities, above all. Whether there were any.

    They are the deviations of the score over questions drawn again with repetition.
    """
    missing = {name: task for name, task in loaded.tasks.items() if _lacks_error(metrics[name])}
    if not missing:
        return False
    items = _evaluate(model, {"tasks": missing}, limit, has_items=True)["samples"]
    for name, task in missing.items():
        for metric, filtered in [*_metric_keys(metrics[name])]:
            key = f"{metric}_stderr,{filtered}"
            if metrics[name].get(key) == _UNKNOWN:
                values = [
                    one[metric]
                    for one in items[name]
                    if one["filter"] == filtered and metric in one
                ]
                metrics[name][key] = _bootstrap(task, metric, values)
        if metrics[name]["sample_len"] < 2:
            progress.note(f"{name}: one question has no standard error; it is given as 0")
    return True


def _lacks_error(found: Mapping[str, Any]) -> bool:
    return any("_stderr," in key and value == _UNKNOWN for key, value in found.items())


def _bootstrap(task: Task, metric: str, values: Sequence[Any]) -> float:
    if len(values) < 2:
        return 0.0
    aggregate = task.aggregation().get(metric, statistics.fmean)
    generator = random.Random(_SEED)
    draws = [aggregate(generator.choices(values, k=len(values))) for _ in range(_OWN_DRAWS)]
    return float(statistics.stdev(draws))


def _metric_keys(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names of metrics, each with the filter of answers that it is of."""
    for key in found:
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            yield metric, filtered


def _scores(
    name: str, group: str, found: Mapping[str, Any], variant: str, n_shots: int
) -> Iterator[TaskScore]:
    for metric, filtered in _metric_keys(found):
        value, error = found[f"{metric},{filtered}"], found.get(f"{metric}_stderr,{filtered}")
        error = 0.0 if error in (None, _UNKNOWN) else error
        if not (_is_finite(value) and _is_finite(error)):
            raise EvaluationError(
                f"{variant}: {metric} of {name} is {shown(value)}, expected a finite number"
            )
        yield TaskScore(
            task=name,
            variant=variant,
            metric=metric if filtered == "none" else f"{metric},{filtered}",
            score=Estimate(float(value), float(error)),
            n_items=int(found["sample_len"]),
            n_shots=n_shots,
            group=group,
        )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(value)


def _n_shots(loaded: Loaded, name: str) -> int:
    """Examples before each question; of a group, the most that one of its tasks has."""
    tasks = [loaded.tasks[name]] if name in loaded.tasks else loaded.groups[name].get_all_tasks()
    return max((int(task.get_config("num_fewshot") or 0) for task in tasks), default=0)
