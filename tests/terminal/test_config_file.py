"""`--config` and `--like` on the command line: what wins, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest

from reap2gguf.cli import cli
from reap2gguf.errors import UsageError
from reap2gguf.options import BuildOptions, CheckQuants
from reap2gguf.terminal import build_commands
from tests.conftest import Bundle
from tests.test_cli import one_line, run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command up to its plan; the options that it would plan with."""

    def ask(*arguments: object) -> BuildOptions:
        found: list[BuildOptions] = []

        def plan(options: BuildOptions, **_: Any) -> None:
            found.append(options)
            raise click.UsageError("caught")

        monkeypatch.setattr(build_commands.reap2gguf, "plan", plan)
        one_line(run(*arguments), "caught")
        return found[0]

    return ask


def write(folder: Path, text: str) -> Path:
    path = folder / "build.toml"
    path.write_text(text)
    return path


FULL = """
model = "./model"
keep-experts = 12
method = "frequency"
mtp = "drop"
calibration = "seed-000"
samples = 7
max_length = 99
seed = -3
pack = false
recipe = ["Q5_K_M", "q8_0,bf16"]
tensor-type = "attn_v=q8_0"
label = ["q8_0=MINE"]
output = "here"
name = "NAME"
imatrix-text = "text.txt"
chunk = 64
device = "cpu"
memory = "2GiB"
spool = "disk"
dtype = "float32"
threads = 3
check-quants = "all"
follow-links = true
fresh = true
space-check = false
json = false
verbose = true
"""


def test_every_key_is_an_option(tmp_path: Path, asked: Any) -> None:
    found = asked("build", "--config", write(tmp_path, FULL))
    assert (found.model, found.keep_experts, found.compression) == ("./model", 12, None)
    assert (found.method, found.mtp, found.name) == ("frequency", "drop", "NAME")
    calibration = found.calibration
    assert (calibration.spec, calibration.samples, calibration.max_length) == ("seed-000", 7, 99)
    assert (calibration.seed, calibration.pack) == (-3, False)
    assert found.recipes == ("Q5_K_M", "q8_0", "bf16")
    assert (found.tensor_types, found.labels) == (("attn_v=q8_0",), {"q8_0": "MINE"})
    assert (found.output, found.imatrix_text, found.chunk) == (Path("here"), Path("text.txt"), 64)
    compute = found.compute
    assert (compute.device, compute.dtype, compute.spool) == ("cpu", "float32", "disk")
    assert (compute.memory, compute.threads) == (2**31, 3)
    assert compute.check_quants is CheckQuants.ALL
    assert (found.follow_links, found.fresh, found.check_space) == (True, True, False)


def test_every_option_of_build_and_plan_can_be_a_key(tmp_path: Path) -> None:
    keys = {line.partition(" = ")[0].replace("_", "-") for line in FULL.strip().splitlines()}
    options = {
        name.removeprefix("--")
        for command in ("build", "plan")
        for parameter in cli.commands[command].params
        for name in parameter.opts
        if name.startswith("--")
    }
    missing = options - keys - {"config", "like", "help", "quiet", "llama-cpp"}
    for key in missing:  # of options that are younger than this test
        result = run("plan", "--config", write(tmp_path, f"{key} = 1979-05-27\n"))
        one_line(result, f"build.toml: {key} is datetime.date(1979, 5, 27), expected")


def test_plan_takes_the_same_file(tmp_path: Path, asked: Any) -> None:
    found = asked("plan", "--config", write(tmp_path, FULL))
    assert found.keep_experts == 12
    assert not found.fresh  # an option of `build` alone


def test_the_command_line_wins(tmp_path: Path, asked: Any) -> None:
    path = write(tmp_path, FULL)
    found = asked("build", "./other", "--config", path, "--recipe", "Q6_K", "--seed", 5, "--pack")
    assert (found.model, found.recipes) == ("./other", ("Q6_K",))
    assert (found.calibration.seed, found.calibration.pack) == (5, True)
    found = asked("build", "--compression", 0.5, "--config", path)
    assert (found.compression, found.keep_experts) == (0.5, None)


