"""`min_coverage` and `min_tokens`: how they are read, and what has too little importance."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import reap2gguf
from reap2gguf.building import pipeline, stages
from reap2gguf.building.plan import make_plan
from reap2gguf.errors import RecipeError
from reap2gguf.gguf_files.imatrix import Imatrix, load_imatrix, save_both
from reap2gguf.models.description import GgufTensor
from reap2gguf.models.reference import REFERENCE_FACTS
from reap2gguf.options import BuildOptions
from reap2gguf.progress import Silent
from reap2gguf.quantizing.minimum import Minimum, check_minimum
from reap2gguf.quantizing.recipe import Recipe, load_recipe, parse_recipe
from reap2gguf.quantizing.resolve import ResolvedRecipe, resolve
from tests.building.builds import build, options, refuse_at
from tests.exporting.files import gguf_tensors, random_imatrix
from tests.tiny import TinyQwen3Moe

HEAD = 'title = "T"\nlabel = "L"\nfile_type = "Q4_K_M"\n'
RULE = '[[rules]]\nmatch = "attention"\ntype = "Q5_K"\n'
TENSORS = [
    GgufTensor("token_embd.weight", (64, 256), ()),
    GgufTensor("blk.0.attn_q.weight", (64, 256), ()),
    GgufTensor("blk.0.ffn_up_exps.weight", (4, 64, 256), ()),
    GgufTensor("blk.0.ffn_down_exps.weight", (4, 256, 256), ()),
]
MTP = [
    GgufTensor("blk.1.nextn.eh_proj.weight", (256, 512), ()),
    GgufTensor("blk.1.ffn_down_exps.weight", (4, 256, 256), ()),
]


def parse(more: str = "", rules: str = "") -> Recipe:
    return parse_recipe(HEAD + more + rules, "mine", "mine.toml")


def applied(recipe: Recipe, tensors: list[GgufTensor] | None = None) -> ResolvedRecipe:
    return resolve(recipe, tensors or TENSORS, REFERENCE_FACTS, 4, has_imatrix=True)


def matrix(**hits: list[int]) -> Imatrix:
    """Importance with so many tokens per expert, by the ends of names."""
    every = {"attn_q": [9], "ffn_up_exps": [9, 9, 9, 9], "ffn_down_exps": [9, 9, 9, 9], **hits}
    whole = random_imatrix(TENSORS)
    entries = {}
    for short, counts in every.items():
        entry = whole.entries[f"blk.0.{short}.weight"]
        entries[entry.name] = replace(entry, counts=np.array(counts))
    return replace(whole, entries=entries)


def refusal(recipe: Recipe, imatrix: Imatrix | None) -> str:
    with pytest.raises(RecipeError) as raised:
        check_minimum(applied(recipe), imatrix, "mine.gguf")
    return str(raised.value)


def test_what_is_written_is_read_again() -> None:
    recipe = parse("min_coverage = 0.9\nmin_tokens = 100\n", f"{RULE}min_coverage = 1\n")
    assert recipe.minimum == Minimum(0.9, 100)
    assert recipe.rules[0].minimum == Minimum(1.0, 100)  # of the rule, with the recipe's tokens
    again = parse_recipe(recipe.as_toml(), "mine", "mine.toml")
    assert (again.minimum, again.rules) == (recipe.minimum, recipe.rules)
    assert parse(rules=f"{RULE}min_coverage = 0.5\n").rules[0].minimum == Minimum(0.5, 1)
    tokens = parse("min_coverage = 0.9\n", f"{RULE}min_tokens = 7\n").rules[0].minimum
    assert tokens == Minimum(0.9, 7)
    assert parse().minimum is parse(rules=RULE).rules[0].minimum is None


def test_a_recipe_that_extends_another_takes_its_minimum(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "base.toml").write_text(
        f"{HEAD}min_coverage = 0.9\nmin_tokens = 5\n{RULE}min_coverage = 0.5\n"
    )
    monkeypatch.setattr(
        "reap2gguf.quantizing.recipe.shipped_recipes", lambda: {"base": tmp_path / "base.toml"}
    )
    own = parse_recipe('title = "T"\nextends = "base"\n', "own", "own.toml")
    assert own.minimum == Minimum(0.9, 5)
    assert own.rules[0].minimum == Minimum(0.5, 5)
    assert parse_recipe(own.source, "own", "manifest").minimum == own.minimum
    other = parse_recipe('title = "T"\nextends = "base"\nmin_coverage = 0\n', "own", "own.toml")
    assert other.minimum == Minimum(0.0, 5)


@pytest.mark.parametrize(
    ("more", "rules", "message"),
    [
        ("min_coverage = 1.5\n", "", "line 4: min_coverage is 1.5, expected a share of experts fr"),
        ("min_coverage = '90%'\n", "", "line 4: min_coverage is '90%', expected a share of expert"),
        ("min_coverage = true\n", "", "line 4: min_coverage is True, expected a share"),
        ("min_coverage = nan\n", "", "line 4: min_coverage is nan, expected a share"),
        ("min_tokens = 9\n", "", "line 4: min_tokens says nothing without min_coverage, the share"),
        ("min_coverage = 1\nmin_tokens = 0\n", "", "line 5: min_tokens is 0, expected a number of"),
        ("min_coverage = 1\nmin_tokens = 1.5\n", "", "line 5: min_tokens is 1.5, expected a numbe"),
        ("", f"{RULE}min_coverage = -1\n", "line 7: rule 1: min_coverage is -1, expected a share"),
        ("", f"{RULE}min_tokens = 3\n", "line 7: rule 1: min_tokens says nothing without min_cov"),
        (
            "",
            f"{RULE.replace('Q5_K', 'Q8_0')}min_coverage = 1\n",
            "line 7: rule 1: min_coverage has no effect, since no importance matrix changes the",
        ),
    ],
)
def test_wrong_values(more: str, rules: str, message: str) -> None:
    with pytest.raises(RecipeError, match=f"^mine.toml, {re.escape(message)}"):
        parse(more, rules)


def test_the_experts_of_every_tensor_are_asked_about() -> None:
    recipe = parse("min_coverage = 0.75\nmin_tokens = 5\n")
    check_minimum(applied(recipe), matrix(), "mine.gguf")
    check_minimum(applied(recipe), matrix(ffn_up_exps=[5, 5, 5, 4], attn_q=[1]), "mine.gguf")
    assert refusal(recipe, matrix(ffn_up_exps=[5, 5, 4, 0])) == (
        "recipe mine: min_coverage is 0.75, but in mine.gguf 2 of 4 experts of "
        "blk.0.ffn_up_exps.weight have seen 5 tokens (50.0%, 1 never hit), and 1 of 2 tensors "
        "have too little; compute the matrix on more text (--imatrix-text, more --samples), add "
        "several with `reap2gguf imatrix merge`, or lower min_coverage or min_tokens in the recipe"
    )
    worst = refusal(recipe, matrix(ffn_up_exps=[5, 5, 4, 0], ffn_down_exps=[1, 1, 1, 1]))
    assert "0 of 4 experts of blk.0.ffn_down_exps.weight have seen 5 tokens (0.0%), and 2" in worst


def test_an_entry_that_is_missing_covers_nothing() -> None:
    recipe, whole = parse("min_coverage = 0.01\n"), matrix()
    entries = {n: one for n, one in whole.entries.items() if "down" not in n}
    found = refusal(recipe, replace(whole, entries=entries))
    assert "0 of 4 experts of blk.0.ffn_down_exps.weight have seen any (0.0%, 4 never" in found
    assert refusal(recipe, None).startswith(
        "recipe mine: min_coverage asks for an importance matrix, and there is none; pass --imatrix"
    )


def test_a_rule_asks_about_the_tensors_that_it_decides() -> None:
    rule = f"{RULE}min_coverage = 1\nmin_tokens = 9\n"
    check_minimum(applied(parse(rules=rule)), matrix(ffn_up_exps=[0, 0, 0, 0]), "mine.gguf")
    assert "0 of 1 experts of blk.0.attn_q.weight have seen 9 tokens" in refusal(
        parse(rules=rule), matrix(attn_q=[8])
    )
    lower = "[[rules]]\nmatch = 'experts.up'\ntype = 'Q5_K'\nmin_coverage = 0\n"
    check_minimum(
        applied(parse("min_coverage = 1\n", lower)), matrix(ffn_up_exps=[0, 0, 0, 0]), "mine.gguf"
    )


def test_tensors_that_no_matrix_changes_are_not_asked_about() -> None:
    eight_bits = "[[rules]]\nmatch = 'experts'\ntype = 'Q8_0'\n"
    recipe = parse("min_coverage = 1\n", eight_bits)
    assert not applied(recipe).asks_importance
    check_minimum(applied(recipe), None, "mine.gguf")
    assert not applied(parse("min_coverage = 0\n")).asks_importance
    assert applied(parse("min_coverage = 0.1\n")).asks_importance


def test_an_mtp_block_of_which_a_matrix_has_nothing_is_asked_only_by_its_own_rules() -> None:
    recipe, tensors = parse("min_coverage = 1\n"), [*TENSORS, *MTP]
    check_minimum(applied(recipe, tensors), matrix(), "mine.gguf")
    own = parse(rules="[[rules]]\nmatch = 'mtp'\ntype = 'Q5_K'\nmin_coverage = 1\n")
    with pytest.raises(RecipeError, match=r"experts of blk\.1\.\S+ have seen any"):
        check_minimum(applied(own, tensors), matrix(), "mine.gguf")
    entry = replace(matrix().entries["blk.0.ffn_down_exps.weight"], counts=np.array([1, 0, 1, 1]))
    with_one = replace(matrix(), entries={**matrix().entries, MTP[1].name: entry})
    with pytest.raises(RecipeError, match=r"3 of 4 experts of blk\.1\.ffn_down_exps"):
        check_minimum(applied(recipe, tensors), with_one, "mine.gguf")


def test_quantize_refuses_too_little_before_it_writes(tmp_path: Path) -> None:
    model = TinyQwen3Moe().write(tmp_path / "model")
    imatrix = random_imatrix(gguf_tensors(model))  # the last expert of each tensor saw no token
    save_both(imatrix, tmp_path / "mine.gguf")
    recipe, output = tmp_path / "mine.toml", tmp_path / "model.gguf"

    def quantize(share: float, tokens: int, file: str | None = "mine.gguf") -> None:
        recipe.write_text(f"{HEAD}min_coverage = {share}\nmin_tokens = {tokens}\n")
        given = None if file is None else tmp_path / file
        reap2gguf.quantize(model, str(recipe), output, imatrix=given, threads=1)

    with pytest.raises(RecipeError, match=r"but in mine\.gguf 7 of 8 experts of blk\.0\.ffn_\w+"):
        quantize(0.9, 1)
    with pytest.raises(RecipeError, match=r"7 of 8 experts of .* have seen any .*1 never hit"):
        quantize(0.9, 1, "mine.dat")  # all experts in one row
    with pytest.raises(RecipeError, match=r"which mine\.dat does not say, since \.dat files"):
        quantize(0.5, 2, "mine.dat")
    with pytest.raises(RecipeError, match="there is none"):
        quantize(0.5, 1, None)
    assert {path.name for path in tmp_path.iterdir()} == {
        "model", "mine.gguf", "mine.dat", "mine.toml",
    }  # fmt: skip
    quantize(0.875, 1)
    assert output.is_file()


def test_a_build_refuses_too_little_before_the_export_and_goes_on_with_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TinyQwen3Moe().write(tmp_path / "model")
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f"{HEAD}min_coverage = 1.0\nmin_tokens = 1000000\n")
    made = {"recipes": (str(recipe),)}
    with pytest.raises(RecipeError, match=r"in the importance matrix \(.* chunks.*0 of \d+ exper"):
        build(model, tmp_path / "out", **made)
    assert not list((tmp_path / "out").rglob("*-L.gguf*"))
    recipe.write_text(f"{HEAD}min_coverage = 0.01\nmin_tokens = 1\n")
    with monkeypatch.context() as patch:
        refuse_at(patch, stages.Observe, "compute")
        refuse_at(patch, stages.Importance, "compute")
        result = build(model, tmp_path / "out", **made)
    (record,) = result.manifest.gguf
    assert load_recipe(reap2gguf.RecipeText("mine", record.recipe_source)).minimum == Minimum(0.01)

    # a matrix that is given is asked when the plan is made, and one to be cut when experts are
    matrix = tmp_path / "given.gguf"
    imatrix = load_imatrix(result.gguf_folder / "imatrix.gguf")
    save_both(imatrix, matrix)
    recipe.write_text(f"{HEAD}min_coverage = 1.0\nmin_tokens = 1000000\n")
    asked = BuildOptions(recipes=(str(recipe),), model=str(model), imatrix=matrix)
    with pytest.raises(RecipeError, match=r"but in given\.gguf 0 of \d+ experts"):
        reap2gguf.plan(asked)
    recipe.write_text(recipe.read_text().replace('"L"', '"M"'))
    with pytest.raises(RecipeError, match=r"but in imatrix\.gguf 0 of \d+ experts"):
        reap2gguf.add(result.gguf_folder, recipes=str(recipe))
    # of the model before pruning
    save_both(random_imatrix(gguf_tensors(model)), matrix)
    more = {"imatrix": matrix, **made}
    plan = make_plan(options(model, tmp_path / "other", **more))
    assert plan.imatrix is not None
    assert plan.imatrix.cut_from == 8
    with pytest.raises(RecipeError, match=r"but in given\.gguf 0 of 6 experts of blk\.0"):
        pipeline.build(plan, Silent())
    assert not list((tmp_path / "other").rglob("*.gguf"))
