"""`model-index` in the front matter of a card: the measured results, as the Hub shows them.

A result has a task, a dataset and a metric. A repository of several GGUF files has one entry, so
the name of a metric says which file it is of.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from reap2gguf.bundle.wording import Wording, wording

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from reap2gguf.bundle.evaluation import Evaluation
    from reap2gguf.bundle.manifest import Manifest

_TASK = "text-generation"
# texts that are datasets on the Hub: name, configuration and split
_DATASETS = {"wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")}
# lm-eval's names of metrics, by the Hub's
_METRICS = {"acc": "accuracy", "acc_norm": "acc_norm", "exact_match": "exact_match"}
_DIGITS = 6  # significant, of a value
_MOST_LETTERS = 100
_NO_NAME = re.compile(r"[^\w./@+-]+", re.ASCII)


def eval_results(manifest: Manifest, *, of_files: bool) -> list[EvalResult]:
    """Perplexity, divergence and tasks, of the GGUF files or of the pruned safetensors."""
    evaluation = manifest.evaluation
    if evaluation is None:
        return []
    if of_files:
        variants = {record.file: f", {_name(record.label)}" for record in manifest.gguf}
    else:
        variants = {"pruned": ""}
    words = wording(manifest.pruning)
    found: list[EvalResult] = []
    for name, end in variants.items():
        found += _of_text(evaluation, name, end, words)
    for name, end in variants.items():
        found += _of_tasks(evaluation, name, end)
    return found


def _of_text(
    evaluation: Evaluation, variant: str, end: str, words: Wording
) -> Iterator[EvalResult]:
    record, text = evaluation.variant(variant), evaluation.text
    if record is None or text is None:
        return
    label = _name(text.label)
    dataset, config, split = _DATASETS.get(text.label, (label, None, None))
    where = {
        "dataset_type": dataset,
        "dataset_name": label,
        "dataset_config": config,
        "dataset_split": split,
    }
    yield _result("perplexity", f"perplexity{end}", record.perplexity.value, **where)
    for reference in ("source", "pruned"):
        found = evaluation.divergence(variant, reference)
        if found is not None:
            name = f"mean KL divergence from the {words.name(reference)} model{end}"
            yield _result("kl_divergence", name, found.mean.value, **where)


def _of_tasks(evaluation: Evaluation, variant: str, end: str) -> Iterator[EvalResult]:
    for one in evaluation.scores(variant):
        name, metric = _name(one.task), _name(one.metric)
        yield _result(
            _METRICS.get(metric, metric),
            f"{metric}, {one.n_shots}-shot{end}",
            one.score.value,
            dataset_type=name,
            dataset_name=name,
            dataset_args={"num_few_shot": one.n_shots},
        )


def _result(metric: str, name: str, value: float, **dataset: Any) -> EvalResult:
    from huggingface_hub import EvalResult

    rounded = float(f"{value:.{_DIGITS}g}")
    return EvalResult(
        task_type=_TASK, metric_type=metric, metric_name=name, metric_value=rounded, **dataset
    )


def _name(text: str) -> str:
    """A name of a text, task or label without letters that a name on the Hub does not have."""
    return _NO_NAME.sub("-", text).strip("-")[:_MOST_LETTERS] or "unnamed"
