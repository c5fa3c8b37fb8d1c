from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reap2gguf.checkpoint.config import ConfigReader, parse_json_object, read_json
from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.messages import shown


def reader(**values: Any) -> ConfigReader:
    return ConfigReader(values, "here/config.json")


def refusal(read: Callable[[], object]) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        read()
    message = str(caught.value)
    assert message.startswith("here/config.json: ")
    return message


@pytest.mark.parametrize("value", [1, 5, 10])
def test_integers_within_the_range(value: int) -> None:
    assert reader(size=value).integer("size", low=1, high=10) == value


@pytest.mark.parametrize(
    "value",
    [
        0,
        11,
        -1,
        True,
        False,
        5.0,
        "5",
        [5],
        {},
        math.nan,
        math.inf,
        pytest.param(10**400, id="huge"),
    ],
)
def test_other_values_are_no_integer(value: Any) -> None:
    message = refusal(lambda: reader(size=value).integer("size", low=1, high=10))
    assert f"size is {shown(value)}" in message
    assert "from 1 to 10" in message


def test_integers_are_bounded_by_themselves() -> None:
    assert reader(size=2**31 - 1).integer("size") == 2**31 - 1
    refusal(lambda: reader(size=2**31).integer("size"))
    refusal(lambda: reader(size=-1).integer("size"))


def test_first_spelling_that_is_present() -> None:
    both = reader(a=None, b=2, c=3)
    assert both.integer("a", "b", "c") == 2
    assert both.integer("c", "b") == 3
    assert "b is 2" in refusal(lambda: both.integer("a", "b", low=3))


def test_missing_values_and_defaults() -> None:
    assert "a or b is missing" in refusal(lambda: reader().integer("a", "b"))
    assert "a is missing" in refusal(lambda: reader(a=None).number("a"))
    assert reader().integer("a", default=0) == 0
    assert reader(a=None).integer("a", default=4) == 4
    assert reader().number("a", default=0.5) == 0.5


def test_a_zero_is_not_missing() -> None:
    assert reader(a=0).integer("a", default=4) == 0


@pytest.mark.parametrize("value", [1, 2.5, -3, 0, 1e-6])
def test_numbers(value: float) -> None:
    found = reader(eps=value).number("eps")
    assert found == value
    assert isinstance(found, float)


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, True, "1e-6", [1.0], {}, pytest.param(10**400, id="huge")],
)
def test_other_values_are_no_number(value: Any) -> None:
    assert f"eps is {shown(value)}" in refusal(lambda: reader(eps=value).number("eps"))


@pytest.mark.parametrize("value", [True, False])
def test_booleans(value: bool) -> None:
    assert reader(tied=value).boolean("tied", default=not value) is value
    assert reader(tied=None).boolean("tied", default=value) is value
    assert reader().boolean("tied", default=value) is value


@pytest.mark.parametrize("value", [0, 1, "true", "", [], [True], 1.0])
def test_other_values_are_no_boolean(value: Any) -> None:
    message = refusal(lambda: reader(tied=value).boolean("tied", default=False))
    assert f"tied is {value!r}" in message


@pytest.mark.parametrize("value", [[], [0], [3, 1, 2]])
def test_lists_of_integers(value: list[int]) -> None:
    assert reader(dense=value).integers("dense", 0, 3) == tuple(value)


def test_absent_lists_are_empty() -> None:
    assert reader().integers("dense", 0, 3) == ()
    assert reader(dense=None).integers("dense", 0, 3) == ()


@pytest.mark.parametrize(
    "value", [[4], [-1], [True], [1.0], ["1"], [None], [[1]], "1", 1, {"0": 1}, {}, "", 0, False]
)
def test_other_values_are_no_list(value: Any) -> None:
    message = refusal(lambda: reader(dense=value).integers("dense", 0, 3))
    assert f"dense is {value!r}" in message


def test_expected_values() -> None:
    for config in (reader(), reader(act=None), reader(act="silu"), reader(act="swish")):
        config.expect("act", "silu", "swish", why="only SwiGLU")


@pytest.mark.parametrize("value", ["gelu", "", False, 0, [], ["silu"], {}])
def test_unexpected_values(value: Any) -> None:
    message = refusal(lambda: reader(act=value).expect("act", "silu", "swish", why="only SwiGLU"))
    assert f"act is {value!r}" in message
    assert "'silu' or 'swish'" in message
    assert "only SwiGLU" in message


def test_keys_that_must_be_absent() -> None:
    reader().expect("quantization_config", why="dequantize it")
    message = refusal(
        lambda: reader(quantization_config={"bits": 4}).expect("quantization_config", why="no")
    )
    assert "{'bits': 4}" in message
    assert "no such key" in message


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", '"x"', '{"a": NaN}', '{"a": -Infinity}', "{'a': 1}", "{}{}",
     '{"a": 1, "a": 1}', '{"a": {"b": 1, "b": 2}}', "[" * 100_000, "\ufeff{}"],
)  # fmt: skip
def test_text_that_is_no_json_object(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"^some/file\.json"):
        parse_json_object(text, "some/file.json")


def test_repeated_keys_are_named() -> None:
    with pytest.raises(CheckpointError, match="'num_experts' occurs twice"):
        parse_json_object('{"num_experts": 8, "num_experts": 16}', "config.json")


def test_read_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": [1, 2.5, "ü"]}', encoding="utf-8")
    assert read_json(path) == {"a": [1, 2.5, "ü"]}


def test_infinity_in_a_config(tmp_path: Path) -> None:
    """Python writes it so, and so do configs of Mamba models."""
    path = tmp_path / "config.json"
    path.write_text('{"time_step_limit": [0.0, Infinity]}')
    found = read_json(path)
    assert found == {"time_step_limit": [0.0, float("inf")]}
    with pytest.raises(UnsupportedModelError, match="width is inf, expected a finite number"):
        ConfigReader({"width": found["time_step_limit"][1]}, "here").number("width")
    with pytest.raises(CheckpointError, match="Infinity is not JSON"):
        parse_json_object(path.read_text(), "some/header")


def test_unreadable_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        read_json(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match="not UTF-8"):
        read_json(path)


def test_oversized_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": "' + "x" * 100 + '"}')
    assert read_json(path, max_bytes=path.stat().st_size)
    with pytest.raises(CheckpointError, match="expected at most 50"):
        read_json(path, max_bytes=50)
