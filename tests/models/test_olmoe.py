"""OLMoE: what is refused by name, its header, and what pruning does to its router."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.olmoe import Olmoe
from tests.families.olmoe import TINY
from tests.models.oracles import pruned


def model_of(**changes: Any) -> Olmoe:
    return Olmoe({**TINY.config(), **changes}, "here/config.json", TINY.tensors().keys())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm_topk_prob": True}, "norm_topk_prob is True.*does not normalise"),
        ({"clip_qkv": 8.0}, "clip_qkv is 8.0.*does not clip"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2, expected num_attention_heads, 4"),
        ({"sliding_window": 64}, "sliding_window is 64.*full attention"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"intermediate_size": None}, "intermediate_size is null"),
    ],
    ids=str,
)
def test_what_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        model_of(**changes)


def test_the_header() -> None:
    model = model_of(rms_norm_eps=1e-6)
    found = {one.key.removeprefix("olmoe."): one.value for one in model.gguf_metadata()}
    assert found["feed_forward_length"] == 96
    assert "expert_feed_forward_length" not in found
    # llama.cpp's converter would write 1e-05
    assert found["attention.layer_norm_rms_epsilon"] == 1e-6


def test_pruning_raises_the_weights_of_the_others(tmp_path: Path) -> None:
    """What the caveat says, in transformers' own router: a softmax over fewer experts."""
    assert any("are not normalised" in caveat for caveat in model_of().caveats())
    folder = TINY.write(tmp_path / "model")
    hidden = torch.randn(5, TINY.hidden, generator=torch.Generator().manual_seed(0))
    weights = []
    for path in (folder, pruned(folder, tmp_path / "pruned", 4)):
        whole: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        router = whole.model.layers[0].mlp.gate
        with torch.inference_mode():
            weights.append(torch.softmax(hidden @ router.weight.T, -1)[:, :4])
            _, scores, _ = router(hidden)
        assert torch.allclose(scores, weights[-1].topk(2).values) is (path != folder)
    assert (weights[1] > weights[0]).all()
