"""`--tensor-type`: rules before those of a recipe."""

from __future__ import annotations

import pytest

from reap2gguf.errors import RecipeError
from reap2gguf.models.reference import REFERENCE_FACTS, reference_tensors
from reap2gguf.quantizing.overrides import read_overrides
from reap2gguf.quantizing.recipe import Recipe, load_recipe, load_recipes, parse_recipe
from reap2gguf.quantizing.resolve import resolve
from reap2gguf.quantizing.role_settings import roles_as_patterns


def types(recipe: Recipe) -> dict[str, str]:
    found = resolve(recipe, reference_tensors(), REFERENCE_FACTS, 128, has_imatrix=True)
    return {name: kind.name for name, kind in found.tensor_types().items()}


def overridden(name: str, *texts: str) -> Recipe:
    (recipe,) = load_recipes([name], {}, read_overrides(texts))
    return recipe


@pytest.mark.parametrize(
    ("text", "match", "kind"),
    [
        ("attn_v=q5_k", "*attn_v*", "Q5_K"),
        ("ATTN_V=Q5_K", "*attn_v*", "Q5_K"),
        ("output.weight=q8_0", "output.weight", "Q8_0"),
        ("blk.[0-3].*_exps.weight=iq4-xs", "blk.[0-3].*_exps.weight", "IQ4_XS"),
    ],
)
def test_a_word_is_searched_for_and_a_glob_is_one(text: str, match: str, kind: str) -> None:
    (rule,) = read_overrides([text])
    assert (rule.match, rule.tensor_type.name, rule.override) == (match, kind, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attn_v", "--tensor-type 'attn_v' is not PATTERN=TYPE, such as attn_v=Q5_K"),
        ("=q8_0", "is not PATTERN=TYPE"),
        ("attn_v=", "is not PATTERN=TYPE"),
        ("attn_v=q4_k_m", "attn_v: type 'q4_k_m' is not a GGML tensor type; Q4_K_M is a file type"),
        ("attn_(v|k)=q8_0", r"pattern 'attn_\(v|k\)' is not a glob"),
        ("*" * 17 + "=q8_0", "17 stars"),
    ],
)
def test_a_wrong_one_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_overrides([text])


def test_only_so_many() -> None:
    with pytest.raises(RecipeError, match=r"201 patterns, expected at most 200"):
        read_overrides(["a=F16"] * 201)


def test_the_first_match_wins_and_the_rest_is_the_recipe() -> None:
    plain = types(load_recipe("unsloth-iq4km"))
    found = types(overridden("unsloth-iq4km", "blk.0.attn_v.weight=f16", "attn_v=q8_0"))
    assert found["blk.0.attn_v.weight"] == "F16"
    assert {found[f"blk.{layer}.attn_v.weight"] for layer in range(1, 48)} == {"Q8_0"}
    assert {k: v for k, v in found.items() if "attn_v" not in k} == {
        k: v for k, v in plain.items() if "attn_v" not in k
    }


def test_the_recipe_says_so_and_can_be_read_again() -> None:
    recipe = overridden("q4km", "attn_v=q8_0")
    assert recipe.name == "q4km+custom"
    assert recipe.label == "Q4_K_M"
    assert recipe.title.endswith(", with *attn_v*=Q8_0")
    assert recipe.source != load_recipe("q4km").source
    again = parse_recipe(recipe.source, recipe.name, "manifest")
    assert again == recipe
    assert types(again) == types(recipe)
    assert overridden("q4km") == load_recipe("q4km")
    title = overridden("q4km", "a=F16", "b=F16", "c=F16", "d=F16", "e=F16").title
    assert title.endswith("*c*=F16, 2 more")


def test_a_label_is_given_by_the_recipes_own_name() -> None:
    overrides = read_overrides(["attn_v=q8_0"])
    for name in ("Q4_K_M", "q4km", "q4km+custom"):
        (recipe,) = load_recipes(["q4km"], {name: "MINE"}, overrides)
        assert recipe.label == "MINE"


def test_it_may_take_all_tensors_of_the_recipes_own_rule() -> None:
    found = types(overridden("unsloth-iq4km", "ffn_down_exps=q6_k"))
    assert found["blk.7.ffn_down_exps.weight"] == "Q6_K"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["nothing=q8_0"], r"--tensor-type \*nothing\*=Q8_0: matches no tensor of this model"),
        (
            ["blk.0.attn_v=q8_0"],
            "matches no tensor of this model; PATTERN is a word such as attn_v",
        ),
        (["attn=q8_0", "attn_v=f16"], r"--tensor-type \*attn_v\*=F16 is shadowed: earlier"),
        (["attn_norm=q8_0"], "llama.cpp never quantizes what it matches"),
    ],
)
def test_one_that_decides_nothing_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        types(overridden("unsloth-iq4km", *texts))


def test_a_rule_that_was_shadowed_before_still_is() -> None:
    text = (
        'title = "T"\nlabel = "L"\nfile_type = "Q4_K_M"\n'
        '[[rules]]\nmatch = "blk.*"\ntype = "Q8_0"\n'
        '[[rules]]\nmatch = "blk.0.attn_v.weight"\ntype = "F16"\n'
    )
    recipe = parse_recipe(text, "mine", "mine").with_overrides(read_overrides(["attn_q=q6_k"]))
    with pytest.raises(RecipeError, match=r"rule 'blk\.0\.attn_v\.weight' is shadowed"):
        types(recipe)


@pytest.mark.parametrize(
    ("text", "match", "layers"),
    [
        ("experts.down=q6_k", "experts.down", ""),
        ("Experts.Down@0-3=q6_k", "experts.down", "0-3"),
        ("attention@-4:=q6_k", "attention", "-4:"),
        ("output=q6_k", "output.weight", ""),
        ("blk.*.attn_v.weight@1,3=q6_k", "blk.*.attn_v.weight", "1,3"),
    ],
)
def test_a_role_may_be_set(text: str, match: str, layers: str) -> None:
    (rule,) = read_overrides(roles_as_patterns([text]))
    assert (rule.match, rule.layers, rule.tensor_type.name) == (match, layers, "Q6_K")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experts.down", "--set 'experts.down' is not ROLE=TYPE, such as experts.down=Q6_K"),
        ("expert.down=q8_0", "'expert.down' is not a role \\(did you mean experts.down"),
        ("attn_v=q8_0", "'attn_v' is not a role.*; --tensor-type takes parts of names"),
        ("experts@x=q8_0", "layers is 'x', expected numbers and ranges"),
        ("experts=q4_k_m", "experts: type 'q4_k_m' is not a GGML tensor type; Q4_K_M is a file"),
        ("mtp=q8_0", "--set mtp=Q8_0: matches no tensor of this model"),
        ("experts@48=q8_0", "--set experts@48=Q8_0: matches no .* has experts in layers 0-47"),
        ("router=q8_0", "llama.cpp never quantizes what it matches"),
    ],
)
def test_a_wrong_role(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        types(overridden("q4km", *roles_as_patterns([text])))


def test_roles_of_an_override_are_kept_in_the_recipe() -> None:
    recipe = overridden("unsloth-iq4km", *roles_as_patterns(["experts.down@0-3=q6_k"]))
    kinds = types(recipe)
    assert [kinds[f"blk.{n}.ffn_down_exps.weight"] for n in (0, 3, 4)] == ["Q6_K", "Q6_K", "Q5_K"]
    assert recipe.title.endswith(", with experts.down in layers 0-3=Q6_K")
    assert types(parse_recipe(recipe.source, recipe.name, "manifest")) == kinds
