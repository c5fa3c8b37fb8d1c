"""The documentation agrees with the code: tables, trees, links, generated pages and commands."""

from __future__ import annotations

import fnmatch
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest

import reap2gguf
from reap2gguf import errors
from reap2gguf.building import likeness
from reap2gguf.calibration.spec import shipped_mixes
from reap2gguf.choosing.names import AUTO
from reap2gguf.cli import cli
from reap2gguf.models.table import ARCHITECTURES
from reap2gguf.pruning.methods import FROM_WEIGHTS, MERGING, OBSERVED
from reap2gguf.quantizing.kernels.compiling import SOURCE
from reap2gguf.quantizing.kernels.gpu_kernels import FORMS
from reap2gguf.quantizing.recipe import load_recipe, parse_recipe, shipped_recipes
from reap2gguf.terminal import config_file
from tests.child import Child
from tests.forked_program import client
from tests.tiny import REPOSITORY, child_environment

README = REPOSITORY / "README.md"
DOCS = REPOSITORY / "docs"
PAGES = [
    README,
    REPOSITORY / "CONTRIBUTING.md",
    REPOSITORY / "CHANGELOG.md",
    REPOSITORY / "bench" / "README.md",
    REPOSITORY / "tests" / "fuzz" / "README.md",
    *sorted(DOCS.glob("*.md")),
]
FIRST = DOCS / "first-build.md"
FIRST_HOUR = (
    "example",
    "plan",
    "build",
    "inspect",
    "add",
    "verify",
    "chat",
    "push",
)  # commands in their order
DOWNLOAD = "needs a download"
NOT_RUN = "not run: "
STEPS = {"plan", "build", "observe", "select", "prune", "imatrix", "quantize", "verify"}
_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n\n?)?^```(?P<language>\w*)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and the HTML comment before it."""

    page: Path
    language: str
    body: str
    mark: str

    @property
    def is_run(self) -> bool:
        return self.language == "bash" and not self.mark


def blocks(page: Path, language: str) -> list[Block]:
    found = [
        Block(page, match["language"], match["body"], match["mark"] or "")
        for match in _BLOCK.finditer(page.read_text(encoding="utf-8"))
    ]
    return [block for block in found if block.language == language]


def page_name(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def first_cells(text: str, header: str) -> list[str]:
    """The code in the first column of the table whose header row begins with `header`."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith(f"| {header} |"):
            break
    next(lines)
    found = []
    for line in lines:
        if not line.startswith("|"):
            break
        found.append(line.split("|")[1].strip().strip("`"))
    return found


# ---------------------------------------------------------------------- tables equal the code


def test_the_table_of_commands_is_that_of_the_command_line() -> None:
    listed = first_cells(README.read_text(), "command")
    assert sorted(listed) == sorted(f"reap2gguf {name}" for name in cli.commands)


@pytest.mark.parametrize("page", [README, DOCS / "recipes.md"], ids=page_name)
def test_the_table_of_recipes_is_that_of_the_program(page: Path) -> None:
    text = page.read_text()
    assert sorted(first_cells(text, "recipe")) == sorted(shipped_recipes())
    for name in shipped_recipes():
        assert f"| `{name}` | {load_recipe(name).file_type} |" in text


def test_the_table_of_models_is_that_of_the_program() -> None:
    assert sorted(first_cells(README.read_text(), "architecture")) == sorted(ARCHITECTURES)


def test_the_table_of_kernels_is_that_of_their_source() -> None:
    text = (DOCS / "kernels.md").read_text()
    rows = re.findall(r"^\| ([A-Z0-9_, ]+) \| (\w+) \| (\w+|-) \|$", text, re.MULTILINE)
    listed = {name: (cpu, gpu) for names, cpu, gpu in rows for name in names.split(", ")}
    source = (SOURCE / "cpu.cpp").read_text()
    compiled = re.findall(r"^ *(?:case|CASE\w*)\W*GGML_(\w+)[,:]", source, re.MULTILINE)
    assert sorted(compiled) == sorted(name for name, (cpu, _) in listed.items() if cpu == "kernel")
    on_gpu = {name for name, (_, gpu) in listed.items() if gpu == "kernel"}
    assert on_gpu == {one.name for one in FORMS}


def test_the_tables_of_calibration_are_those_of_the_program() -> None:
    text = (DOCS / "calibration.md").read_text()
    mixes = shipped_mixes()
    assert sorted(first_cells(text, "mix")) == sorted(mixes)
    for name, mix in mixes.items():
        n_rows = sum(int(count) for count in re.findall(r":(\d+)", mix.spec))
        assert f"| `{name}` | {n_rows:,} x {mix.max_length:,} |" in text


