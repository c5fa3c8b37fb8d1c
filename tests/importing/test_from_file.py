"""Recipes that are found from the types of a file give back those types."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.importing.from_file import recipe_of_header
from reap2gguf.models.roles import spots
from reap2gguf.quantizing.file_types import MIXTURES
from reap2gguf.quantizing.recipe import load_recipe, shipped_recipes
from tests.exporting.files import (
    export_files,
    gguf_tensors,
    plain,
    random_imatrix,
    types_of_llama_cpp,
)
from tests.importing.headers import Unquantized, is_exact, types_in, unquantized
from tests.models.layouts import FIRST, Case
from tests.models.test_types import WIDE
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

_SIZES = {"hidden": 256, "width": 512, "n_experts": 8}
# what recipes are mixed of: rows of 256 fill the blocks of each
_KINDS = ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_XS", "BF16")
TINY: dict[str, Any] = {
    "qwen3": TinyQwen3Moe(hidden=256, width=256, head_dim=64, n_layers=9, vocab=512),
    "qwen3.5": TinyQwen35Moe(hidden=256, width=512),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Unquantized]:
    """The tiny models by name, each written once."""
    return cache(lambda name: unquantized(TINY[name], tmp_path_factory.mktemp("model")))


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest, models: Callable[[str], Unquantized]) -> Unquantized:
    return models(request.param)


# mixtures of which some types depend on whether there is an importance matrix
_DEPEND = ("Q5_0", "Q4_0", "IQ4_NL", "IQ4_XS", "IQ3_XXS")
_HOW = [
    pytest.param(
        tiny,
        name,
        has_imatrix,
        id=f"{tiny}-{name}-{'with' if has_imatrix else 'without'}",
        marks=() if name in _DEPEND or (has_imatrix and tiny == "qwen3") else pytest.mark.slow,
    )
    for tiny in TINY
    for name in MIXTURES
    for has_imatrix in (True, False)
]


@pytest.mark.parametrize(("model", "name", "has_imatrix"), _HOW, indirect=["model"])
def test_files_of_llama_quantize(model: Unquantized, name: str, has_imatrix: bool) -> None:
    number = int(MIXTURES[name].file_type)
    importance = model.importance if has_imatrix else None
    if name == "NVFP4":  # which llama-quantize refuses to make
        types = model.types_by(plain(name).as_toml(), has_imatrix)
    else:
        types = types_of_llama_cpp(model.path, number, importance)
    header = model.with_types(types, **{"general.file_type": number})
    found = recipe_of_header(header, f"Tiny-{name}.gguf")
    assert is_exact(found, header, model)
    assert found.same_as[0] == found.base == name
    whose = "the file type" if name == "NVFP4" else "llama-quantize's"
    assert f"those of {whose} {name}" in found.as_toml().splitlines()[0]
    assert found.recipe.label == name
    if found.how != "with an importance matrix":
        assert model.types_by(found.as_toml(), has_imatrix=False) == types_in(header)
        assert not found.need_imatrix
    else:
        assert has_imatrix
        assert found.rules == ()
        assert set(found.need_imatrix) == {
            name
            for name, kind in model.types_by(found.as_toml(), has_imatrix=False).items()
            if kind != types[name]
        }


def test_a_file_type_that_asks_for_importance(model: Unquantized) -> None:
    """Q4_0 has Q4_1 in the first layers with an importance matrix, and not without."""
    number = int(MIXTURES["Q4_0"].file_type)
    unweighted = types_of_llama_cpp(model.path, number, None)
    without = recipe_of_header(model.with_types(unweighted), "a.gguf")
    assert "those of llama-quantize's Q4_0" in without.what
    weighted = types_of_llama_cpp(model.path, number, model.importance)
    if model.facts.gguf_arch != "qwen3moe":
        return  # too few layers for a difference
    assert weighted != unweighted
    assert "without an importance matrix" in without.what
    assert [rule.tensor_type.name for rule in without.rules] == ["Q4_0"]
    # keys of llama-quantize say how such a file was made
    header = model.with_types(weighted, **{"quantize.imatrix.file": "x"})
    assert "with an importance matrix" in recipe_of_header(header, "a.gguf").what


# libggml needs seconds before it quantizes to some of their types
_SLOW_TO_START = ("iq3s-multimodal", "small-iq2", "small-iq3")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file of an included recipe."""
    root = tmp_path_factory.mktemp("own")
    folder = replace(TINY["qwen3"], n_layers=2).write(root / "model")
    imatrix = random_imatrix(gguf_tensors(folder))

    def file(name: str) -> Path:
        return export_files(folder, root, [load_recipe(name)], imatrix)[name]

    return file


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(one, marks=pytest.mark.slow if one in _SLOW_TO_START else ())
        for one in shipped_recipes()
        if not load_recipe(one).is_ik  # another program's library makes those
    ],
)
def test_own_files(own: Callable[[str], Path], name: str) -> None:
    path = own(name)
    header = read_gguf_header(path)
    found = recipe_of_header(header, path.name)
    recipe = load_recipe(name)
    assert found.rules == ()
    assert found.base == (name if recipe.rules else recipe.file_type)
    read = {one.name: one.tensor_type.name for one in GGUFReader(path).tensors}
    assert {one: kind.name for one, kind in found.tensor_types.items()} == read


