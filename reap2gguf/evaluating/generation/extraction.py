"""The program in a model's answer. Nothing is run here: answers are parsed.

Of a program, EvalPlus keeps the imports and what its function needs; examples, tests and prints at
its end are left out (https://github.com/evalplus/evalplus, sanitize.py). This does the same with
Python's own parser.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterable, Sequence

from reap2gguf.evaluating.generation.prompts import FENCE

_LONGEST = 100_000  # characters of an answer that are read
# How much of one answer is parsed, which may be no program at all: parsing once, and a thousand
# characters, count as one. Of texts that are none, Python parses some thousand characters a second.
_MOST_WORK = 150
_START = re.compile(r"import |from |def |class |async |@|[A-Za-z_]\w* *(?::[^=]*)?=[^=]")
_THINKING = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL)
_BEFORE_ANSWER = re.compile(r".*</think(?:ing)?>", re.DOTALL)
_BLOCK = re.compile(rf"^ *{FENCE}[^\n`]*\n(.*?)(?:^ *{FENCE}|\Z)", re.DOTALL | re.MULTILINE)
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


def without_thinking(text: str) -> str:
    """An answer without its `<think>` sections; what is not closed is no answer."""
    text = _THINKING.sub("", text)
    return _BEFORE_ANSWER.sub("", text)  # where the template has opened the section


def program_of(answer: str, entry_point: str, is_begun: bool = False) -> str:
    """The program in an answer: of its code blocks the first that defines the function.

    `is_begun`: the answer continues a code block. Without a block, the longest run of lines that is
    Python is taken.
    """
    answer = without_thinking(answer[:_LONGEST])
    blocks = [found.group(1) for found in _BLOCK.finditer(answer)]
    if is_begun:
        begun = re.split(rf"^ *{FENCE}", answer, maxsplit=1, flags=re.MULTILINE)[0]
        blocks.insert(0, begun)
    for block in blocks:
        if defines(block, entry_point):
            return needed(block, entry_point)
    return needed(next((one for one in blocks if one.strip()), answer), entry_point)


def defines(code: str, name: str) -> bool:
    """Whether a text has a function of this name."""
    return re.search(rf"^\s*(?:async +)?def +{re.escape(name)}\b", code, re.MULTILINE) is not None


def needed(text: str, entry_point: str) -> str:
    """Imports, and definitions that a function needs; all that is Python if it is not there."""
    code = _longest_program(text[:_LONGEST].replace("\t", "    "), entry_point)
    tree = _parsed(code)
    if tree is None:
        return code
    found = _definitions(tree.body)
    if entry_point not in found:
        return code
    wanted, waiting = {entry_point}, [entry_point]
    while waiting:
        names = {one.id for one in ast.walk(found[waiting.pop()]) if isinstance(one, ast.Name)}
        new = (names & found.keys()) - wanted
        wanted |= new
        waiting += new
    imports = [one for one in tree.body if isinstance(one, ast.Import | ast.ImportFrom)]
    kept = [one for name, one in found.items() if name in wanted]
    lines = code.split("\n")
    return "\n".join(_source(lines, one) for one in [*imports, *kept])


def without_future(code: str) -> str:
    """A program that can follow another: without imports that must come first."""
    lines = code.split("\n")
    return "\n".join(one for one in lines if not one.startswith("from __future__ import"))


def _definitions(body: Iterable[ast.stmt]) -> dict[str, ast.stmt]:
    """The first definition of each name; of functions, the first that returns something."""
    found: dict[str, ast.stmt] = {}
    for node in body:
        if not isinstance(node, _Definition) or (name := _name(node)) is None:
            continue
        earlier = found.get(name)
        if earlier is None or (_is_stub(earlier) and not _is_stub(node)):
            found[name] = node
    return found


def _name(node: _Definition) -> str | None:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    return target.id if isinstance(target, ast.Name) else None


def _is_stub(node: ast.stmt) -> bool:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    return not any(isinstance(one, ast.Return) for one in ast.walk(node))


def _source(lines: Sequence[str], node: ast.stmt) -> str:
    """The lines of a statement with its decorators."""
    first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", ()))])
    assert node.end_lineno is not None
    whole = lines[first - 1 : node.end_lineno]
    # several statements may share a line
    return "\n".join(whole) if node.col_offset == 0 else ast.unparse(node)


def _longest_program(text: str, entry_point: str) -> str:
    """The longest run of lines that is Python; one with the function before all others."""
    lines = text.split("\n")
    best, best_worth, budget = "", (False, 0), _MOST_WORK
    starts = [0, *(n for n, line in enumerate(lines) if n and _START.match(line))]
    for start in starts:
        run, budget = _run_from(lines[start:], budget)
        code = "\n".join(run)
        worth = (defines(code, entry_point), sum(1 for line in run if line.strip()))
        if worth > best_worth:
            best, best_worth = code, worth
        if start + len(run) == len(lines) and best_worth[0]:
            break  # no later start has more
    return best


def _run_from(lines: list[str], budget: int) -> tuple[list[str], int]:
    """The most lines from the first on that are Python, and how much may be parsed from now on.

    The parser says where it stops, so a program with some lines behind it takes few steps.
    """
    end = len(lines)
    while end > 0:
        code = "\n".join(lines[:end])
        budget -= 1 + len(code) // 1000
        if budget < 0:
            return [], 0
        failed = _failed_line(code)
        if failed is None:
            break
        end = min(end - 1, failed - 1)
    return lines[:end], budget


def _failed_line(code: str) -> int | None:
    """The line, from 1, at which the parser stops; None for a program."""
    try:
        _parse(code)
    except SyntaxError as error:
        return error.lineno or 1
    except (ValueError, MemoryError, RecursionError):
        return 1  # a NUL, or nested deeper than the parser goes: it names no line
    return None


def _parsed(code: str) -> ast.Module | None:
    try:
        return _parse(code)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def _parse(code: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as an escape that Python does not know
        return ast.parse(code)
