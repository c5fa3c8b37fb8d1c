"""The Modelfile: what the checkpoint says, in Ollama's words."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reap2gguf.bundle.manifest import Manifest, SideRecord
from reap2gguf.bundle.modelfile import modelfile
from tests.conftest import Bundle

# docs.ollama.com/modelfile
_PARAMETERS = {"temperature", "top_p", "top_k", "min_p", "repeat_penalty", "stop"}
TOKENS = [
    {"id": 7, "content": "<|im_end|>", "special": True},
    {"id": 8, "content": "<|end|>", "special": True},
    {"id": 9, "content": "the", "special": False},
    {"id": 10, "content": 'a"b\n', "special": True},
]


def lines(folder: Path, manifest: Manifest) -> list[str]:
    return [line for line in modelfile(manifest, folder).splitlines() if line[:1] not in ("#", "")]


@pytest.fixture(scope="module")
def manifest(built: Bundle) -> Manifest:
    return Manifest.load(built.gguf)


def test_a_bundle_has_one_that_is_hashed_and_carded(built: Bundle) -> None:
    text = (built.gguf / "Modelfile").read_text()
    assert "\nFROM ./example-IQ4_K_M.gguf\n# FROM ./example-BF16.gguf\n" in text
    assert 'PARAMETER stop "<|endoftext|>"' in text
    assert 'TEMPLATE "' not in text
    assert re.search(r"^[0-9a-f]{64}  Modelfile$", (built.gguf / "SHA256SUMS").read_text(), re.M)
    assert "ollama create example -f Modelfile" in (built.gguf / "README.md").read_text()


def test_what_the_generation_config_says_is_taken_over(tmp_path: Path, manifest: Manifest) -> None:
    values = {
        "do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0,
        "repetition_penalty": 1.05, "eos_token_id": [7, 8, 7], "max_length": 20,
    }  # fmt: skip
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": TOKENS}))
    found = lines(tmp_path, manifest)
    assert found == [
        "FROM ./example-IQ4_K_M.gguf", "PARAMETER temperature 0.6", "PARAMETER top_p 0.95",
        "PARAMETER min_p 0", "PARAMETER repeat_penalty 1.05", "PARAMETER top_k 20",
        'PARAMETER stop "<|im_end|>"', 'PARAMETER stop "<|end|>"',
    ]  # fmt: skip
    assert {line.split()[1] for line in found[1:]} == _PARAMETERS


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": "0.6\nFROM /etc/passwd", "top_k": 2.5, "top_p": 1e9, "min_p": True},
        {"temperature": 1e999, "top_k": -1, "repetition_penalty": 0, "eos_token_id": "7"},
        {"do_sample": False, "temperature": 0.6},
        {"eos_token_id": [9, 10, 11, None, [7], -7]},
    ],
)
def test_what_means_nothing_is_left_out(
    values: dict[str, Any], tmp_path: Path, manifest: Manifest
) -> None:
    text = json.dumps(values).replace("Infinity", "1e999")
    (tmp_path / "generation_config.json").write_text(text)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": TOKENS}))
    assert lines(tmp_path, manifest) == ["FROM ./example-IQ4_K_M.gguf"]


def test_projector_and_mtp_block_are_in_it(tmp_path: Path, manifest: Manifest) -> None:
    mtp = replace(manifest.pruning.mtp, state="pruned")
    side = SideRecord("mmproj-example-F16.gguf", "vision projector", 5, {})
    made = replace(manifest, side_files=(side,), pruning=replace(manifest.pruning, mtp=mtp))
    assert lines(tmp_path, made) == [
        "FROM ./example-IQ4_K_M.gguf",
        "FROM ./mmproj-example-F16.gguf",
    ]
    # older versions of Ollama refuse a parameter that they do not know
    assert "\n# PARAMETER draft_num_predict 2\n" in modelfile(made, tmp_path)
    assert "draft_num_predict" not in modelfile(manifest, tmp_path)


def test_no_and_a_broken_generation_config(tmp_path: Path, manifest: Manifest) -> None:
    assert lines(tmp_path, manifest) == ["FROM ./example-IQ4_K_M.gguf"]
    (tmp_path / "generation_config.json").write_text("{")
    assert lines(tmp_path, manifest) == ["FROM ./example-IQ4_K_M.gguf"]
    assert "cannot be read; Ollama's defaults apply" in modelfile(manifest, tmp_path)
