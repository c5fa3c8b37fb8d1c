"""One line of the report."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class State(Enum):
    """The state of what was checked; the value is its name in JSON."""

    OK = "ok"
    ABSENT = "absent"  # not needed; the advice says what it is for
    ADVICE = "advice"  # works, but could be better
    PROBLEM = "problem"  # needed, and missing or broken


@dataclass(frozen=True)
class Finding:
    """What was checked, what was found, and what to do about it."""

    what: str
    found: str
    state: State = State.OK
    advice: str = ""

    @property
    def is_problem(self) -> bool:
        """Whether something needed is missing."""
        return self.state is State.PROBLEM
