"""Programs in answers of many forms."""

from __future__ import annotations

import pytest

from reap2gguf.evaluating.generation.extraction import (
    needed,
    program_of,
    without_future,
    without_thinking,
)
from reap2gguf.evaluating.generation.problems import Problem
from reap2gguf.evaluating.generation.programs import program_for

RIGHT = "def f(x):\n    return 2 * x"
ANSWERS = {
    "block": f"Here it is:\n```python\n{RIGHT}\n```\nIt doubles x.",
    "without a language": f"```\n{RIGHT}\n```",
    "not closed": f"```python\n{RIGHT}\n",
    "the second block": f"```bash\npip install x\n```\nand\n```python\n{RIGHT}\n```",
    "plain": f"{RIGHT}\n",
    "words before and after": f"The function is this.\n\n{RIGHT}\n\nIt doubles x, don't you see?",
    "with a test": f"```python\n{RIGHT}\n\nprint(f(2))\nassert f(2) == 4\n```",
    "with a main": f"{RIGHT}\n\nif __name__ == '__main__':\n    f(1)\n",
    "cut off": f"{RIGHT}\n\ndef g(x):\n    return (1 +",
    "thoughts": f"<think>\n```python\ndef f(x): return 1\n```\n</think>\n```python\n{RIGHT}\n```",
    "thoughts begun by the template": f"def f(x): return 1\n</think>\n\n{RIGHT}\n",
    "indented block": f"1. So:\n   ```python\n{RIGHT}\n   ```",
}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_program_of_an_answer(name: str) -> None:
    assert program_of(ANSWERS[name], "f") == RIGHT


def test_an_answer_that_continues_a_block() -> None:
    assert program_of(f"{RIGHT}\n", "f", is_begun=True) == RIGHT
    assert program_of(f"{RIGHT}\n```\nIt is ```def f(x)```.", "f", is_begun=True) == RIGHT
    assert program_of(f"```python\n{RIGHT}\n```", "f", is_begun=True) == RIGHT


def test_thoughts_that_do_not_end_are_no_answer() -> None:
    assert without_thinking("<think>\nso") == ""
    assert without_thinking("so</think>\nx") == "\nx"
    assert without_thinking("<think>a</think>b<think>c</think>d") == "bd"


def test_what_a_function_needs() -> None:
    code = (
        "import math\nfrom os import path\nLIMIT = 3\nOTHER = 4\n"
        "class A:\n    size = LIMIT\n"
        "@staticmethod\ndef f(x):\n    return g(x) + A.size\n"
        "def g(x):\n    return math.pi\n"
        "def h(x):\n    return f(x)\n"
        "print(f(1))\n"
    )
    kept = needed(code, "f")
    assert kept == (
        "import math\nfrom os import path\nLIMIT = 3\n"
        "class A:\n    size = LIMIT\n"
        "@staticmethod\ndef f(x):\n    return g(x) + A.size\n"
        "def g(x):\n    return math.pi"
    )


def test_the_first_function_that_returns() -> None:
    code = f"def f(x):\n    '''Only a promise.'''\n{RIGHT}\ndef f(x):\n    return 3\n"
    assert needed(code, "f") == RIGHT
    assert needed("def f(x):\n    x.append(1)\n", "f") == "def f(x):\n    x.append(1)"


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "",
        "(" * 50_000,
        "-" * 50_000 + "1",
        "x = " + "[" * 90 + "\n" * 5000,
        "a\n" * 40_000,
        "lambda " * 20_000,
        "\x00",
        "\ud800",
        "if x:\n" * 3000,
        "'''" + "x\n" * 30_000,
        "```" * 20_000,
        "<think>" * 10_000,
    ],
)
def test_no_answer_breaks_the_parser(text: str) -> None:
    assert isinstance(program_of(text, "f"), str)
    assert isinstance(program_of(text, "f", is_begun=True), str)


def test_programs_and_their_lines() -> None:
    problem = Problem("HumanEval/0", "def f(x):\n    'Twice.'\n", "f", "", {})
    found = program_for(problem, False, "completion", "    return 2 * x")
    assert found.sample == {"task_id": "HumanEval/0", "completion": "    return 2 * x"}
    assert found.code == "def f(x):\n    'Twice.'\n    return 2 * x"
    answer = f"from __future__ import annotations\n{RIGHT}\n```\n"
    found = program_for(problem, False, "chat", answer)
    assert found.sample["completion"] == f"\n\n{RIGHT}\n" or RIGHT in found.sample["completion"]
    assert found.code == problem.prompt + found.sample["completion"]
    compile(found.code, "found", "exec")
    found = program_for(problem, True, "completion", "    return 2 * x\n")
    assert found.code == "def f(x):\n    'Twice.'\n    return 2 * x"
    assert found.sample == {"task_id": "HumanEval/0", "solution": found.code}
    assert without_future("from __future__ import x\na = 1") == "a = 1"
