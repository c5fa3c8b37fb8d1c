"""One line of a diagnosis."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class State(Enum):
    """How a thing is; the value is how JSON calls it."""

    OK = "ok"
    ABSENT = "absent"  # not needed, and said what it would be for
    ADVICE = "advice"  # works, and could be better
    PROBLEM = "problem"  # needed


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found, and what to do about it."""

    what: str
    found: str
    state: State = State.OK
    advice: str = ""

    @property
    def is_problem(self) -> bool:
        """Whether something needed is missing."""
        return self.state is State.PROBLEM
