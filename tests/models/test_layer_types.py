from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.config import ConfigReader
from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.layer_types import read_layer_types
from reap2gguf.models.table import describe
from tests.exporting.files import write_small_tokenizer
from tests.models.oracles import SMALL_VOCAB, mean_kl, of_llama_cpp, of_transformers
from tests.tiny import TinyQwen35Moe

KINDS = {"l": "linear_attention", "f": "full_attention"}


def types(letters: str) -> list[str]:
    return [KINDS[letter] for letter in letters]


def read(**values: Any) -> tuple[tuple[str, ...], int | None]:
    n_layers = len(values.get("layer_types") or "four")
    return read_layer_types(ConfigReader({"num_hidden_layers": n_layers} | values, "here"))


@pytest.mark.parametrize(
    ("letters", "interval"),
    [
        ("lllf", 4), ("lllflllf", 4), ("lflf", 2), ("lflfl", 2), ("llfll", 3), ("lf", 2),
        ("fl", None), ("lffl", None), ("lllflf", None), ("llflllf", None),
    ],
)  # fmt: skip
def test_the_interval_is_that_of_the_layers(letters: str, interval: int | None) -> None:
    assert read(layer_types=types(letters)) == (tuple(types(letters)), interval)
    if interval is not None:
        given = read(layer_types=types(letters), full_attention_interval=interval)
        assert given == read(layer_types=types(letters))


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "lllf"), ({"full_attention_interval": 2}, "lflf")]
)
def test_layers_of_an_interval(given: dict[str, int], expected: str) -> None:
    from transformers import CONFIG_MAPPING

    found = read(**given)[0]
    config = CONFIG_MAPPING["qwen3_5_moe_text"](num_hidden_layers=4, **given)
    assert list(found) == types(expected) == config.layer_types


@pytest.mark.parametrize("letters", ["lflf", "fl", "lffl", "lllf"])
def test_an_interval_that_contradicts_the_layers(letters: str) -> None:
    with pytest.raises(UnsupportedModelError, match="full_attention_interval is 3, but layer_typ"):
        read(layer_types=types(letters), full_attention_interval=3)


@pytest.mark.parametrize(("letters", "words"), [("ll", "is full_att"), ("ff", "is linear_att")])
def test_layers_of_one_kind(letters: str, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"no layer of layer_types {words}"):
        read(layer_types=types(letters))


@pytest.mark.parametrize("layers", ["lflf", "lffl"])
def test_llama_cpp_reads_the_layers(layers: str, tmp_path: Path) -> None:
    tiny = TinyQwen35Moe(
        hidden=32, n_experts=3, layers=layers, nested=False, mtp=False, vocab=SMALL_VOCAB
    )
    folder = tiny.write(tmp_path / "model")
    write_small_tokenizer(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if "token_id" not in k}))
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
    header = {value.key.partition(".")[2]: value.value for value in model.gguf_metadata()}
    assert header["attention.recurrent_layers"] == [letter == "l" for letter in layers]
    if layers == "lflf":
        assert header["full_attention_interval"] == 2
        assert model.caveats() == ()
    else:
        assert "full_attention_interval" not in header
        (caveat,) = model.caveats()
        assert "need a llama.cpp that reads attention.recurrent_layers" in caveat
    found = of_llama_cpp(folder, tmp_path, SMALL_VOCAB)
    assert mean_kl(of_transformers(folder, SMALL_VOCAB), found) < 1e-5
