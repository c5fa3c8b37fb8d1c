"""What every architecture of the table must do, whatever it is.

A line of the table is held to this by a layout in tests/models/layouts.py. transformers and
llama.cpp are the oracles; facts of one family alone are tested in the family's own file.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFValueType

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError, UnknownTensorError
from reap2gguf.gguf_files.rows import read_rows, rows_per_matrix
from reap2gguf.models.contract import MoeModel
from reap2gguf.models.description import (
    Carried,
    Dropped,
    Expert,
    GgufTensor,
    Router,
    experts_of,
    is_of_experts,
)
from reap2gguf.models.loading import text_model
from reap2gguf.models.table import ARCHITECTURES, describe
from reap2gguf.observing.saliency import SaliencyObserver
from reap2gguf.observing.sweep import sweep
from reap2gguf.observing.targets import layer_targets
from reap2gguf.options import ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.pruning.view import PrunedView
from reap2gguf.pruning.write import write_pruned
from reap2gguf.tokenizer.form import recognise_pre_tokenizer
from reap2gguf.tokenizer.tokenizer_files import read_tokenizer_json
from tests.models.layouts import CASES, FIRST, LAYOUTS, Case, rows_of_slabs, stored_of, tensors_of
from tests.models.oracles import loaded
from tests.tiny import EXAMPLE, ONE_THREAD

every_layout = pytest.mark.parametrize("case", CASES, ids=str)
every_architecture = pytest.mark.parametrize("case", FIRST, ids=str)
EXPERTS = re.compile(r"\.experts\.|\.block_sparse_moe\.(in|out)put_linear\.")
SPELLINGS = {
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3"),
    "down": ("down_proj", "w2", "output_linear"),
    "gate_up": ("gate_up_proj", "input_linear"),
}
NEEDED_KEYS = (
    "block_count",
    "context_length",
    "embedding_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "expert_count",
    "expert_used_count",
    "feed_forward_length|expert_feed_forward_length",
    "rope.freq_base",
)


def test_every_architecture_has_a_layout() -> None:
    assert LAYOUTS.keys() == ARCHITECTURES.keys()


def tensors(case: Case) -> tuple[GgufTensor, ...]:
    return case.model.gguf_tensors(case.stored)


@every_layout
def test_every_stored_tensor_is_explained(case: Case) -> None:
    model = case.model
    model.check_tensors(case.stored)
    for name, stored in case.stored.items():
        role = model.role(name)
        match = re.search(r"\blayers\.(\d+)\.", name)
        if role.layer is not None:
            prefix = model.block_prefix(role.layer)
            assert name.startswith(prefix)
            if role.layer != model.facts.mtp_layer:
                assert match is not None
                assert int(match[1]) == role.layer
        is_expert = EXPERTS.search(name) is not None and not name.startswith("talker.")
        assert isinstance(role, Expert) is (is_expert and not isinstance(role, Dropped))
        if isinstance(role, Expert):
            assert any(part in name for part in SPELLINGS[role.projection])
            number = re.search(r"\.experts\.(\d+)\.", name)
            assert role.expert == (int(number[1]) if number else None)
            if number:
                start, end = number.span(1)
                assert model.renumbered(name, 130) == f"{name[:start]}130{name[end:]}"
        elif isinstance(role, Router):
            assert stored.shape[role.axis] == model.facts.n_experts


@every_layout
def test_a_tensor_that_no_rule_explains_is_refused(case: Case) -> None:
    prefix = case.model.block_prefix(case.model.facts.moe_layers[0])
    layers = [
        int(match[1])
        for match in map(re.compile(r"\blayers\.(\d+)\.").search, case.stored)
        if match
    ]
    last = case.model.block_prefix(0).replace("layers.0.", f"layers.{max(layers) + 1}.")
    for name in (
        "weight",
        prefix + "extra.weight",
        prefix + "rotary_emb.inv_freq",
        last + "self_attn.rotary_emb.inv_freq",
        prefix + "mlp.experts.0.gate_up_proj.weight",
        prefix + "mlp.experts.01.up_proj.weight",
        last + "input_layernorm.weight",
    ):
        stored = {**case.stored, **stored_of({name: torch.ones(2)})}
        with pytest.raises(UnknownTensorError, match=re.escape(repr(name))):
            case.model.check_tensors(stored)


@every_layout
def test_frequencies_that_old_versions_of_transformers_saved_are_carried(case: Case) -> None:
    """Moonlight and Kimi-K2 have them in every layer; transformers and llama.cpp read none."""
    prefixes = [case.model.block_prefix(layer) for layer in range(case.model.facts.n_layers)]
    names = [prefix + "self_attn.rotary_emb.inv_freq" for prefix in prefixes]
    stored = {**case.stored, **stored_of(dict.fromkeys(names, torch.ones(2)))}
    case.model.check_tensors(stored)
    assert {case.model.role(name) for name in names} == {Carried()}
    made = [(tensor.name, tensor.slabs) for tensor in case.model.gguf_tensors(stored)]
    assert made == [(tensor.name, tensor.slabs) for tensor in tensors(case)]


@every_layout
def test_every_stored_value_is_used_once(case: Case) -> None:
    stored = case.stored
    made = [tensor for tensor in tensors(case) if tensor.made is None]
    assert len({tensor.name for tensor in tensors(case)}) == len(tensors(case))
    for tensor in made:
        assert len(tensor.slabs) in (1, tensor.n_matrices)
        if tensor.transform is None:
            n_rows = len(rows_of_slabs([tensor], stored))
            per_row = tensor.n_columns if len(tensor.shape) > 1 else 1
            if tensor.slabs[0].columns is not None:
                per_row = tensor.shape[-2]
            assert n_rows == int(np.prod(tensor.shape)) // per_row
    # these take a whole tensor; that they miss nothing, test_transforms_are_undone shows
    transformed: Counter[str] = Counter()
    for tensor in made:
        if tensor.transform is not None:
            transformed[tensor.slabs[0].stored] += int(np.prod(tensor.shape))
    assert transformed == {name: int(np.prod(stored[name].shape)) for name in transformed}
    expected = set()
    turned = {slab.stored for tensor in made for slab in tensor.slabs if slab.transposed}
    for name, one in stored.items():
        role = case.model.role(name)
        unused = isinstance(role, Carried | Dropped) or case.model.is_beside_gguf(name)
        if name not in transformed and not unused:
            fused = isinstance(role, Expert) and role.expert is None and role.part == "weight"
            n_rows = one.shape[2 if name in turned else 1] if fused else one.shape[0]
            for index in range(one.shape[0] if fused else 1):
                expected |= {(name, index, row) for row in range(n_rows)}
    used = Counter(rows_of_slabs([t for t in made if t.transform is None], stored))
    assert set(used) == expected
    assert set(used.values()) == {1}


@every_layout
def test_a_missing_tensor_is_named(case: Case) -> None:
    for name in case.stored:
        if isinstance(case.model.role(name), Carried | Dropped):
            continue
        stored = {other: tensor for other, tensor in case.stored.items() if other != name}
        with pytest.raises(CheckpointError, match="missing"):
            case.model.check_tensors(stored)


@every_layout
def test_a_tensor_of_another_shape_is_named(case: Case) -> None:
    for name, tensor in case.stored.items():
        if isinstance(case.model.role(name), Carried | Dropped):
            continue
        shape = (*tensor.shape[:-1], tensor.shape[-1] + 1)
        stored = {**case.stored, **stored_of({name: torch.empty(shape, device="meta")})}
        with pytest.raises(CheckpointError) as caught:
            case.model.check_tensors(stored)
        assert name in str(caught.value)
        assert str(list(shape)) in str(caught.value)


@every_layout
def test_names_are_those_of_gguf_py(case: Case) -> None:
    facts = case.model.facts
    (arch,) = (a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == facts.gguf_arch)
    known = {
        gguf.TENSOR_NAMES[one].format(bid=layer)
        for one in gguf.MODEL_TENSORS[arch]
        for layer in range(case.model.n_gguf_blocks)
    }
    # gguf-py does not name these for every architecture whose loader takes them
    known |= {gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.OUTPUT]} if not facts.tied_embeddings else set()
    known |= {
        name.format(bid=facts.mtp_layer)
        for name in gguf.TENSOR_NAMES.values()
        if "nextn" in name and facts.has_mtp
    }
    known |= {f"blk.{facts.mtp_layer}.post_attention_norm"} if facts.has_mtp else set()
    for tensor in tensors(case):
        match = re.match(r"blk\.(\d+)\.ffn_(gate|up|down)\.", tensor.name)
        is_dense = match is not None and int(match[1]) not in facts.moe_layers
        name = re.sub(r"\.(weight|bias|scale)$", "", tensor.name)
        assert name in known or is_dense, tensor.name


@every_layout
def test_what_is_of_experts_has_an_entry_per_expert(case: Case) -> None:
    facts = case.model.facts
    found = Counter()
    for tensor in tensors(case):
        count = experts_of(tensor.name, tensor.shape)
        if count is not None:
            assert count == facts.n_experts
            found[is_of_experts(tensor.name)] += 1
    assert found[True] >= 2 * len(facts.moe_layers)
    assert found[False] >= len(facts.moe_layers)


@every_layout
def test_the_header_is_complete(case: Case) -> None:
    facts = case.model.facts
    values = case.model.gguf_metadata()
    found = {value.key.removeprefix(f"{facts.gguf_arch}."): value for value in values}
    assert len(found) == len(values)
    assert all(value.key.startswith(f"{facts.gguf_arch}.") for value in values)
    is_rotated = getattr(case.model, "has_rotary", True)
    for keys in NEEDED_KEYS if is_rotated else set(NEEDED_KEYS) - {"rope.freq_base"}:
        assert any(key in found for key in keys.split("|")), keys
    types = {
        bool: GGUFValueType.BOOL,
        float: GGUFValueType.FLOAT32,
        int: GGUFValueType.UINT32,
        str: GGUFValueType.STRING,
    }
    for value in values:
        assert value.value_type is types.get(type(value.value), GGUFValueType.ARRAY)
    expected = {
        "block_count": case.model.n_gguf_blocks,
        "embedding_length": facts.hidden_size,
        "expert_count": facts.n_experts,
        "expert_used_count": facts.experts_per_token,
    }
    assert {key: found[key].value for key in expected} == expected
    if case.model.n_gguf_blocks > facts.n_layers:
        assert found["nextn_predict_layers"].value == 1


@every_layout
def test_pruned_config(case: Case) -> None:
    before = case.tiny.config()
    n_kept = in_groups(case.model, 3)
    after = case.model.pruned_config(n_kept)
    assert case.model.config == before
    assert list(after) == list(before)
    names = tensors_of(case.tiny).keys()
    again = ARCHITECTURES[case.architecture](after, "config.json", names, case.keep_mtp)
    assert again.facts.n_experts == n_kept
    assert again.config_at_odds() is None
    n_experts = case.model.facts.n_experts
    assert again.pruned_config(n_experts) == case.model.pruned_config(n_experts)


def in_groups(model: MoeModel, n_kept: int) -> int:
    """A number of experts that the groups of a router can share, two each at least."""
    groups = model.facts.n_groups
    return n_kept if groups == 1 else groups * max(2, -(-n_kept // groups))


def kept_of(model: MoeModel, n_kept: int) -> dict[int, tuple[int, ...]]:
    """Others in every layer."""
    count = model.facts.n_experts
    return {
        layer: tuple(sorted((layer + 3 * i) % count for i in range(n_kept)))
        for layer in model.facts.moe_layers
    }


@every_layout
def test_the_pruned_checkpoint_is_one_of_its_architecture(case: Case, tmp_path: Path) -> None:
    (tmp_path / "pruned").mkdir()
    with Checkpoint.open(case.tiny.write(tmp_path / "model")) as source:
        model = describe(source, case.keep_mtp)
        n_kept = in_groups(model, 5)
        kept = kept_of(model, n_kept)
        view = PrunedView(source, model, kept)
        write_pruned(view, tmp_path / "pruned", Silent())
        with Checkpoint.open(tmp_path / "pruned") as pruned:
            again = describe(pruned)
            facts = again.facts
            assert facts.n_experts == n_kept
            assert again.config_at_odds() is None
            assert (facts.moe_layers, facts.has_mtp) == (
                model.facts.moe_layers,
                model.facts.has_mtp,
            )
            before = {tensor.name: tensor for tensor in model.gguf_tensors(source.tensors)}
            after = {tensor.name: tensor for tensor in again.gguf_tensors(pruned.tensors)}
            assert list(after) == list(before)
            for name, tensor in after.items():
                layer = re.match(r"blk\.(\d+)\.", name)
                ids = kept[int(layer[1])] if layer and int(layer[1]) in kept else ()
                expected = values_of(source, before[name])
                if experts_of(name, tensor.shape) is not None:
                    axis = -1 if ".exp_probs_b." in name else 0
                    expected = np.take(expected, ids, axis)
                np.testing.assert_array_equal(values_of(pruned, tensor), expected)


def values_of(checkpoint: Checkpoint, tensor: GgufTensor) -> np.ndarray:
    """A whole GGUF tensor in float32."""
    n_rows = rows_per_matrix(tensor)
    parts = [read_rows(checkpoint, tensor, slab, 0, n_rows) for slab in tensor.slabs]
    return np.concatenate(parts).reshape(tensor.shape)


def biases_of(checkpoint: Checkpoint, model: MoeModel, layer: int) -> dict[str, torch.Tensor]:
    """Of the experts' projections, (E, rows), or (E, 1) zeros where the family has none."""
    made = {tensor.name: tensor for tensor in model.gguf_tensors(checkpoint.tensors)}
    found = {}
    for projection in ("gate", "up", "down"):
        tensor = made.get(f"blk.{layer}.ffn_{projection}_exps.bias")
        values = torch.zeros(model.facts.n_experts, 1)
        found[projection] = (
            values if tensor is None else torch.from_numpy(values_of(checkpoint, tensor))
        )
    return found


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


