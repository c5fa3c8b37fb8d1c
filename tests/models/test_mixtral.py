"""Mixtral: what is refused by name, its header, its order of rows, and dense `llama` files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.from_gguf import model_from_gguf
from reap2gguf.models.mixtral import Mixtral
from reap2gguf.models.table import BY_GGUF
from reap2gguf.models.transformers_config import check_with_transformers
from tests.families.mixtral import TINY
from tests.models.layouts import stored_of
from tests.models.test_from_gguf import header_of


def model_of(**changes: Any) -> Mixtral:
    return Mixtral({**TINY.config(), **changes}, "here/config.json", TINY.tensors().keys())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sliding_window": 4096}, "sliding_window is 4096.*llama has full attention"),
        ({"num_experts": 4}, "num_local_experts is 8, but num_experts is 4|num_experts is 4"),
        ({"intermediate_size": None}, "intermediate_size is null"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "head_dim is missing.*set it to 16",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type 'llama3'"),
    ],
    ids=str,
)
def test_what_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        model_of(**changes)


def test_the_header() -> None:
    found = {one.key.removeprefix("llama."): one for one in model_of().gguf_metadata()}
    assert found["feed_forward_length"].value == 96
    assert found["vocab_size"].value == TINY.vocab
    assert found["rope.dimension_count"].value == 16
    assert found["rope.dimension_count"].value_type is GGUFValueType.UINT32
    assert "expert_feed_forward_length" not in found


def test_no_size_of_a_head_is_the_same_as_null() -> None:
    """transformers writes null when it saves a config without one."""
    for model in (model_of(), model_of(head_dim=None)):
        check_with_transformers(model)
        assert model.facts.head_dim == 16
    model = model_of(head_dim=32)
    check_with_transformers(model)
    assert model.facts.head_dim == 32


def test_absent_keys_have_transformers_values() -> None:
    config = TINY.config()
    for key in ("rope_theta", "rms_norm_eps", "num_key_value_heads"):
        del config[key]
    model = Mixtral(config | {"num_attention_heads": 16}, "here/config.json")
    check_with_transformers(model)
    assert model.rope.theta == 1e6
    assert model.facts.n_kv_heads == 8


def test_rows_of_queries_and_keys() -> None:
    """The first half of a head's dimensions alternates with the second; so it is in keys."""
    model = model_of()
    named = {tensor.name: tensor for tensor in model.gguf_tensors(stored_of(TINY.tensors()))}
    order = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]
    for name, n_heads in (("q", 4), ("k", 2)):
        transform = named[f"blk.0.attn_{name}.weight"].transform
        assert transform is not None
        rows = np.arange(16 * n_heads, dtype=np.float32)[:, None]
        expected = [head * 16 + row for head in range(n_heads) for row in order]
        assert transform(rows)[:, 0].tolist() == expected
    assert named["blk.0.attn_v.weight"].transform is None


def test_yarn_in_a_file_without_the_size_of_a_head() -> None:
    """The config that is read from it has the size, which transformers needs."""
    header = header_of(model_of(), stored_of(TINY.tensors()))
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 128}
    scaled = {f"llama.rope.scaling.{key}": value for key, value in yarn.items()}
    found = model_from_gguf(replace(header, metadata={**header.metadata, **scaled}), BY_GGUF)
    assert found.config["head_dim"] == 16
    check_with_transformers(found.model)


@pytest.mark.parametrize("count", [None, 0])
def test_dense_files_are_refused(count: int | None) -> None:
    header = header_of(model_of(), stored_of(TINY.tensors()))
    metadata = {k: v for k, v in header.metadata.items() if "expert" not in k}
    if count is not None:
        metadata["llama.expert_count"] = count
    with pytest.raises(UnsupportedModelError, match="missing or 0: this is a dense model"):
        model_from_gguf(replace(header, metadata=metadata), BY_GGUF)
