"""What a size may be, and what files that meet it are called."""

from __future__ import annotations

from typing import Any

import pytest

from reap2gguf.errors import UsageError
from reap2gguf.fitting.target import DEFAULT_CONTEXT, SizeTarget
from reap2gguf.quantizing.labels import label_fault
from reap2gguf.quantizing.recipe import check_label


@pytest.mark.parametrize(
    ("values", "label"),
    [
        ({"size": 12 * 2**30}, "FIT-12GiB"),
        ({"size": int(5.3 * 2**30)}, "FIT-5.3GiB"),
        ({"size": 12 * 10**9}, "FIT-12GB"),
        ({"size": 700 * 2**20}, "FIT-700MiB"),
        ({"size": 9_144_352}, "FIT-9144352B"),
        ({"bpw": 4.25}, "FIT-4.25BPW"),
        ({"bpw": 4}, "FIT-4BPW"),
        ({"card": 16 * 10**9}, "FIT-16GB-8K"),
        ({"card": 24 * 2**30, "context": 32768}, "FIT-24GiB-32K"),
        ({"card": 24 * 2**30, "context": 1000}, "FIT-24GiB-1000"),
    ],
)
def test_labels(values: dict[str, Any], label: str) -> None:
    target = SizeTarget(**values)
    assert target.label == label
    check_label(label, "here")
    assert label_fault(label) is None
    assert target.words


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "pass one of"),
        ({"size": 1, "bpw": 4}, "pass one of"),
        ({"size": 0}, "--target-size is 0"),
        ({"size": True}, "--target-size is True"),
        ({"size": 1.5}, "whole number"),
        ({"card": 2**61}, "--fit is"),
        ({"card": 2**34, "context": 0}, "--fit-context is 0"),
        ({"bpw": 16.1}, "at most 16"),
        ({"bpw": float("nan")}, "at most 16"),
        ({"bpw": "4"}, "at most 16"),
    ],
)
def test_what_is_no_target(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        SizeTarget(**values)


def test_none_is_asked_for() -> None:
    assert SizeTarget.of(None, None, None, None) is None
    with pytest.raises(UsageError, match="pass --fit"):
        SizeTarget.of(None, 4, None, 4096)
    found = SizeTarget.of(None, None, 2**34, None)
    assert found is not None
    assert found.context == DEFAULT_CONTEXT
