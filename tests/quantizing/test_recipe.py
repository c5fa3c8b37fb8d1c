from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gguf import GGMLQuantizationType, LlamaFileType
from hypothesis import given
from hypothesis import strategies as st

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import RecipeError
from reap2gguf.models.description import GgufTensor, Slab
from reap2gguf.models.table import describe
from reap2gguf.quantizing.file_types import MIXTURES, REFUSED
from reap2gguf.quantizing.named import RecipeText
from reap2gguf.quantizing.recipe import (
    Recipe,
    Rule,
    find_recipe,
    load_recipe,
    load_recipes,
    parse_recipe,
    shipped_recipes,
)
from reap2gguf.quantizing.resolve import resolve
from tests.tiny import REPOSITORY

RECIPES = sorted((REPOSITORY / "recipes").glob("*.toml"))
HEAD = 'title = "T"\nlabel = "L"\nfile_type = "Q4_K_M"\n'


def parse(text: str) -> Recipe:
    return parse_recipe(text, "name", "file.toml")


def rule(match: str = "output.weight", kind: str = "Q6_K", more: str = "") -> str:
    return f'{HEAD}[[rules]]\nmatch = "{match}"\ntype = "{kind}"\n{more}\n'


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES} >= {"bf16", "q8_0", "q4km", "unsloth-iq4km"}
    assert shipped_recipes() == {path.stem: path for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_resolves_for_the_example(path: Path, example: Path) -> None:
    recipe = load_recipe(path.stem)
    assert recipe == load_recipe(str(path))
    assert recipe.source == path.read_text()
    with Checkpoint.open(example) as checkpoint:
        model = describe(checkpoint)
        tensors = model.gguf_tensors(checkpoint.tensors)
    resolved = resolve(recipe, tensors, model.facts, model.facts.n_experts, has_imatrix=True)
    assert [entry.tensor for entry in resolved.table] == list(tensors)
    assert 2.5 < resolved.bits_per_weight < 16.1


def test_labels_of_shipped_recipes_differ() -> None:
    labels = [load_recipe(path.stem).label for path in RECIPES]
    assert len(set(labels)) == len(labels)


def test_all_fields() -> None:
    text = rule("blk.[0-3].*_exps.weight", "IQ4_XS", "optional = true")
    expected = Rule("blk.[0-3].*_exps.weight", GGMLQuantizationType.IQ4_XS, True)
    assert parse(text) == Recipe("name", "T", "L", "Q4_K_M", (expected,), text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "rule = 1\n", "unknown key 'rule', expected extends, file_type, label, min_"),
        (rule(more='kind = "Q8_0"'), "unknown key 'kind', expected fallback, inherited, layers"),
        (HEAD.replace('"T"', "1"), "title is 1, expected text"),
        (HEAD.replace('"T"', '" "'), "title is ' ', expected text"),
        (HEAD.replace('title = "T"\n', ""), "missing key `title`, what the recipe is"),
        (HEAD.replace('label = "L"\n', ""), "missing key `label`, the end of the file name"),
        (HEAD.replace('file_type = "Q4_K_M"\n', ""), "missing key `file_type`, llama.cpp"),
        (HEAD + '[[rules]]\ntype = "F16"\n', "rule 1: missing key `match`, a glob"),
        (HEAD + '[[rules]]\nmatch = "a"\n', "rule 1: missing key `type`, a GGML tensor type"),
        (rule(more="override = 1"), "override is 1, expected true or false"),
        (HEAD.replace('"L"', "true"), "label is True, expected text"),
        (HEAD.replace('"L"', '"../up"'), "label '../up', expected letters"),
        (HEAD.replace('"L"', '"-L"'), "label '-L', expected letters"),
        (HEAD.replace('"L"', f'"{"L" * 65}"'), "expected letters"),
        (HEAD.replace('"Q4_K_M"', '["Q4_K_M"]'), "file_type is .*, expected text"),
        (HEAD.replace("Q4_K_M", "Q4_K"), r"file_type 'Q4_K', expected one of F32, .*Q4_K_M"),
        (HEAD.replace("Q4_K_M", "IQ4_KX"), "file_type 'IQ4_KX', expected one of"),
        (HEAD + "rules = 1\n", r"rules must be at most 1000"),
        (HEAD + "rules = [1]\n", r"rule 1: expected a \[\[rules\]\] table"),
        (HEAD + "rules = [" + '{match="a",type="F16"},\n' * 1001 + "]", "at most 1000"),
        (rule(match=""), "match is '', expected text"),
        (rule(match="blk 0"), "match 'blk 0' is not a glob on GGUF tensor names"),
        (rule(match="(a|b)"), "is not a glob"),
        (rule(match="a" * 201), "is not a glob"),
        (rule(more="optional = 1"), "optional is 1, expected true or false"),
        (rule(kind="q4_k_m"), "'q4_k_m' is not a GGML tensor type; Q4_K_M is a file type, the"),
        (rule(kind="Q4_K_M"), "Q4_K_M is a file type, the tensor type is Q4_K"),
        (rule(kind="Q3_K_L"), "Q3_K_L is a file type, the tensor type is Q3_K"),
        (rule(kind="MXFP4_MOE"), "MXFP4_MOE is a file type, the tensor type is MXFP4"),
        (rule(kind="q1_0"), "type 'q1_0' is not supported: it holds only the sign of a weight"),
        (rule(kind="COPY"), "type 'COPY' is not a GGML tensor type; expected one of BF16, F16"),
        (HEAD.replace("Q4_K_M", "Q1_0"), "file_type 'Q1_0' is not supported: it holds only"),
        (rule(kind="IQ4_K"), "exists only in ik_llama.cpp, and llama.cpp cannot load it"),
        (rule(kind="IQ5_KS"), "exists only in ik_llama.cpp"),
        (rule(kind="IQ2_KT"), "exists only in ik_llama.cpp"),
        (rule(kind="IQ4_KSS"), "exists only in ik_llama.cpp"),
        (rule(kind="Q9"), "type 'Q9' is not a GGML tensor type; expected one of BF16"),
        (HEAD + "[[rules]\n", "file.toml, line 4: not valid TOML"),
        ("", "file.toml: is empty, expected a recipe; `reap2gguf recipes show"),
        ("# nothing\n", "file.toml: is empty"),
        (rule(kind="Q4K"), r"type 'Q4K' is not a GGML tensor type; did you mean Q4_K\?"),
        (HEAD + "a = " + "[" * 5000, "not valid TOML"),
        ("title = " + "1" * 5000, "not valid TOML"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as raised:
        parse(text)
    assert re.match(r"file\.toml(, line \d+)?: ", str(raised.value))


@pytest.mark.parametrize("kind", ["I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"])
def test_types_that_no_weight_is_stored_in_are_refused(kind: str) -> None:
    with pytest.raises(RecipeError, match=kind):
        parse(rule(kind=kind))


def test_a_rule_is_named_by_its_number() -> None:
    text = rule() + '[[rules]]\nmatch = "a"\ntype = "Q9"\n'
    with pytest.raises(RecipeError, match="rule 2"):
        parse(text)


@pytest.mark.parametrize(
    ("written", "expected"),
    [("q8_0", "Q8_0"), ("q4_K", "Q4_K"), ("iq4-xs", "IQ4_XS"), ("Bf16", "BF16")],
)
def test_a_type_may_be_written_as_llama_cpp_does(written: str, expected: str) -> None:
    assert parse(rule(kind=written)).rules[0].tensor_type.name == expected


@pytest.mark.parametrize(
    ("written", "name", "label"),
    [
        ("Q5_K_M", "Q5_K_M", "Q5_K_M"),
        ("q5_k_m", "Q5_K_M", "Q5_K_M"),
        ("Q5-K-M", "Q5_K_M", "Q5_K_M"),
        ("q5km", "Q5_K_M", "Q5_K_M"),
        ("Q5_K", "Q5_K_M", "Q5_K_M"),
        ("iq4xs", "IQ4_XS", "IQ4_XS"),
        ("mxfp4-moe", "MXFP4_MOE", "MXFP4_MOE"),
        ("iq1s", "IQ1_S", "IQ1_S"),
        ("f16", "F16", "F16"),
        ("Q4_K_M", "q4km", "Q4_K_M"),
        ("q4_k", "q4km", "Q4_K_M"),
        ("BF16", "bf16", "BF16"),
        ("Q8-0", "q8_0", "Q8_0"),
        ("Unsloth_IQ4KM", "unsloth-iq4km", "IQ4_K_M"),
    ],
)
def test_names_are_found_however_they_are_written(written: str, name: str, label: str) -> None:
    found = load_recipe(written)
    assert (found.name, found.label) == (name, label)


@pytest.mark.parametrize("name", MIXTURES)
def test_every_file_type_is_a_recipe_of_its_own_mixture(name: str) -> None:
    found = load_recipe(name)
    assert (found.file_type, found.label, found.rules) == (name, name, ())
    assert parse_recipe(found.source, found.name, "x") == found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "q5",
            r"no recipe 'q5'; did you mean Q5_K_M\? Pass a \.toml file or a name that `reap2gguf",
        ),
        ("unsloth", "did you mean unsloth-iq4km"),
        ("MXFP4", r"no recipe 'MXFP4'; did you mean MXFP4_MOE\?"),
        ("qqqqqqqqqqqqqqqqqqqqqq", r"no recipe '\w+'; pass a \.toml file"),
        ("", "no recipe ''; pass"),
        ("./missing.toml", r"\./missing\.toml: no such recipe file"),
    ],
)
def test_an_unknown_recipe_suggests_the_nearest(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        find_recipe(name)


@pytest.mark.parametrize("name", REFUSED)
def test_file_types_that_cannot_be_had_say_why(name: str) -> None:
    assert name not in MIXTURES
    for written in (name, name.lower(), name.replace("_", "")):
        with pytest.raises(RecipeError) as raised:
            load_recipe(written)
        assert str(raised.value) == f"file type {written!r} is not supported: {REFUSED[name]}"
        assert "; use " in str(raised.value)
        # what it advises is a recipe
        load_recipe(str(raised.value).split("; use ")[1].split(" ")[0])


def test_every_file_type_of_llama_cpp_is_a_recipe_or_refused() -> None:
    known = {one.name.split("_", 1)[1] for one in LlamaFileType if one.name != "GUESSED"}
    assert known <= MIXTURES.keys() | REFUSED.keys()


def test_a_recipe_file_must_be_toml(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text(HEAD)
    (tmp_path / "mine.toml").write_text(HEAD)
    with pytest.raises(RecipeError, match=r"mine\.txt: the name of a recipe's file must end in"):
        load_recipe(str(tmp_path / "mine.txt"))
    assert load_recipe(str(tmp_path / "mine.toml")).name == "mine"


def test_two_spellings_of_a_recipe_are_one(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(HEAD)
    path = str(tmp_path / "mine.toml")
    names = ["Q5_K_M", "q4km", path, "q5-k-m", "Q4_K_M", f"{tmp_path}/./mine.toml"]
    assert [recipe.name for recipe in load_recipes(names, {})] == ["Q5_K_M", "q4km", "mine"]
    labelled = load_recipes(names, {"q4_k_m": "A", "mine": "B", "Q5KM": "C"})
    assert [recipe.label for recipe in labelled] == ["C", "A", "B"]


def test_a_recipe_may_come_as_text() -> None:
    (found,) = load_recipes([RecipeText("old", HEAD, "NEW")], {})
    assert (found.name, found.label, found.source) == ("old", "NEW", HEAD)
    (found,) = load_recipes([RecipeText("old", HEAD, "NEW")], {"old": "OTHER"})
    assert found.label == "OTHER"
    with pytest.raises(RecipeError, match="recipe 'old': not valid TOML"):
        load_recipe(RecipeText("old", "["))


@given(st.text(max_size=40), st.booleans())
def test_toml_that_is_written_is_read_again(title: str, optional: bool) -> None:
    rules = (Rule("a*", GGMLQuantizationType.Q8_0, optional), Rule("b", GGMLQuantizationType.F16))
    recipe = Recipe("n", f"x{title}", "L", "Q4_K_M", rules, "")
    text = recipe.as_toml()
    assert replace(parse(text), name="n", source="") == recipe


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"title = '\xff'", "cannot be read"), (b"#" * (2**20 + 1), "too large for a recipe")],
    ids=["not-utf8", "large"],
)
def test_a_file_that_cannot_be_a_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "mine.toml").write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(tmp_path / "mine.toml"))