def test_without_a_file_the_recipe_is_q4_k_m(asked: Any) -> None:
    assert asked("build").recipes == ("Q4_K_M",)
    assert asked("plan", "--recipe", "Q4_K_M,Q8_0", "--recipe", "bf16").recipes == (
        "Q4_K_M", "Q8_0", "bf16",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipies = 'q8_0'", "build.toml: unknown key 'recipies', did you mean recipe?"),
        (
            "zzzzzzzz = 1",
            "unknown key 'zzzzzzzz', expected one of calibration, candidates, check-quants",
        ),
        ("config = 'x'", "unknown key 'config'"),
        ("like = 'x'", "unknown key 'like'"),
        ("help = true", "unknown key 'help'"),
        ("[calibration]\nsamples = 3", "calibration is a section, expected keys alone"),
        ("[[recipe]]\nname = 'x'", "recipe is a section"),
        ("samples = '7'", "samples is '7', expected a whole number"),
        ("samples = true", "samples is True, expected a whole number"),
        ("samples = 0", "samples: 0 is not between 1 and"),
        ("keep-experts = 1.5", "keep-experts is 1.5, expected a whole number"),
        ("compression = 'x'", "compression: 'x' is neither a number such as 0.25 nor auto"),
        ("pack = 1", "pack is 1, expected true or false"),
        ("memory = 8", "memory is 8, expected text"),
        ("memory = 'much'", "memory: 'much' is not a size such as 12GiB"),
        ("method = 'best'", "method: 'best' is not one of"),
        ("recipe = 3", "recipe is 3, expected text, or a list of texts"),
        ("recipe = ['q8_0', 3]", "expected text, or a list of texts"),
        ("label = 'x'", "label: 'x' is not RECIPE=LABEL"),
        ("recipe = ", "build.toml: not valid TOML"),
        ('output = "a\\u0000b"', "output is 'a\\x00b', expected text without NUL"),
        ('model = "a\\u0000b"', "model is 'a\\x00b', expected text without NUL"),
        ('imatrix-text = "a\\u0000b"', "imatrix-text is 'a\\x00b', expected text without NUL"),
        ('recipe = ["q8_0", "a\\u0000b"]', "recipe is 'a\\x00b', expected text without NUL"),
        (
            "keep-experts = 5\nkeep_experts = 6",
            "build.toml: keep-experts and keep_experts are one option given twice; keep one",
        ),
    ],
)
def test_what_is_wrong_in_the_file_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    one_line(run("plan", "--config", write(tmp_path, text)), message)


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path, asked: Any) -> None:
    assert asked("plan", "--config", write(tmp_path, "\ufeffsamples = 7")).calibration.samples == 7


def test_no_name_of_a_recipe_holds_nul() -> None:
    for name in ("a\0b", "~\0.toml", "q8_0,~\0"):
        with pytest.raises(UsageError, match="without NUL"):
            BuildOptions(recipes=(name,))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    one_line(run("build", "--config", tmp_path / "none.toml"), "none.toml: cannot be read")
    one_line(run("build", "--like", tmp_path / "none.json"), "none.json: ")
    (tmp_path / "other.json").write_text("{}")
    one_line(run("build", "--like", tmp_path / "other.json"), "not a manifest of format 1")


def test_like_takes_over_and_others_win(
    built: Bundle, tmp_path: Path, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads((built.gguf / "reap2gguf.json").read_text())
    text = tmp_path / manifest["calibration"]["spec"]
    text.write_text("not the same")
    monkeypatch.chdir(tmp_path)
    found = asked("build", built.source, "--like", built.gguf)
    assert [recipe.name for recipe in found.recipes] == [one["recipe"] for one in manifest["gguf"]]
    assert [recipe.label for recipe in found.recipes] == [one["label"] for one in manifest["gguf"]]
    assert found.calibration.samples == manifest["options"]["samples"]
    assert found.chunk == manifest["options"]["chunk"]
    config = write(tmp_path, "samples = 3\ncompression = 0.5\nrecipe = 'Q6_K'")
    arguments = ("build", built.source, "--like", built.gguf, "--config", config)
    found = asked(*arguments, "--chunk", 32)
    assert (found.calibration.samples, found.chunk, found.recipes) == (3, 32, ("Q6_K",))
    assert (found.compression, found.keep_experts) == (0.5, None)
    found = asked(*arguments, "--keep-experts", 6)
    assert (found.compression, found.keep_experts) == (None, 6)


def test_like_asks_for_what_is_not_here(
    built: Bundle, tmp_path: Path, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = json.loads((built.gguf / "reap2gguf.json").read_text())
    manifest["source"]["label"] = "a-folder"
    (tmp_path / "old.json").write_text(json.dumps(manifest))
    one_line(run("plan", "--like", "old.json"), "'a-folder'; pass that folder as MODEL")
    like = ("plan", "--like", built.gguf / "reap2gguf.json")
    one_line(run(*like, built.source), "which is not in this folder; pass it with --calibration")
    assert asked(*like, built.source, "--calibration", "default").calibration.spec == "default"


def test_like_warns_of_other_inputs(built: Bundle, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Some words of another text. " * 500)
    arguments = ("plan", built.source, "--like", built.hf, "--calibration", other)
    shown = " ".join(run(*arguments, "--device", "cpu").stderr.split())
    assert "--calibration reads other.txt, which it did not (SHA-256 " in shown
    assert "warning: unlike " in shown
