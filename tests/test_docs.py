"""What the documentation says is so."""

from __future__ import annotations

import re
import tomllib

import pytest

from reap2gguf import errors
from reap2gguf.cli import cli
from reap2gguf.models.table import ARCHITECTURES
from reap2gguf.quantizing.recipe import load_recipe, parse_recipe, shipped_recipes
from reap2gguf.terminal.click_options import METHODS
from tests.tiny import REPOSITORY

ROOT = REPOSITORY
README = (ROOT / "README.md").read_text()


def test_every_command_is_in_the_readme() -> None:
    for name in cli.commands:
        assert f"| `reap2gguf {name}` |" in README


def test_every_recipe_is_in_the_readme_with_its_file_type() -> None:
    for name in shipped_recipes():
        assert f"| `{name}` | {load_recipe(name).file_type} |" in README


def test_every_architecture_is_in_the_readme() -> None:
    for name in ARCHITECTURES:
        assert f"| `{name}` |" in README


def test_the_recipe_in_the_readme_parses() -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    assert parse_recipe(block, "readme", "README.md").rules[0].optional


def test_the_tree_is_the_tree() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    listed = set(re.findall(r"^  ([\w./]+)", tree, re.MULTILINE))
    package = ROOT / "reap2gguf"
    missing = {name for name in listed if not (package / name.rstrip("/")).exists()}
    assert not missing
    folders = {f"{p.name}/" for p in package.iterdir() if (p / "__init__.py").is_file()}
    assert folders <= listed


def test_the_ci_runs_the_readmes_test_command() -> None:
    run = (ROOT / ".ci" / "run").read_text()
    assert "'.[test]'" in README
    assert "'.[test]'" in run
    assert "python -m pytest" in run


def test_the_error_tree_shows_every_error() -> None:
    declared = {
        name for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }  # fmt: skip
    drawn = set(re.findall(r"(\w+Error)\b", errors.__doc__ or ""))
    assert declared == drawn
    for name in declared:
        assert vars(errors)[name].__doc__


def test_the_methods_of_the_command_line_are_documented() -> None:
    assert METHODS[0] == "reap"
    assert "`--method`" in README


@pytest.mark.parametrize("folder", ["recipes", "calibration"])
def test_shipped_folders_travel_in_the_wheel(folder: str) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included[folder] == f"reap2gguf/data/{folder}"
