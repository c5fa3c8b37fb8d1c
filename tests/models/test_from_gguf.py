"""A config from a GGUF header: the same facts, header, tensors, and the same logits."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import Phase, given, settings

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError, Reap2ggufError, UnsupportedModelError
from reap2gguf.gguf_files.reader import GgufHeader, GgufTensorInfo, read_gguf_header
from reap2gguf.models.contract import MoeModel
from reap2gguf.models.from_gguf import GgufModel, model_from_gguf
from reap2gguf.models.table import BY_GGUF
from reap2gguf.models.transformers_config import check_with_transformers
from tests.exporting.files import export_files, plain
from tests.models.drawn import Drawn
from tests.models.layouts import CASES, Case, stored_of
from tests.models.oracles import mean_kl, of_transformers, planned, pruned
from tests.models.synthetic import SyntheticMoe, TinySynthetic
from tests.models.test_any_config import ANY
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe


def header_of(model: MoeModel, stored: Mapping[str, Any]) -> GgufHeader:
    """The header of the F32 file that would be written, without the file."""
    metadata: dict[str, Any] = {"general.architecture": model.facts.gguf_arch}
    for entry in model.gguf_metadata():
        is_float = isinstance(entry.value, float)
        metadata[entry.key] = float(np.float32(entry.value)) if is_float else entry.value
    f32 = GGMLQuantizationType.F32
    tensors = {
        t.name: GgufTensorInfo(t.name, f32, t.shape, 0, 4 * math.prod(t.shape))
        for t in model.gguf_tensors(stored)
    }
    return GgufHeader(Path("some.gguf"), metadata, tensors)


def expect_same_model(
    model: MoeModel, header: GgufHeader, keep_mtp: bool = True, known: Any = BY_GGUF
) -> GgufModel:
    """What a header gives, if it describes the same model."""
    found = model_from_gguf(header, known, keep_mtp)
    name = model.facts.architecture
    facts = model.facts
    if model.n_gguf_blocks == facts.n_layers:  # a file does not have the MTP block
        trunk = tuple(layer for layer in facts.moe_layers if layer != facts.mtp_layer)
        facts = replace(facts, has_mtp=False, moe_layers=trunk)
    assert replace(found.model.facts, architecture=name) == facts
    again = header_of(found.model, found.template)
    assert again.metadata.keys() == header.metadata.keys()
    for key, value in header.metadata.items():
        if key.endswith("attn_factor"):
            assert again.metadata[key] == pytest.approx(value, rel=1e-6)
        else:
            assert again.metadata[key] == value, key
    assert [*again.tensors] == [*header.tensors]
    shapes = {name: info.shape for name, info in header.tensors.items()}
    assert {name: info.shape for name, info in again.tensors.items()} == shapes
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layout(case: Case) -> None:
    header = header_of(case.model, case.stored)
    check_with_transformers(expect_same_model(case.model, header, case.keep_mtp).model)


def test_a_family_that_is_not_in_the_table() -> None:
    """Dense layers, a router's bias and groups, and the MTP block as one more layer."""
    tensors = TinySynthetic().tensors()
    model = SyntheticMoe(TinySynthetic().config(), "here", tensors.keys())
    header = header_of(model, stored_of(tensors))
    metadata = header.metadata | {"synthetic.nextn_predict_layers": 1}
    known: dict[str, list[type[MoeModel]]] = {"synthetic": [SyntheticMoe]}
    found = model_from_gguf(replace(header, metadata=metadata), known)
    assert found.model.facts == model.facts
    assert found.template.keys() == tensors.keys()


def test_an_mtp_block_may_be_left_out() -> None:
    case = next(c for c in CASES if getattr(c.tiny, "mtp", False) and c.keep_mtp)
    header = header_of(case.model, case.stored)
    found = model_from_gguf(header, BY_GGUF, keep_mtp=False)
    assert not found.model.facts.has_mtp
    assert not any(name.startswith("mtp.") for name in found.template)
    assert found.model.facts.n_layers == case.model.facts.n_layers


def apart(drawn: Drawn) -> Drawn:
    """The same values with flat names and one tensor per expert, as a template has them."""
    if hasattr(drawn.tiny, "apart"):
        return replace(drawn, tiny=drawn.tiny.apart())
    layouts = {"nested", "fused", "fused_mtp", "vision"} & {f.name for f in fields(drawn.tiny)}
    return replace(drawn, tiny=replace(drawn.tiny, **dict.fromkeys(layouts, False)))


