"""From names to lm-eval's task objects, with their data sets."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.errors import (
    DependencyError,
    EvaluationError,
    OutputError,
    Reap2ggufError,
    UsageError,
)
from reap2gguf.evaluating.tasks.task_files import broken_files, check_no_code
from reap2gguf.hub.errors import Problem, cache_refusal, causes, first_line, problem_of
from reap2gguf.messages import shown

if TYPE_CHECKING:
    from reap2gguf.evaluating.tasks.spec import TaskSpec
    from reap2gguf.progress import Progress

_GENERATES = "generate_until"
_MOST_NAMED = 5
_NEAR = 0.6  # how alike a near name must be
_PATTERN = frozenset("*?[")
Manager = Any  # lm_eval.tasks.TaskManager
Task = Any  # lm_eval.api.task.Task


@dataclass
class Loaded:
    """lm-eval's objects, by name, and which group holds which."""

    tasks: dict[str, Task] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    members: dict[str, Sequence[str]] = field(default_factory=dict)  # direct ones, of each group

    def in_order(self) -> list[tuple[str, str]]:
        """Every group and task with the group that it is in ("" for none), groups first."""
        held = {name for names in self.members.values() for name in names}
        roots = [name for name in (*self.groups, *self.tasks) if name not in held]
        found: list[tuple[str, str]] = []

        def visit(name: str, group: str) -> None:
            found.append((name, group))
            for member in self.members.get(name, ()):
                visit(member, name)

        for root in roots:
            visit(root, "")
        return found


def load_tasks(spec: TaskSpec, progress: Progress) -> Loaded:
    """The tasks of `spec` and all that their groups hold, with their data sets. See `harness`.

    Raises UsageError for an unknown name or a task that is named twice; EvaluationError for a task
    that generates text, runs code without leave, whose file is broken, or whose data set cannot be
    had; DependencyError if a task needs a package that is missing; OutputError if the cache of data
    sets cannot be written.
    """
    with progress.task("Finding tasks", 0, ""):
        manager = _manager_of(spec)
        names = _resolved(manager, spec)
        found = {name: list(_walk(manager, name, {})) for name in names}
        _refuse_repeated(found)
        _check_before([one for ones in found.values() for one in ones], spec)
    loaded = Loaded()
    with progress.task("Loading tasks", len(names), "names") as bar:
        for name in names:
            bar.at(name)
            with _errors_of(_place(name, manager, spec)):
                one = manager.load([name])
            loaded.tasks.update(one["tasks"])
            loaded.groups.update(one.get("groups", {}))
            loaded.members.update(one.get("group_map", {}))
            bar.advance()
    _check_after(loaded)
    _set_shots(loaded, spec, progress)
    return loaded


@dataclass(frozen=True)
class _Found:
    """A task or group of the index, before it is built."""

    name: str
    path: Path | None
    config: Mapping[str, Any]  # functions are not resolved
    is_task: bool
    is_known: bool = True


def _manager_of(spec: TaskSpec) -> Manager:
    """The index of the user's folder, alone if it has all that is named, since that is quicker."""
    from lm_eval.tasks import TaskManager

    if spec.folder is None:
        return TaskManager()
    try:
        own = TaskManager(include_path=str(spec.folder), include_defaults=False)
        if all(_matches(own, name) for name in spec.names) and _is_closed(own, spec.names):
            return own
        return TaskManager(include_path=str(spec.folder))
    except (TypeError, ValueError, AttributeError, KeyError) as error:  # of broken files
        reason = next(broken_files(spec.folder), None) or shown(str(error))
        raise EvaluationError(f"{spec.folder}: holds a broken task file: {reason}") from error


def _is_closed(manager: Manager, names: Iterable[str]) -> bool:
    """Whether all that groups name is in the index."""
    for name in names:
        for match in _matches(manager, name):
            if not all(found.is_known for found in _walk(manager, match, {})):
                return False
    return True


def _matches(manager: Manager, name: str) -> list[str]:
    if name in manager.task_index or not _PATTERN & set(name):
        return [name] if name in manager.task_index else []
    return fnmatch.filter(manager.all_tasks, name)


