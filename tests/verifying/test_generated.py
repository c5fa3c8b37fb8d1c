"""Texts that are made again: cards of published bundles, and the index of several shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import reap2gguf
from reap2gguf.bundle.card import CardNames
from reap2gguf.bundle.layout import MANIFEST_FILE
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.bundle.opening import open_bundle
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.writer import write_checkpoint
from reap2gguf.progress import Silent
from reap2gguf.publishing.contents import PreparedRepo
from reap2gguf.publishing.prepare import prepare
from reap2gguf.verifying.bundle import verify_bundle
from reap2gguf.verifying.context import Strictness
from tests.conftest import Bundle
from tests.verifying.mutations import copied, fix_hashes, rewrite

HEADERS_ONLY = Strictness(reads_values=False)


def downloaded(repo: PreparedRepo, folder: Path) -> Path:
    """A repository as it would be after a push and a download."""
    folder.mkdir(parents=True)
    for file in repo.files:
        content = file.content
        raw = content if isinstance(content, bytes) else content.read_bytes()
        (folder / file.name).write_bytes(raw)
    return folder


@pytest.fixture
def published(built: Bundle, tmp_path: Path) -> Bundle:
    """A bundle that was published under another name, one file in parts, and downloaded."""
    names = CardNames("me/thing", "me/thing-GGUF", on_hub=True)
    prepared = prepare(open_bundle(built.gguf), names, 10_000_000, tmp_path / "push", Silent())
    hf = downloaded(prepared.hf, tmp_path / "got" / "thing")
    gguf = downloaded(prepared.gguf, tmp_path / "got" / "thing-GGUF")
    return Bundle(tmp_path / "got", hf, gguf, built.source)


def test_a_published_bundle_is_sound(published: Bundle) -> None:
    report = verify_bundle(published.gguf, 2, Silent())
    assert report.violations == ()
    assert str(report.levels["thing-GGUF/example-BF16-00002-of-00003.gguf"]) == "exact"
    assert str(report.levels["thing-GGUF/Modelfile"]) == "exact"


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("thing/README.md", b"vllm serve me/thing", b"vllm serve me/evil"),
        ("thing-GGUF/README.md", b"12 of 16", b"13 of 16"),
        ("thing-GGUF/README.md", b"base_model: me/thing", b"base_model: me/other"),
        ("thing-GGUF/Modelfile", b"--merge example", b"--merge another"),
    ],
)
def test_a_published_text_that_was_changed(
    file: str, old: bytes, new: bytes, published: Bundle
) -> None:
    path = published.output / file
    assert old in path.read_bytes()
    rewrite(path, lambda raw: raw.replace(old, new))
    fix_hashes(published)
    found = verify_bundle(published.gguf, 1, Silent(), HEADERS_ONLY).violations
    assert any("is not what this program writes" in one for one in found), found


@pytest.fixture
def sharded(built: Bundle, tmp_path: Path) -> Bundle:
    """The bundle with its safetensors in three files, as that of a large model."""
    bundle = copied(built, tmp_path / "build")
    with Checkpoint.open(built.hf) as whole:

        def contents(tensor: Any) -> list[memoryview]:
            return [whole.read(tensor.name).view("u1").reshape(-1).data]

        (bundle.hf / "model.safetensors").unlink()
        tensors = list(whole.tensors.values())
        write_checkpoint(bundle.hf, tensors, contents, 9_000_000)
    manifest = Manifest.load(bundle.gguf)
    replace(manifest, hf=replace(manifest.hf, n_shards=3)).save(bundle.gguf)
    rewrite(bundle.hf / "README.md", lambda raw: raw.replace(b"in one file", b"in 3 shards"))
    fix_hashes(bundle)
    assert verify_bundle(bundle.gguf, 1, Silent(), HEADERS_ONLY).violations == ()
    return bundle


SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"


def change_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / INDEX).read_text())
    change(values)
    (folder / INDEX).write_text(json.dumps(values, indent=2) + "\n")


def name_another_shard(folder: Path) -> None:
    change_index(folder, lambda values: values["weight_map"].update({EMBEDDING: SHARDS[2]}))


def lose_a_tensor(folder: Path) -> None:
    change_index(folder, lambda values: values["weight_map"].pop(EMBEDDING))


def invent_a_tensor(folder: Path) -> None:
    change_index(folder, lambda values: values["weight_map"].update({"model.x": SHARDS[0]}))


def name_a_lost_shard(folder: Path) -> None:
    change_index(folder, lambda values: values["weight_map"].update({"model.x": "gone"}))


def another_total_size(folder: Path) -> None:
    change_index(folder, lambda values: values["metadata"].update(total_size=1))


def another_count(folder: Path) -> None:
    change_index(folder, lambda values: values["metadata"].update(total_parameters=1))


def no_metadata(folder: Path) -> None:
    change_index(folder, lambda values: values.pop("metadata"))


def lose_a_shard(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()


def a_shard_too_many(folder: Path) -> None:
    save_file(load_file(folder / SHARDS[1]), folder / "model-00004-of-00003.safetensors")


def a_whole_file_beside(folder: Path) -> None:
    save_file(load_file(folder / SHARDS[1]), folder / "model.safetensors")


def lose_the_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def a_tensor_twice(folder: Path) -> None:
    both = load_file(folder / SHARDS[1]) | {EMBEDDING: load_file(folder / SHARDS[0])[EMBEDDING]}
    save_file(both, folder / SHARDS[1], {"format": "pt"})


def two_names_swapped(folder: Path) -> None:
    first, second = folder / SHARDS[0], folder / SHARDS[1]
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def other_names(folder: Path) -> None:
    for number, name in enumerate(SHARDS):
        (folder / name).rename(folder / f"model-0000{number}-of-00003.safetensors.new")
    for number in range(3):
        old = folder / f"model-0000{number}-of-00003.safetensors.new"
        old.rename(folder / f"model-0000{number}-of-00002.safetensors")
    renamed = {name: f"model-0000{n}-of-00002.safetensors" for n, name in enumerate(SHARDS)}

    def change(values: dict[str, Any]) -> None:
        values["weight_map"] = {k: renamed[v] for k, v in values["weight_map"].items()}

    change_index(folder, change)


@pytest.mark.parametrize(
    "change",
    [
        name_another_shard, lose_a_tensor, invent_a_tensor, name_a_lost_shard, another_total_size,
        another_count, no_metadata, lose_a_shard, a_shard_too_many, a_whole_file_beside,
        lose_the_index, a_tensor_twice, two_names_swapped, other_names,
    ],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_an_index_and_its_shards_agree(change: Callable[[Path], None], sharded: Bundle) -> None:
    change(sharded.hf)
    fix_hashes(sharded)
    assert verify_bundle(sharded.gguf, 1, Silent(), HEADERS_ONLY).violations
    assert (sharded.hf / MANIFEST_FILE).is_file()


def test_the_values_in_several_shards_are_compared_with_the_source(sharded: Bundle) -> None:
    report = reap2gguf.verify(sharded.gguf, source=sharded.source, threads=1)
    assert report.violations == ()
    assert str(report.levels[f"example/{SHARDS[2]}"]) == "exact"
    assert str(report.levels[f"example/{INDEX}"]) == "exact"