def clamped_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gpt-oss: gates up to 7, ups from -7 to 7."""
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def squared_relu(up: torch.Tensor) -> torch.Tensor:
    """Nemotron-3, without a gate."""
    return torch.relu(up).square()


def gelu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Gemma-4."""
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


ACTIVATIONS = {"gemma4": gelu, "gpt-oss": clamped_swiglu, "nemotron_h_moe": squared_relu}


@every_layout
def test_matrices_are_all_those_of_a_layer(case: Case) -> None:
    model = case.model
    made = {tensor.name: tensor for tensor in tensors(case)}
    for layer in range(model.n_gguf_blocks):
        named = [name for names in model.matrices(layer).values() for name in names]
        if (heads := model.head_matrices(layer)) is not None:
            named += heads.names
            assert made[heads.queries].shape[::2] == (heads.n_heads, heads.query_width)
            assert made[heads.sums].shape[::2] == (heads.n_heads, heads.sum_width)
        for names in model.expert_matrices(layer) if layer in model.facts.moe_layers else ():
            named += names
        expected = {
            name
            for name, tensor in made.items()
            if name.startswith(f"blk.{layer}.")
            and len(tensor.shape) > 1
            and not name.endswith(".bias")  # of a router, with an axis of size 1, and of experts
            # an embedding and a head of the MTP block's own have none, like those of the model
            and not name.endswith(("nextn.embed_tokens.weight", "nextn.shared_head_head.weight"))
            # convolutions are stored with an axis more, and multiply nothing
            and (is_of_experts(name) or len(case.stored[tensor.slabs[0].stored].shape) == 2)
        }
        assert Counter(named) == Counter(dict.fromkeys(expected, 1))


