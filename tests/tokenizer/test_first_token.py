from __future__ import annotations

import json
from pathlib import Path

import pytest

from reap2gguf.models.tokenizer_families import tokenizer_family
from reap2gguf.tokenizer.caveats import BOS_CAVEAT
from reap2gguf.tokenizer.check import check_tokenizer
from reap2gguf.tokenizer.first_token import forced_bos
from reap2gguf.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.small_gemma import VOCAB_SIZE, gemma_tokenizer, write_gemma
from tests.tokenizer.test_gemma import written

FAMILY = tokenizer_family("gemma4")


def test_a_file_that_leaves_the_first_token_to_templates(tmp_path: Path) -> None:
    description = gemma_tokenizer() | {"post_processor": None}
    folder = written(write_gemma(tmp_path, description=description))
    assert check_tokenizer(folder, VOCAB_SIZE, FAMILY) == (BOS_CAVEAT,)
    assert forced_bos(folder) == "<bos>"
    assert Tokenizer(folder).bos == 2
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral", "eos_token_id": 1}))
    assert forced_bos(folder) is None
    assert Tokenizer(folder).bos is None


@pytest.mark.parametrize("model_type", ["gemma4", "gemma4_text"])
def test_a_named_token_may_be_an_object(model_type: str, tmp_path: Path) -> None:
    folder = write_gemma(tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for bos, expected in (({"content": "<bos>"}, "<bos>"), (None, None), (7, None)):
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": bos}))
        assert forced_bos(folder) == expected
