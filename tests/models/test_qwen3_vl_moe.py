"""Qwen3-VL-MoE: both orientations of its experts, its tower's layers, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError, Reap2ggufError, UnsupportedModelError
from reap2gguf.exporting.header_facts import HeaderNames
from reap2gguf.exporting.model_files import export_side
from reap2gguf.models.description import SideFile
from reap2gguf.models.qwen3_vl_moe import Qwen3VlMoe
from reap2gguf.models.table import describe
from reap2gguf.models.transformers_config import check_with_transformers
from reap2gguf.progress import Silent
from tests.exporting.files import export_files, plain
from tests.families.qwen_vl import VL, TinyQwen3Vl
from tests.models.config_rows import Carried, Elsewhere, Read, Refused
from tests.models.layouts import stored_of
from tests.models.oracles import mean_kl, of_llama_cpp, of_transformers, pruned
from tests.models.test_config_fields import VISION

PUBLISHED = {"sections": (24, 20, 20), "head_dim": 128, "n_heads": 2, "n_kv_heads": 1}


def model_of(tiny: TinyQwen3Vl = VL, change: Callable[[Any], Any] = lambda config: None) -> Any:
    config = tiny.config()
    change(config)
    model = Qwen3VlMoe(config, "here/config.json", tiny.tensors().keys())
    check_with_transformers(model)
    return model


def header(model: Any) -> dict[str, Any]:
    found = {value.key: value.value for value in model.gguf_metadata()}
    return {key.removeprefix("qwen3vlmoe."): value for key, value in found.items()}


@pytest.mark.parametrize("n_kept", [8, 4])
def test_both_orientations_are_one_model(n_kept: int, tmp_path: Path) -> None:
    """transformers loads either; llama.cpp computes the same from the file of each."""
    logits = []
    for resaved in (False, True):
        folder = replace(VL, resaved=resaved).write(tmp_path / f"model{resaved}")
        ours = pruned(folder, tmp_path / f"pruned{resaved}", n_kept)
        logits.append(of_transformers(ours, VL.vocab))
        logits.append(of_llama_cpp(ours, tmp_path, VL.vocab))
    torch.testing.assert_close(logits[2], logits[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[3], logits[1], rtol=0, atol=0)
    assert mean_kl(logits[0], logits[1]) < 1e-6


@pytest.mark.parametrize(("hidden", "width"), [(48, 24), (24, 24)])
def test_experts_whose_orientation_does_not_show(hidden: int, width: int) -> None:
    tiny = replace(VL, hidden=hidden, width=width, vision=False)
    with pytest.raises(UnsupportedModelError, match="does not show whether its matrices are"):
        model_of(tiny).check_tensors(stored_of(tiny.tensors()))


def test_experts_of_neither_orientation() -> None:
    stored = stored_of(VL.tensors())
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    stored[name] = replace(stored[name], shape=(8, 24, 65))
    with pytest.raises(CheckpointError, match=r"\[8, 24, 65\], expected \[8, 64, 24\]"):
        model_of().check_tensors(stored)


def test_experts_one_by_one_are_refused() -> None:
    """transformers gives such a checkpoint random experts."""
    tiny = replace(VL, fused=False)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.experts\.0.* only fused"):
        model_of(tiny).check_tensors(stored_of(tiny.tensors()))


def test_the_header() -> None:
    found = header(model_of())
    assert found["n_deepstack_layers"] == 2
    assert found["rope.dimension_sections"] == [8, 4, 4, 0]
    assert found["rope.freq_base"] == 5e6
    assert header(model_of(replace(VL, deepstack=())))["n_deepstack_layers"] == 0


def test_published_sections() -> None:
    """Those of Qwen3-VL: two pairs of a head stay unrotated in llama.cpp, and turn little."""
    model = model_of(replace(VL, **PUBLISHED))
    assert header(model)["rope.dimension_sections"] == [24, 20, 20, 0]
    caveats = " ".join(model.caveats())
    assert "does not rotate the pairs 61, 62 of a head" in caveats
    assert "over the whole context of 512 tokens" in caveats
    longer = model_of(
        replace(VL, **PUBLISHED),
        lambda config: config["text_config"].update(max_position_embeddings=262144),
    )
    # 262144 * 5e6 ** (-2 * 61 / 128)
    assert "by up to 0.11 radians" in " ".join(longer.caveats())
    assert "does not rotate" not in " ".join(model_of(replace(VL, sections=(6, 5, 5))).caveats())


def test_sections_that_would_turn_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"llama\.cpp cannot express it"):
        model_of(replace(VL, theta=1e4))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["text_config"].update(norm_topk_prob=False), "norm_topk_prob is False"),
        (lambda c: c["text_config"]["rope_scaling"].pop("mrope_section"), "mrope_section is miss"),
        (lambda c: c["text_config"]["rope_scaling"].update(interleaved=False), "interleaved is"),
        (lambda c: c["text_config"].update(model_type="qwen3_moe"), "model_type is 'qwen3_moe'"),
        (lambda c: c["text_config"].update(model_type=None), "model_type is null"),
        (lambda c: c["vision_config"].update(model_type="clip"), "model_type is 'clip'"),
        (lambda c: c.update(model_type="qwen3_vl_moe_text"), "model_type is 'qwen3_vl_moe_text'"),
        (lambda c: c.update(hidden_size=32), "text_config.hidden_size is 64, but hidden_size"),
        (lambda c: c.pop("vision_config"), "deepstack_visual_indexes is missing"),
        (lambda c: c["vision_config"].pop("deepstack_visual_indexes"), "indexes is missing"),
        (lambda c: c["vision_config"].update(deepstack_visual_indexes=[3]), "indexes"),
        (lambda c: c["vision_config"].update(deepstack_visual_indexes=[1, 1]), "each layer once"),
        (lambda c: c["text_config"].update(num_hidden_layers=2), "fewer than the text model's 2"),
        (lambda c: c["text_config"].update(use_sliding_window=True), "use_sliding_window is True"),
    ],
)
def test_what_is_refused(change: Callable[[Any], Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        model_of(change=change)


def test_dense_layers_are_not_for_llama_cpp() -> None:
    model = model_of(
        replace(VL, vision=False), lambda c: c["text_config"].update(mlp_only_layers=[1])
    )
    assert any("llama.cpp cannot load them" in caveat for caveat in model.caveats())


def test_tying_goes_by_the_top(tmp_path: Path) -> None:
    """transformers' default of the text model's section is true, and has no effect."""
    config = VL.config()
    config["text_config"]["tie_word_embeddings"] = True
    folder = VL.write(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(config))
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        assert not model.facts.tied_embeddings
        again = model.pruned_config(4)
    assert not again["tie_word_embeddings"]
    assert not again["text_config"]["tie_word_embeddings"]
    found = of_llama_cpp(folder, tmp_path, VL.vocab)
    assert mean_kl(of_transformers(folder, VL.vocab), found) < 1e-6


# the tower


def test_layers_that_enter_early_are_in_the_projector(tmp_path: Path) -> None:
    folder = VL.write(tmp_path / "model")
    path = tmp_path / "mmproj.gguf"
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        (side,) = model.side_files(folder, checkpoint.tensors)
        export_side(checkpoint, model, HeaderNames("tiny"), path, side, 2, Silent())
    values = {value.key: value.value for value in side.values}
    assert values["clip.vision.is_deepstack_layers"] == [True, False, True]
    written = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    stored = VL.tensors()
    for merger, layer in enumerate((0, 2)):
        for name, gguf_name in (("norm", "norm"), ("linear_fc1", "fc1"), ("linear_fc2", "fc2")):
            for part in ("weight", "bias"):
                own = stored[f"model.visual.deepstack_merger_list.{merger}.{name}.{part}"]
                found = written[f"v.deepstack.{layer}.{gguf_name}.{part}"]
                assert found.dtype == (np.float16 if own.ndim == 2 else np.float32)
                np.testing.assert_array_equal(found, own.float().numpy().astype(found.dtype))
    used = {slab.stored for tensor in side.tensors for slab in tensor.slabs}
    assert used == {name for name in stored if name.startswith("model.visual.")}


VISION_ROWS = {
    **VISION,
    "deepstack_visual_indexes": Read([0, 1]),
    "depth": Read(4),
    "out_hidden_size": Refused((32, "absent")),
}


@pytest.mark.parametrize(
    "name", [name for name, row in VISION_ROWS.items() if not isinstance(row, Elsewhere)]
)
def test_fields_of_the_tower(name: str, tmp_path: Path) -> None:
    folder = VL.write(tmp_path / "model")
    row = VISION_ROWS[name]
    with Checkpoint.open(folder) as checkpoint:
        expected = describe(checkpoint).side_files(folder, checkpoint.tensors)
    others = row.others if isinstance(row, Refused) else (row.other,)  # type: ignore[union-attr]
    for other in others:
        config = copy.deepcopy(VL.config())
        config["vision_config"].pop(name, None)
        if other != "absent":
            config["vision_config"][name] = other
        (folder / "config.json").write_text(json.dumps(config))
        try:
            with Checkpoint.open(folder) as checkpoint:
                found = describe(checkpoint).side_files(folder, checkpoint.tensors)
        except Reap2ggufError:
            assert not isinstance(row, Carried)
            continue
        assert not isinstance(row, Refused)
        changes = signs_of(found[0]) != signs_of(expected[0])
        assert changes is isinstance(row, Read)


def signs_of(side: SideFile) -> Any:
    """What a projector file holds, transforms left out."""
    return side.values, [(tensor.name, tensor.slabs) for tensor in side.tensors]


def test_a_text_file_loads_with_any_number_of_early_layers(tmp_path: Path) -> None:
    """The key of early layers has no effect on text."""
    logits = []
    for number, deepstack in enumerate(((), (0,), (0, 2))):
        folder = replace(VL, deepstack=deepstack).write(tmp_path / str(number))
        logits.append(of_llama_cpp(folder, tmp_path, VL.vocab))
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=0, atol=0)


def test_types_of_the_file(tmp_path: Path) -> None:
    folder = VL.write(tmp_path / "model")
    path = export_files(folder, tmp_path, [plain("BF16")])["BF16"]
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    assert types["blk.0.ffn_gate_inp.weight"] == "F32"
    assert {kind for name, kind in types.items() if "_exps" in name} == {"BF16"}
