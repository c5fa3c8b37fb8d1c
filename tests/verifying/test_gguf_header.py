"""Keys of GGUF headers by type and value: of bundles, of pairs, of other programs' files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType

from reap2gguf.bundle.manifest import Manifest
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.gguf_files.imatrix import load_imatrix
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.gguf_files.writer import encode_start
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from reap2gguf.verifying.gguf_file import check_header, check_side_file
from reap2gguf.verifying.gguf_header import (
    ExpectedGguf,
    check_model_keys,
    expected_gguf,
    expected_side,
)
from tests.building.builds import build
from tests.conftest import Bundle
from tests.tiny import TinyQwen35Moe
from tests.verifying.gguf_changes import Key, as_type, change_keys

U8, I32, U32, I64 = (
    GGUFValueType.UINT8, GGUFValueType.INT32, GGUFValueType.UINT32, GGUFValueType.INT64
)  # fmt: skip
F32, F64, STRING, BOOL = (
    GGUFValueType.FLOAT32, GGUFValueType.FLOAT64, GGUFValueType.STRING, GGUFValueType.BOOL
)  # fmt: skip
OTHER_TYPE = {U32: I64, I32: U32, F32: F64, BOOL: U8}  # that holds the same value
Keys = dict[str, Key]
Change = Callable[[Keys], object]
PREFIXES = ("qwen3moe.", "tokenizer.")  # what the safetensors alone tell


def weighted(bundle: Bundle) -> Path:
    return bundle.gguf / "example-IQ4_K_M.gguf"


@contextmanager
def opened(folder: Path) -> Iterator[tuple[Checkpoint, Any]]:
    with Checkpoint.open(folder) as checkpoint:
        yield checkpoint, describe(checkpoint)


def of_bundle(built: Bundle, path: Path) -> list[str]:
    """Violations in a header, as those of a bundle's file."""
    manifest = Manifest.load(built.gguf)
    record = next(one for one in manifest.gguf if one.file == weighted(built).name)
    expected = expected_gguf(manifest, record)
    imatrix = load_imatrix(built.gguf / "imatrix.gguf")
    header = read_gguf_header(path)
    with opened(built.hf) as (checkpoint, model):
        found = list(check_header(header, expected))
        return found + list(check_model_keys(header, expected, checkpoint, model, imatrix))


def of_pair(built: Bundle, path: Path) -> list[str]:
    """Violations in a header, as those of a file with nothing but the safetensors beside it."""
    header = read_gguf_header(path)
    with opened(built.hf) as (checkpoint, model):
        expected = ExpectedGguf(n_experts=model.facts.n_experts)
        found = list(check_header(header, expected))
        return found + list(check_model_keys(header, expected, checkpoint, model, None))


def changed(built: Bundle, tmp_path: Path, change: Change) -> Path:
    return change_keys(weighted(built), tmp_path / weighted(built).name, change)


def foreign(keys: Keys) -> None:
    """Make it a file of another program."""
    for key in [key for key in keys if key.startswith("reap2gguf.")]:
        del keys[key]


def test_the_header_as_it_is_written(built: Bundle, tmp_path: Path) -> None:
    assert of_bundle(built, weighted(built)) == []
    assert of_pair(built, weighted(built)) == []
    rewritten = changed(built, tmp_path, lambda keys: None)
    assert rewritten.read_bytes() == weighted(built).read_bytes()
    assert of_pair(built, changed(built, tmp_path, foreign)) == []


def keys_of(built: Bundle) -> dict[str, Key]:
    header = read_gguf_header(weighted(built))
    return {name: Key(value, header.kinds[name]) for name, value in header.metadata.items()}


def test_every_type_is_compared(built: Bundle, tmp_path: Path) -> None:
    """A number of another type is one that llama.cpp does not load, or reads as another."""
    others = {
        name: as_type(key, OTHER_TYPE[key.kind[-1]])
        for name, key in keys_of(built).items()
        if key.kind[-1] in OTHER_TYPE
    }
    assert len(others) > 20
    path = changed(built, tmp_path, lambda keys: keys.update(others))
    for found in (of_bundle(built, path), of_pair(built, path)):
        named = {name for name in others if any(f"{name} is of type" in v for v in found)}
        assert named == others.keys()


