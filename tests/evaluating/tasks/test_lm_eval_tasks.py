"""The tasks of published cards, from lm-eval's own files, on questions that are made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reap2gguf.evaluating.tasks.run import run_tasks
from reap2gguf.evaluating.tasks.spec import TaskSpec
from reap2gguf.progress import Silent
from reap2gguf.terminal.task_views import task_lines
from tests.evaluating.tasks.task_folders import (
    TEXTS,
    Scorer,
    lm_eval_results,
    load,
    only_own_tasks,
)
from tests.tiny import TinyQwen3Moe

FOLDERS = (
    "mmlu/default",
    "arc",
    "super_glue/boolq",
    "hellaswag",
    "openbookqa",
    "glue/rte",
    "winogrande",
    "wikitext",
)
OTHERS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "rte", "winogrande")
WORDS = ("a stone", "the old bridge", "rain", "nothing at all")
LABELS = ("A", "B", "C", "D")


def asked(number: int) -> str:
    return f"What did the traveller see first on day {number}"


def of_letters(number: int) -> dict[str, Any]:
    """ARC and OpenBookQA."""
    question = asked(number)
    return {
        "question": question,
        "question_stem": question,
        "choices": {"text": list(WORDS), "label": list(LABELS)},
        "answerKey": LABELS[number % 4],
    }


def of_two(number: int) -> dict[str, Any]:
    """BoolQ, RTE and WinoGrande."""
    return {
        "passage": f"{WORDS[number % 4]} was seen.",
        "question": asked(number),
        "sentence1": asked(number),
        "sentence2": f"{WORDS[number % 4]} was seen.",
        "label": number % 2,
        "sentence": f"On day {number} the fox met the dog, and _ ran away in fear.",
        "option1": "the fox",
        "option2": "the dog",
        "answer": str(1 + number % 2),
    }


def of_endings(number: int) -> dict[str, Any]:
    """HellaSwag."""
    return {
        "ctx_a": f"A man opens door {number}.",
        "ctx_b": "he then",
        "activity_label": "Opening doors",
        "endings": [f"[header] sees {word}." for word in WORDS],
        "label": str(number % 4),
    }


def of_mmlu(number: int) -> dict[str, Any]:
    question = f" {asked(number)}? "
    return {"question": question, "choices": list(WORDS), "answer": number % 4, "subject": "any"}


def of_wikitext(number: int) -> dict[str, Any]:
    return {"page": f" = Day {number} = \n {TEXTS[0]}"}


RECORDS: dict[str, Callable[[int], dict[str, Any]]] = {
    "cais/mmlu": of_mmlu,
    "allenai/ai2_arc": of_letters,
    "allenai/openbookqa": of_letters,
    "aps/super_glue": of_two,
    "nyu-mll/glue": of_two,
    "allenai/winogrande": of_two,
    "Rowan/hellaswag": of_endings,
    "EleutherAI/wikitext_document_level": of_wikitext,
}


def load_made_up(path: str, name: str | None = None, **_: Any) -> Any:
    """In place of `datasets.load_dataset`: tests have no network."""
    from datasets import Dataset, DatasetDict

    n_questions = 3 + len(name or "") % 3
    records = [RECORDS[path](number) for number in range(n_questions)]
    splits = ("train", "validation", "test", "dev")
    return DatasetDict({split: Dataset.from_list(records) for split in splits})


@pytest.mark.slow
def test_the_tasks_of_published_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    only_own_tasks(monkeypatch, *FOLDERS)
    monkeypatch.setattr(datasets, "load_dataset", load_made_up)
    source = TinyQwen3Moe(n_layers=1).write(tmp_path / "source")
    model = load(source)
    names = ("mmlu", *OTHERS, "wikitext")
    spec = TaskSpec(names, limit=2)
    found = run_tasks(spec, source, Scorer({"source": model}), ["source"], Silent())
    theirs = lm_eval_results(model, source, None, names, monkeypatch, limit=2)["results"]
    for one in found:
        assert one.score.value == pytest.approx(theirs[one.task][f"{one.metric},none"], rel=1e-4)
        error = theirs[one.task][f"{one.metric}_stderr,none"]
        assert error == "N/A" or one.score.error == pytest.approx(error)
    scores = {one.task: one for one in found if one.metric in ("acc", "bits_per_byte")}
    assert scores.keys() == theirs.keys()
    assert scores["mmlu"].n_items == 57 * 2
    assert [one.split()[0] for one in task_lines(found) if " acc " in one] == [
        "mmlu", "mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities", *OTHERS,
    ]  # fmt: skip