def compare_drawn(drawn: Drawn, with_logits: bool) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        drawn.write(folder / "model")
        try:
            model = planned(folder / "model")
        except Reap2ggufError:
            return "refused"
        with Checkpoint.open(folder / "model") as checkpoint:
            found = expect_same_model(model, header_of(model, checkpoint.tensors))
        check_with_transformers(found.model)
        # transformers cannot load the source with what is left of its quantization
        if not with_logits or any("pruned config.json" in caveat for caveat in model.caveats()):
            return "the same"
        apart(drawn).write(folder / "apart")
        (folder / "apart" / "config.json").write_text(json.dumps(found.config))
        vocab = model.facts.vocab_size
        ours = of_transformers(folder / "apart", vocab)
        # leftovers that transformers stops at are not in a pruned config
        whole = pruned(folder / "model", folder / "pruned")
        assert mean_kl(of_transformers(whole, vocab), ours) < 1e-6
        return "the same"


@given(drawn=ANY)
@settings(max_examples=12, phases=[Phase.generate])
def test_drawn_configs(drawn: Drawn) -> None:
    compare_drawn(drawn, with_logits=False)


@pytest.mark.slow
@given(drawn=ANY)
@settings(max_examples=150, phases=[Phase.generate, Phase.shrink])
def test_drawn_configs_compute_the_same(drawn: Drawn) -> None:
    compare_drawn(drawn, with_logits=True)


YARN = {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3}


@pytest.mark.parametrize(
    "drawn",
    [
        Drawn(TinyQwen3Moe(hidden=40, head_dim=24, vocab=320), "own", (), ()),
        Drawn(TinyQwen3Moe(vocab=320), "none", (("tie_word_embeddings", True),), ()),
        Drawn(TinyQwen3Moe(vocab=320), "own", (("rope_scaling", YARN), ("rope_theta", 5e5)), ()),
        Drawn(TinyQwen35Moe(layers="lffl", head_dim=48, vocab=320), "own", (), ()),
    ],
    ids=["plain", "tied", "yarn", "qwen3.5"],
)
def test_transformers_computes_the_same(drawn: Drawn) -> None:
    assert compare_drawn(drawn, with_logits=True) == "the same"


@pytest.mark.parametrize("tiny", [TinyQwen3Moe(), TinyQwen35Moe()], ids=["qwen3", "qwen3.5"])
def test_a_file_that_was_written(tiny: Any, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "model")
    path = export_files(folder, tmp_path, [plain("F32")])["F32"]
    model = planned(folder)
    found = model_from_gguf(read_gguf_header(path), BY_GGUF)
    assert replace(found.model.facts, architecture=model.facts.architecture) == model.facts
    assert found.model.gguf_metadata() == model.gguf_metadata()


# what is not written by this program, or is not possible

QWEN3 = next(c for c in CASES if c.layout == "2D")
QWEN35 = next(c for c in CASES if c.architecture.startswith("Qwen3_5") and c.keep_mtp)
Q3, Q35 = "qwen3moe.", "qwen35moe."


def changed(case: Case, **changes: Any) -> GgufHeader:
    """A header with other values; ABSENT removes a key. `_` stands for dots."""
    header = header_of(case.model, case.stored)
    metadata = dict(header.metadata)
    for key, value in changes.items():
        if value is None:
            del metadata[key]
        else:
            metadata[key] = value
    return replace(header, metadata=metadata)


def facts_of(header: GgufHeader) -> Any:
    return model_from_gguf(header, BY_GGUF).model.facts


def test_what_llama_cpp_takes_for_absent_keys() -> None:
    case = replace(QWEN3, layout="2D")
    gone = {Q3 + "rope.freq_base": None, Q3 + "attention.head_count_kv": [2, 2]}
    assert facts_of(changed(case, **gone)) == case.model.facts
    # a head is a share of the hidden size: here that is what it has
    lengths = {Q3 + "attention.key_length": None, Q3 + "attention.value_length": None}
    assert facts_of(changed(case, **lengths)) == case.model.facts
    scaled = {Q3 + "rope.scale_linear": 4.0}
    config = model_from_gguf(changed(case, **scaled), BY_GGUF).config
    assert config["rope_parameters"]["rope_type"] == "linear"
    none = {Q3 + "rope.scaling.type": "none", Q3 + "rope.scaling.factor": 4.0}
    config = model_from_gguf(changed(case, **none), BY_GGUF).config
    assert config["rope_parameters"]["rope_type"] == "default"


def test_old_headers_of_qwen35() -> None:
    gone = {Q35 + "attention.recurrent_layers": None, Q35 + "full_attention_interval": None}
    gone[Q35 + "expert_shared_feed_forward_length"] = None
    found = model_from_gguf(changed(QWEN35, **gone), BY_GGUF)
    assert found.config["layer_types"] == [*["linear_attention"] * 3, "full_attention"]
    assert found.config["shared_expert_intermediate_size"] == 32


