"""Typed, bounded reads of JSON files; a value that is not supported is refused by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.files import TooLargeError, read_entry
from reap2gguf.messages import shown

MAX_CONFIG_BYTES = 4 * 2**20
MAX_TOKENIZER_BYTES = 48 * 2**20
_MAX_INT = 2**31 - 1
# Three bytes of JSON become an object of 70 bytes, so the number of values bounds the memory. The
# largest tokenizers have two million.
_MAX_VALUES = 3_000_000
_MAX_DEPTH = 64
_HALF_LETTER = re.compile(r"\\u[dD][89a-fA-F]")  # also one half of a whole pair


def read_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The object in a JSON file, which may say Infinity, as configs of Mamba models do.

    Raises CheckpointError if the file is missing, not a plain file, a link outside the Hub's cache,
    larger than `max_bytes`, not UTF-8, or refused by `parse_json_object`.
    """
    try:
        text = read_entry(path, max_bytes).decode("utf-8")
    except TooLargeError as error:
        raise CheckpointError(f"{path}: {error}; is this the right file?") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: not UTF-8 text ({error.reason} at {error.start})"
        ) from error
    return parse_json_object(text, str(path), infinity=True)


def read_optional(folder: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of a folder, empty if there is no such file."""
    path = folder / name
    return read_json(path) if path.is_file() else {}


def parse_json_object(text: str, where: str, infinity: bool = False) -> dict[str, Any]:
    """The JSON object in `text`; with `infinity` it may say Infinity, which Python writes for it.

    Raises CheckpointError that names `where` if it is not one, if it has NaN, Infinity, repeated
    keys or half characters, if it is nested deeper than 64, or has over three million values.
    """
    n_values = text.count(",") + text.count("[") + text.count("{")
    if n_values > _MAX_VALUES:
        raise CheckpointError(
            f"{where}: about {n_values:,} values, expected at most {_MAX_VALUES:,}; is this the "
            "right file?"
        )

    def constant(name: str) -> float:
        if infinity and name == "Infinity":
            return math.inf
        raise ValueError(f"{name} is not JSON")

    def refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"the key {shown(twice)} occurs twice")
        return result

    try:
        value = json.loads(text, parse_constant=constant, object_pairs_hook=refuse_repeats)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: holds a {type(value).__name__}, expected a JSON object")
    if problem := _unwieldy(value, _HALF_LETTER.search(text) is not None):
        raise CheckpointError(f"{where}: {problem}")
    return value


def _unwieldy(value: dict[str, Any], may_have_halves: bool) -> str | None:
    """What later steps would fail on: deep nesting, and text that UTF-8 cannot hold."""
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        inner: list[Any] = []
        for node in level:
            items = node.values() if isinstance(node, dict) else node
            if may_have_halves and _has_halves([*node, *items]):
                return "holds half a character (a surrogate)"
            inner += [item for item in items if isinstance(item, dict | list)]
        if not inner:
            return None
        level = inner
    return f"nested deeper than {_MAX_DEPTH}, expected the file of a model"


def _has_halves(items: list[Any]) -> bool:
    try:
        "".join(item for item in items if isinstance(item, str)).encode()
    except UnicodeEncodeError:
        return True
    return False


def same_value(one: Any, other: Any) -> bool:
    """Whether two values of JSON are the same: 1 and 1.0 are, 1 and true are not.

    >>> same_value(1, 1.0), same_value(1, True)
    (True, False)
    """
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return bool(one == other)


class ConfigReader:
    """Typed reads from one `config.json`; each error names the key, the value and the file.

    >>> ConfigReader({"num_experts": 16}, "config.json").integer("num_experts", low=1)
    16
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def integer(
        self, *keys: str, low: int = 0, high: int = _MAX_INT, default: int | None = None
    ) -> int:
        """The integer under the first of `keys` that is present, within [low, high]."""
        key, value = self._first(keys, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise UnsupportedModelError(
                f"{self.where}: {key} is {shown(value)}, expected an integer from {low} to {high}"
            )
        return value

    def number(
        self,
        *keys: str,
        low: float = -math.inf,
        high: float = math.inf,
        default: float | None = None,
    ) -> float:
        """The finite number under the first of `keys` that is present, within [low, high]."""
        key, value = self._first(keys, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UnsupportedModelError(f"{self.where}: {key} is {shown(value)}, expected a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise UnsupportedModelError(
                f"{self.where}: {key} is {shown(value)}, expected a finite number"
            )
        if not low <= number <= high:
            raise UnsupportedModelError(
                f"{self.where}: {key} is {shown(value)}, expected a number from {low:g} to {high:g}"
            )
        return number

    def boolean(self, key: str, default: bool) -> bool:
        """True or false under `key`."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise UnsupportedModelError(
                f"{self.where}: {key} is {shown(value)}, expected true or false"
            )
        return value

    def integers(self, key: str, low: int, high: int) -> tuple[int, ...]:
        """The list of integers under `key`, each within [low, high]; absent or null is empty.

        A list that is longer than the range is refused.
        """
        value = self.values.get(key)
        if value is None:
            return ()
        good = (
            isinstance(value, list)
            and len(value) <= high - low + 1
            and all(
                isinstance(item, int) and not isinstance(item, bool) and low <= item <= high
                for item in value
            )
        )
        if not good:
            raise UnsupportedModelError(
                f"{self.where}: {key} is {shown(value)}, expected a list of integers "
                f"from {low} to {high}"
            )
        return tuple(value)

    def section(self, key: str) -> Mapping[str, Any]:
        """The object under `key`; absent or null is empty."""
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise UnsupportedModelError(
                f"{self.where}: {key} is {shown(value)}, expected an object"
            )
        return value

    def expect(self, key: str, *allowed: Any, why: str) -> None:
        """Refuse the model unless `key` is absent or holds one of `allowed`."""
        value = self.values.get(key)
        if value is not None and not any(same_value(value, item) for item in allowed):
            wanted = " or ".join(repr(item) for item in allowed) or "no such key"
            raise UnsupportedModelError(
                f"{self.where}: {key} is {shown(value)}, expected {wanted}: {why}"
            )

    def refuse_nulls(self, keys: Iterable[str]) -> None:
        """Refuse keys that are there and null, where transformers does not take that for absent."""
        for key in keys:
            if key in self.values and self.values[key] is None:
                raise UnsupportedModelError(
                    f"{self.where}: {key} is null, which transformers refuses; set its value, or "
                    "delete the key to get transformers' default"
                )

    def refuse_spellings(self, keys: Iterable[str]) -> None:
        """Refuse several keys that state one fact with different values; null states nothing."""
        present = [key for key in keys if self.values.get(key) is not None]
        for key in present[1:]:
            self.refuse_difference(present[0], self.values[present[0]], key, self.values[key])

    def refuse_difference(self, key: str, value: Any, other_key: str, other: Any) -> None:
        """Refuse two keys that state the same fact with different values; null states nothing."""
        if value is None or other is None or same_value(value, other):
            return
        raise UnsupportedModelError(
            f"{self.where}: {key} is {shown(value)}, but {other_key} is {shown(other)}; both state "
            "the same fact, so correct one of them"
        )

    def with_values(self, values: Mapping[str, Any]) -> ConfigReader:
        """A reader of other values of the same file."""
        return ConfigReader(values, self.where)

    def _first(self, keys: tuple[str, ...], default: Any) -> tuple[str, Any]:
        for key in keys:
            if self.values.get(key) is not None:
                return key, self.values[key]
        if default is None:
            names = " or ".join(keys)
            raise UnsupportedModelError(f"{self.where}: {names} is missing")
        return keys[0], default
