"""How a `tokenizer.json` splits text into words, as regular expressions, one for each step.

A `Digits` step and the splitting of a `ByteLevel` step are fixed patterns, so each way of splitting
is a list of patterns: the key by which a family names it (`models/tokenizer_families.py`).
"""

from __future__ import annotations

from typing import Any

from reap2gguf.models.tokenizer_families import ALL_DIGITS, GPT2_PATTERN, ONE_DIGIT


def steps_of(part: Any, key: str = "pretokenizers") -> list[dict[str, Any]]:
    """The steps of a part of a `tokenizer.json`: those of a Sequence, or itself."""
    steps = part.get(key) if is_sequence(part) else [] if part is None else [part]
    return [step if isinstance(step, dict) else {"type": step} for step in steps or []]


def is_sequence(part: Any) -> bool:
    """Whether a part is a list of steps."""
    return (
        isinstance(part, dict)
        and part.get("type") == "Sequence"
        and any(isinstance(value, list) for value in part.values())
    )


def split_patterns(part: Any) -> tuple[str, ...]:
    """The pattern of each step of a pre-tokenizer that splits text; other steps are left out.

    A ByteLevel step counts only where no Split stands before it: none of the known ways has both.
    """
    steps = steps_of(part)
    found = [_pattern(step) for step in steps]
    if not any(step.get("type") == "Split" for step in steps):
        found += [GPT2_PATTERN for step in steps[-1:] if _splits_by_itself(step)]
    return tuple(pattern for pattern in found if pattern is not None)


def _pattern(step: dict[str, Any]) -> str | None:
    kind, pattern = step.get("type"), step.get("pattern")
    if kind == "Split" and isinstance(pattern, dict):
        # files have line breaks in patterns as they are, or as escapes
        regex = str(pattern.get("Regex", ""))
        return regex.replace("\r", r"\r").replace("\n", r"\n")
    if kind == "Digits":
        return ONE_DIGIT if step.get("individual_digits") is True else ALL_DIGITS
    return None


def _splits_by_itself(step: dict[str, Any]) -> bool:
    return step.get("type") == "ByteLevel" and step.get("use_regex") is not False
