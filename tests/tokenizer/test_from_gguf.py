"""A tokenizer from a GGUF header gives the ids of the checkpoint's own, and of llama.cpp."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from reap2gguf.errors import ArtifactError, UnsupportedModelError
from reap2gguf.gguf_files.reader import GgufHeader, read_gguf_header
from reap2gguf.tokenizer.from_gguf import header_tokens, tokenizer_json, write_tokenizer
from reap2gguf.tokenizer.tokenizer import Tokenizer
from tests.exporting.files import export_files, plain
from tests.tiny import EXAMPLE, TinyQwen3Moe

TEXT = (
    "It's a test, isn't it?  3.14 and 100\n\n\tnaïve café 東京 <|im_start|>user\nHI<|im_end|> "
    "x = [1, 2]\r\n    return  \u00a0end"
)
TOKENS = "tokenizer.ggml.tokens"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gguf")
    model = TinyQwen3Moe(n_layers=1, hidden=32, width=8, head_dim=8, vocab=4096)
    return export_files(model.write(made / "model"), made, [plain("F16")])["F16"]


@pytest.fixture
def header(path: Path) -> GgufHeader:
    return read_gguf_header(path)


def changed(header: GgufHeader, **values: Any) -> GgufHeader:
    named = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return replace(header, metadata=header.metadata | named)


def test_the_same_ids(path: Path, header: GgufHeader, tmp_path: Path) -> None:
    write_tokenizer(header, tmp_path)
    found, own = Tokenizer(tmp_path), Tokenizer(EXAMPLE)
    ids = found.encode(TEXT)
    assert np.array_equal(ids, own.encode(TEXT))
    assert found.bos is None
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    theirs = llama.tokenize(TEXT.encode(), add_bos=False, special=True)
    llama.close()
    assert ids.tolist() == theirs
    assert "".join(header_tokens(header)[i] for i in ids[:1]) == "It"


def test_a_beginning_of_text(header: GgufHeader, tmp_path: Path) -> None:
    write_tokenizer(changed(header, add_bos_token=True, bos_token_id=7), tmp_path)
    assert Tokenizer(tmp_path).bos == 7


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"model": "llama"}, UnsupportedModelError, "its tokenizer is 'llama'"),
        ({"pre": "unheard-of"}, UnsupportedModelError, "the pre-tokenizer 'unheard-of'"),
        ({"pre": None}, UnsupportedModelError, "--reference"),
        ({"tokens": None}, ArtifactError, "expected a list of texts"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, ArtifactError, "has a token twice"),
        ({"token_type": [1]}, ArtifactError, "does not have a type for each of 4,096"),
        ({"merges": ["no token"]}, ArtifactError, "the merge 'no token' is of texts"),
        ({"add_bos_token": True, "bos_token_id": 4096}, ArtifactError, "bos_token_id is 4096"),
    ],
)
def test_a_header_that_cannot_be(
    header: GgufHeader, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        tokenizer_json(changed(header, **changes))
