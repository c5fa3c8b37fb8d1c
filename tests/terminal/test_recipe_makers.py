"""`reap2gguf recipes of` and `recipes import` as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import reap2gguf
from reap2gguf.cli import cli
from reap2gguf.errors import UsageError
from reap2gguf.gguf_files.split import plan_split, write_part
from reap2gguf.progress import Silent
from reap2gguf.quantizing.recipe import load_recipe
from tests.exporting.files import export_files, plain
from tests.test_cli import one_line, run
from tests.tiny import EXAMPLE, TinyQwen3Moe

TINY = TinyQwen3Moe(hidden=256, width=256, head_dim=64, n_layers=3, vocab=512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY.write(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    """A file of a recipe that no program has: Q4_K_M with other attention."""
    path = folder.parent / "mine.toml"
    text = 'title = "Mine"\nlabel = "Q4_K_L"\nextends = "Q4_K_M"\n'
    path.write_text(f'{text}[[rules]]\nmatch = "attention"\ntype = "Q8_0"\n')
    found = export_files(folder, folder.parent, [load_recipe(str(path))])["mine"]
    return found.rename(found.with_name("Tiny-Q4_K_L.gguf"))


def test_the_recipe_of_a_file_makes_that_file_again(
    file: Path, folder: Path, tmp_path: Path
) -> None:
    printed = run("recipes", "of", file)
    assert printed.exit_code == 0
    lines = printed.stdout.splitlines()
    assert lines[0] == (
        "# Tiny-Q4_K_L.gguf: llama-quantize's Q4_K_M gives 27 of 39 tensors their types, and 1 "
        "rule gives 12 theirs"
    )
    assert lines[1:] == [
        'title = "Types of Tiny-Q4_K_L.gguf"', 'label = "Q4_K_L"', 'extends = "Q4_K_M"', "",
        "[[rules]]  # 12 tensors", 'match = "attention"', 'type = "Q8_0"',
    ]  # fmt: skip
    path = tmp_path / "theirs.toml"
    done = run("recipes", "of", file, "-o", path)
    assert done.stdout == f"{path}: the recipe, 1 rules\n"
    assert path.read_text() == printed.stdout
    again = export_files(folder, tmp_path, [load_recipe(str(path))])["theirs"]
    other = run("recipes", "of", again, "--json")
    types = json.loads(other.stdout)["types"]
    assert types == json.loads(run("recipes", "of", file, "--json").stdout)["types"]


def test_a_plain_file_type_is_said(folder: Path, tmp_path: Path) -> None:
    path = export_files(folder, tmp_path, [plain("Q5_K_S")])["Q5_K_S"]
    values = json.loads(run("recipes", "of", path, "--json").stdout)
    assert values["same_as"] == ["Q5_K_S"]
    assert values["what"] == "its types are those of llama-quantize's Q5_K_S"
    assert values["rules"] == []
    assert reap2gguf.recipe_of(path).base == "Q5_K_S"


def test_a_file_in_parts(file: Path, tmp_path: Path) -> None:
    plan = plan_split(file, file.stat().st_size // 2)
    with Silent().task("", 1, "bytes") as task:
        parts = [write_part(plan, part, tmp_path, task)[0] for part in plan.parts]
    assert len(parts) > 1
    whole = json.loads(run("recipes", "of", file, "--json").stdout)
    found = json.loads(run("recipes", "of", parts[0], "--json").stdout)
    assert found["types"] == whole["types"]
    assert found["label"] == "Q4_K_L"
    one_line(run("recipes", "of", parts[1]), "pass the first")


def test_errors_of_files_are_one_line(file: Path, tmp_path: Path) -> None:
    one_line(run("recipes", "of", tmp_path / "none.gguf"), "no such GGUF file; pass a file, or")
    one_line(run("recipes", "of", tmp_path), "no such GGUF file")
    one_line(run("recipes", "of", EXAMPLE / "config.json"), "expected GGUF version 2 or 3")
    one_line(run("recipes", "of", file, "-o", tmp_path / "x.txt"), "must end in .toml")
    with pytest.raises(UsageError, match="it is a file of the model"):
        reap2gguf.recipe_of(file, file)


def test_a_command_is_imported(folder: Path, file: Path, tmp_path: Path) -> None:
    text = "--tensor-type attn_v=q8_0 --tensor-type ssm=q8_0 --imatrix x.gguf in.gguf Q4_K_M"
    path = tmp_path / "mine.toml"
    done = run("recipes", "import", text, folder, "-o", path)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{path}: the recipe, 2 of 2 rules\n"
    assert "ssm=q8_0: matches no tensor\n" in done.stderr
    assert "--imatrix is not part of a recipe" in done.stderr
    assert run("recipes", "import", text, folder).stdout == path.read_text()
    assert "Q8_0" in run("recipes", "check", path, folder).stdout
    # the tensors of a GGUF file are those of its model
    values = json.loads(run("recipes", "import", text, file, "--json").stdout)
    assert values["types"]["blk.2.attn_v.weight"] == "Q8_0"
    assert [one["fate"] for one in values["rules"]] == ["kept", "matches nothing"]
    assert values["toml"].splitlines()[1:] == path.read_text().splitlines()[1:]


def test_a_list_from_a_file_and_from_standard_input(tmp_path: Path) -> None:
    path = tmp_path / "theirs.recipe"
    path.write_text("# comment\n^output\\.weight$=q8_0\nattn=q6_K\n")
    from_file = run("recipes", "import", path)
    assert from_file.exit_code == 0
    piped = CliRunner().invoke(cli, ["recipes", "import", "-"], input=path.read_text())
    assert piped.stdout == from_file.stdout
    typed = run("recipes", "import", r"^output\.weight$=q8_0,attn=q6_K")
    assert typed.stdout == from_file.stdout
    assert 'regex = "attn"' in typed.stdout
    assert reap2gguf.import_recipe(path).as_toml() == typed.stdout
    mine = run("recipes", "import", path, "--base", "unsloth-q4kxl").stdout
    assert 'extends = "unsloth-q4kxl"' in mine


def test_errors_of_texts_are_one_line(tmp_path: Path) -> None:
    one_line(run("recipes", "import", "attn=q6_0"), "the text: q6_0 exists only in ik_llama.cpp")
    one_line(run("recipes", "import", "hello"), "'hello' is neither a file")
    path = tmp_path / "x.recipe"
    path.write_bytes(b"a=q8_0\xff")
    one_line(run("recipes", "import", path), "cannot be read")
    path.write_text("a=q8_0\nb(=q8_0\n")
    one_line(run("recipes", "import", path), f"{path}, line 2: pattern 'b(' is not a regular")
    one_line(run("recipes", "import", path, "-o", path), "it is a file of the model")
    one_line(run("recipes", "import", "--tensor-type", "a=q8_0"), "no option --tensor-type")
