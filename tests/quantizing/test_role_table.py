"""Recipes by role and layers: rows hold every tensor once, and sizes are those of files."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

import reap2gguf
from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.roles import ROLE_WORDS, spots
from reap2gguf.quantizing.recipe import load_recipe
from reap2gguf.quantizing.resolve import ResolvedRecipe, resolve
from reap2gguf.quantizing.role_table import RoleRow, difference, table_of
from reap2gguf.quantizing.selector import Selector
from tests.families.gpt_oss import TINY as GPT_OSS
from tests.loopback_hub.model import layered_files, serving
from tests.models.layouts import CASES, Case
from tests.quantized import as_mxfp4
from tests.tiny import EXAMPLE, TinyQwen3Moe, TinyQwen35Moe

RECIPES = ("Q4_K_M", "IQ2_M", "unsloth-q3kxl")


def resolved(name: str, case: Case) -> ResolvedRecipe:
    tensors, facts = case.model.gguf_tensors(case.stored), case.model.facts
    return resolve(load_recipe(name), tensors, facts, facts.n_experts, has_imatrix=True)


def names_of(row: RoleRow, names: list[str]) -> list[str]:
    """The tensors that a row speaks of, found by what it prints."""
    places = spots(names)
    picked = Selector("*", row.layers)
    return [
        name
        for name in names
        if re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight") in row.tensors
        and (places[name].block is None) is (row.layers == "")
        and picked.fits(places[name])
        and (row.role not in ROLE_WORDS or Selector(row.role).fits(places[name]))
        and (row.role == "mtp") is ("MTP" in places[name].roles)
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_is_in_one_row_with_its_type(case: Case) -> None:
    for recipe in RECIPES:
        found = resolved(recipe, case)
        table = table_of(found, "model", 10**9)
        types, counted = table.tensor_types, Counter[str]()
        for row in table.rows:
            names = names_of(row, list(types))
            assert len(names) == row.n_tensors, row
            assert {types[name] for name in names} == {row.tensor_type}
            counted.update(names)
        assert counted == Counter(types.keys())
        assert sum(row.n_bytes for row in table.rows) == table.n_bytes == found.n_bytes
        assert sum(row.n_weights for row in table.rows) == table.n_weights
        assert table.bits_per_weight == pytest.approx(found.bits_per_weight)


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_what_differs_is_what_has_another_type(case: Case) -> None:
    both = resolved("Q4_K_M", case), resolved("unsloth-q4kxl", case)
    first, second = (table_of(one, "model", 1) for one in both)
    found = difference(both, (first, second))
    names = {n for n in first.tensor_types if first.tensor_types[n] != second.tensor_types[n]}
    assert found.n_changed == len(names) > 0
    assert all(one.types[0] != one.types[1] for one in found.changes)
    change = sum(one.n_bytes[1] - one.n_bytes[0] for one in found.changes)
    assert change == second.n_bytes - first.n_bytes
    same = difference((both[0], both[0]), (first, first))
    assert same.is_equal
    assert not found.is_equal


def test_rows_that_fill_no_blocks_are_marked_with_the_reason(tmp_path: Path) -> None:
    model = TinyQwen3Moe().write(tmp_path / "model")  # rows of 64 and 32
    rows = reap2gguf.recipe_table("Q4_K_M", model).rows
    down = [row for row in rows if row.role == "experts.down"]
    assert {(row.tensor_type, row.wanted) for row in down} >= {("Q5_0", "Q4_K")}
    assert down[0].reason == "rows of 32 do not fill the blocks of 256 that Q4_K has"
    assert all(not row.reason for row in reap2gguf.recipe_table("Q4_0", model).rows[:1])


def test_experts_that_stay_as_they_are_stored_are_marked_with_the_reason(tmp_path: Path) -> None:
    rows = reap2gguf.recipe_table("Q8_0", as_mxfp4(GPT_OSS).write(tmp_path / "model")).rows
    experts = [row for row in rows if row.role.startswith("experts") and row.wanted]
    assert {(row.tensor_type, row.wanted) for row in experts} == {("MXFP4", "Q8_0")}
    said = "they are stored as MXFP4, and would take no fewer bits in another"
    assert {row.reason for row in experts} == {said}


@pytest.mark.parametrize("tiny", [TinyQwen3Moe, TinyQwen35Moe])
def test_the_size_is_that_of_the_file_that_is_written(tiny: type, tmp_path: Path) -> None:
    model = tiny().write(tmp_path / "model")
    for recipe in ("Q8_0", "q4km"):
        path = tmp_path / f"{recipe}.gguf"
        reap2gguf.quantize(model, recipe, path, threads=1)
        table = reap2gguf.recipe_table(recipe, model, weighted=False)
        assert table.n_file_bytes == path.stat().st_size
        # a GGUF file is a model too, and this recipe changes nothing in it
        again = reap2gguf.recipe_table(recipe, path, weighted=False)
        assert again.n_file_bytes == path.stat().st_size
        assert again.rows == table.rows


def test_a_folder_of_gguf_files_and_the_example(tmp_path: Path) -> None:
    reap2gguf.quantize(EXAMPLE, "q8_0", tmp_path / "a-Q8_0.gguf", threads=1)
    of_folder = reap2gguf.recipe_table("q4km", tmp_path)
    assert of_folder.model == "a-Q8_0.gguf"
    assert of_folder.rows == reap2gguf.recipe_table("q4km").rows
    found = reap2gguf.compare_recipes("Q4_K_M", "q4km", tmp_path)
    assert found.is_equal
    assert found.model == "a-Q8_0.gguf"


def test_a_file_of_an_unknown_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    reap2gguf.quantize(TinyQwen3Moe().write(tmp_path / "m"), "q8_0", path, threads=1)
    path.write_bytes(path.read_bytes().replace(b"qwen3moe", b"qwen9moe"))
    with pytest.raises(UnsupportedModelError, match=r"a\.gguf: its tensors are not known, so no"):
        reap2gguf.recipe_table("q4km", path)


def test_overrides_are_the_rules_of_their_rows() -> None:
    table = reap2gguf.recipe_table("q8_0", tensor_types={"attn_v": "F16", "blk.0.*": "Q5_K"})
    rules = {row.rules: row for row in table.rows if row.rules}
    assert rules[("*attn_v*",)].tensors == ("attn_v",)
    assert all(row.layers == "0" for rule, row in rules.items() if rule == ("blk.0.*",))
    assert table.recipe == "q8_0+custom"


def test_models_on_the_hub_are_read_from_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = layered_files(tmp_path / "layers")
    path = tmp_path / "a-Q8_0.gguf"
    reap2gguf.quantize(tmp_path / "layers", "q8_0", path, threads=1)
    here = reap2gguf.recipe_table("Q4_K_M", tmp_path / "layers")
    with serving({**contents, path.name: path.read_bytes()}, monkeypatch, tmp_path / "cache"):
        for name in ("owner/name", f"owner/name:{path.name}"):
            found = reap2gguf.recipe_table("Q4_K_M", name)
            assert found.model == name
            assert found.rows == here.rows
        difference = reap2gguf.compare_recipes("Q4_K_M", "q8_0", "owner/name")
    # but for names in the header
    assert difference.second.n_file_bytes == pytest.approx(path.stat().st_size, abs=512)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
