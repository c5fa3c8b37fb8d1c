"""The tensors that rules are for, by glob or role and in layers, and errors of wrong rules."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import reap2gguf
from reap2gguf.errors import RecipeError
from reap2gguf.models.description import GgufTensor
from reap2gguf.models.reference import REFERENCE_FACTS, reference_tensors
from reap2gguf.models.roles import ROLE_WORDS, Spot, spots
from reap2gguf.quantizing.recipe import Recipe, load_recipe, parse_recipe
from reap2gguf.quantizing.resolve import resolve
from reap2gguf.quantizing.selector import Selector, check_layers, layers_text
from tests.models.layouts import CASES, Case
from tests.tiny import EXAMPLE

HEAD = 'title = "T"\nlabel = "L"\nfile_type = "Q4_K_M"\n\n'


def found(match: str, layers: str = "", n_layers: int = 8) -> list[str]:
    names = ["token_embd.weight", "output.weight"]
    names += [f"blk.{layer}.attn_q.weight" for layer in range(n_layers + 1)]
    names.append(f"blk.{n_layers}.nextn.eh_proj.weight")
    selector = Selector(match, layers)
    return [name for name, spot in spots(names).items() if selector.fits(spot)]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("3", [3]),
        ("0-3", [0, 1, 2, 3]),
        ("5:", [5, 6, 7]),
        ("-4:", [4, 5, 6, 7]),
        ("-1", [7]),
        ("-9:", [*range(8)]),
        ("0,2,5-7", [0, 2, 5, 6, 7]),
        (" 0-1 , -1 ", [0, 1, 7]),
        ("8", [8]),  # the MTP block
        ("6-8", [6, 7, 8]),
        ("9", []),
    ],
)
def test_layers_count_decoder_layers(layers: str, expected: list[int]) -> None:
    assert found("attention", layers) == [f"blk.{layer}.attn_q.weight" for layer in expected]
    assert found("*attn_q*", layers) == found("attention", layers)
    assert found("*_embd.weight", layers) == []


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("", "expected numbers and ranges"),
        ("a", "expected numbers and ranges"),
        ("0:3", "expected numbers and ranges"),
        ("-4-2", "expected numbers and ranges"),
        ("1,,2", "expected numbers and ranges"),
        ("7-3", "7-3 ends before it begins"),
        (",".join("1" * 201), "201 parts, expected at most 200"),
    ],
)
def test_wrong_layers(layers: str, message: str) -> None:
    with pytest.raises(RecipeError, match=f"^here: layers .*{message}"):
        check_layers(layers, "here: layers")


def test_layers_are_written_as_they_are_read() -> None:
    text = layers_text({0, 1, 2, 5, 7, 8})
    assert text == "0-2,5,7-8"
    spot = [Spot("blk", block, frozenset(), 10) for block in range(10)]
    assert [s.block for s in spot if Selector("*", text).fits(s)] == [0, 1, 2, 5, 7, 8]


# every matrix of every family that is stored in another type than F32, and its role
MATRICES = {
    "attention": "attn_(q|k|v|output|q_a|q_b|kv_a_mqa|kv_b|k_b|v_b)",
    # Kimi's are called as attention's are
    "deltanet": "attn_(qkv|gate|q|k|v|output)|ssm_(alpha|beta|ba|out|[fg]_[ab])",
    "mamba": "ssm_(in|out)",
    "latent": "ffn_latent_(down|up)",
    "convolution": r"shortconv\.(in|out)_proj",
    "experts.gate": "ffn_gate_exps|ffn_gate_up_exps",
    "experts.up": "ffn_up_exps",
    "experts.down": "ffn_down_exps",
    "shared_expert": "ffn_(gate|up|down)_shexp",
    "dense_ffn": "ffn_(gate|up|down)",
    "embedding": "token_embd",
    "output": "output",
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_matrix_of_a_family_has_one_role_word(case: Case) -> None:
    tensors = case.model.gguf_tensors(case.stored)
    places = spots([tensor.name for tensor in tensors])
    for tensor in tensors:
        words = [w for w in MATRICES if Selector(w).fits(places[tensor.name])]
        is_mtp = Selector("mtp").fits(places[tensor.name])
        if tensor.always_f32:
            continue
        if ".nextn." in tensor.name:
            assert (words, is_mtp) == ([], True), tensor.name
            continue
        stem = re.sub(r"^blk\.\d+\.", "", tensor.name).removesuffix(".weight")
        (word,) = words
        assert re.fullmatch(MATRICES[word], stem), tensor.name
        in_experts = Selector("experts").fits(places[tensor.name])
        assert in_experts is word.startswith("experts.")
        block = places[tensor.name].block
        assert is_mtp is (block is not None and block >= places[tensor.name].n_layers)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_routers_are_found_by_their_role(case: Case) -> None:
    places = spots([tensor.name for tensor in case.model.gguf_tensors(case.stored)])
    routers = {name for name, spot in places.items() if Selector("router").fits(spot)}
    assert {f"blk.{n}.ffn_gate_inp" for n in case.model.facts.moe_layers} >= {
        name.rpartition(".")[0]
        for name in routers
        if "gate_inp" in name  # weight, bias, scale
    }
    assert routers


def types(recipe: Recipe) -> dict[str, str]:
    tensors = reference_tensors()
    resolved = resolve(recipe, tensors, REFERENCE_FACTS, 128, has_imatrix=True)
    return {name: kind.name for name, kind in resolved.tensor_types().items()}


def parse(text: str) -> Recipe:
    return parse_recipe(text, "mine", "mine.toml")


def test_the_first_rule_that_matches_wins() -> None:
    recipe = parse(
        f'{HEAD}[[rules]]\nmatch = "experts.down"\nlayers = "-2:"\ntype = "Q8_0"\n'
        '[[rules]]\nmatch = "experts"\nlayers = "40:"\ntype = "Q3_K"\n'
    )
    kinds = types(recipe)
    down = [kinds[f"blk.{n}.ffn_down_exps.weight"] for n in (39, 40, 45, 46, 47)]
    assert down[1:] == ["Q3_K", "Q3_K", "Q8_0", "Q8_0"]
    assert kinds["blk.47.ffn_up_exps.weight"] == "Q3_K"
    plain = types(load_recipe("q4km"))
    assert down[0] == plain["blk.39.ffn_down_exps.weight"]
    again = parse_recipe(recipe.as_toml(), "mine", "manifest")
    assert again.rules == recipe.rules
    assert types(again) == kinds


def test_own_rules_come_before_those_of_the_extended_recipe() -> None:
    text = (
        'title = "T"\nextends = "unsloth-iq4km"\n[[rules]]\nmatch = "experts.down"\ntype = "Q6_K"\n'
    )
    recipe, base = parse(text), load_recipe("unsloth-iq4km")
    assert (recipe.label, recipe.file_type) == (base.label, base.file_type)
    kinds, plain = types(recipe), types(base)
    changed = {name for name in kinds if kinds[name] != plain[name]}
    assert changed == {f"blk.{n}.ffn_down_exps.weight" for n in range(48)}
    assert {kinds[name] for name in changed} == {"Q6_K"}
    # a manifest holds the whole recipe
    again = parse_recipe(recipe.source, "mine", "manifest")
    assert again.rules == recipe.rules
    assert types(again) == kinds
    other = parse('title = "T"\nlabel = "M"\nextends = "iq4-xs"\nfile_type = "Q4_K_S"\n')
    assert (other.label, other.file_type, other.rules) == ("M", "Q4_K_S", ())


RULE = '[[rules]]\nmatch = "attention"\ntype = "Q8_0"\n'  # lines 5 to 7
# a recipe's text and what is said of it, where it is read or on a model
MALFORMED = [
    ("", "mine.toml: is empty, expected a recipe; `reap2gguf recipes show q4km --toml` prints"),
    (HEAD + "[[rules]\n", "mine.toml, line 5: not valid TOML .* at column 8"),
    (
        HEAD + 'label = "M"\n',
        "line 5: not valid TOML .*; it stands there for the second t",
    ),
    (
        HEAD + RULE + 'type = "Q4_K"\n',
        "line 8: not valid TOML .*; it stands there for the second t",
    ),
    (HEAD + "extend = 'q4km'\n", "line 5: unknown key 'extend', .*; did you mean extends?"),
    (HEAD + "extends = 'q4kmm'\n", "line 5: extends: no recipe 'q4kmm'; did you mean q4km?"),
    (HEAD + "extends = 'my.toml'\n", "line 5: extends is 'my.toml', expected a name"),
    (HEAD.replace("Q4_K_M", "Q4"), "line 3: file_type 'Q4', expected one of F32"),
    (HEAD.replace('"L"', '"a b"'), "line 2: label 'a b', expected letters"),
    (HEAD + RULE + "layer = '3'\n", "line 8: rule 1: unknown key 'layer', .*did you mean layers?"),
    (HEAD + RULE + "layers = '3-'\n", "line 8: rule 1: layers is '3-', expected numbers"),
    (HEAD + RULE + "layers = '5-3'\n", "line 8: rule 1: layers is '5-3': 5-3 ends before"),
    (HEAD + RULE + "layers = 3\n", "line 8: rule 1: layers is 3, expected text"),
    (HEAD + RULE.replace("Q8_0", "Q9_K"), "line 7: rule 1: type 'Q9_K' is not .*; did you mean Q"),
    (
        HEAD + RULE + "min_coverage = 2\n",
        "line 8: rule 1: min_coverage has no effect, since",
    ),
    (HEAD + "min_coverage = 2\n", "line 5: min_coverage is 2, expected a share of experts from 0"),
    (HEAD + "min_tokens = 2\n", "line 5: min_tokens says nothing without min_coverage, .*; add it"),
    (HEAD + RULE.replace("Q8_0", "Q4_K_M"), "line 7: rule 1: type 'Q4_K_M' is not .* type is Q4_K"),
    (HEAD + RULE.replace("attention", "(a)"), r"line 6: rule 1: match '\(a\)' is not a glob"),
    (HEAD + RULE.replace('type = "Q8_0"', ""), "line 5: rule 1: missing key `type`"),
    (HEAD + RULE + "optional = 'yes'\n", "line 8: rule 1: optional is 'yes', expected true or fal"),
    (
        HEAD + RULE.replace("attention", "atention"),
        "line 5: rule 'atention' matches no tensor of this model; did you mean the role attention",
    ),
    (
        HEAD + RULE + "layers = '48'\n",
        "line 5: rule 'attention' in layers '48' matches no .*has attention in layers 0-47",
    ),
    (
        HEAD + RULE.replace("attention", "output") + "layers = '3'\n",
        "line 5: rule 'output' in layers '3' matches no tensor .*output is in no layer; remove `la",
    ),
    (
        HEAD + RULE + "# a comment with [[rules]]\n" + RULE + "layers = '-4:'\n",
        "line 9: rule 'attention' in layers '-4:' is shadowed: earlier rules take every tensor",
    ),
    (
        HEAD + RULE.replace("attention", "router"),
        "line 5: rule 'router' asks for Q8_0, but llama.cpp never quantizes .*; remove it",
    ),
]


@pytest.mark.parametrize(("text", "message"), MALFORMED)
def test_each_malformed_recipe_has_an_error_with_file_line_and_advice(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message.replace("?", r"\?")) as raised:
        types(load_recipe(str(path)))
    assert str(raised.value).startswith(str(path))


def test_those_errors_are_all_different(tmp_path: Path) -> None:
    assert len({message for _, message in MALFORMED}) == len(MALFORMED) > 15


def test_a_type_that_a_shape_cannot_have() -> None:
    tensor = GgufTensor("blk.0.attn_q.weight", (64, 96), ())
    recipe = parse(HEAD + RULE.replace("Q8_0", "Q4_K"))
    message = "mine.toml, line 5: rule 'attention': Q4_K has blocks of 256, .* of 96; .*fallback"
    with pytest.raises(RecipeError, match=message):
        resolve(recipe, [tensor], REFERENCE_FACTS, 8, has_imatrix=True)


@pytest.mark.parametrize(
    "rules",
    ['rules = [{match = "attention", type = "Q9"}]\n', '[["rules"]]\nmatch = "a"\ntype = "Q9"\n'],
)
def test_rules_in_another_notation_have_no_line_and_not_a_wrong_one(rules: str) -> None:
    with pytest.raises(RecipeError, match=r"^mine\.toml: rule 1: type 'Q9' is not"):
        parse(HEAD + rules)


def test_texts_of_several_lines_do_not_shift_lines() -> None:
    text = HEAD.replace('"T"', '"""a\n[[rules]]\nmatch = 1\n"""') + RULE.replace("Q8_0", "Q9")
    with pytest.raises(RecipeError, match=r"^mine\.toml, line 10: rule 1: type 'Q9'"):
        parse(text)


def test_role_words_are_no_names_of_tensors() -> None:
    names = {tensor.name for tensor in reference_tensors()}
    assert not names & ROLE_WORDS.keys()


def test_a_rule_may_have_a_regular_expression() -> None:
    text = (
        f"{HEAD}[[rules]]\nregex = '^blk\\.[0-2]\\.attn_[qk]\\.'\nlayers = \"1:\"\ntype = 'Q8_0'\n"
    )
    recipe = parse_recipe(text, "mine", "mine.toml")
    assert parse_recipe(recipe.as_toml(), "mine", "again").rules == recipe.rules
    kinds = resolve(recipe, reference_tensors(), REFERENCE_FACTS, 128, True).tensor_types()
    found = {name for name, kind in kinds.items() if kind.name == "Q8_0"}
    assert found == {f"blk.{layer}.attn_{one}.weight" for layer in (1, 2) for one in "qk"}


def test_a_regular_expression_is_no_role() -> None:
    selector = Selector("experts", is_regex=True)
    assert not selector.is_role
    names = ["blk.0.ffn_up_exps.weight", "blk.0.experts.weight"]
    assert [name for name, spot in spots(names).items() if selector.fits(spot)] == names[1:]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("regex = 'attn_(v'", r"mine.toml, line 6: rule 1: regex 'attn_\(v' is not a .*: expected"),
        ("regex = 'a'\nmatch = 'b'", "mine.toml, line 6: rule 1: has both match and regex"),
        ("regex = 3", "mine.toml, line 6: rule 1: regex is 3, expected text"),
        ("regex = 'nothing'", "line 5: rule regex 'nothing' matches no tensor of this model"),
        ("regex = 'attn_v'\nlayers = '50'", "the model has /attn_v/ in layers 0-47"),
    ],
)
def test_a_wrong_regular_expression(rule: str, message: str) -> None:
    text = f"{HEAD}[[rules]]\n{rule}\ntype = 'Q8_0'\n"

    def apply() -> None:
        recipe = parse_recipe(text, "mine", "mine.toml")
        resolve(recipe, reference_tensors(), REFERENCE_FACTS, 128, True)

    with pytest.raises(RecipeError, match=message):
        apply()


def test_regular_expressions_count_as_work() -> None:
    rules = "".join(
        f"[[rules]]\nregex = '({'a?' * 100})+{n}'\ntype = 'Q8_0'\noptional = true\n"
        for n in range(300)
    )
    recipe = parse_recipe(HEAD + rules, "mine", "mine.toml")
    with pytest.raises(RecipeError, match="too many to match; use fewer rules, with few stars or"):
        resolve(recipe, reference_tensors(), REFERENCE_FACTS, 128, True)


def test_a_recipe_may_not_extend_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, other in (("one", "two"), ("two", "one")):
        (tmp_path / f"{name}.toml").write_text(f'title = "T"\nextends = "{other}"\n')
    found = {path.stem: path for path in tmp_path.iterdir()}
    monkeypatch.setattr("reap2gguf.quantizing.recipe.shipped_recipes", lambda: found)
    with pytest.raises(RecipeError, match=r"line 2: extends: \S+one\.toml, line 2: .* by itself"):
        load_recipe("one")
    with pytest.raises(RecipeError, match=r"^mine\.toml, line 1: .*'(one|two)' is extended by it"):
        parse('extends = "two"\ntitle = "T"\n')
    # nothing is left of the attempt
    (tmp_path / "two.toml").write_text(HEAD)
    assert load_recipe("one").label == "L"


def test_a_type_that_needs_importance_names_its_rule(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(HEAD + RULE.replace("Q8_0", "IQ2_XS"))
    message = (
        rf"^{re.escape(str(path))}, line 5: rule 'attention': blk\.0\.attn_k\.weight gets IQ2_XS, "
        "which needs an importance matrix, and none is given; compute one with `reap2gguf imatrix`"
    )
    with pytest.raises(RecipeError, match=message):
        reap2gguf.quantize(EXAMPLE, str(path), tmp_path / "model.gguf")
    with pytest.raises(RecipeError, match=r"^recipe IQ2_XS: .* gets IQ2_XS, which needs"):
        reap2gguf.quantize(EXAMPLE, "IQ2_XS", tmp_path / "model.gguf")
    assert [one.name for one in tmp_path.iterdir()] == ["mine.toml"]