@every_layout
def test_transformers_has_a_parameter_for_every_tensor(case: Case, tmp_path: Path) -> None:
    """By name and shape; and a matrix's input is as wide as the matrix."""
    with Checkpoint.open(case.tiny.write(tmp_path / "model")) as checkpoint:
        model = describe(checkpoint, case.keep_mtp)
        theirs = text_model(checkpoint.config, torch.bfloat16)
        made = {tensor.name: tensor for tensor in model.gguf_tensors(checkpoint.tensors)}
        for layer, module in enumerate(theirs.layers):
            targets = layer_targets(checkpoint, model, layer, torch.bfloat16, True)
            shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
            assert {name: target.shape for name, target in targets.items()} == shapes
            for path, names in model.matrices(layer).items():
                width = module.get_submodule(path).weight.shape[-1]
                assert {made[name].n_columns for name in names} == {width}


@every_layout
def test_transforms_are_undone(case: Case) -> None:
    """The tensors that are made of a stored one, put back, are that tensor again."""
    stored: dict[str, list[GgufTensor]] = {}
    for tensor in tensors(case):
        if tensor.transform is not None:
            stored.setdefault(tensor.slabs[0].stored, []).append(tensor)
    for name, made in stored.items():
        values = np.random.default_rng(0).uniform(-3, 3, case.stored[name].shape)
        values = values.astype(np.float32)
        again = np.full_like(values, np.nan)
        for tensor in made:
            assert tensor.transform is not None
            found = tensor.transform(values).reshape(tensor.shape)
            tensor.transform.put_back(found, again)
        np.testing.assert_allclose(again, values, rtol=1e-6, atol=3e-7, err_msg=name)