# latent attention, convolutions, linear attention, an MTP block, exactly eight experts
_QUICK = ("DeepseekV3", "Lfm2Moe", "Qwen3Next", "Glm4MoeFor", "Mixtral")
_FAMILIES = [
    pytest.param(
        case,
        id=str(case),
        marks=() if case.architecture.startswith(_QUICK) else pytest.mark.slow,
    )
    for case in FIRST
]


@pytest.mark.parametrize("case", _FAMILIES)
def test_every_family(case: Case, tmp_path: Path) -> None:
    made = replace(case.tiny, **(_SIZES | WIDE.get(case.record, {})))
    model = unquantized(made, tmp_path)
    drawn = random.Random(case.architecture)
    for name in ("Q4_K_M", "IQ2_M", "Q3_K_M"):
        number = int(MIXTURES[name].file_type)
        types = types_of_llama_cpp(model.path, number, model.importance)
        changed = {
            one.name: drawn.choice(("F16", "BF16", "Q8_0" if one.n_columns % 32 == 0 else "F32"))
            for one in model.tensors
            if drawn.random() < 0.1 and not (one.always_f32 or one.never_quantized)
        }
        for some in (types, {**types, **changed}):
            header = model.with_types(some)
            assert is_exact(recipe_of_header(header, "x.gguf"), header, model)


def mixed(model: Unquantized, seed: int) -> dict[str, str]:
    """Random types: of roles, of layers and of single tensors."""
    drawn = random.Random(seed)
    names = [one.name for one in model.tensors if not (one.always_f32 or one.never_quantized)]
    by_role: dict[object, str] = {}
    types = {}
    share = drawn.choice((0, 0.02, 0.3))
    for name, spot in spots([one.name for one in model.tensors]).items():
        if name not in names:
            continue
        part = drawn.choice((0, 0, 0, (spot.block or 0) % 3))
        usual = by_role.setdefault((spot.role, part), drawn.choice(_KINDS))
        kind = drawn.choice(_KINDS) if drawn.random() < share else usual
        columns = model.header.tensors[name].shape[-1]
        types[name] = kind if columns % 256 == 0 else "Q8_0"
    return types


@pytest.mark.parametrize("seed", range(6))
def test_any_types(model: Unquantized, seed: int) -> None:
    header = model.with_types(mixed(model, seed))
    found = recipe_of_header(header, "x.gguf")
    assert is_exact(found, header, model)
    assert all(rule.names for rule in found.rules)
    assert found.n_decided <= len(found.tensor_types)


