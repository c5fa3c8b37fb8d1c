"""`reap2gguf recipes`: what it prints, for people and for programs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from reap2gguf.gguf_files.imatrix import save_gguf
from reap2gguf.quantizing.file_types import MIXTURES
from reap2gguf.quantizing.recipe import load_recipe, shipped_recipes
from tests.exporting.files import gguf_tensors, random_imatrix
from tests.test_cli import one_line, run
from tests.tiny import TinyQwen3Moe


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
    assert {"match": "output.weight", "type": "Q6_K", "optional": True} in values["rules"]
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
    one_line(run(*given, "-o", path), "pass --target-size or --target-bpw, one of them")
    both = ("--target-size", "1GiB", "--target-bpw", 4, "-o", path)
    one_line(run(*given, *both), "pass --target-size or --target-bpw, one of them")
    one_line(run(*given, "--target-size", "1KiB", "-o", path), "pass a larger target")
    done = run(*given, "--target-bpw", 6, "--threads", 1, "-o", path)
    assert done.exit_code == 0, done.output
    assert f"{path}: a file of " in done.stdout
    lines = run("recipes", "check", path, tmp_path / "model").stdout.splitlines()
    bits = float(lines[-1].split(", ")[-1].split()[0])
    assert 5.9 < bits <= 6
