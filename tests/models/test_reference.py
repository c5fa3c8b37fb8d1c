"""The reference model against the program's own description of a config of its shapes."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.models.reference import REFERENCE_FACTS, reference_tensors
from reap2gguf.models.table import describe
from reap2gguf.quantizing.recipe import load_recipe
from reap2gguf.quantizing.resolve import resolve
from tests.tiny import REPOSITORY


def test_names_and_shapes_are_those_of_the_real_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "bench")
    module = import_module("sparse_checkpoint")
    config, shapes = module.SHAPES["qwen3-30b-a3b"]
    module.write(config, shapes(config), tmp_path / "model")
    with Checkpoint.open(tmp_path / "model") as checkpoint:
        model = describe(checkpoint)
        tensors = model.gguf_tensors(checkpoint.tensors)
    expected = {one.name: (one.shape, one.always_f32) for one in tensors}
    assert {one.name: (one.shape, one.always_f32) for one in reference_tensors()} == expected
    assert model.facts == REFERENCE_FACTS
    for name in ("Q4_K_M", "IQ3_XS", "unsloth-iq4km"):
        asked = load_recipe(name)
        sizes = [
            resolve(asked, of, model.facts, 128, True).n_bytes
            for of in (tensors, reference_tensors())
        ]
        assert sizes[0] == sizes[1]