LINES = st.sampled_from(
    ['title = "T"', 'label = "L"', 'file_type = "Q8_0"', "[[rules]]", 'match = "*"',
     'type = "Q8_0"', "optional = true", "[rules]", "rules = []", 'type = "IQ4_K"', "match = 1",
     "label = 1979-05-27", "title = inf", '"" = 1', "a.b = {}", "[[rules.a]]"]
)  # fmt: skip


@given(st.one_of(st.text(), st.lists(LINES, max_size=9).map("\n".join)))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        recipe = parse(text)
    except RecipeError as error:
        assert re.match(r"file\.toml(, line \d+)?: ", str(error))
    else:
        assert (recipe.title, recipe.label, recipe.file_type) == ("T", "L", "Q8_0")


def test_stars_are_few(example: Path) -> None:
    assert parse(rule(match="*a" * 16)).rules[0].match == "*a" * 16
    with pytest.raises(RecipeError, match="has 17 stars, expected at most 16"):
        parse(rule(match="*a" * 17))


def test_many_rules_with_stars_are_refused_before_they_are_matched() -> None:
    """A rule costs as much as it has stars, for each tensor."""
    rules = tuple(
        Rule(f"*a*b*c{number}", GGMLQuantizationType.Q8_0, optional=True) for number in range(1000)
    )
    recipe = Recipe("name", "T", "L", "Q4_K_M", rules, "")
    tensors = [GgufTensor(f"blk.{n}.attn_q.weight", (32, 32), (Slab("x"),)) for n in range(1001)]
    facts: Any = SimpleNamespace(gqa=1)
    with pytest.raises(RecipeError, match="1,000 rules for 1,001 tensors, too many to match"):
        resolve(recipe, tensors, facts, 8, has_imatrix=True)
