"""Task files of a user's folder, read before lm-eval does: which are broken, which run code.

lm-eval leaves broken files out without a word, and runs whatever code a file names. Code hides in
more places than `!function`: a class, a metric of the library `evaluate` (a script from the Hub), a
prompt file (which is read by a loader that makes Python objects).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from reap2gguf.errors import EvaluationError
from reap2gguf.files import TooLargeError, read_entry
from reap2gguf.messages import shown

_MAX_BYTES = 2**20  # lm-eval's own largest has 0.2 MB
_MOST_INCLUDES = 64
_FLAGS = ("unsafe_code", "trust_remote_code", "hf_evaluate")
_NAME_KEYS = ("task", "group", "tag")
_CODE_KEYS = ("class", "custom_dataset", "use_prompt")


class _Code(str):
    """What follows `!function`."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML without any object but plain values; `!function` is noted and not followed."""


_Loader.add_constructor("!function", lambda loader, node: _Code(loader.construct_scalar(node)))


def read_task_file(path: Path) -> dict[str, Any]:
    """The values of one file, without those that it includes.

    Raises EvaluationError if the file is too large, not YAML, not a mapping, or has a number for a
    name.
    """
    try:
        text = read_entry(path, _MAX_BYTES).decode("utf-8")
        values = yaml.load(text, Loader=_Loader)
    except TooLargeError as error:
        raise EvaluationError(f"{path}: {error}; is this a task file?") from error
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise EvaluationError(f"{path}: not a task file in YAML ({reason}); correct it") from error
    if not isinstance(values, dict):
        raise EvaluationError(
            f"{path}: holds a {type(values).__name__}, expected the keys of a task, such as `task`"
        )
    for key in _NAME_KEYS:
        if not isinstance(values.get(key), str | list | type(None)):
            raise EvaluationError(
                f"{path}: `{key}` is {shown(values[key])}, expected a name; put it in quotes"
            )
    return values


def check_no_code(path: Path, metrics: Iterable[str]) -> None:
    """Raise EvaluationError if a task file, or one that it includes, would run code.

    `metrics` are those that lm-eval knows: it fetches all others as scripts.
    """
    known = frozenset(metrics)
    for file, values in _with_included(path):
        for what in _code(values, known):
            raise EvaluationError(
                f"{file}: runs code ({what}), which files of a task folder may not do; if you "
                "trust it, add --allow-task-code"
            )


def _with_included(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A file and all that it includes, each once."""
    waiting, seen = [path.resolve()], set[Path]()
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        if len(seen) > _MOST_INCLUDES:
            raise EvaluationError(f"{path}: includes more than {_MOST_INCLUDES} files")
        values = read_task_file(file)
        yield file, values
        included = values.get("include", [])
        for name in included if isinstance(included, list) else [included]:
            if not isinstance(name, str):
                raise EvaluationError(f"{file}: includes {shown(name)}, expected names of files")
            waiting.append((file.parent / name).resolve())


def _code(values: Any, metrics: frozenset[str]) -> Iterator[str]:
    """What in a file's values runs code, at any depth."""
    waiting, seen = [values], set[int]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, _Code):
            yield f"!function {shown(str(value))}"
        elif isinstance(value, dict | list) and id(value) not in seen:
            seen.add(id(value))  # an alias may stand in many places
            if isinstance(value, dict):
                yield from _code_of_keys(value, metrics)
            waiting += value.values() if isinstance(value, dict) else value


def _code_of_keys(values: dict[Any, Any], metrics: frozenset[str]) -> Iterator[str]:
    for key in _CODE_KEYS:
        if values.get(key) is not None:
            yield f"`{key}`"
    for key in _FLAGS:
        if values.get(key, False) is not False:
            yield f"`{key}`"
    listed = values.get("metric_list")
    for entry in listed if isinstance(listed, list) else []:
        name = entry.get("metric") if isinstance(entry, dict) else None
        if isinstance(name, str) and not isinstance(name, _Code) and name not in metrics:
            yield f"the metric {shown(name)}, which is not among lm-eval's own"


def broken_files(folder: Path) -> Iterator[EvaluationError]:
    """What is wrong with each file of a folder that is not a task file."""
    for path in sorted(folder.glob("**/*.yaml")):
        try:
            for _ in _with_included(path):
                pass
        except EvaluationError as error:
            yield error
