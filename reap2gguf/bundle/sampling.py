"""The sampling that a checkpoint recommends in `generation_config.json`.

The names are llama.cpp's, as in the keys `general.sampling.*` of a GGUF file. llama-server and
llama-cli take their defaults from these keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reap2gguf.checkpoint.config import read_json
from reap2gguf.errors import CheckpointError
from reap2gguf.messages import shown

GENERATION_FILE = "generation_config.json"
_SEQUENCE = re.compile(r"[a-z_;]{1,200}")  # samplers by name, in order


@dataclass(frozen=True)
class _Bounds:
    """The keys that a value may have, the first that is there counts; its type and range."""

    keys: tuple[str, ...]
    value_type: type[int] | type[float]
    low: float
    high: float


_NUMBERS = {
    "top_k": _Bounds(("top_k",), int, 0, 1_000_000),
    "top_p": _Bounds(("top_p",), float, 0, 1),
    "min_p": _Bounds(("min_p",), float, 0, 1),
    "xtc_probability": _Bounds(("xtc_probability",), float, 0, 1),
    "xtc_threshold": _Bounds(("xtc_threshold",), float, 0, 1),
    "temp": _Bounds(("temperature",), float, 0, 10),
    "penalty_last_n": _Bounds(("penalty_last_n",), int, -1, 2**31 - 1),
    "penalty_repeat": _Bounds(("penalty_repeat", "repetition_penalty"), float, 0.01, 10),
    "mirostat": _Bounds(("mirostat",), int, 0, 2),
    "mirostat_tau": _Bounds(("mirostat_tau",), float, 0, 100),
    "mirostat_eta": _Bounds(("mirostat_eta",), float, 0, 100),
}


@dataclass(frozen=True)
class Sampling:
    """What a checkpoint recommends, by llama.cpp's names; only what its file holds."""

    numbers: Mapping[str, float] = field(default_factory=dict)  # int or float, as llama.cpp has it
    sequence: str | None = None
    samples: bool = True  # false: `do_sample` is false, so the numbers have no effect
    problems: tuple[str, ...] = ()  # what was ignored, one sentence each

    @property
    def is_recommended(self) -> bool:
        """Whether there is anything that a program should use."""
        return self.samples and bool(self.numbers)


def read_sampling(folder: Path) -> Sampling:
    """What `generation_config.json` in a checkpoint's folder recommends.

    Values of a wrong type or range are ignored, and listed in `problems`. So is a whole file that
    cannot be read; a plan and an export refuse such a file before.
    """
    path = folder / GENERATION_FILE
    if not path.is_file():
        return Sampling()
    try:
        values = read_json(path)
    except CheckpointError as error:
        return Sampling(problems=(f"{error}; its sampling is ignored",))
    problems: list[str] = []
    numbers: dict[str, float] = {}
    for name, bounds in _NUMBERS.items():
        key = next((key for key in bounds.keys if key in values), bounds.keys[-1])
        value = values.get(key)
        if value is None:
            continue
        if (number := _within(value, bounds)) is None:
            kind = "a whole number" if bounds.value_type is int else "a number"
            problems.append(
                f"{path}: {key} is {shown(value)}, expected {kind} from {bounds.low:g} to "
                f"{bounds.high:g}; ignored"
            )
        else:
            numbers[name] = number
    sequence = values.get("sequence")
    if sequence is not None and not (isinstance(sequence, str) and _SEQUENCE.fullmatch(sequence)):
        problems.append(f"{path}: sequence is {shown(sequence)}, expected samplers; ignored")
        sequence = None
    return Sampling(numbers, sequence, values.get("do_sample") is not False, tuple(problems))


def _within(value: Any, bounds: _Bounds) -> float | None:
    """The value in its type, or None if it is not one; NaN is in no range."""
    allowed = (int,) if bounds.value_type is int else (int, float)
    if type(value) not in allowed or not bounds.low <= value <= bounds.high:
        return None
    number: float = bounds.value_type(value)
    return number
