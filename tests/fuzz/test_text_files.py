"""Configs, indexes, recipes and manifests whose values lie: described, or refused in one line."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reap2gguf.bundle.layout import MANIFEST_FILE
from reap2gguf.bundle.manifest import (
    CalibrationRecord,
    FileRecord,
    FolderRecord,
    GgufRecord,
    Manifest,
    PruningRecord,
    SideRecord,
    SourceRecord,
)
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.index import INDEX_NAME
from reap2gguf.errors import (
    ArtifactError,
    CheckpointError,
    Reap2ggufError,
    RecipeError,
    UnsupportedModelError,
)
from reap2gguf.models.contract import MoeModel
from reap2gguf.models.table import describe
from reap2gguf.quantizing.recipe import load_recipe, parse_recipe
from reap2gguf.quantizing.resolve import resolve
from tests.fuzz.documents import changed
from tests.fuzz.targets import MAX_MESSAGE
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

REUSED_FOLDER = settings(
    max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MANY_BYTES = 64 * 2**20  # 4096 layers of names and shapes, which a config may claim
BF16 = parse_recipe('title = "T"\nlabel = "L"\nfile_type = "BF16"\n', "t", "t.toml")


def refused_or_done(work: Callable[[], object], *allowed: type[Reap2ggufError]) -> bool:
    """Whether `work` ended well; any error is one of `allowed`, in a line, in bounded memory."""
    tracemalloc.start()
    try:
        work()
    except Reap2ggufError as error:
        assert isinstance(error, allowed), repr(error)
        assert "\n" not in str(error)
        assert str(error).isprintable()
        assert len(str(error)) <= MAX_MESSAGE
        return False
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak <= MANY_BYTES
    return True


LAYOUTS: dict[str, TinyQwen3Moe | TinyQwen35Moe] = {
    "qwen3": TinyQwen3Moe(n_layers=2, hidden=32, width=32, n_experts=3, vocab=64, n_shards=2),
    "qwen3 fused": TinyQwen3Moe(n_layers=1, hidden=32, width=32, vocab=64, fused=True, tied=True),
    "qwen3.5": TinyQwen35Moe(hidden=32, width=32, n_experts=3, layers="lf", vocab=64, vision=False),
    "qwen3.5 flat": TinyQwen35Moe(hidden=32, width=32, layers="lf", vocab=64, nested=False),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {name: layout.write(base / name) for name, layout in LAYOUTS.items()}


PACKED = {
    GGUFValueType.UINT32: "<I", GGUFValueType.FLOAT32: "<f", GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT32: "<i",
}  # fmt: skip


def check_description(folder: Path) -> None:
    """What a model that is described promises to the stages after it."""
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        tensors = model.gguf_tensors(checkpoint.tensors)
        used = {slab.stored for tensor in tensors for slab in tensor.slabs}
        assert used <= checkpoint.tensors.keys()
        assert len({tensor.name for tensor in tensors}) == len(tensors)
        check_facts(model)
        for value in model.gguf_metadata():
            if value.value_type in PACKED:
                struct.pack(PACKED[value.value_type], value.value)
        n_kept = model.facts.experts_per_token
        json.dumps(model.pruned_config(n_kept)).encode()
        resolved = resolve(BF16, tensors, model.facts, n_kept, has_imatrix=False)
        assert resolved.n_bytes > 0


def check_facts(model: MoeModel) -> None:
    facts = model.facts
    assert 1 <= facts.experts_per_token <= facts.n_experts
    assert facts.moe_layers
    assert all(0 <= layer < facts.n_blocks for layer in facts.moe_layers)
    sizes = (facts.hidden_size, facts.expert_width, facts.head_dim, facts.vocab_size)
    numbers = (*sizes, facts.n_layers, facts.n_heads, facts.n_kv_heads, facts.context_length)
    assert all(type(number) is int and 1 <= number < 2**31 for number in numbers)


@pytest.mark.parametrize("name", LAYOUTS)
@REUSED_FOLDER
@given(data=st.data())
def test_configs_that_lie(folders: dict[str, Path], name: str, data: st.DataObject) -> None:
    text = data.draw(changed(LAYOUTS[name].config(), most=2))
    (folders[name] / "config.json").write_text(text)
    refused_or_done(
        lambda: check_description(folders[name]), CheckpointError, UnsupportedModelError
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_true_configs_are_described(folders: dict[str, Path], name: str) -> None:
    (folders[name] / "config.json").write_text(json.dumps(LAYOUTS[name].config()))
    assert refused_or_done(lambda: check_description(folders[name]))


@REUSED_FOLDER
@given(content=st.binary(max_size=60) | st.text(max_size=30).map(lambda text: text.encode()))
def test_configs_of_any_bytes(folders: dict[str, Path], content: bytes) -> None:
    (folders["qwen3"] / "config.json").write_bytes(content)
    refused_or_done(
        lambda: describe(Checkpoint.open(folders["qwen3"])), CheckpointError, UnsupportedModelError
    )


@REUSED_FOLDER
@given(data=st.data())
def test_indexes_that_lie(folders: dict[str, Path], data: st.DataObject) -> None:
    folder = folders["qwen3"]
    (folder / "config.json").write_text("{}")
    path = folder / INDEX_NAME
    good = path.read_text()
    try:
        path.write_text(data.draw(changed(json.loads(good))))
        refused_or_done(
            lambda: check_opened(folder, len(json.loads(good)["weight_map"])), CheckpointError
        )
    finally:
        path.write_text(good)


def check_opened(folder: Path, n_tensors: int) -> None:
    with Checkpoint.open(folder) as checkpoint:
        assert len(checkpoint.tensors) == n_tensors
        for name, tensor in checkpoint.tensors.items():
            assert checkpoint.read(name).nbytes == tensor.n_bytes


def manifest() -> Manifest:
    return Manifest(
        name="example",
        program={"reap2gguf": "0.1.0"},
        source=SourceRecord("owner/name", None, "f", "Qwen3MoeForCausalLM", 10, 20),
        pruning=PruningRecord("reap", 16, 3, 2, {0: (0, 5, 15), 1: (1, 2, 3)}, "a", 7, 700, 0),
        calibration=CalibrationRecord("mix", "b", 512, 42, False, "text.txt", "c", 9, 512),
        hf=FolderRecord("example", 1, 10, 20, {"config.json": FileRecord(3, "d")}),
        gguf=(GgufRecord("x.gguf", "q4", "Q4", "L", "Q4_K", "t", 9, 4.5, {"a.weight": "Q6_K"}),),
        side_files=(SideRecord("y.gguf", "Y", 9, {"v.weight": "F16"}),),
        verification={"passed": True},
    )


def check_manifest(folder: Path) -> None:
    found = Manifest.load(folder)
    assert type(found.name) is str
    for record in (*found.gguf, *found.side_files):
        assert Path(record.file).name == record.file
        assert f"{record.n_bytes:,}"
        assert record.title + record.file
    for layer, kept in found.pruning.kept.items():
        assert all(type(number) is int for number in (layer, *kept))
    assert abs(found.pruning.n_tokens + found.pruning.mtp.hits_after) < 2**64
    assert found.source.label + found.calibration.spec + found.hf.folder


@REUSED_FOLDER
@given(data=st.data())
def test_manifests_that_lie(tmp_path: Path, data: st.DataObject) -> None:
    manifest().save(tmp_path)
    assert refused_or_done(lambda: check_manifest(tmp_path))
    path = tmp_path / MANIFEST_FILE
    path.write_text(data.draw(changed(json.loads(path.read_text()))))
    refused_or_done(lambda: check_manifest(tmp_path), ArtifactError)


HEAD = {"title": '"T"', "label": '"L"', "file_type": '"Q4_K_M"'}
RULE = {"match": '"blk.*.ffn_*_exps.weight"', "type": '"Q8_0"', "optional": "true"}
KEYS = st.sampled_from(
    [*HEAD, *RULE, "rules", "rules.a", "a." * 14 + "a", '"a\\nb"', "'\u202e'", '""']
)
TOML_VALUES = st.sampled_from(
    ['""', '"x"', '"Q8_0"', '"F32"', '"IQ2_XXS"', '"*"', '"[!a]*"', '"[]"', '"[a"', '"**?*"',
     '"""a\nb"""', '"\\u0000"', '"\\u202e"', '"\\ud800"', f'"{"x" * 70_000}"', f'"{"*a" * 99}"',
     "1", "-1", "0.5", "inf", "nan", "1e400", "0x" + "f" * 5000, "0b" + "1" * 20_000, "9" * 5000,
     "true", "false", "1979-05-27", "07:32:00", "1979-05-27T07:32:00Z", "[]", "{}", "[[]]", "[{}]",
     "[" * 300 + "]" * 300, "[" * 5000, "{a=" * 50 + "1" + "}" * 50]
)  # fmt: skip


@st.composite
def recipes(draw: st.DrawFn) -> str:
    """A recipe with a few keys of other names or values."""
    head = HEAD | draw(st.dictionaries(KEYS, TOML_VALUES, max_size=1))
    rules = [
        RULE | draw(st.dictionaries(KEYS, TOML_VALUES, max_size=2))
        for _ in range(draw(st.integers(0, 3)))
    ]
    tables = [head, *rules]
    return "[[rules]]\n".join(
        "".join(f"{key} = {value}\n" for key, value in table.items()) for table in tables
    )


@pytest.fixture(scope="module")
def described(folders: dict[str, Path]) -> tuple[MoeModel, Any]:
    (folders["qwen3"] / "config.json").write_text(json.dumps(LAYOUTS["qwen3"].config()))
    with Checkpoint.open(folders["qwen3"]) as checkpoint:
        model = describe(checkpoint)
        return model, model.gguf_tensors(checkpoint.tensors)


@REUSED_FOLDER
@given(text=recipes())
def test_recipes_that_lie(tmp_path: Path, described: tuple[MoeModel, Any], text: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    model, tensors = described

    def work() -> None:
        recipe = load_recipe(str(path))
        assert recipe.source == text
        assert all(rule.match and type(rule.optional) is bool for rule in recipe.rules)
        resolved = resolve(recipe, tensors, model.facts, 2, has_imatrix=True)
        assert [entry.tensor for entry in resolved.table] == list(tensors)
        assert resolved.n_bytes > 0

    refused_or_done(work, RecipeError)


@REUSED_FOLDER
@given(content=st.binary(max_size=60))
def test_recipes_of_any_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    assert not refused_or_done(lambda: load_recipe(str(path)), RecipeError)


@pytest.mark.parametrize(
    "text",
    ["a." * 30_000 + "a = 1", '"!" . ' * 5000 + "a = 1", "[" + "a." * 30_000 + "a]",
     "x = {" + "a." * 30_000 + "a = 1}", "title = '''" + "'" * 50_000, '"""' + '\\"' * 30_000,
     '"' * 60_000, "\\'" * 30_000],
    ids=["key", "quoted", "table", "inline", "quotes", "escapes", "doubles", "singles"],
)  # fmt: skip
def test_keys_of_many_parts_take_no_memory(text: str) -> None:
    tracemalloc.start()
    with pytest.raises(RecipeError, match="not valid TOML"):
        parse_recipe(text, "name", "file.toml")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2**20


def test_dots_in_strings_and_comments_are_no_parts() -> None:
    many = "a." * 90
    text = f'title = "{many}" # {many}\nlabel = "L"\nfile_type = "Q8_0"\n'
    text += f"[[rules]]\nmatch = '{many}'\ntype = \"Q8_0\"\n"
    assert parse_recipe(text, "name", "file.toml").rules[0].match == many
