"""`evaluate` with tasks, llama.cpp, speed, answers and programs; and what is refused at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reap2gguf.bundle.evaluation import Evaluation
from reap2gguf.evaluating import whole as whole_module
from reap2gguf.evaluating.llama import smoke, speed
from reap2gguf.evaluating.llama.outside import LlamaVariant
from reap2gguf.evaluating.llama.speed import SpeedOptions
from reap2gguf.evaluating.tasks import harness
from reap2gguf.machine import Processes
from tests.conftest import Bundle
from tests.evaluating.llama.test_smoke import here
from tests.evaluating.tasks.task_folders import only_own_tasks, write_three_tasks
from tests.test_cli import run
from tests.tiny import EXAMPLE

SMALL = ("--chunks", 2, "--chunk", 64, "--device", "cpu", "--threads", 1)
QUICK = SpeedOptions((8,), (4,), (1, 2), 2)


def evaluated(*arguments: object) -> dict[str, Any]:
    result = run("evaluate", *arguments, *SMALL, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refused(*arguments: object) -> str:
    result = run("evaluate", *arguments, *SMALL)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Evaluating" not in result.output
    return result.output


def q4(built: Bundle) -> Path:
    return built.gguf / "example-IQ4_K_M.gguf"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_three_tasks(tmp_path_factory.mktemp("tasks") / "tasks")


@pytest.mark.slow
def test_text_and_tasks_in_one_sweep(built: Bundle, tasks: Path, tmp_path: Path) -> None:
    asked = ("--tasks", "plain,normed,rolling", "--task-folder", tasks)
    output = tmp_path / "evaluation.json"
    both = evaluated(EXAMPLE, built.hf, q4(built), *asked, "-o", output)
    assert Evaluation.load(output).as_json() == both
    names = ["source", "pruned", q4(built).name]
    assert [one["name"] for one in both["variants"]] == names
    scores = {(one["variant"], one["task"], one["metric"]) for one in both["tasks"]}
    assert {variant for variant, _, _ in scores} == set(names)
    assert {(task, metric) for _, task, metric in scores} == {
        ("plain", "acc"), ("normed", "acc"), ("normed", "acc_norm"),
        ("rolling", "word_perplexity"), ("rolling", "byte_perplexity"),
        ("rolling", "bits_per_byte"),
    }  # fmt: skip
    # the one does not change the other
    text = evaluated(EXAMPLE, built.hf, q4(built))
    for one, other in zip(both["variants"], text["variants"], strict=True):
        assert one["perplexity"]["value"] == pytest.approx(other["perplexity"]["value"], rel=1e-6)
    for one, other in zip(both["comparisons"], text["comparisons"], strict=True):
        assert one["divergence"]["mean"]["value"] == pytest.approx(
            other["divergence"]["mean"]["value"], rel=1e-4
        )
    alone = evaluated(EXAMPLE, built.hf, q4(built), *asked, "--no-text")
    assert (alone["text"], alone["variants"], alone["comparisons"]) == (None, [], [])
    for one, other in zip(both["tasks"], alone["tasks"], strict=True):
        assert one["score"]["value"] == pytest.approx(other["score"]["value"], rel=1e-5)
    assert "lm_eval" in alone["made_with"]


def test_the_table_of_tasks(built: Bundle, tasks: Path) -> None:
    asked = ("--tasks", "normed", "--limit", 3, "--num-fewshot", 1, "--task-folder", tasks)
    result = run("evaluate", EXAMPLE, built.hf, *asked, "--no-text", *SMALL[4:])
    assert result.exit_code == 0, result.output
    assert "acc_norm  3" in result.output
    assert "1-shot" in result.output
    assert "perplexity" not in result.output


@pytest.mark.slow
def test_llama_cpp_as_engine(built: Bundle, tasks: Path) -> None:
    """GGUF files by llama.cpp, folders streamed: nearly the same figures."""
    asked = ("--tasks", "plain", "--task-folder", tasks)
    files = sorted(built.gguf.glob("example-*.gguf"))
    theirs = evaluated(EXAMPLE, built.hf, *files, *asked, "--engine", "llama.cpp")
    ours = evaluated(EXAMPLE, built.hf, *files, *asked)
    assert (theirs["engine"], ours["engine"]) == ("llama.cpp", "streamed")
    for one, other in zip(theirs["variants"], ours["variants"], strict=True):
        assert one["name"] == other["name"]
        close = 1e-9 if one["kind"] != "gguf" else 0.02
        assert one["perplexity"]["value"] == pytest.approx(other["perplexity"]["value"], rel=close)
    for one, other in zip(theirs["comparisons"], ours["comparisons"], strict=True):
        assert (one["reference"], one["variant"]) == (other["reference"], other["variant"])
        assert one["divergence"]["mean"]["value"] == pytest.approx(
            other["divergence"]["mean"]["value"], abs=0.02
        )
    assert len(theirs["tasks"]) == len(ours["tasks"]) == 4


def test_speed_and_smoke_test(
    built: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(speed, "SpeedOptions", lambda: QUICK)
    monkeypatch.setattr(smoke, "transformers_answer", here)
    monkeypatch.setattr(smoke.smoke_tests, "__defaults__", (smoke.QUESTION, 4))
    output = tmp_path / "e.json"
    arguments = (EXAMPLE, built.hf, q4(built), "--speed", "--smoke-test", "--no-text", "-o", output)
    result = run("evaluate", *arguments, *SMALL[4:])
    assert result.exit_code == 0, result.output
    assert "of the first 4 tokens are as in transformers, after the same prompt" in result.output
    for test in ("pp8", "tg4", "tg4x2"):
        assert test in result.output
    found = Evaluation.load(output)
    assert [one.test for one in found.speeds] == ["pp8", "tg4", "tg4x2"]
    assert found.smoke_tests[0].file == q4(built).name
    assert found.smoke_tests[0].same_prompt
    assert "llama_cpp_python" in found.made_with
    assert not list(tmp_path.glob("*.state*"))


def test_an_interrupted_call_keeps_what_is_done(
    built: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Scores and speeds are measured once, though the call after them fails."""
    monkeypatch.setattr(speed, "SpeedOptions", lambda: QUICK)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(smoke, "smoke_tests", stop)
    output = tmp_path / "e.json"
    arguments = (EXAMPLE, built.hf, q4(built), "--speed", "-o", output, *SMALL)
    assert run("evaluate", *arguments, "--smoke-test").exit_code == 130
    assert len(list(tmp_path.glob("e.json.state*"))) == 2

    def again(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("reap2gguf.evaluating.scoring.evaluate_variants", again)
    monkeypatch.setattr(speed, "measure_speed", again)
    result = run("evaluate", *arguments)
    assert result.exit_code == 0, result.output
    assert len(Evaluation.load(output).variants) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]


