"""What the mixers of blocks are, in both spellings of a config."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import NemotronHConfig

from reap2gguf.checkpoint.config import ConfigReader
from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.block_kinds import kinds_in, read_kinds
from reap2gguf.models.description import MAX_LAYERS

KINDS = ("linear_attention", "moe", "full_attention", "mlp")


def reader(**values: Any) -> ConfigReader:
    return ConfigReader(values, "here/config.json")


def test_both_spellings() -> None:
    assert kinds_in("ME*-") == KINDS
    assert kinds_in(list(KINDS)) == KINDS
    assert kinds_in(["mamba", "moe", "attention", "mlp"]) == KINDS
    assert NemotronHConfig(hybrid_override_pattern="ME*-").layers_block_type == list(KINDS)
    old = NemotronHConfig(layers_block_type=["mamba", "moe", "attention", "mlp"])
    assert old.layers_block_type == list(KINDS)


@pytest.mark.parametrize(
    "value", ["", [], "MX", ["moe", None], ["sparse"], None, 3, {"moe": 1}, "M" * (MAX_LAYERS + 1)]
)
def test_what_is_neither(value: Any) -> None:
    assert kinds_in(value) is None


def test_the_most_blocks() -> None:
    assert kinds_in("M" * MAX_LAYERS) is not None


def test_a_model_that_says_it_twice() -> None:
    same = reader(hybrid_override_pattern="ME*", layers_block_type=["mamba", "moe", "attention"])
    assert read_kinds(same, "arch") == KINDS[:3]
    other = reader(hybrid_override_pattern="ME*", layers_block_type=["moe", "mamba", "attention"])
    with pytest.raises(UnsupportedModelError, match="transformers reads the first"):
        read_kinds(other, "arch")


@pytest.mark.parametrize("count", [3.0, "3", 4])
def test_a_count_that_is_another(count: Any) -> None:
    config = reader(hybrid_override_pattern="ME*", num_hidden_layers=count)
    if count == 3.0:
        assert len(read_kinds(config, "arch")) == 3
        return
    with pytest.raises(UnsupportedModelError, match="hybrid_override_pattern has 3 blocks"):
        read_kinds(config, "arch")


def test_an_mlp_is_named_by_its_number() -> None:
    with pytest.raises(UnsupportedModelError, match=r"block 3 is an MLP.* llama\.cpp.s arch takes"):
        read_kinds(reader(hybrid_override_pattern="ME*-"), "arch")