def test_every_value_is_compared(built: Bundle, tmp_path: Path) -> None:
    others = {name: Key(_other(key.value), key.kind) for name, key in keys_of(built).items()}
    arch = others.pop("general.architecture")
    path = changed(built, tmp_path, lambda keys: keys.update(others))
    assert named_in(of_bundle(built, path), others) == others.keys()
    known = {name for name in others if name.startswith(PREFIXES)}
    assert named_in(of_pair(built, path), known) == known
    path = changed(built, tmp_path, lambda keys: keys.update({"general.architecture": arch}))
    for found in (of_bundle(built, path), of_pair(built, path)):
        assert any("general.architecture is 'qwen3moex'" in violation for violation in found)


def _other(value: Any) -> Any:
    if isinstance(value, list):
        return [*value[:-1], _other(value[-1])]
    if isinstance(value, str):
        return value + "x"
    return not value if isinstance(value, bool) else value + 1


def named_in(violations: list[str], names: Iterable[str]) -> set[str]:
    return {name for name in names if any(f": {name} " in violation for violation in violations)}


def test_every_key_is_needed(built: Bundle, tmp_path: Path) -> None:
    names = keys_of(built).keys() - {"general.architecture"}
    path = changed(built, tmp_path, lambda keys: [keys.pop(name) for name in names])
    assert named_in(of_bundle(built, path), names) == names
    known = {name for name in names if name.startswith(PREFIXES)}
    assert named_in(of_pair(built, path), known) == known
    path = changed(built, tmp_path, lambda keys: keys.pop("general.architecture"))
    for found in (of_bundle(built, path), of_pair(built, path)):
        assert any("general.architecture is " in violation for violation in found)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("qwen3moe.rope.scaling.type", Key("linear", (STRING,))),
        ("qwen3moe.rope.scaling.factor", Key(4.0, (F32,))),
        ("qwen3moe.rope.dimension_count", Key(32, (U32,))),
        ("qwen3moe.expert_weights_scale", Key(2.0, (F32,))),
        ("tokenizer.ggml.add_bos_token", Key(True, (BOOL,))),
        ("tokenizer.ggml.add_eos_token", Key(True, (BOOL,))),
        ("tokenizer.chat_template.tool_use", Key("{{ 1 }}", (STRING,))),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_a_key_that_nobody_wrote(name: str, key: Key, built: Bundle, tmp_path: Path) -> None:
    assert name not in keys_of(built)
    path = changed(built, tmp_path, lambda keys: keys.update({name: key}))
    assert any(f"'{name}' is" in violation for violation in of_bundle(built, path))
    assert any(f"'{name}' is" in violation for violation in of_pair(built, path))

    def of_another_program(keys: Keys) -> None:
        keys[name] = key
        foreign(keys)

    found = of_pair(built, changed(built, tmp_path, of_another_program))
    assert any(f"'{name}' is" in violation for violation in found)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("general.author", Key("Eve", (STRING,))),
        ("general.alignment", Key(32, (U32,))),
        ("rope.scaling.type", Key("linear", (STRING,))),
        ("reap2gguf.more", Key(1, (U32,))),
        ("adapter.type", Key("lora", (STRING,))),
        ("mine", Key(1, (U8,))),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_our_files_have_no_other_keys(name: str, key: Key, built: Bundle, tmp_path: Path) -> None:
    path = changed(built, tmp_path, lambda keys: keys.update({name: key}))
    assert any(f"'{name}' is" in violation for violation in of_bundle(built, path))
    if name.startswith("reap2gguf."):
        return

    def of_another_program(keys: Keys) -> None:
        foreign(keys)
        keys[name] = key

    assert of_pair(built, changed(built, tmp_path, of_another_program)) == []


def test_another_order_of_keys(built: Bundle, tmp_path: Path) -> None:
    def change(keys: Keys) -> None:
        keys["general.name"] = keys.pop("general.name")

    (found,) = of_bundle(built, changed(built, tmp_path, change))
    assert "its header differs at byte" in found


def test_another_version_of_the_format(built: Bundle, tmp_path: Path) -> None:
    raw = bytearray(weighted(built).read_bytes())
    assert raw[:8] == encode_start(0, 0)[:8]
    raw[4] = 2
    path = tmp_path / weighted(built).name
    path.write_bytes(raw)
    (found,) = of_bundle(built, path)
    assert "its header differs at byte 4 from what the export writes" in found


