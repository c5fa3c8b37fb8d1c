"""A question, answered by the example in llama.cpp and in transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch
from llama_cpp import Llama

from reap2gguf.bundle.evaluation import Answer, SmokeTest
from reap2gguf.errors import CheckpointError, UsageError
from reap2gguf.evaluating.llama import smoke, transformers_answer
from reap2gguf.evaluating.llama.smoke import QUESTION, smoke_test, smoke_tests
from tests.conftest import Bundle
from tests.evaluating.llama.files import ONE_THREAD
from tests.local.altered import altered
from tests.tiny import ONE_THREAD as DIRECTLY

N_TOKENS = 12


def here(folder: Path, prompt: Sequence[int], most: int, threads: int) -> list[int]:
    """transformers in this process, which has loaded it already."""
    return transformers_answer._greedy(str(folder), list(prompt), most, torch.get_num_threads())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "transformers_answer", here)


@pytest.mark.usefixtures("quick")
def test_the_answers_of_a_right_file_agree(built: Bundle) -> None:
    paths = [built.gguf / f"example-{label}.gguf" for label in ("BF16", "IQ4_K_M")]
    right, quantized = smoke_tests(paths, built.hf, ONE_THREAD, n_tokens=N_TOKENS)
    assert right.same_prompt
    assert quantized.same_prompt
    assert right.n_agree == N_TOKENS
    assert str(right) == (
        "example-BF16.gguf: 12 of the first 12 tokens are as in transformers, after the same prompt"
    )
    assert right.transformers is not None
    assert right.transformers.text == right.llama_cpp.text
    assert quantized.transformers == right.transformers
    with closing(Llama(str(paths[0]), n_ctx=256, verbose=False, **DIRECTLY)) as llama:
        answer = llama.create_chat_completion(
            [{"role": "user", "content": QUESTION}], temperature=0.0, max_tokens=N_TOKENS
        )
    assert answer["choices"][0]["message"]["content"] == right.llama_cpp.text


@pytest.mark.usefixtures("quick")
def test_another_template_is_seen(built: Bundle, tmp_path: Path) -> None:
    path = altered(
        built.gguf / "example-BF16.gguf",
        tmp_path / "x.gguf",
        tokenizer__chat_template="Q: {{ messages[0]['content'] }}",
    )
    test = smoke_test(path, built.hf, ONE_THREAD, n_tokens=4)
    assert test.same_prompt is False
    assert test.llama_cpp.prompt == f"Q: {QUESTION}"
    assert str(test).endswith("after ANOTHER PROMPT")


def answer(*tokens: int) -> Answer:
    return Answer("Hello", (1,), tokens, "")


@pytest.mark.parametrize(
    ("one", "other", "agree"),
    [((1, 2, 3), (1, 2, 3), 3), ((1, 2, 3), (1, 9, 3), 1), ((1, 2), (1, 2, 3), 2), ((9,), (1,), 0)],
)
def test_first_tokens_are_counted(one: tuple[int, ...], other: tuple[int, ...], agree: int) -> None:
    test = SmokeTest("x.gguf", "Hello", True, answer(*one), answer(*other))
    assert test.n_agree == agree


def test_a_folder_larger_than_the_memory_is_not_compared(
    built: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoke, "available_bytes", lambda: 2**20)
    test = smoke_test(built.gguf / "example-BF16.gguf", built.hf, ONE_THREAD, n_tokens=4)
    assert test.llama_cpp.text
    assert (test.transformers, test.same_prompt, test.n_agree) == (None, None, None)
    assert "in float32 take" in test.note
    assert "more than the 1.00 MiB of memory that are free" in str(test)


@pytest.mark.usefixtures("quick")
def test_a_question_longer_than_the_context_is_refused(built: Bundle) -> None:
    with pytest.raises(UsageError, match="may not fit the context of"):
        smoke_test(built.gguf / "example-BF16.gguf", built.hf, ONE_THREAD, "word " * 20_000, 1)


@pytest.mark.slow
def test_transformers_runs_in_a_process_of_its_own(built: Bundle, tmp_path: Path) -> None:
    test = smoke_test(built.gguf / "example-BF16.gguf", built.hf, ONE_THREAD, n_tokens=N_TOKENS)
    assert test.n_agree == N_TOKENS
    broken = Path(shutil.copytree(built.hf, tmp_path / "broken"))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "head_dim": "many"}))
    with pytest.raises(
        CheckpointError, match=r"broken: transformers cannot run it \(exit code 1: "
    ):
        transformers_answer.transformers_answer(broken, [1, 2], 3, 1)