def test_the_tables_of_methods_are_those_of_the_program() -> None:
    (method,) = (option for option in cli.commands["build"].params if option.name == "method")
    assert isinstance(method.type, click.Choice)
    text = (DOCS / "pruning-methods.md").read_text()
    observed, others = text.split("## Weights alone")
    by_weights, merging = others.split("## Merging")
    parts = observed, by_weights, merging
    listed = [first_cells(part, "`--method`") for part in parts]
    every = [name for part in listed for name in part]
    assert sorted([*every, AUTO]) == sorted(method.type.choices)
    rows = re.findall(r"^\| `(\w+)` \| (\d) \| (\d) \| ([\d.]+) \|", observed, re.MULTILINE)
    formulas = {name: (one.gate, one.norm, one.per) for name, one in OBSERVED.items()}
    assert {name: (int(a), int(b), float(p)) for name, a, b, p in rows} == formulas
    assert set(listed[1]) == set(FROM_WEIGHTS)
    assert set(listed[2]) == set(MERGING)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_recipes_and_config_files_on_the_pages_parse(page: Path) -> None:
    options = {name for one in cli.commands["build"].params for name in one.opts}
    for block in blocks(page, "toml"):
        if "[[rules]]" in block.body:
            assert parse_recipe(block.body, "page", page.name).rules
        else:
            keys = tomllib.loads(block.body).keys()
            assert {f"--{key}" for key in keys - {"model"}} <= options


def test_the_error_tree_shows_every_error() -> None:
    declared = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    drawn = set(re.findall(r"(\w+Error)\b", errors.__doc__ or ""))
    assert declared == drawn
    for name in declared:
        assert vars(errors)[name].__doc__


# ------------------------------------------------------------------------------------ the tree


def tree() -> tuple[set[str], set[str]]:
    """What the README lists of the repository, and of the package."""
    text = README.read_text().split("## The tree")[1].split("```")[1]
    outer = set(re.findall(r"^([\w./]+)", text, re.MULTILINE))
    inner = set(re.findall(r"^  ([\w./]+)", text, re.MULTILINE))
    return outer, inner


def package_folders() -> set[str]:
    package = REPOSITORY / "reap2gguf"
    return {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}


def test_the_readme_lists_the_folders_of_the_repository() -> None:
    ignored = [
        line.strip("/") for line in (REPOSITORY / ".gitignore").read_text().splitlines() if line
    ]
    folders = {
        f"{path.name}/"
        for path in REPOSITORY.iterdir()
        if path.is_dir()
        and not path.name.startswith(".")
        and not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored)
    }
    assert tree()[0] == folders


def test_the_readme_lists_the_folders_and_files_of_the_package() -> None:
    modules = {path.name for path in (REPOSITORY / "reap2gguf").glob("*.py")}
    assert tree()[1] == package_folders() | modules - {"__init__.py"}


def test_the_architecture_lists_the_folders_of_the_package() -> None:
    text = (DOCS / "architecture.md").read_text()
    assert set(first_cells(text, "folder")) == package_folders()
    named = set(re.findall(r"`(\w+\.py)`", text.split("Single files")[1].split("\n\n")[0]))
    modules = {path.name for path in (REPOSITORY / "reap2gguf").glob("*.py")}
    assert named == modules - {"__init__.py", "__main__.py"}


# ----------------------------------------------------------------------------- generated pages


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["commands.md", "api.md"])
def test_generated_pages_are_what_the_code_says(name: str) -> None:
    written = (DOCS / name).read_text(encoding="utf-8")
    made = generator().page(name)
    if written != made:
        pytest.fail(f"docs/{name} is out of date; run `python docs/generate.py`", pytrace=False)


def test_every_public_name_is_on_the_page() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    for name in getattr(reap2gguf, "__all__", ()):
        assert name in text


# --------------------------------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs and the Hub's hosts make them."""
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"\s+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", _BLOCK.sub("", page.read_text(encoding="utf-8")))
    for target in re.findall(r"(?<!\\)\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), f"{page_name(page)}: {target}"
        assert not anchor or anchor in anchors(path), f"{page_name(page)}: {target}"


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"^ +- .*: ([\w-]+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))


@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="needs the extra `docs`")
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------- commands on the pages


def command_lines(body: str) -> Iterator[list[str]]:
    """The words of every simple command of a block; comments and redirections are left out."""
    for line in body.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in (";", "&&", "||", "|"):
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def our_arguments(words: list[str]) -> list[str] | None:
    """The arguments of this program; None for a command of another."""
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    if words[:1] == ["reap2gguf"]:
        return words[1:]
    for index, pair in enumerate(pairwise(words)):
        if pair == ("-m", "reap2gguf"):
            return words[index + 2 :]
    return None


