"""`general.*` against llama.cpp's converter, and against cards that nobody can use."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFValueType
from hypothesis import given, settings
from hypothesis import strategies as st

import reap2gguf
from reap2gguf.bundle.front_matter import PrunedFrom
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import UsageError
from reap2gguf.exporting.general import general_values
from reap2gguf.exporting.header_facts import HeaderNames, model_header, side_header
from reap2gguf.exporting.model_files import export_side
from reap2gguf.gguf_files.writer import HeaderWriter
from reap2gguf.models.description import HeaderValue
from reap2gguf.models.table import describe
from reap2gguf.progress import CallbackProgress, ProgressEvent, Silent
from tests.conftest import Bundle
from tests.loopback_hub.model import layered_files, serving
from tests.tiny import REPOSITORY, TinyQwen3Moe, TinyQwen35Moe
from tests.tokens import FULL_VOCAB

CONVERTER = json.loads((REPOSITORY / "tests" / "data" / "llama-general-keys.json").read_text())
MODELS = {
    "Qwen3-30B-A3B-Instruct-2507": TinyQwen3Moe(vocab=FULL_VOCAB),
    "Tiny-Qwen3.5-MoE": TinyQwen35Moe(vocab=FULL_VOCAB),
}
FROM_HUB = PrunedFrom("Qwen/Qwen3-30B-A3B-Instruct-2507", "Qwen3MoeForCausalLM")
SIZE = 22_900_000_000  # of that model with three quarters of its experts


def keys(path: Path) -> dict[str, list[Any]]:
    """Types and value of every key."""
    return {
        key: [[kind.name for kind in field.types], field.contents()]
        for key, field in GGUFReader(path).fields.items()
        if not key.startswith("GGUF.")
    }


def general(path: Path) -> dict[str, list[Any]]:
    return {key: value for key, value in keys(path).items() if key.startswith("general.")}


def with_card(folder: Path) -> Path:
    (folder / "README.md").write_text(CONVERTER["card"])
    (folder / "generation_config.json").write_text(json.dumps(CONVERTER["generation_config"]))
    return folder


def of_card(folder: Path, card: str, pruned: PrunedFrom | None = None) -> dict[str, Any]:
    (folder / "README.md").write_text(card)
    name = "Qwen3-30B-A3B-Instruct-2507-REAP-0.25" if pruned else "some-model"
    values = general_values(folder, name, SIZE, pruned).values
    return {value.key.removeprefix("general."): value.value for value in values}


@pytest.mark.parametrize("name", MODELS)
def test_quantize_writes_what_the_converter_writes(name: str, tmp_path: Path) -> None:
    folder = with_card(MODELS[name].write(tmp_path / name))
    path = reap2gguf.quantize(folder, "bf16", tmp_path / "out.gguf").path
    expected = CONVERTER[name] | {"general.name": [["STRING"], name]}
    if name.startswith("Qwen3-"):  # it has four million parameters, and not thirty billion
        expected["general.size_label"] = [["STRING"], "8x563K"]
    assert general(path) == expected


def test_a_model_of_the_hub_brings_its_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "name"
    layered_files(folder)
    files = {path.name: path.read_bytes() for path in with_card(folder).iterdir()}
    with serving(files, monkeypatch, tmp_path / "cache"):
        found = general(reap2gguf.quantize("owner/name", "bf16", tmp_path / "hub.gguf").path)
    assert found == general(reap2gguf.quantize(folder, "bf16", tmp_path / "here.gguf").path)
    wanted = ("license", "languages", "tags", "base_model.0.repo_url", "dataset.0.repo_url")
    assert {f"general.{key}" for key in wanted} <= found.keys()


def test_the_projector_says_it_too(tmp_path: Path) -> None:
    name = "Tiny-Qwen3.5-MoE"
    folder, path = with_card(MODELS[name].write(tmp_path / name)), tmp_path / "mmproj.gguf"
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        (side,) = model.side_files(folder, checkpoint.tensors)
        export_side(checkpoint, model, HeaderNames(name), path, side, 1, Silent())
    assert general(path) == CONVERTER[f"mmproj of {name}"] | {"general.name": [["STRING"], name]}


def test_a_pruned_model_is_based_on_its_source(tmp_path: Path) -> None:
    found = of_card(tmp_path, CONVERTER["card"], FROM_HUB)
    assert found == {
        "name": "Qwen3-30B-A3B-Instruct-2507-REAP-0.25",
        "basename": "Qwen3",
        "finetune": "Instruct-REAP-0.25",
        "version": "2507",
        "license": "apache-2.0",
        "license.name": "the-licence",
        "license.link": "https://huggingface.co/Qwen/Qwen3-30B-A3B/blob/main/LICENSE",
        "base_model.count": 1,
        "base_model.0.name": "Qwen3 30B A3B Instruct 2507",
        "base_model.0.version": "2507",
        "base_model.0.organization": "Qwen",
        "base_model.0.repo_url": "https://huggingface.co/Qwen/Qwen3-30B-A3B-Instruct-2507",
        "dataset.count": 1,
        "dataset.0.name": "Some Data v2",
        "dataset.0.version": "v2",
        "dataset.0.organization": "Owner",
        "dataset.0.repo_url": "https://huggingface.co/owner/some-data-v2",
        "tags": [
            "reap", "moe", "expert-pruning", "pruned", "qwen3_moe", "chat", "qwen3",
            "text-generation",
        ],
        "languages": ["en", "no"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("Qwen3-30B-A3B", 30_532_122_624, "30B-A3B"),
        ("Qwen3-30B-A3B-REAP-0.05", 29_000_000_000, "30B-A3B"),
        ("Qwen3-30B-A3B-REAP-0.25", SIZE, None),
        ("Qwen3-23B-A3B-REAP", SIZE, "23B-A3B"),
        ("Model-8x7B", 46_700_000_000, None),
        ("Model-A3B", 30_532_122_624, None),
    ],
)
def test_a_size_in_the_name_counts_if_it_is_true(
    name: str, size: int, expected: str | None, tmp_path: Path
) -> None:
    for pruned in (None, FROM_HUB):
        values = {v.key: v.value for v in general_values(tmp_path, name, size, pruned).values}
        assert values.get("general.size_label") == expected
        assert "0.25" not in str(values.get("general.version")) or pruned is None


def test_a_pruned_model_without_a_card(tmp_path: Path) -> None:
    local = PrunedFrom("my-model", "Qwen3_5MoeForConditionalGeneration", True, ("a/b",))
    found = {v.key: v.value for v in general_values(tmp_path, "thing", 10, local).values}
    assert found == {
        "general.name": "thing",
        "general.base_model.count": 1,
        "general.base_model.0.name": "My Model",
        "general.dataset.count": 1,
        "general.dataset.0.name": "B",
        "general.dataset.0.organization": "A",
        "general.dataset.0.repo_url": "https://huggingface.co/a/b",
        "general.tags": [
            "reap", "moe", "expert-pruning", "pruned", "qwen3_5_moe", "image-text-to-text",
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("owner/Some-7B-v1.5", ("Some 7B v1.5", "v1.5", "Owner", "https://huggingface.co/owner/Some-7B-v1.5")),
        ("https://huggingface.co/owner/Some", ("Some", None, "Owner", "https://huggingface.co/owner/Some")),
        ("https://example.com/model", (None, None, None, "https://example.com/model")),
        ("./local", ("Local", None, None, None)),
        ("no repository at all", ("No Repository At All", None, None, None)),
    ],
)  # fmt: skip
def test_what_a_card_calls_its_base_model(
    base: str, expected: tuple[str | None, ...], tmp_path: Path
) -> None:
    found = of_card(tmp_path, f"---\nbase_model: {base}\n---\n")
    parts = ("name", "version", "organization", "repo_url")
    assert tuple(found.get(f"base_model.0.{part}") for part in parts) == expected


def test_what_a_card_says_of_itself(tmp_path: Path) -> None:
    keys = {
        "model_creator": ("author", "Somebody"),
        "organization": ("organization", "Some Lab"),
        "description": ("description", "What it is."),
        "version": ("version", "1.0"),
        "finetune": ("finetune", "chat"),
        "model_type": ("basename", "Base"),
        "size_label": ("size_label", "7B"),
        "model_name": ("name", "Its Name"),
        "url": ("source.url", "https://example.com"),
        "doi": ("source.doi", "10.1/x"),
        "uuid": ("source.uuid", "1-2"),
        "repo_url": ("source.repo_url", "https://example.com/r"),
    }
    card = "".join(f"{key}: {value}\n" for key, (_, value) in keys.items())
    found = of_card(tmp_path, f"---\nlicense: [mit, other]\n{card}---\n")
    assert found == {place: value for place, value in keys.values()} | {"license": "mit,other"}
    pruned = of_card(tmp_path, f"---\n{card}---\n", FROM_HUB)
    assert not pruned.keys() & {"author", "organization", "description", "source.url"}
    assert pruned["name"] == "Qwen3-30B-A3B-Instruct-2507-REAP-0.25"


def test_a_bundle_gives_its_own_headers_again(built: Bundle) -> None:
    """From the pruned folder and the manifest, as `verify` has them."""
    manifest = Manifest.load(built.hf)
    with Checkpoint.open(built.hf) as checkpoint:
        for record in manifest.gguf:
            found = keys(built.gguf / record.file)
            model = describe(checkpoint)
            values = model_header(checkpoint, model, HeaderNames.of(manifest), record.recipe)
            check_same(values, found)
            rest = found.keys() - {value.key for value in values}
            assert all(
                key.startswith(("tokenizer.", "quantize."))
                or key in ("general.architecture", "general.type", "general.file_type",
                           "general.quantization_version", "general.size_label")
                for key in rest
            )  # fmt: skip


def check_same(values: tuple[HeaderValue, ...], found: dict[str, list[Any]]) -> None:
    for value in values:
        kinds, written = found[value.key]
        assert kinds[0] == value.value_type.name
        if value.value_type is GGUFValueType.FLOAT32:
            assert struct.pack("<f", value.value) == struct.pack("<f", written)
        else:
            assert written == value.value


def test_side_files_give_theirs_again(tmp_path: Path) -> None:
    folder = with_card(TinyQwen35Moe().write(tmp_path / "model"))
    pruned = PrunedFrom("a/b", "Qwen3_5MoeForConditionalGeneration", True)
    names, path = HeaderNames("x", pruned), tmp_path / "mmproj.gguf"
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        (side,) = model.side_files(folder, checkpoint.tensors)
        export_side(checkpoint, model, names, path, side, 1, Silent())
        check_same(side_header(checkpoint, model, names, side), keys(path))


def test_what_is_ignored_is_said(tmp_path: Path) -> None:
    folder = TinyQwen3Moe().write(tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: {a: b}\n---\n")
    (folder / "generation_config.json").write_text('{"temperature": "hot", "top_k": 20}')
    notes: list[str] = []

    def hear(event: ProgressEvent) -> None:
        notes.append(event.text)

    path = reap2gguf.quantize(
        folder, "bf16", tmp_path / "out.gguf", progress=CallbackProgress(hear)
    ).path
    said = "\n".join(notes)
    assert "README.md: license is {'a': 'b'}, expected a text" in said
    assert "temperature is 'hot', expected a number from 0 to 10; ignored" in said
    found = general(path)
    assert found["general.sampling.top_k"] == [["INT32"], 20]
    assert "general.sampling.temp" not in found
    assert "general.license" not in found


PIECES = st.sampled_from(
    ["license", "tags", "base_model", ": ", "\n", "- ", "---\n", "[", "]", "{", "}", "&a ", "*a",
     "|", ">", "'", '"', "\t", "\x00", "\x1b", "\u202e", "1.0", "null", "!!python/object:os ", "é",
     "a/b", "https://huggingface.co/", "-7B", "-A3B", "8x7b1", "٣B"]
)  # fmt: skip
TEXTS = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=30).map("".join))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
SAMPLING = ["top_k", "temperature", "penalty_repeat", "repetition_penalty", "mirostat", "sequence"]


@settings(max_examples=30, deadline=None)
@given(TEXTS, st.dictionaries(st.sampled_from(SAMPLING), JSON), TEXTS, st.booleans())
def test_no_card_breaks_a_header(
    tmp_path_factory: pytest.TempPathFactory,
    front: str,
    sampling: dict[str, Any],
    name: str,
    is_pruned: bool,
) -> None:
    folder = tmp_path_factory.mktemp("card")
    (folder / "README.md").write_text(f"---\n{front}\n---\n", encoding="utf-8", errors="ignore")
    (folder / "generation_config.json").write_text(json.dumps(sampling))
    pruned = PrunedFrom(name, name, False, (name,)) if is_pruned else None
    writer = HeaderWriter("qwen3moe")
    for value in general_values(folder, name, 10**6, pruned).values:
        texts = value.value if isinstance(value.value, list) else [value.value]
        assert all(len(text) <= 600 for text in texts if isinstance(text, str))
        writer.add_key_value(value.key, value.value, value.value_type)
    assert writer.header()


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    folder = TinyQwen3Moe().write(tmp_path / os.fsdecode(b"caf\xe9\n"))
    path = reap2gguf.quantize(folder, "bf16", tmp_path / "out.gguf").path
    assert general(path)["general.name"] == [["STRING"], "caf\\udce9\\n"]


def test_quantize_names_the_file_by_its_label(tmp_path: Path) -> None:
    folder = TinyQwen3Moe().write(tmp_path / "model")
    found = reap2gguf.quantize(folder, "bf16", tmp_path, labels={"bf16": "BF16_OWN"})
    assert found.path == tmp_path / "model-BF16_OWN.gguf"
    with pytest.raises(UsageError, match="names the file already; pass a folder, or no label"):
        reap2gguf.quantize(folder, "bf16", tmp_path / "x.gguf", labels={"bf16": "X"})
    with pytest.raises(UsageError, match="there is no such folder; create it first"):
        reap2gguf.quantize(folder, "bf16", f"{tmp_path}/new/")


@pytest.mark.parametrize("way", ["REAP-0.25", "REAM-0.25", "HC-SMoE-0.125"])
def test_what_was_done_to_experts_is_no_version(way: str, tmp_path: Path) -> None:
    found = general_values(tmp_path, f"Model-Instruct-{way}", SIZE, FROM_HUB).values
    values = {one.key: one.value for one in found}
    assert values["general.finetune"] == f"Instruct-{way}"
    assert "general.version" not in values
