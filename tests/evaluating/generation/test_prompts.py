"""Questions: EvalPlus's, in the model's template, and where answers end."""

from __future__ import annotations

from collections.abc import Sequence

from reap2gguf.evaluating.generation.problems import Problem, load_problems
from reap2gguf.evaluating.generation.prompts import Message, Prompt, prompt_for

PROBLEM = Problem("HumanEval/0", "\ndef f(x):\n    'Twice.'\n", "f", "", {})


class Brackets:
    """A template; one that `forgets` leaves out what the assistant says."""

    def __init__(self, forgets: bool = False) -> None:
        self._forgets = forgets

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        said = [m for m in messages if not (self._forgets and m["role"] == "assistant")]
        end = "[assistant]" if add_generation_prompt else ""
        return "".join(f"[{m['role']}]{m['content']}[/]" for m in said) + end


def test_a_completion_is_the_problem_itself() -> None:
    for problem in load_problems("humaneval").problems:
        found = prompt_for(problem, "humaneval", "completion", Brackets())
        assert found.text == problem.prompt
        assert found.stops == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
        assert not found.is_rendered
        # a right answer is not cut, but for functions that follow
        assert problem.canonical.startswith(found.cut(problem.canonical))


def test_a_chat_begins_the_answer() -> None:
    found = prompt_for(PROBLEM, "humaneval+", "chat", Brackets())
    assert found.text == (
        "[user]Please provide a self-contained Python script that solves the following problem in "
        "a markdown code block:\n```\ndef f(x):\n    'Twice.'\n```\n[/]"
        "[assistant]Below is a Python script with a self-contained function that solves the "
        "problem and passes corresponding tests:\n```python\n"
    )
    assert found.is_rendered
    assert found.cut("def f(x): pass\n```\nmore") == "def f(x): pass"


def test_a_template_that_leaves_answers_out_and_thinking() -> None:
    for found in (
        prompt_for(PROBLEM, "humaneval", "chat", Brackets(forgets=True)),
        prompt_for(PROBLEM, "humaneval", "thinking", Brackets()),
    ):
        assert found.text.endswith("```\n[/][assistant]")
        assert found.stops == ()
        assert found.cut("```\n") == "```\n"


def test_an_answer_ends_at_the_first_of_its_ends() -> None:
    prompt = Prompt("", ("\nb", "\na"), is_rendered=False)
    assert prompt.cut("x\na\nb") == "x"
    assert prompt.cut("xab") == "xab"
