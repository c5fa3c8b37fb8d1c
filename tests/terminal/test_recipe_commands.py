"""`reap2gguf recipes`: what it prints, for people and for programs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from reap2gguf.ggml import NEEDS_IMPORTANCE
from reap2gguf.gguf_files.imatrix import save_gguf
from reap2gguf.quantizing.file_types import MIXTURES
from reap2gguf.quantizing.recipe import load_recipe, shipped_recipes
from tests.exporting.files import gguf_tensors, random_imatrix
from tests.test_cli import one_line, run
from tests.tiny import EXAMPLE, REPOSITORY, TinyQwen3Moe


def test_the_list_has_recipes_file_types_and_bits() -> None:
    lines = run("recipes", "list").output.splitlines()
    assert all(len(line) <= 120 for line in lines)
    text = "\n".join(lines)
    assert all(f"\n{name} " in text for name in shipped_recipes())
    assert all(f"{name} " in text.split("FILE TYPES")[1] for name in MIXTURES)
    assert re.search(r"^q4km +4\.9  Plain Q4_K_M", text, re.MULTILINE)
    assert "Qwen3-30B-A3B" in lines[-1]


def test_the_list_for_programs() -> None:
    values = json.loads(run("recipes", "list", "--json").stdout)
    assert values["reference"] == "Qwen3-30B-A3B"
    assert [one["name"] for one in values["recipes"]] == list(shipped_recipes())
    bits = {one["name"]: one["bits_per_weight"] for one in values["file_types"]}
    assert bits.keys() == MIXTURES.keys()
    assert bits["F16"] == pytest.approx(16, abs=0.1)
    assert bits["IQ2_XS"] < bits["Q2_K"] < bits["Q4_K_M"] < bits["Q5_K_M"] < bits["Q8_0"]


@pytest.mark.parametrize("name", ["unsloth-iq4km", "Q5_K_M", "bf16"])
def test_toml_that_is_shown_is_a_recipe(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(run("recipes", "show", name, "--toml").stdout)
    assert load_recipe(str(path)).rules == load_recipe(name).rules
    assert "fits tiny-qwen3-moe" in run("recipes", "check", path).output


def test_a_recipe_for_programs() -> None:
    values = json.loads(run("recipes", "show", "unsloth-iq4km", "--json").stdout)
    assert values["label"] == "IQ4_K_M"
    output = {"match": "output.weight", "layers": "", "type": "Q6_K", "optional": True}
    assert output in values["rules"]
    assert values["toml"] == load_recipe("unsloth-iq4km").source
    one_line(run("recipes", "show", "q4km", "--json", "--toml"), "exclude each other")


def test_check_prints_the_table_and_the_total() -> None:
    lines = run("recipes", "check", "unsloth-iq4km").stdout.splitlines()
    (down,) = (line for line in lines if "ffn_down_exps" in line)
    assert down.split() == [
        "blk.*.ffn_down_exps.weight", "Q5_K", "x4", "2.75", "MiB", "5.500", "rule",
        "blk.*.ffn_down_exps.weight",
    ]  # fmt: skip
    assert lines[-1].startswith("unsloth-iq4km: fits tiny-qwen3-moe: ")
    assert lines[-1].endswith("14.4 M weights, 5.13 bits per weight")


def test_check_for_programs_with_an_override() -> None:
    command = ("recipes", "check", "Q4_K_M", "--tensor-type", "attn_v=q8_0", "--json")
    values = json.loads(run(*command).stdout)
    assert values["recipe"] == "q4km+custom"
    assert values["types"]["blk.2.attn_v.weight"] == "Q8_0"
    assert sum(group["bytes"] for group in values["groups"]) == values["bytes"]
    assert sum(group["count"] for group in values["groups"]) == len(values["types"])
    assert values["notes"] == []


def test_check_for_programs_with_a_role_that_is_set() -> None:
    command = ("recipes", "check", "Q4_K_M", "--set", "attention@0=f16", "--json")
    types = json.loads(run(*command, "--tensor-type", "attn_v=q8_0").stdout)["types"]
    assert (types["blk.0.attn_v.weight"], types["blk.1.attn_v.weight"]) == ("F16", "Q8_0")
    for command in (("plan",), ("recipes", "check", "Q4_K_M")):
        one_line(run(*command, "--set", "expert=q8_0"), "did you mean experts?")


def test_an_unknown_name_is_one_line() -> None:
    one_line(run("recipes", "show", "q5km2"), "did you mean Q5_K_M?")
    one_line(run("recipes", "check", "q4km,q8_0"), "expected one recipe for one file")


def test_fit_makes_a_recipe_of_this_size(tmp_path: Path) -> None:
    TinyQwen3Moe().write(tmp_path / "model")
    save_gguf(random_imatrix(gguf_tensors(tmp_path / "model")), tmp_path / "imatrix.gguf")
    given = ("recipes", "fit", tmp_path / "model", "--imatrix", tmp_path / "imatrix.gguf")
    path = tmp_path / "mine.toml"
    one_line(run(*given, "-o", path), "pass one of --target-size, --target-bpw and --fit")
    both = ("--target-size", "1GiB", "--target-bpw", 4, "-o", path)
    one_line(run(*given, *both), "pass one of --target-size, --target-bpw and --fit")
    one_line(run(*given, "--target-size", "1KiB", "-o", path), "pass at least --target-size")
    quick = ("--sensitivity", "table", "--threads", 1)
    done = run(*given, "--target-bpw", 6, *quick, "-o", path)
    assert done.exit_code == 0, done.output
    assert f"{path}: a file of " in done.stdout
    lines = run("recipes", "check", path, tmp_path / "model").stdout.splitlines()
    bits = float(lines[-1].split(", ")[-1].split()[0])
    assert 5.9 < bits <= 6


def test_show_prints_the_layers_of_rules_and_takes_roles_that_are_set(tmp_path: Path) -> None:
    lines = run("recipes", "show", "unsloth-q4kxl").stdout.splitlines()
    assert "  experts.down in layers 0-1   Q6_K  (if the model has it)" in lines
    path = tmp_path / "mine.toml"
    path.write_text(run("recipes", "show", "q4km", "--set", "experts@-2:=q6_k", "--toml").stdout)
    (rule,) = load_recipe(str(path)).rules
    assert (rule.match, rule.layers, rule.tensor_type.name) == ("experts", "-2:", "Q6_K")


def test_show_for_a_model_is_by_role_and_layers() -> None:
    result = run("recipes", "show", "Q4_K_M", EXAMPLE)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert lines[0] == "q4km for tiny-qwen3-moe: Plain Q4_K_M, llama.cpp's own mixture"
    rows = [line.split() for line in lines if line.startswith(("experts", "attention", "embed"))]
    attention = ["attn_k,", "attn_output,", "attn_q"]
    assert rows == [
        ["embedding", "token_embd", "-", "Q6_K", "1.0", "M", "6.562", "840.00", "KiB"],
        ["attention", *attention, "all", "Q4_K", "0.7", "M", "4.500", "360.00", "KiB"],
        ["attention", "attn_v", "0-1", "Q4_K", "65,536", "4.500", "36.00", "KiB"],
        ["attention", "attn_v", "2-3", "Q6_K", "65,536", "6.562", "52.50", "KiB"],
        ["experts.gate", "ffn_gate_exps", "all", "Q4_K", "4.2", "M", "4.500", "2.25", "MiB"],
        ["experts.up", "ffn_up_exps", "all", "Q4_K", "4.2", "M", "4.500", "2.25", "MiB"],
        ["experts.down", "ffn_down_exps", "0-1", "Q4_K", "2.1", "M", "4.500", "1.12", "MiB"],
        ["experts.down", "ffn_down_exps", "2-3", "Q6_K", "2.1", "M", "6.562", "1.64", "MiB"],
    ]
    total = " ".join(line.strip() for line in lines[-2:])
    assert "q4km: 14.4 M weights in 8.60 MiB, 5.00 bits per weight; the file has 8.72 MiB" in total


def test_show_marks_what_fell_back_and_what_needs_a_matrix(tmp_path: Path) -> None:
    TinyQwen3Moe().write(tmp_path)  # rows of 64 and 32
    lines = run("recipes", "show", "IQ2_XS", tmp_path).stdout.splitlines()
    (output,) = (line for line in lines if line.startswith("output"))
    assert output.split()[3] == "Q8_0*"
    (why,) = (line for line in lines if line.startswith("* Q8_0"))
    assert why.startswith("* Q8_0 in place of Q5_K: rows of 64 do not fill the blocks of 256 that")
    text = run("recipes", "show", "IQ2_XS", EXAMPLE).stdout
    assert " tensors need an importance matrix, such as blk.0." in text


def test_show_for_programs() -> None:
    values = json.loads(run("recipes", "show", "q4km", EXAMPLE, "--json").stdout)
    types = json.loads(run("recipes", "check", "q4km", EXAMPLE, "--json").stdout)["types"]
    assert values["types"] == types
    assert sum(row["n_tensors"] for row in values["rows"]) == len(types) == values["n_tensors"]
    assert sum(row["n_bytes"] for row in values["rows"]) == values["n_bytes"]
    assert values["n_bytes"] < values["n_file_bytes"]
    assert values["bits_per_weight"] < values["file_bits_per_weight"]
    command = ("recipes", "show", "q4km", EXAMPLE, "--json", "--set", "attention@0=f16")
    changed = json.loads(run(*command).stdout)
    assert changed["types"]["blk.0.attn_v.weight"] == "F16"
    assert {row["layers"] for row in changed["rows"] if row["rules"]} == {"0"}


def test_show_says_what_does_not_go_together() -> None:
    one_line(run("recipes", "show", "q4km", EXAMPLE, "--toml"), "leave MODEL out")
    one_line(run("recipes", "show", "q4km", "--no-imatrix"), "pass MODEL")
    one_line(run("recipes", "show", "q4km", "./nothing-here"), "no such folder")


def test_types_without_a_matrix_may_be_others() -> None:
    with_one, without = (
        json.loads(run("recipes", "show", "IQ3_XXS", EXAMPLE, "--json", *more).stdout)["types"]
        for more in ((), ("--no-imatrix",))
    )
    changed = {name for name in with_one if with_one[name] != without[name]}
    assert {with_one[name] for name in changed} == {"IQ3_XXS"}
    assert {without[name] for name in changed} & {one.name for one in NEEDS_IMPORTANCE} == set()


def test_diff_prints_what_differs_and_both_sizes() -> None:
    result = run("recipes", "diff", "Q4_K_M", "unsloth-q4kxl")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert all(len(line) <= 110 for line in lines)
    assert lines[0] == "q4km and unsloth-q4kxl for tiny-qwen3-moe"
    down = [" ".join(line.split()) for line in lines if line.startswith("experts.down")]
    assert down == [
        "experts.down ffn_down_exps 0-1 Q4_K Q6_K 4.500 6.562 +528.00 KiB",
        "experts.down ffn_down_exps 2-3 Q6_K Q5_K 6.562 5.500 -272.00 KiB",
    ]
    assert not any(line.startswith("experts.up") for line in lines)
    assert lines[-4:-1] == [
        "20 tensors differ, 30 have the same type in both",
        "q4km: 5.00 bits per weight, the file has 8.72 MiB",
        "unsloth-q4kxl: 5.35 bits per weight, the file has 9.33 MiB",
    ]
    assert lines[-1].startswith("difference: +0.35 bits per weight, +")


def test_diff_says_that_recipes_are_equal(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(run("recipes", "show", "q4km", "--set", "router=f32", "--toml").stdout)
    lines = run("recipes", "diff", "Q4_K_M", path).stdout.splitlines()
    assert lines[1] == "equal: all 50 tensors have the same type in both"
    values = json.loads(run("recipes", "diff", "Q4_K_M", path, "--json").stdout)
    assert (values["equal"], values["changes"], values["n_changed"]) == (True, [], 0)


def test_diff_for_programs() -> None:
    values = json.loads(run("recipes", "diff", "q8_0", "Q4_K_M", EXAMPLE, "--json").stdout)
    first, second = values["recipes"]
    change = sum(one["n_bytes"][1] - one["n_bytes"][0] for one in values["changes"])
    assert second["n_bytes"] - first["n_bytes"] == change < 0
    assert sum(one["n_tensors"] for one in values["changes"]) == values["n_changed"]
    one_line(run("recipes", "diff", "q8_0", "q4kmm"), "did you mean q4km?")


def test_show_prints_what_a_recipe_asks_of_importance(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'title = "T"\nextends = "q4km"\nmin_coverage = 0.95\nmin_tokens = 100\n'
        '[[rules]]\nmatch = "experts.up"\ntype = "Q5_K"\nmin_coverage = 1\nmin_tokens = 1\n'
    )
    lines = run("recipes", "show", path).stdout.splitlines()
    asked = "0.95 of experts with 100 tokens"
    assert f"  the importance matrix must have {asked}, in every tensor of experts" in lines
    assert lines[-1].endswith(" Q5_K  (with 1 of experts with any token of importance)")
    values = json.loads(run("recipes", "show", path, "--json").stdout)
    assert (values["min_coverage"], values["min_tokens"]) == (0.95, 100)
    assert (values["rules"][0]["min_coverage"], values["rules"][0]["min_tokens"]) == (1, 1)


@pytest.mark.parametrize("words", ["show Q4_K_M", "diff Q4_K_M unsloth-q4kxl"])
def test_the_tables_of_the_page_are_what_is_printed(words: str) -> None:
    page = (REPOSITORY / "docs" / "recipes.md").read_text()
    command = f"```bash\nreap2gguf recipes {words} examples/tiny-qwen3-moe\n```\n\n```text\n"
    printed = page.split(command)[1].split("```")[0]
    assert printed == run("recipes", *words.split(), EXAMPLE).stdout