@pytest.mark.slow
def test_files_that_llama_cpp_has_computed_are_kept(
    built: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = sorted(built.gguf.glob("example-*.gguf"))
    output = tmp_path / "e.json"
    arguments = (EXAMPLE, built.hf, *files, "--engine", "llama.cpp", "-o", output, *SMALL)
    whole, compute = run("evaluate", *arguments), LlamaVariant.logits
    figures = Evaluation.load(output)
    asked: list[str] = []

    def once(variant: LlamaVariant, rows: Any) -> Any:
        asked.append(variant.name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return compute(variant, rows)

    monkeypatch.setattr(LlamaVariant, "logits", once)
    output.unlink()
    assert run("evaluate", *arguments).exit_code == 130
    again = run("evaluate", *arguments)
    assert again.exit_code == 0, again.output
    assert asked == [files[0].name, files[1].name, files[1].name]
    assert again.stdout == whole.stdout
    assert Evaluation.load(output) == figures
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]


def test_programs(built: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What models write lies beside the output; here it is not run."""
    from reap2gguf.evaluating.generation import run as run_module

    monkeypatch.setattr(run_module, "_MAX_TOKENS", 8)
    output = tmp_path / "e.json"
    asked = ("--humaneval", "--limit", 2, "--no-text", "--generate-with", "none", "-o", output)
    result = run("evaluate", EXAMPLE, built.hf, q4(built), *asked, *SMALL[4:])
    assert result.exit_code == 0, result.output
    assert "programs are written and not run" in result.output
    folder = whole_module.programs_folder(output)
    assert [path.name for path in folder.iterdir()] == [q4(built).name]
    assert len((folder / q4(built).name / "humaneval.jsonl").read_text().splitlines()) == 2
    assert not Evaluation.load(output).tasks


def test_what_cannot_be_measured_is_refused_before_anything_is(
    built: Bundle, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for option in (("--engine", "llama.cpp"), ("--speed",), ("--smoke-test",)):
        message = f"{' '.join(option)} is for GGUF files, and there is none"
        assert message in refused(EXAMPLE, built.hf, *option)
    only_own_tasks(monkeypatch)
    asked = ("--task-folder", tasks, "--tasks")
    assert "did you mean normed" in refused(EXAMPLE, *asked, "normd")
    assert "no such folder" in refused(EXAMPLE, "--tasks", "x", "--task-folder", tasks / "none")
    assert "pass --output" in refused(EXAMPLE, q4(built), "--humaneval")
    assert "nothing is measured" in refused(EXAMPLE, "--no-text")
    monkeypatch.setattr("reap2gguf.evaluating.checks.processes", lambda: Processes(size=2))
    assert "run this part without torchrun" in refused(EXAMPLE, q4(built), "--speed")


def test_missing_libraries_are_named_before_anything_is_computed(
    built: Bundle, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reap2gguf.evaluating.checks.find_spec", lambda name: None)
    output = run("evaluate", EXAMPLE, q4(built), "--speed").output
    assert "--speed needs llama-cpp-python, which is not installed; run `" in output
    monkeypatch.setattr(harness, "OLDEST", "99")
    output = run("evaluate", EXAMPLE, "--tasks", "plain", "--task-folder", tasks).output
    assert "expected 99 or newer; run `pip install 'reap2gguf[eval]'`" in output
