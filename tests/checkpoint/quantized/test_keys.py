from __future__ import annotations

from reap2gguf.checkpoint.quantized.keys import (
    sections_of,
    with_quantization,
    without_quantization,
)

SECTION = {"quant_method": "fp8"}


def test_taken_out_and_put_back() -> None:
    config = {"a": 1, "quantization_config": SECTION, "text_config": {"b": 2}, "c": 3}
    plain = without_quantization(config)
    assert plain == {"a": 1, "text_config": {"b": 2}, "c": 3}
    again = with_quantization(plain, config)
    assert list(again.items()) == list(config.items())


def test_a_nested_section() -> None:
    config = {"text_config": {"quantization_config": SECTION, "b": 2}, "c": 3}
    assert sections_of(config) == {"text_config.quantization_config": SECTION}
    plain = without_quantization(config)
    assert plain == {"text_config": {"b": 2}, "c": 3}
    plain["text_config"]["b"], plain["d"] = 4, 5
    again = with_quantization(plain, config)
    assert again == {"text_config": {"quantization_config": SECTION, "b": 4}, "c": 3, "d": 5}
    assert list(again["text_config"]) == ["quantization_config", "b"]
    assert list(again) == ["text_config", "c", "d"]


def test_a_key_that_pruning_takes_away() -> None:
    assert with_quantization({"a": 1}, {"a": 0, "gone": 1, "quantization_config": SECTION}) == {
        "a": 1, "quantization_config": SECTION,
    }  # fmt: skip