def _resolved(manager: Manager, spec: TaskSpec) -> list[str]:
    """Names with patterns replaced by what they match. Raises UsageError for an unknown one."""
    found: dict[str, None] = {}
    for name in spec.names:
        matches = _matches(manager, name)
        if not matches:
            raise _unknown(name, manager, spec)
        found |= dict.fromkeys(matches)
    return list(found)


def _unknown(name: str, manager: Manager, spec: TaskSpec) -> Reap2ggufError:
    if spec.folder is not None and (broken := next(broken_files(spec.folder), None)):
        return EvaluationError(
            f"{shown(name)}: no such task; a file of the task folder is broken: {broken}"
        )
    near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=_NEAR)
    advice = f"; did you mean {' or '.join(near)}?" if near else "; `lm-eval ls tasks` lists all"
    where = "" if spec.folder is None else f", nor in {spec.folder} (files named *.yaml)"
    return UsageError(f"{shown(name)}: no such task in lm-eval{where}{advice}")


def _walk(
    manager: Manager, name: str, overrides: Mapping[str, Any], depth: int = 0
) -> Iterator[_Found]:
    """A name of the index and all that it holds, with what groups override."""
    if depth > 20:
        raise EvaluationError(f"{name}: groups hold each other, or are nested deeper than 20")
    entry = manager.task_index.get(name)
    if entry is None:  # a task that is written inside its group
        yield _Found(name, None, overrides, is_task=True, is_known="dataset_path" in overrides)
        return
    if entry.kind.name == "TAG":
        for member in sorted(entry.tags):
            yield from _walk(manager, member, overrides, depth + 1)
        return
    config = {**(entry.cfg or {}), **overrides}
    is_group = entry.kind.name == "GROUP"
    yield _Found(name, entry.yaml_path, config, not is_group)
    if is_group:
        members = (entry.cfg or {}).get("task")
        yield from _walk_members(manager, members, overrides, depth)


def _walk_members(
    manager: Manager, members: Any, overrides: Mapping[str, Any], depth: int
) -> Iterator[_Found]:
    for member in members if isinstance(members, list) else []:
        own = {} if not isinstance(member, dict) else member
        name = own.get("group") or own.get("task") or member
        if isinstance(name, str):
            changes = {key: value for key, value in own.items() if key not in ("group", "task")}
            yield from _walk(manager, name, {**overrides, **changes}, depth + 1)
        elif isinstance(name, list):  # a group that is written inside its group
            yield from _walk_members(manager, name, overrides, depth + 1)


def _refuse_repeated(found: Mapping[str, Sequence[_Found]]) -> None:
    """A task that is part of two names would be asked with the options of one of them."""
    names: dict[str, str] = {}
    for name, ones in found.items():
        for task in {one.name for one in ones if one.is_task}:
            if task in names:
                raise UsageError(
                    f"the task {task} is part of {names[task]} and of {name}; name one of them"
                )
            names[task] = name


def _check_before(found: Sequence[_Found], spec: TaskSpec) -> None:
    """Refuse what must not be loaded: code of the user's folder, and tasks that generate."""
    from lm_eval.api.registry import metric_registry

    if unknown := [one.name for one in found if not one.is_known]:
        raise EvaluationError(
            f"{', '.join(unknown[:_MOST_NAMED])}: named by a group, but no such task is in lm-eval "
            "or in the task folder; correct the group's file"
        )
    if spec.folder is not None and not spec.allows_code:
        metrics = list(metric_registry)
        folder = spec.folder.resolve()
        for path in {one.path.resolve(): None for one in found if one.path is not None}:
            if path.is_relative_to(folder):
                check_no_code(path, metrics)
    # a task without an output type is one that generates; classes say it themselves, later
    _refuse_generating(
        one.name
        for one in found
        if one.is_task
        and "class" not in one.config
        and one.config.get("output_type", _GENERATES) == _GENERATES
    )


