"""An evaluation of a bundle that measured a part of it, put into an earlier one.

What was measured again is replaced, and all else stays: a text with its perplexities and
divergences, each task, the speed of each file, and each file's answer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from reap2gguf.bundle.evaluation import Evaluation, TaskScore


def updated(earlier: Evaluation, newer: Evaluation) -> Evaluation:
    """The newer figures, and of the earlier ones those that were not measured again.

    Variants that only the earlier evaluation has keep their figures of the text if it was the same
    text, computed in the same way: figures of two texts cannot stand side by side. `engine`,
    `device` and `dtype` are those of the text, where there is one.
    """
    found = newer if newer.text is not None or earlier.text is None else earlier
    if found is newer and is_same_text(earlier, newer):
        found = _with_other_variants(earlier, newer)
    timed = {one.variant for one in newer.speeds}
    asked = {one.file for one in newer.smoke_tests}
    return replace(
        found,
        tasks=_tasks(earlier.tasks, newer.tasks),
        speeds=[*(one for one in earlier.speeds if one.variant not in timed), *newer.speeds],
        smoke_tests=[
            *(one for one in earlier.smoke_tests if one.file not in asked),
            *newer.smoke_tests,
        ],
        made_with={**earlier.made_with, **newer.made_with},
    )


def is_same_text(one: Evaluation, other: Evaluation) -> bool:
    """Whether both scored one text in the same way, so that their figures can be compared."""
    return one.text is not None and (one.text, one.engine, one.dtype) == (
        other.text,
        other.engine,
        other.dtype,
    )


def _with_other_variants(earlier: Evaluation, newer: Evaluation) -> Evaluation:
    """The newer figures of a text, and the earlier ones of variants that it does not have."""
    again = {one.name: one for one in newer.variants}
    pairs = {(one.reference, one.variant) for one in newer.comparisons}
    before = [again.pop(one.name, one) for one in earlier.variants]
    kept = [one for one in earlier.comparisons if (one.reference, one.variant) not in pairs]
    return replace(
        newer, variants=[*before, *again.values()], comparisons=[*kept, *newer.comparisons]
    )


def _tasks(earlier: Sequence[TaskScore], newer: Sequence[TaskScore]) -> list[TaskScore]:
    """Scores in the order of variants: the source first, from which all others differ.

    A variant that was not asked again keeps its score if it was asked the same questions, with as
    many examples, and judged in the same way, since others cannot stand beside the new scores. A
    group keeps its score as long as all its tasks are what they were; they stay its parts.
    """
    again = {(one.task, one.variant) for one in newer}
    asked = {one.task: _asked(one) for one in newer}
    changed = {one.task for one in earlier if asked.get(one.task, _asked(one)) != _asked(one)}
    parents = {one.task: one.group for one in earlier}
    outdated = _groups_of(changed, parents) - asked.keys()
    kept = [
        one
        for one in earlier
        if (one.task, one.variant) not in again and one.task not in changed | outdated
    ]
    stay = {one.task for one in kept}
    # a group that is asked again names its members
    gone = outdated | asked.keys()
    found = [
        *(replace(one, group="" if one.group in gone else one.group) for one in kept),
        *(_in_group(one, parents.get(one.task, ""), stay - asked.keys()) for one in newer),
    ]
    names = list(dict.fromkeys(("source", "pruned", *(one.variant for one in found))))
    return sorted(found, key=lambda one: names.index(one.variant))


def outdated_groups(earlier: Evaluation, found: Evaluation) -> list[str]:
    """Groups whose scores an update removed, since a task of theirs was measured and is another."""
    names = {one.task for one in found.tasks}
    groups = {one.group for one in earlier.tasks}
    return sorted({one.task for one in earlier.tasks} & groups - names)


def _asked(one: TaskScore) -> tuple[int, int, str]:
    return one.n_items, one.n_shots, one.definition


def _groups_of(tasks: Iterable[str], parents: Mapping[str, str]) -> set[str]:
    """All groups that tasks are in, at any depth."""
    found: set[str] = set()
    waiting = [parents[name] for name in tasks]
    while waiting:
        name = waiting.pop()
        if name and name not in found:
            found.add(name)
            waiting.append(parents.get(name, ""))
    return found


def _in_group(one: TaskScore, group: str, stay: Collection[str]) -> TaskScore:
    """A task that was asked alone, in the group that stays."""
    return replace(one, group=group) if not one.group and group in stay else one
