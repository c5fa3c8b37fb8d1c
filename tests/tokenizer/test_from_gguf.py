"""A tokenizer from a GGUF header gives the ids of the checkpoint's own, and of llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from gguf import GGUFWriter

from reap2gguf.errors import ArtifactError, UnsupportedModelError
from reap2gguf.gguf_files.reader import GgufHeader, read_gguf_header
from reap2gguf.models.tokenizer_families import tokenizer_family
from reap2gguf.tokenizer.from_gguf import header_tokens, tokenizer_json, write_tokenizer
from reap2gguf.tokenizer.gguf_keys import add_tokenizer
from reap2gguf.tokenizer.pre_tokenizers import PRE_TOKENIZERS, is_settled
from reap2gguf.tokenizer.probe import HARD_CASES
from reap2gguf.tokenizer.tokenizer import Tokenizer
from tests.exporting.files import export_files, plain
from tests.tiny import EXAMPLE, TinyQwen3Moe
from tests.tokenizer.small import LlamaCpp, loaded_by_llama_cpp, mixed_text, write
from tests.tokenizer.small_spm import VOCAB_SIZE, piece_model, spm_tokenizer, write_spm
from tests.tokenizer.test_llama_bpe import family_of, of_family

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


@contextmanager
def written(writer: GGUFWriter, path: Path) -> Iterator[tuple[GgufHeader, LlamaCpp]]:
    """The header of a file of a tokenizer alone, and llama.cpp's tokenizer."""
    with loaded_by_llama_cpp(writer, path) as llama:
        yield read_gguf_header(path), llama


# where the library and llama.cpp class characters alike
TEXTS = [text for text in HARD_CASES if is_settled(text)]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_pre_tokenizer_splits_as_llama_cpp_does(name: str, tmp_path: Path) -> None:
    write(tmp_path, of_family(name))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|endoftext|>"}')
    writer = GGUFWriter(tmp_path / "x.gguf", "qwen3moe")
    add_tokenizer(writer, tmp_path, 4096, family_of(name))
    (tmp_path / "made").mkdir()
    wide = "。\u3000好\u2003ก\u3000、x\u00a0y "
    with written(writer, tmp_path / "x.gguf") as (header, llama):
        write_tokenizer(header, tmp_path / "made")
        found = Tokenizer(tmp_path / "made")
        for text in [*TEXTS, wide, mixed_text(seed=11, length=5_000)]:
            assert found.encode(text).tolist() == llama.encode(text), text
        assert (found.bos is not None) is PRE_TOKENIZERS[name].adds_bos


@pytest.mark.parametrize("puts_space", [True, False])
def test_a_sentencepiece_tokenizer(puts_space: bool, tmp_path: Path) -> None:
    description = spm_tokenizer()
    if not puts_space:
        del description["normalizer"]["normalizers"][0]
    config = {"add_prefix_space": puts_space}
    write_spm(tmp_path, description, piece_model(adds_space=puts_space), config)
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    add_tokenizer(writer, tmp_path, VOCAB_SIZE, tokenizer_family("mixtral"))
    (tmp_path / "made").mkdir()
    with written(writer, tmp_path / "x.gguf") as (header, llama):
        write_tokenizer(header, tmp_path / "made")
        found = Tokenizer(tmp_path / "made")
        assert found.bos == 1
        for text in [*TEXTS, mixed_text(seed=12, length=5_000), "a</s> b<unk>c<s>"]:
            assert found.encode(text).tolist() == llama.encode(text), text
    assert found.decode(found.encode("It's  a test").tolist()) == "It's  a test"


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"model": "t5"}, UnsupportedModelError, "its tokenizer is 't5'"),
        ({"model": "llama"}, ArtifactError, "scores does not have a score for each of 4,096"),
        ({"model": "llama", "scores": [0.0] * 4096}, ArtifactError, "no token <0x00>, expected"),
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