def test_a_quantizer_drops_leading_sizes_of_one() -> None:
    header = header_of(QWEN35.model, QWEN35.stored)
    name = "blk.0.ffn_gate_inp_shexp.weight"
    assert header.tensors[name].shape == (1, 64)
    tensors = header.tensors | {name: replace(header.tensors[name], shape=(64,))}
    assert facts_of(replace(header, tensors=tensors)).n_experts == 8


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("general.architecture", "falcon", "architecture 'falcon' is not implemented"),
        ("general.architecture", None, "expected the name of an architecture"),
        (Q3 + "block_count", 2**40, "block_count is 1099511627776"),
        (Q3 + "block_count", 0, "block_count is 0"),
        (Q3 + "block_count", None, "block_count is missing"),
        (Q3 + "expert_count", 65536, "has 8 experts, expected 65,536"),
        (Q3 + "expert_count", "8", "expert_count is '8'"),
        (Q3 + "expert_used_count", 9, "expert_used_count is 9"),
        (Q3 + "embedding_length", 65, "has the shape|shape"),
        (Q3 + "attention.head_count", 3, "expected a multiple"),
        (Q3 + "attention.head_count_kv", [2, 1], "expected the same in every layer"),
        (Q3 + "attention.value_length", 8, "keys and values have one size"),
        (Q3 + "attention.layer_norm_rms_epsilon", float("nan"), "expected a finite number"),
        (Q3 + "expert_gating_func", 2, "softmax"),
        (Q3 + "vocab_size", 7, "vocab_size is 7"),
        (Q3 + "rope.dimension_count", 8, "whole heads are rotated"),
        (Q3 + "rope.scaling.type", "longrope", "expected none, linear or yarn"),
        (Q3 + "rope.scaling.type", 3, "expected a text"),
        (Q35 + "nextn_predict_layers", 5, "from 0 to 1"),
        (Q35 + "rope.dimension_sections", [1, 1], "has 2 values, expected 4"),
        (Q35 + "rope.dimension_sections", None, "has 0 values, expected 4"),
        (Q35 + "ssm.inner_size", 129, "expected a multiple"),
        (Q35 + "ssm.state_size", 8, "linear_value_head_dim"),
        (Q35 + "attention.recurrent_layers", [True], "times true or false"),
    ],
)  # fmt: skip
def test_a_header_that_cannot_be(key: str, value: Any, said: str) -> None:
    header = changed(QWEN35 if key.startswith(Q35) else QWEN3, **{key: value})
    with pytest.raises((UnsupportedModelError, CheckpointError), match=said) as caught:
        model_from_gguf(header, BY_GGUF)
    assert "some.gguf" in str(caught.value)


@pytest.mark.parametrize(
    ("remove", "add", "said"),
    [
        ("blk.1.attn_q.weight", None, "'blk.1.attn_q.weight' is missing"),
        ("token_embd.weight", None, "'token_embd.weight' is missing"),
        (None, "blk.0.attn_q.bias", "'blk.0.attn_q.bias' is not one of qwen3moe"),
        (None, "blk.2.attn_q.weight", "'blk.2.attn_q.weight' is not one of qwen3moe"),
        (None, "blk.0.ffn_gate_up_exps.weight", "is not one of qwen3moe"),
    ],
)
def test_tensors_that_do_not_fit(remove: str | None, add: str | None, said: str) -> None:
    header = header_of(QWEN3.model, QWEN3.stored)
    tensors = dict(header.tensors)
    if remove:
        del tensors[remove]
    if add:
        like = "blk.0.ffn_gate_exps.weight" if "_exps" in add else "output_norm.weight"
        tensors[add] = replace(tensors[like], name=add)
    with pytest.raises((UnsupportedModelError, CheckpointError), match=said):
        model_from_gguf(replace(header, tensors=tensors), BY_GGUF, keep_mtp=False)


def test_a_dense_share_as_old_files_have_it() -> None:
    """Without its own key, an expert's width is the dense one divided by the experts per token."""
    gone = {Q3 + "expert_feed_forward_length": None, Q3 + "feed_forward_length": 64}
    assert facts_of(changed(QWEN3, **gone)).expert_width == 32


def test_values_come_in_their_shortest_form() -> None:
    header = header_of(QWEN3.model, QWEN3.stored)
    assert header.metadata[Q3 + "attention.layer_norm_rms_epsilon"] != 1e-6
    assert model_from_gguf(header, BY_GGUF).config["rms_norm_eps"] == 1e-6
    assert torch.tensor(1e-6).item() == header.metadata[Q3 + "attention.layer_norm_rms_epsilon"]