def test_the_toml_is_short_and_says_what_rules_cover(model: Unquantized) -> None:
    number = int(MIXTURES["Q4_K_M"].file_type)
    types = types_of_llama_cpp(model.path, number, model.importance)
    spot = spots(list(types))
    for name in types:
        if "attention" in spot[name].roles and types[name] != "F32":
            types[name] = "Q8_0"
        if "_exps" in name and spot[name].block in (0, 1):
            types[name] = "Q6_K"
    found = recipe_of_header(model.with_types(types), "Tiny-Q4_K_L-00001-of-00002.gguf")
    assert len(found.rules) <= 2
    lines = found.as_toml().splitlines()
    assert lines[0].startswith("# Tiny-Q4_K_L-00001-of-00002.gguf: ")
    assert found.recipe.label == "Q4_K_L"
    (experts,) = (rule for rule in found.rules if rule.selector.match == "experts")
    assert (experts.selector.layers, experts.tensor_type.name) == ("0-1", "Q6_K")
    assert len(experts.names) == 6
    at = lines.index('match = "experts"')
    assert lines[at - 1 : at + 3] == [
        "[[rules]]  # 6 tensors", 'match = "experts"', 'layers = "0-1"', 'type = "Q6_K"',
    ]  # fmt: skip


def test_types_that_are_read_and_not_written(model: Unquantized) -> None:
    some = [one for one in model.header.tensors if one.endswith("ffn_down_exps.weight")]
    header = model.with_types({name: "Q1_0" for name in some})
    found = recipe_of_header(header, "x.gguf")
    assert [*found.unwritable] == some
    assert found.same_as == ()
    others = len(header.tensors) - len(some) - found.n_decided
    assert f" gives {others} of {len(header.tensors)} tensors their types" in found.what
    (note,) = (one for one in found.notes() if "Q1_0" in one)
    assert note.startswith(f"{len(some)} tensors of Q1_0, such as {some[0]}: reap2gguf reads")
    assert f"# {note}" in found.as_toml().splitlines()
    made = model.types_by(found.as_toml())
    expected = types_in(header)
    assert {one: kind for one, kind in made.items() if one not in some} == {
        one: kind for one, kind in expected.items() if one not in some
    }


def test_rows_that_only_such_types_fill(tmp_path: Path) -> None:
    """Blocks of Q8_1 have 32 values; a rule for the whole role must not ask more of these rows."""
    model = unquantized(TinyQwen3Moe(hidden=256, width=96, head_dim=64, n_layers=2), tmp_path)
    types = {one.name: "Q5_K" for one in model.tensors if "_exps" in one.name}
    types |= {name: "Q8_1" for name in types if "_down_" in name}
    header = model.with_types({**types, "token_embd.weight": "Q5_K", "output.weight": "Q5_K"})
    found = recipe_of_header(header, "x.gguf")
    made = model.types_by(found.as_toml())
    assert {one: kind for one, kind in made.items() if "_down_" not in one} == {
        one: kind for one, kind in types_in(header).items() if "_down_" not in one
    }


def test_types_that_no_recipe_decides(model: Unquantized) -> None:
    header = model.with_types({"output_norm.weight": "F16"})
    found = recipe_of_header(header, "x.gguf")
    assert [*found.fixed] == ["output_norm.weight"]
    assert found.same_as == ()
    assert any("output_norm.weight is F16 in the file" in one for one in found.notes())


@pytest.mark.parametrize("name", ["IQ4_K", "IQ4_KS", "ik-iq4k"])
def test_types_of_ik_llama_cpp(model: Unquantized, name: str) -> None:
    recipe = load_recipe(name)
    types = model.types_by(recipe.source)
    header = model.with_types(types)
    found = recipe_of_header(header, "Tiny-IQ4_K_L.gguf")
    assert is_exact(found, header, model)
    assert found.rules == ()
    assert found.recipe.label == "ik-IQ4_K_L"
    some = [one for one in types if one.endswith("ffn_down_exps.weight")]
    changed = model.with_types({**types, **dict.fromkeys(some, "IQ5_K")})
    other = recipe_of_header(changed, "x.gguf")
    assert is_exact(other, changed, model)
    assert 1 <= len(other.rules) <= 2


def test_another_architecture_is_one_line(model: Unquantized) -> None:
    header = model.with_types({}, **{"general.architecture": "gemma3"})
    with pytest.raises(UnsupportedModelError, match="architecture 'gemma3' is not implemented"):
        recipe_of_header(header, "x.gguf")
