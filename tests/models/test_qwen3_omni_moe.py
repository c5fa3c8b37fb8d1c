"""Qwen3-Omni-MoE: the thinker is described, and all else is carried and counted nowhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.description import Carried, Expert
from reap2gguf.models.qwen3_vl_moe import Qwen3OmniMoe
from reap2gguf.models.table import describe
from reap2gguf.models.transformers_config import check_with_transformers
from tests.families.qwen_vl import OMNI
from tests.models.oracles import mean_kl, of_llama_cpp, of_transformers, pruned


def model_of(change: Callable[[Any], Any] = lambda config: None) -> Any:
    config = OMNI.config()
    change(config)
    model = Qwen3OmniMoe(config, "here/config.json", OMNI.tensors().keys())
    check_with_transformers(model)
    return model


def test_what_is_not_the_thinkers_text_model_is_carried() -> None:
    model = model_of()
    roles = {name: model.role(name) for name in OMNI.tensors()}
    carried = {name.split(".")[0:2][-1] for name, role in roles.items() if role == Carried()}
    assert carried == {"visual", "audio_tower", "model", "decoder"}
    assert not any(
        isinstance(role, Expert) for name, role in roles.items() if name.startswith("talker.")
    )
    assert model.facts.n_experts == 8
    found = {value.key: value.value for value in model.gguf_metadata()}
    assert found["qwen3vlmoe.n_deepstack_layers"] == 0
    assert found["qwen3vlmoe.expert_count"] == 8


def test_the_talker_keeps_its_experts(tmp_path: Path) -> None:
    folder = OMNI.write(tmp_path / "model")
    ours = pruned(folder, tmp_path / "pruned", 4)
    with Checkpoint.open(ours) as checkpoint:
        assert describe(checkpoint).facts.n_experts == 4
        assert checkpoint.config["talker_config"] == OMNI.config()["talker_config"]
        kept = OMNI.tensors()
        for name in checkpoint.tensors:
            if name.startswith(("talker.", "code2wav.", "thinker.visual.", "thinker.audio")):
                row = torch.from_numpy(checkpoint.read_float32(name))
                torch.testing.assert_close(row.reshape(kept[name].shape), kept[name].float())
    assert mean_kl(of_transformers(ours, 512), of_llama_cpp(ours, tmp_path, 512)) < 1e-6


def test_no_projector_is_written(tmp_path: Path) -> None:
    folder = OMNI.write(tmp_path / "model")
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        assert model.side_files(folder, checkpoint.tensors) == ()
        said = " ".join(model.caveats())
    assert "does not write a projector" in said
    assert "talker" in said
    without = replace(OMNI, vision=False).write(tmp_path / "without")
    with Checkpoint.open(without) as checkpoint:
        said = " ".join(describe(checkpoint).caveats())
    assert "projector" not in said
    assert "talker" not in said


def text(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["thinker_config"]["text_config"]
    return found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: text(c).update(norm_topk_prob=False), "norm_topk_prob is False"),
        (lambda c: text(c).update(sliding_window=16), "sliding_window is 16"),
        (lambda c: text(c).update(tie_word_embeddings=True), "tie_word_embeddings is True"),
        (lambda c: c["thinker_config"].update(tie_word_embeddings=True), "tie_word_embeddings is"),
        (lambda c: c["thinker_config"].pop("text_config"), "text_config is None"),
        (lambda c: c["thinker_config"].update(model_type="qwen3_vl_moe"), "'qwen3_vl_moe'"),
        (lambda c: text(c)["rope_scaling"].pop("mrope_section"), "mrope_section is missing"),
        (lambda c: text(c)["rope_scaling"].update(interleaved=False), "interleaved is False"),
        (lambda c: text(c).update(num_local_experts=4), "num_experts is 8, but num_local"),
    ],
)
def test_what_is_refused(change: Callable[[Any], Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        model_of(change)
