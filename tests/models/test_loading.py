"""transformers' classes: each builds the text model, and loads the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from reap2gguf.models.loading import classes_of, text_model, whole_class
from reap2gguf.models.table import ARCHITECTURES
from tests.models.layouts import FIRST, Case


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_every_architecture_is_loaded(case: Case, tmp_path: Path) -> None:
    """With no weight missing, and none left over that is of the text model."""
    config, folder = case.tiny.config(), case.tiny.write(tmp_path / "model")
    model, report = whole_class(config).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    whole: Any = model.get_decoder()
    built = text_model(config, torch.bfloat16)
    assert type(built) is type(whole)
    assert {name: p.shape for name, p in built.named_parameters()} == {
        name: p.shape for name, p in whole.named_parameters()
    }
    assert all(parameter.is_meta for parameter in built.parameters())
    attention = "eager" if case.model.has_eager_attention else "sdpa"
    assert built.config._attn_implementation == attention


def test_an_architecture_that_is_not_in_the_table() -> None:
    assert whole_class({"architectures": ["Unheard"]}) is AutoModelForCausalLM
    assert whole_class({}) is AutoModelForCausalLM
    vision = {"architectures": ["Qwen3VLMoeForConditionalGeneration"]}
    assert whole_class(vision) is AutoModelForImageTextToText


def test_classes_are_transformers_own() -> None:
    import transformers

    for architecture in ARCHITECTURES:
        classes = classes_of(architecture)
        for name in filter(None, (classes.whole, classes.text, classes.processor)):
            assert hasattr(transformers, name)