@every_layout
def test_columns_are_moved_as_column_order_says(case: Case) -> None:
    for tensor in tensors(case):
        order = case.model.column_order(tensor.name)
        if order is None:
            continue
        shape = case.stored[tensor.slabs[0].stored].shape
        values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        assert tensor.transform is not None
        np.testing.assert_array_equal(tensor.transform(values), values[:, order])


@every_architecture
def test_the_tokenizer_of_the_example_is_known(case: Case) -> None:
    tokenizer = read_tokenizer_json(EXAMPLE)
    assert (
        recognise_pre_tokenizer(tokenizer, EXAMPLE, case.model.tokenizers.pre_tokenizers) == "qwen2"
    )


@every_architecture
def test_what_is_observed_is_the_formula(case: Case, tmp_path: Path) -> None:
    """arXiv 2510.13999 by hand: what transformers gives its experts, and the stored matrices."""
    row = np.random.default_rng(0).integers(0, 500, 24)
    folder = case.tiny.write(tmp_path / "model")
    theirs = loaded(folder)
    given: dict[int, tuple[torch.Tensor, ...]] = {}
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        observer = SaliencyObserver(model)
        options = ComputeOptions(device="cpu", dtype="float32")
        sweep(checkpoint, model, [row], observer, options, "test", Silent())
        for layer, module in enumerate(theirs.get_decoder().layers):
            if layer in model.facts.moe_layers:
                experts = module.get_submodule(model.experts_path(layer))
                experts.register_forward_pre_hook(
                    lambda _, arguments, layer=layer: given.update({layer: arguments})
                )
        with torch.inference_mode():
            theirs(torch.from_numpy(row)[None])
        for layer, (hidden, indices, weights) in given.items():
            made = model.expert_tensors(layer, checkpoint.tensors)
            matrices = {p: torch.from_numpy(values_of(checkpoint, t)) for p, t in made.items()}
            biases = biases_of(checkpoint, model, layer)
            seen = observer.layers[layer]
            for expert in range(model.facts.n_experts):
                token, place = torch.where(indices == expert)
                inputs, gates = hidden.reshape(-1, hidden.shape[-1])[token], weights[token, place]
                own = {projection: matrix[expert] for projection, matrix in matrices.items()}
                if "gate_up" in own:
                    own["gate"], own["up"] = own.pop("gate_up").chunk(2)
                firsts = [inputs @ own[p].T + biases[p][expert] for p in ("gate", "up") if p in own]
                activations = ACTIVATIONS.get(model.gguf_arch, swiglu)(*firsts)
                norms = (activations @ own["down"].T + biases["down"][expert]).norm(dim=-1)
                assert seen.count[expert] == len(token)
                assert seen.reap_sum[expert] == pytest.approx(
                    float((norms * gates).sum()), rel=1e-5
                )
                assert seen.gate_sum[expert] == pytest.approx(float(gates.sum()), rel=1e-5)
    trunk = [layer for layer in model.facts.moe_layers if layer != model.facts.mtp_layer]
    assert list(given) == trunk


@every_architecture
def test_llama_cpp_computes_what_transformers_does(case: Case, tmp_path: Path) -> None:
    """From the float32 file: names, shapes, transforms and header keys together."""
    import llama_cpp

    from tests.exporting.files import export_files, plain

    folder = case.tiny.write(tmp_path / "model")
    tokens = np.random.default_rng(1).integers(0, 500, 32)
    path = export_files(folder, tmp_path, [plain("F32")])["F32"]
    llama = llama_cpp.Llama(
        str(path), n_ctx=64, n_batch=64, logits_all=True, verbose=False, **ONE_THREAD
    )
    try:
        llama.eval(tokens.tolist())
        found = torch.tensor(np.array(llama.scores[: len(tokens)])).double().log_softmax(-1)
    finally:
        llama.close()
    theirs = loaded(folder)
    with torch.inference_mode():
        logits = theirs(torch.from_numpy(tokens)[None]).logits[0]
    expected = logits.double().log_softmax(-1)
    assert float((expected.exp() * (expected - found)).sum(-1).mean()) < 1e-6
