"""Rules that decide about no tensor: which are errors, and which another model has a use for."""

from __future__ import annotations

import re

import pytest

from reap2gguf.errors import RecipeError
from reap2gguf.models.description import GgufTensor
from reap2gguf.models.reference import REFERENCE_FACTS
from reap2gguf.models.roles import spots
from reap2gguf.quantizing.deciding import fixed_type, winner
from reap2gguf.quantizing.recipe import load_recipe, parse_recipe
from reap2gguf.quantizing.resolve import resolve

HEAD = 'title = "T"\nlabel = "L"\nfile_type = "Q4_K_M"\n'


def tensors_of(n_layers: int) -> list[GgufTensor]:
    names = [
        f"blk.{layer}.{name}.weight" for layer in range(n_layers) for name in ("attn_q", "ffn_up")
    ]
    return [GgufTensor(name, (256, 256), ()) for name in ("token_embd.weight", *names)]


def check(*rules: tuple[str, str], optional: bool = True, n_layers: int = 4) -> None:
    """Resolve rules (match, layers); the last one is `optional`, in lines 4, 8 and so on."""
    text = HEAD
    for number, (match, layers) in enumerate(rules):
        text += (
            f'[[rules]]\nmatch = "{match}"\ntype = "Q{8 - 2 * (number % 2)}_{number % 2 and "K"}"\n'
        )
        text += f'layers = "{layers}"\n' if layers else "# all layers\n"
    text += "optional = true\n" if optional else ""
    recipe = parse_recipe(text, "mine", "mine.toml")
    resolve(recipe, tensors_of(n_layers), REFERENCE_FACTS, 8, has_imatrix=True)


# an optional rule for attention (or `last`) after these, in a model of four layers
OF_USE = [
    [("attention", "0-3")],
    [("attention", "-4:")],
    [("attention", "0-1"), ("attention", "-2:")],
    [("attention", "0-1"), ("attention", "2-5")],
    [("attention", "0"), ("attention", "1"), ("attention", "2,3,5:")],  # 4 is left
    [("blk.[0-3].attn_q.weight", "")],
]
OF_NO_USE = [
    [("attention", "")],
    [("attention", "0:")],
    [("attention", "0-1"), ("attention", "2:")],
    [("attention", "0-2,3:")],
    [("*attn*", ""), ("dense_ffn", "0-3")],  # another rule's layers are no excuse
    [("dense_ffn", "0"), ("*attn*", "")],
    [("blk.*.attn_q.weight", "")],
]


@pytest.mark.parametrize("earlier", OF_USE, ids=str)
def test_a_larger_model_would_have_a_use_for_it(earlier: list[tuple[str, str]]) -> None:
    check(*earlier, ("attention", ""))
    check(*earlier, ("attention", ""), optional=False, n_layers=48)
    with pytest.raises(RecipeError, match="rule 'attention' is shadowed"):
        check(*earlier, ("attention", ""), optional=False)


@pytest.mark.parametrize("earlier", OF_NO_USE, ids=str)
def test_no_model_would_have_a_use_for_it(earlier: list[tuple[str, str]]) -> None:
    line = 4 + 4 * len(earlier)
    for n_layers in (4, 48):
        with pytest.raises(RecipeError, match=f"line {line}: rule 'attention' is shadowed"):
            check(*earlier, ("attention", ""), n_layers=n_layers)


def test_a_rule_for_layers_may_be_of_no_use_too() -> None:
    check(("attention", "0-3"), ("attention", "2-9"))
    with pytest.raises(RecipeError, match="rule 'attention' in layers '2-3' is shadowed"):
        check(("attention", "0-3"), ("attention", "2-3"))
    with pytest.raises(RecipeError, match="in layers '-1' is shadowed"):
        check(("attention", "-4:"), ("attention", "-1"))


def test_the_error_names_the_rule_that_takes_the_tensors() -> None:
    message = (
        "mine.toml, line 12: rule 'attention' is shadowed: earlier rules take every tensor it "
        "matches, such as blk.0.attn_q.weight, which rule '*attn*' of line 8 takes; move it up or "
        "remove it"
    )
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        check(("dense_ffn", "0"), ("*attn*", ""), ("attention", ""))


def test_outside_of_layers_nothing_is_narrowed() -> None:
    with pytest.raises(RecipeError, match="rule 'embedding' is shadowed"):
        check(("attention", "0-3"), ("token_*", ""), ("embedding", ""))


def test_tensors_of_a_fixed_type_pass_by_rules_for_others() -> None:
    rules = '[[rules]]\nmatch = "*"\ntype = "Q8_0"\n[[rules]]\nmatch = "*_norm*"\ntype = "F32"\n'
    recipe = parse_recipe(HEAD + rules, "mine", "mine.toml")
    norm = GgufTensor("blk.0.attn_norm.weight", (256,), (), always_f32=True)
    plain = GgufTensor("blk.0.attn_q.weight", (256, 256), ())
    places = spots([norm.name, plain.name])
    assert fixed_type(plain, recipe) is None
    assert winner(recipe, places[plain.name], None) == 0
    assert winner(recipe, places[norm.name], fixed_type(norm, recipe)) == 1
    assert winner(load_recipe("q4km"), places[norm.name], None) is None