def check_arguments(command: click.Command, arguments: list[str], parent: Any = None) -> None:
    """Parse as the command line does, down to the command that would run."""
    context = click.Context(command, parent=parent, info_name=command.name)
    if not isinstance(command, click.Group):
        with command.make_context(command.name, arguments, parent=parent):
            return
    _, rest, _ = command.make_parser(context).parse_args(arguments)
    if not rest:
        return
    _, below, arguments = command.resolve_command(context, rest)
    assert below is not None
    check_arguments(below, arguments, context)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_on_the_pages_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the files that a page names are not all here
    monkeypatch.setattr(click.Path, "convert", lambda self, value, param, ctx: value)
    monkeypatch.setattr(config_file, "read_config", lambda path, ctx: {})
    monkeypatch.setattr(likeness, "read_likeness", lambda path: None)
    for block in blocks(page, "bash"):
        for words in command_lines(block.body):
            arguments = our_arguments(words[: words.index(">")] if ">" in words else words)
            if arguments is None:
                continue
            try:
                check_arguments(cli, arguments)
            except click.UsageError as error:
                pytest.fail(f"{page_name(page)}: {shlex.join(words)}: {error.format_message()}")


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_a_block_that_is_not_run_says_why(page: Path) -> None:
    for block in blocks(page, "bash"):
        is_known = block.mark in ("", DOWNLOAD) or block.mark.startswith(NOT_RUN)
        assert is_known, f"{page_name(page)}: <!-- {block.mark} -->"
    fences = [line for line in page.read_text().splitlines() if line.startswith("```")]
    assert not {"```sh", "```shell", "```console"} & set(fences)


# the program as the shell finds it, a process of its own
_PROGRAM = f"""#!{sys.executable}
import sys
from reap2gguf.cli import main
from tests.forked_program import shortened
sys.argv[1:] = shortened(sys.argv[1:])
main()
"""


def shell(body: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a block as bash does, in `folder`."""
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    environment = child_environment({"PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", body],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def checkout(folder: Path) -> Path:
    """A folder in which the pages' commands find what they name, and write what they write."""
    for name in ("calibration", "examples", "recipes"):
        (folder / name).symlink_to(REPOSITORY / name)
    return empty_folder(folder)


def empty_folder(folder: Path, text: str = _PROGRAM) -> Path:
    """A folder that holds the program and nothing else, as after installing a wheel."""
    (folder / "bin").mkdir()
    program = folder / "bin" / "reap2gguf"
    program.write_text(text)
    program.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The program in forks; the first command and the Python example start processes."""
    path = tmp_path_factory.mktemp("socket") / "program"
    environment = child_environment({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    with Child("tests.forked_program", str(path), environment=environment) as child:
        assert child.receive() == "ready\n"
        yield client(path)


@pytest.fixture(scope="module")
def built_example(tmp_path_factory: pytest.TempPathFactory, forks: str) -> Path:
    """Where the README's first command has run, but for its installation."""
    folder = checkout(tmp_path_factory.mktemp("checkout"))
    first = next(block for block in blocks(README, "bash") if block.mark == DOWNLOAD)
    build = first.body.split("&&")[-1].strip()
    assert build.startswith("reap2gguf build ")
    done = shell(build, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "bin" / "reap2gguf").write_text(forks)
    return folder


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page.stem == "parts" else ())
        for page in PAGES
        if page != FIRST and any(block.is_run for block in blocks(page, "bash"))
    ],
    ids=page_name,
)
def test_commands_on_the_pages_run(page: Path, built_example: Path) -> None:
    for block in blocks(page, "bash"):
        if block.is_run:
            done = shell(block.body, built_example)
            assert done.returncode == 0, f"{block.body}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_the_first_hour_runs_in_an_empty_folder(tmp_path: Path, forks: str) -> None:
    folder = empty_folder(tmp_path, forks)
    run = [block for block in blocks(FIRST, "bash") if not block.mark]
    for block in run:
        done = shell(block.body, folder)
        assert done.returncode == 0, f"{block.body}\n{done.stdout}\n{done.stderr}"
    typed = [words[1] for block in run for words in command_lines(block.body)]
    order = [typed.index(name) for name in FIRST_HOUR]
    assert order == sorted(order)


@pytest.mark.slow
def test_the_python_example_runs(tmp_path: Path) -> None:
    assert set(reap2gguf.__all__) >= STEPS
    folder = empty_folder(tmp_path)
    code = "\n".join(block.body for block in blocks(DOCS / "python.md", "python"))
    (folder / "example.py").write_text(code)
    done = shell(f"{shlex.quote(sys.executable)} example.py", folder)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------ packaging


def test_the_ci_runs_the_readmes_test_command() -> None:
    run = (REPOSITORY / ".ci" / "run").read_text()
    assert "'.[test]'" in README.read_text()
    assert re.search(r"'\.\[test(,\w+)*\]'", run)
    assert "python -m pytest" in run
    assert "run: .ci/run" in (REPOSITORY / ".github" / "workflows" / "ci.yml").read_text()


@pytest.mark.parametrize("folder", ["recipes", "calibration", "examples/tiny-qwen3-moe"])
def test_shipped_folders_travel_in_the_wheel(folder: str) -> None:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    included = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included[folder] == f"reap2gguf/data/{folder}"


def test_the_pages_speak_of_the_project_alone() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"/(?:home|root|work|Users)/\w", text), page
        assert not re.search(r"(?<![\w&])#\d+\b", text), page