def test_a_template_that_only_one_side_has(bundle: Bundle, tmp_path: Path) -> None:
    (bundle.hf / "chat_template.jinja").rename(tmp_path / "chat_template.jinja")
    found = of_pair(bundle, weighted(bundle))
    assert any("'tokenizer.chat_template' is" in violation for violation in found)
    path = changed(bundle, tmp_path, lambda keys: keys.pop("tokenizer.chat_template"))
    assert of_pair(bundle, path) == []
    (tmp_path / "chat_template.jinja").rename(bundle.hf / "chat_template.jinja")
    (found_now,) = of_pair(bundle, path)
    assert "tokenizer.chat_template differs from the tokenizer files" in found_now


def test_a_broken_tokenizer_is_named(bundle: Bundle) -> None:
    (bundle.hf / "tokenizer.json").write_text("{}")
    found = of_pair(bundle, weighted(bundle))
    assert any(violation.startswith("example: ") for violation in found)


def test_another_version_may_describe_a_model_by_other_keys(built: Bundle, tmp_path: Path) -> None:
    def older(keys: Keys) -> None:
        keys["reap2gguf.version"] = Key("0.0.1", (STRING,))
        del keys["general.size_label"]

    path = changed(built, tmp_path, older)
    assert of_pair(built, path) == []
    manifest = Manifest.load(built.gguf)
    made_by = replace(manifest, program={**manifest.program, "reap2gguf": "0.0.1"})
    expected = expected_gguf(made_by, manifest.gguf[0])
    with opened(built.hf) as (checkpoint, model):
        header = read_gguf_header(path)
        imatrix = load_imatrix(built.gguf / "imatrix.gguf")
        assert list(check_model_keys(header, expected, checkpoint, model, imatrix)) == []


@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Manifest]:
    """The safetensors folder, the projector and the manifest of a build with a vision tower."""
    root = tmp_path_factory.mktemp("pictured")
    source = TinyQwen35Moe(mtp=False).write(root / "tiny")
    result = build(source, root / "out", recipes=("bf16",))
    (path,) = result.gguf_folder.glob("mmproj-*.gguf")
    return result.hf_folder, path, result.manifest


def of_projector(pictured: tuple[Path, Path, Manifest], path: Path) -> list[str]:
    folder, _, manifest = pictured
    with opened(folder) as (checkpoint, model):
        sides = model.side_files(folder, checkpoint.tensors)
        expected = expected_side(manifest, manifest.side_files[0])
        return list(check_side_file(path, expected, (checkpoint, model, sides), 1, Silent()))


def test_every_key_of_a_projector(pictured: tuple[Path, Path, Manifest], tmp_path: Path) -> None:
    _, path, _ = pictured
    assert of_projector(pictured, path) == []
    header = read_gguf_header(path)
    target = tmp_path / path.name
    assert sum(name.startswith("clip.") for name in header.metadata) == 15
    for name, kind in header.kinds.items():
        key = Key(header.metadata[name], kind)
        changes: list[Change] = [
            lambda keys, name=name, key=key: keys.update({name: Key(_other(key.value), key.kind)}),
            lambda keys, name=name: keys.pop(name),
        ]
        if kind[-1] in OTHER_TYPE:
            other = as_type(key, OTHER_TYPE[kind[-1]])
            changes.append(lambda keys, name=name, other=other: keys.update({name: other}))
        for change in changes:
            found = of_projector(pictured, change_keys(path, target, change))
            assert any(name in violation for violation in found), (name, found)


def test_what_a_projector_should_not_have(
    pictured: tuple[Path, Path, Manifest], tmp_path: Path
) -> None:
    _, path, _ = pictured
    target = tmp_path / path.name
    for name in ("clip.use_silu", "clip.vision.feature_layer", "general.author", "x"):
        key = Key(True, (BOOL,))
        change_keys(path, target, lambda keys, name=name, key=key: keys.update({name: key}))
        found = of_projector(pictured, target)
        assert found == [f"{path.name}: '{name}' is True, expected no such key"]
    target.write_bytes(path.read_bytes() + bytes(1))
    assert any("after its last tensor" in violation for violation in of_projector(pictured, target))
