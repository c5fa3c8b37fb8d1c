"""Task files with their questions; a scorer and lm-eval's own model, both with whole models."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.evaluating.scores import ScoredRow, Scores, VariantScores
from reap2gguf.evaluating.tasks.harness import harness
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from reap2gguf.pruning.view import PrunedView
from reap2gguf.pruning.write import write_pruned

QUESTIONS = [
    ("The sky on a clear day is", ["blue", "made of wood", "a kind of soup", "very late"], 0),
    ("Two and two are", ["seven hundred and one", "four"], 1),
    ("Fish live in", ["the desert", "water", "books"], 1),
    ("A week has", ["seven days", "a nose", "no end at all, as everybody knows well"], 0),
    ("The opposite of hot is", ["hot", "cold", "green and slow"], 1),
    ("Bread is made from", ["flour", "granite", "the light of the moon", "paper"], 0),
]
TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "In the beginning there was a file. It was long, and nobody had read it to its end. " * 12,
    "Short.",
]


def write_data(folder: Path, name: str, records: Sequence[Mapping[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_task(folder: Path, name: str, data: Path, **values: Any) -> Path:
    """A task file; JSON is YAML."""
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        **values,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config, indent=1))
    return path


def metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


def choice(*metrics: str) -> dict[str, Any]:
    """The keys of a task that chooses between answers."""
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [metric(name) for name in metrics],
    }


def questions(n: int = len(QUESTIONS), first: int = 0) -> list[dict[str, Any]]:
    found = (QUESTIONS[(first + number) % len(QUESTIONS)] for number in range(n))
    return [
        {"question": f"{number}. {text}", "choices": choices, "label": label}
        for number, (text, choices, label) in enumerate(found)
    ]


def write_three_tasks(folder: Path) -> Path:
    """Choices without and with normalisation by length, and the perplexity of whole texts."""
    data = write_data(folder / "data", "questions", questions())
    write_task(folder, "plain", data, **choice("acc"))
    write_task(folder, "normed", data, **choice("acc", "acc_norm"), num_fewshot=2)
    texts = write_data(folder / "data", "texts", [{"text": text} for text in TEXTS])
    metrics = [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
    write_task(folder, "rolling", texts, **rolling, metric_list=metrics)
    return folder


def write_pruned_copy(source: Path, folder: Path, n_kept: int) -> Path:
    folder.mkdir(parents=True)
    with Checkpoint.open(source) as checkpoint:
        model = describe(checkpoint)
        kept = {layer: tuple(range(n_kept)) for layer in model.facts.moe_layers}
        write_pruned(PrunedView(checkpoint, model, kept), folder, Silent())
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class Scorer:
    """Scores rows with whole models, one row at a time."""

    def __init__(self, models: Mapping[str, Any]) -> None:
        self._models = models

    def __call__(self, rows: Sequence[ScoredRow]) -> Scores:
        return Scores(rows, {name: _score(model, rows) for name, model in self._models.items()})


def _score(model: Any, rows: Sequence[ScoredRow]) -> VariantScores:
    losses, tops = [], []
    for row in rows:
        tokens = torch.from_numpy(row.tokens)
        with torch.no_grad():
            logits = model(tokens[None, :-1]).logits[0, row.first - 1 :].double()
        found = logits.log_softmax(-1).gather(1, tokens[row.first :, None])
        losses.append(-found[:, 0].numpy())
        tops.append(logits.argmax(-1).numpy())
    return VariantScores(np.concatenate(losses), np.concatenate(tops))


def hash_scores(rows: Sequence[ScoredRow], names: Sequence[str] = ("source",)) -> Scores:
    """Scores without a model, which differ by tokens and by variant."""
    variants = {}
    for number, name in enumerate(names):
        losses = [
            ((row.tokens[row.first :] * 2654435761 + len(row.tokens) * 97 + number) % 1009) / 100
            for row in rows
        ]
        tops = [row.tokens[row.first :] * (len(row.tokens) % 2) for row in rows]
        variants[name] = VariantScores(np.concatenate(losses), np.concatenate(tops))
    return Scores(rows, variants)


def only_own_tasks(patch: pytest.MonkeyPatch, *folders: str) -> None:
    """lm-eval's own 14,000 tasks take seconds to read: these folders are enough."""
    with harness(allows_code=False):
        import lm_eval.tasks.manager as manager

        own = Path(manager.__file__).parent
        build = manager.TaskIndex.build

        def build_some(paths: list[Path], **options: Any) -> Any:
            some = [own / folder for folder in folders]
            return build([one for path in paths for one in (some if path == own else [path])])

        patch.setattr(manager.TaskIndex, "build", staticmethod(build_some))


def lm_eval_results(
    model: Any,
    tokenizer_folder: Path,
    task_folder: Path | None,
    names: Sequence[str],
    patch: pytest.MonkeyPatch,
    *,
    max_length: int | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """What lm-eval itself finds with its model `hf`."""
    _stand_in_for_accelerate(patch)
    with harness(allows_code=True):
        import lm_eval.evaluator
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        # they describe the machine and the repository, by other programs
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda *_: None)
        patch.setattr(lm_eval.evaluator, "get_git_commit_hash", lambda *_: None)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        found = lm_eval.evaluator.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=max_length),
            tasks=list(names),
            task_manager=TaskManager(
                include_path=None if task_folder is None else str(task_folder),
                include_defaults=task_folder is None,
            ),
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iters=100,
        )
    assert found is not None
    return dict(found)


def _stand_in_for_accelerate(patch: pytest.MonkeyPatch) -> None:
    """lm-eval's `hf` imports accelerate, and uses it to spread a model over several GPUs alone."""
    if importlib.util.find_spec("accelerate"):
        return
    module, utils = types.ModuleType("accelerate"), types.ModuleType("accelerate.utils")
    for one in (module, utils):
        one.__spec__ = importlib.machinery.ModuleSpec(one.__name__, None)
    for name in ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size"):
        setattr(module, name, None)
    utils.get_max_memory = None  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "accelerate", module)
    patch.setitem(sys.modules, "accelerate.utils", utils)
