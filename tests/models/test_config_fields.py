"""Every field of transformers' config classes: what it means here. A new field fails a test."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3_5MoeConfig, Qwen3MoeConfig
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import (
    Qwen3_5MoeTextConfig,
    Qwen3_5MoeVisionConfig,
)

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import Reap2ggufError, UnsupportedModelError
from reap2gguf.models.table import describe
from reap2gguf.models.transformers_config import check_with_transformers, transformers_config
from tests.families.qwen import NESTED
from tests.models.config_rows import EVERY_CONFIG, Carried, Elsewhere, Read, Refused, Row
from tests.models.layouts import every_family

VISION: dict[str, Row] = {
    **EVERY_CONFIG,
    "return_dict": Carried(False),  # the tower is not run
    "depth": Read(1),
    "hidden_size": Read(16),
    "hidden_act": Refused(("gelu", "silu")),
    "intermediate_size": Read(32),
    "num_heads": Read(4),
    "in_channels": Read(1),
    "patch_size": Read(8),
    "spatial_merge_size": Read(1),
    "temporal_patch_size": Refused((1, [2, 2])),
    "out_hidden_size": Refused((32, "absent")),
    "num_position_embeddings": Read(25),
    "initializer_range": Carried(0.5),
    "rope_parameters": Refused(({"rope_theta": 5.0}, {"rope_type": "linear"})),
}
# transformers' class -> its table, a config of it, and the family that reads it
CLASSES: dict[Any, tuple[dict[str, Row], Any, Any]] = {
    cls: entry for family in every_family() for cls, entry in family.FIELDS.items()
}
ROWS = [(cls, name) for cls, (table, _, _) in CLASSES.items() for name in table]


def rows_of(kind: Any) -> Any:
    chosen = [(cls, name) for cls, name in ROWS if isinstance(CLASSES[cls][0][name], kind)]
    ids = [f"{cls.__name__}-{name}" for cls, name in chosen]
    return pytest.mark.parametrize(("cls", "name"), chosen, ids=ids)


def changed(cls: Any, name: str, value: Any) -> dict[str, Any]:
    config: dict[str, Any] = copy.deepcopy(CLASSES[cls][1].config())
    config.pop(name, None)
    if name == "layer_types":
        config.pop("full_attention_interval", None)
    if name == "dtype":
        config.pop("torch_dtype", None)
    if name == "head_dim" and "rope_parameters" in config:
        config["rope_parameters"]["mrope_section"] = [11, 11, 10]  # for any of the sizes here
    return config if value == "absent" else config | {name: value}


def model_of(cls: Any, config: dict[str, Any]) -> Any:
    model = CLASSES[cls][2](config, "here/config.json")
    model.gguf_metadata()
    check_with_transformers(model)
    return model


@pytest.mark.parametrize("cls", [*CLASSES, Qwen3_5MoeVisionConfig])
def test_the_table_has_every_field(cls: Any) -> None:
    table = VISION if cls is Qwen3_5MoeVisionConfig else CLASSES[cls][0]
    fields = {field.name for field in dataclasses.fields(cls)}
    assert not fields - table.keys(), "say in the table what happens with these fields"


def test_what_is_tested_elsewhere_is_there() -> None:
    for table in (*(table for table, _, _ in CLASSES.values()), VISION):
        for row in table.values():
            if isinstance(row, Elsewhere):
                assert (Path(__file__).parent / row.file).is_file()


@rows_of(Read)
def test_a_field_is_read_as_transformers_reads_it(cls: Any, name: str) -> None:
    row = CLASSES[cls][0][name]
    assert isinstance(row, Read)
    before = model_of(cls, CLASSES[cls][1].config())
    config = changed(cls, name, row.other)
    for key in {"layer_types", "mlp_layer_types"} & config.keys():
        config[key] *= 1 + (name == "num_hidden_layers")
    after = model_of(cls, config)
    theirs = getattr(transformers_config(config), name)
    assert theirs == row.other
    if name in after.config_values():
        assert after.config_values()[name] == theirs != before.config_values()[name]
    assert (after.gguf_metadata(), after.facts) != (before.gguf_metadata(), before.facts)


@rows_of(Read)
def test_an_absent_field_has_transformers_default_or_is_refused(cls: Any, name: str) -> None:
    config = changed(cls, name, "absent")
    try:
        found = model_of(cls, config).config_values()
    except UnsupportedModelError as error:
        assert name in str(error) or "multiple" in str(error)
        return
    assert found.get(name) in (None, getattr(transformers_config(config), name))


@pytest.mark.parametrize(
    ("cls", "name"),
    [(Qwen3MoeConfig, "rms_norm_eps"), (Qwen3_5MoeTextConfig, "rms_norm_eps"),
     (Qwen3_5MoeTextConfig, "linear_conv_kernel_dim")],
)  # fmt: skip
def test_an_absent_field_is_not_refused(cls: Any, name: str) -> None:
    config = changed(cls, name, "absent")
    assert model_of(cls, config).config_values()[name] == getattr(cls(), name)


def test_the_head_size_that_transformers_derives() -> None:
    config = changed(Qwen3MoeConfig, "head_dim", "absent")
    assert model_of(Qwen3MoeConfig, config).facts.head_dim == 64 // 4
    # it is no field of Qwen3MoeConfig, and one of Qwen3_5MoeTextConfig
    default = Qwen3_5MoeTextConfig().head_dim
    config = changed(Qwen3_5MoeTextConfig, "head_dim", "absent")
    assert model_of(Qwen3_5MoeTextConfig, config).facts.head_dim == default


@rows_of(Refused)
def test_other_values_are_refused(cls: Any, name: str) -> None:
    row = CLASSES[cls][0][name]
    assert isinstance(row, Refused)
    model_of(cls, CLASSES[cls][1].config())
    for other in row.others:
        with pytest.raises(UnsupportedModelError, match=name):
            model_of(cls, changed(cls, name, other))


@rows_of(Carried)
def test_a_field_of_no_effect_is_carried(cls: Any, name: str) -> None:
    row = CLASSES[cls][0][name]
    assert isinstance(row, Carried)
    before = model_of(cls, CLASSES[cls][1].config())
    after = model_of(cls, changed(cls, name, row.other))
    assert after.gguf_metadata() == before.gguf_metadata()
    assert after.facts == before.facts
    assert after.pruned_config(3)[name] == row.other


@rows_of(Read)
def test_null_is_not_absent(cls: Any, name: str) -> None:
    row = CLASSES[cls][0][name]
    assert isinstance(row, Read)
    if row.may_be_null:
        config = changed(cls, name, None)
        found = model_of(cls, config)
        expected = getattr(transformers_config(config), name)
        assert found.config_values().get(name, expected) == expected
        return
    with pytest.raises(UnsupportedModelError, match=name):
        model_of(cls, changed(cls, name, None))


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return NESTED.write(tmp_path_factory.mktemp("tower") / "model")


@pytest.mark.parametrize(
    "name", [name for name, r in VISION.items() if not isinstance(r, Elsewhere)]
)
def test_fields_of_the_tower(name: str, tower: Path) -> None:
    row = VISION[name]
    path = tower / "config.json"
    before = path.read_text()
    others = row.others if isinstance(row, Refused) else (row.other,)  # type: ignore[union-attr]
    with Checkpoint.open(tower) as checkpoint:
        expected = describe(checkpoint).side_files(tower, checkpoint.tensors)
    for other in others:
        config = json.loads(before)
        config["vision_config"].pop(name, None)
        if other != "absent":
            config["vision_config"][name] = other
        path.write_text(json.dumps(config))
        try:
            with Checkpoint.open(tower) as checkpoint:
                found = describe(checkpoint).side_files(tower, checkpoint.tensors)
            assert not isinstance(row, Refused)
            changes = found[0].values != expected[0].values
            assert changes is isinstance(row, Read), "a change of no effect, or one unread"
        except Reap2ggufError:
            assert not isinstance(row, Carried)
        finally:
            path.write_text(before)


@pytest.mark.parametrize("key", ["num_local_experts", "n_routed_experts", "moe_num_experts"])
@pytest.mark.parametrize("cls", [Qwen3MoeConfig, Qwen3_5MoeTextConfig])
def test_counts_that_disagree(cls: Any, key: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"num_experts is 8, but {key} is 12"):
        model_of(cls, changed(cls, key, 12))


def test_types_that_disagree() -> None:
    config = changed(Qwen3MoeConfig, "dtype", "float16") | {"torch_dtype": "bfloat16"}
    with pytest.raises(UnsupportedModelError, match="dtype is 'float16', but torch_dtype is 'bf"):
        model_of(Qwen3MoeConfig, config)


@pytest.mark.parametrize(
    "name",
    ["hidden_size", "vocab_size", "num_experts", "rms_norm_eps", "head_dim", "layer_types",
     "rope_parameters", "linear_num_key_heads", "num_hidden_layers"],
)  # fmt: skip
def test_a_section_and_what_is_around_it(name: str) -> None:
    config = NESTED.config()
    value = config["text_config"][name]
    assert model_of(Qwen3_5MoeConfig, config | {name: value}).facts.n_experts == 8
    with pytest.raises(UnsupportedModelError, match=rf"text_config\.{name} is .*, but {name}"):
        model_of(Qwen3_5MoeConfig, config | {name: 3})


@pytest.mark.parametrize(
    ("key", "value"),
    [("is_causal", False), ("per_layer_config", {"0": {"hidden_size": 8}}),
     ("attention_chunk_size", 16), ("transformers_weights", "other.safetensors"),
     ("fusion_config", {"a": 1}), ("output_attentions", "yes"), ("pad_token_id", 10**6)],
)  # fmt: skip
@pytest.mark.parametrize("cls", [Qwen3MoeConfig, Qwen3_5MoeTextConfig])
def test_keys_that_change_any_model(cls: Any, key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=key):
        model_of(cls, changed(cls, key, value))


@pytest.mark.parametrize(
    ("outer", "inner", "section"),
    [
        ("qwen3_5_moe", None, "text_config"),
        ("qwen3_5_moe", "qwen3_moe", "text_config"),
        ("qwen3_5_moe_text", ..., "text_config"),
        ("qwen3_moe", ..., "text_config"),
        (None, ..., "text_config"),
        ("qwen3_5_moe", None, "vision_config"),
    ],
)
def test_model_types(outer: Any, inner: Any, section: str) -> None:
    config = NESTED.config() | {"model_type": outer}
    if inner is not ...:
        config[section]["model_type"] = inner
    with pytest.raises(UnsupportedModelError, match="model_type is"):
        model_of(Qwen3_5MoeConfig, config)


@pytest.mark.parametrize(
    ("key", "value"),
    [("norm_topk_prob", False), ("decoder_sparse_step", 2), ("use_sliding_window", True),
     ("attn_output_gate", False), ("mlp_only_layers", [0])],
)  # fmt: skip
def test_keys_that_other_readers_of_qwen35_know(key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=key):
        model_of(Qwen3_5MoeTextConfig, changed(Qwen3_5MoeTextConfig, key, value))