def _refuse_generating(names: Iterable[str]) -> None:
    found = list(dict.fromkeys(names))
    if not found:
        return
    more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    listed = ", ".join(found[:_MOST_NAMED]) + more
    raise EvaluationError(
        f"{listed}: the model has to write text for it, which a streamed evaluation cannot do, "
        "expected tasks that choose between answers or measure perplexity; leave it out, or run "
        "lm-eval itself with the model in memory: `lm_eval --model hf --model_args "
        "pretrained=FOLDER --tasks ...`"
    )


def _check_after(loaded: Loaded) -> None:
    """Refuse what only a built task tells of itself."""
    _refuse_generating(
        name for name, task in loaded.tasks.items() if task.OUTPUT_TYPE == _GENERATES
    )
    for name, task in loaded.tasks.items():
        if getattr(task, "MULTIMODAL", False):
            raise EvaluationError(
                f"{name}: asks about images or sound, expected a task of text alone; leave it out"
            )


def _set_shots(loaded: Loaded, spec: TaskSpec, progress: Progress) -> None:
    """The number of examples, by the rules of lm-eval's own command, and the seed that draws."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    fixed = []
    for name, task in loaded.tasks.items():
        own = task.get_config("num_fewshot")
        if spec.n_shots is not None and own == 0 and spec.n_shots > 0:
            fixed.append(name)
        elif spec.n_shots is not None or own is None:
            task.set_config(key="num_fewshot", value=spec.n_shots or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    if fixed:
        some = ", ".join(fixed[:_MOST_NAMED])
        progress.note(f"{some}: asked without examples, since the task itself says 0")


def _place(name: str, manager: Manager, spec: TaskSpec) -> str:
    """A task's name, with its file if that is the user's."""
    path = getattr(manager.task_index.get(name), "yaml_path", None)
    if path is None or spec.folder is None:
        return name
    is_own = path.resolve().is_relative_to(spec.folder.resolve())
    return f"{name} ({path})" if is_own else name


@contextmanager
def _errors_of(place: str) -> Iterator[None]:
    """Whatever lm-eval and `datasets` raise while they build a task, in our words."""
    try:
        yield
    except Reap2ggufError:
        raise
    except Exception as error:  # a task can raise any error
        raise _refusal(error, place) from error


def _refusal(error: Exception, place: str) -> Reap2ggufError:
    for cause in causes(error):
        if refusal := cache_refusal(cause):
            return OutputError(f"{place}: {refusal}")
        if isinstance(cause, ImportError) and cause.name:
            return DependencyError(
                f"{place}: needs the Python package {cause.name}; install it, or leave the task out"
            )
        if words := _data_words(cause):
            return EvaluationError(f"{place}: {words}")
    return EvaluationError(
        f"{place}: not a task that lm-eval can build ({type(error).__name__}: {first_line(error)});"
        " correct its file, or leave it out"
    )


def _data_words(cause: BaseException) -> str | None:
    """What an error of a data set means; None if it is about something else."""
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError, DatasetsError

    text = " ".join(str(cause).split())
    if "scripts are no longer supported" in text:
        return "its data set is a Python script, which `datasets` no longer runs; leave it out"
    if problem_of(cause) is Problem.GATED or "gated dataset" in text:
        return "its data set is gated on the Hub; accept its terms there and run `hf auth login`"
    if problem_of(cause) is Problem.OFFLINE or "OfflineModeIsEnabled" in text:
        return (
            "its data set is not in the cache and HF_HUB_OFFLINE is set; unset it, or fetch the "
            "data set where there is a network"
        )
    if isinstance(cause, DatasetNotFoundError):
        return (
            f"its data set cannot be found ({first_line(cause)}); check its name, or run `hf auth "
            "login` if it is private"
        )
    is_local = "data_files" in text or isinstance(cause, FileNotFoundError)
    if is_local or isinstance(cause, DataFilesNotFoundError):
        return (
            f"a file of its data set is missing ({first_line(cause)}); paths in a task file start "
            "at the folder in which this command runs, so write whole ones"
        )
    if isinstance(cause, DatasetsError):
        return f"its data set cannot be read ({first_line(cause)})"
    if isinstance(cause, ConnectionError) or problem_of(cause) is not None:
        return (
            f"its data set cannot be fetched ({first_line(cause)}); check the network and run the "
            "same command again, or use tasks of files that are here (--task-folder)"
        )
    return None
