from __future__ import annotations

from typing import Any

import pytest

from reap2gguf.models.tokenizer_families import ALL_DIGITS, GPT2_PATTERN, ONE_DIGIT
from reap2gguf.tokenizer.steps import split_patterns, steps_of
from tests.tokenizer.small import byte_level, split

BYTES = byte_level(use_regex=False)
DIGITS = {"type": "Digits", "individual_digits": True}


def sequence(*steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


@pytest.mark.parametrize(
    ("part", "patterns"),
    [
        (None, ()),
        (BYTES, ()),
        (split("a+"), ("a+",)),
        (sequence(split("a"), split("b"), BYTES), ("a", "b")),
        (sequence(split("[\r\n]+"), BYTES), (r"[\r\n]+",)),
        (sequence(split(r"[\r\n]+"), BYTES), (r"[\r\n]+",)),
        (sequence(DIGITS, byte_level()), (ONE_DIGIT, GPT2_PATTERN)),
        (sequence({"type": "Digits", "individual_digits": False}, BYTES), (ALL_DIGITS,)),
        (byte_level(), (GPT2_PATTERN,)),
        ({"type": "ByteLevel", "add_prefix_space": False}, (GPT2_PATTERN,)),
        (sequence(split("a"), byte_level()), ("a",)),
        (sequence({"type": "Split", "pattern": {"String": "a"}}, BYTES), ("",)),
        (sequence({"type": "Split"}, {"type": "Punctuation"}, BYTES), ()),
        (sequence(5, "x", BYTES), ()),
    ],
)
def test_each_step_is_a_pattern(part: Any, patterns: tuple[str, ...]) -> None:
    assert split_patterns(part) == patterns


def test_a_part_is_its_own_step() -> None:
    assert steps_of(BYTES) == [BYTES]
    assert steps_of(sequence(BYTES, 5)) == [BYTES, {"type": 5}]
    assert steps_of(None) == []
