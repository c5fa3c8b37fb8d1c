"""The shape of the package, measured from its source: imports, sizes, tests and dependencies.

An import counts wherever it stands, inside functions too; only imports for type checking do not.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.tiny import REPOSITORY

PACKAGE = REPOSITORY / "reap2gguf"
TESTS = REPOSITORY / "tests"

# Limits. Lower one when the package gets below it; do not raise one to make room.
MOST_CHAIN = 21  # modules
MOST_AT_THE_TOP = 14  # modules outside folders
MOST_LINES = 420  # of a file
MOST_UNFORMATTED = 86  # `# fmt: skip` in the package

# Modules without a test file of their own name, by the file whose tests run them.
COVERED_BY = {
    "artifacts/test_observations.py": (),
}

# Distributions that are imported but not declared, and the reverse; each with the reason.
NOT_DECLARED = {"triton": "a dependency of torch's CUDA builds; used only on a GPU"}
NOT_IMPORTED = {
    "libggml-python": "its library is loaded by ctypes, after a search without an import",
    "flash-linear-attention": "transformers imports it where it is installed",
    "reap2gguf": "this package, with other extras",
}
COMMANDS = {"ruff", "mypy", "pytest-xdist"}  # of the extra `test`: run, not imported


@cache
def sources() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imported(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports at run time, at any depth."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{path}: relative import; write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        waiting += ast.iter_child_nodes(node)


@cache
def graph() -> dict[str, list[str]]:
    """The package's modules that each module imports."""
    known = sources()
    found = {}
    for name, path in known.items():
        modules = set()
        for full in imported(path):
            # `from package.module import name`: the name may itself be a module
            module = full if full in known else full.rpartition(".")[0]
            if module in known and module != name:
                modules.add(module)
        found[name] = sorted(modules)
    return found


def longest_chain() -> list[str]:
    """The most modules of which each imports the next; the graph has no cycle."""
    chains: dict[str, list[str]] = {}

    def chain(name: str) -> list[str]:
        if name not in chains:
            below = max((chain(module) for module in graph()[name]), key=len, default=[])
            chains[name] = [name, *below]
        return chains[name]

    return max(map(chain, graph()), key=len)


def cycle() -> list[str]:
    """Modules of which each imports the next and the last imports the first; none if there are no
    such modules."""
    finished: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name not in finished:
            for module in graph()[name]:
                if found := search(module, [*path, name]):
                    return found
            finished.add(name)
        return []

    return next(filter(None, (search(name, []) for name in graph())), [])


def test_no_import_cycles() -> None:
    found = cycle()
    assert not found, (
        "modules import each other; move what they share to a lower module: "
        + " -> ".join([*found, *found[:1]])
    )


def test_the_longest_chain_of_imports() -> None:
    chain = longest_chain()
    assert len(chain) <= MOST_CHAIN, (
        f"{len(chain)} modules in a chain of imports, at most {MOST_CHAIN} expected; import the "
        f"lower module directly, or pass in what it makes: {' -> '.join(chain)}"
    )
    assert len(chain) == MOST_CHAIN, f"the chain has become shorter: set MOST_CHAIN = {len(chain)}"


def test_few_modules_at_the_top() -> None:
    found = sorted(path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py")
    assert len(found) <= MOST_AT_THE_TOP, f"move a module into the folder of its job: {found}"


@pytest.mark.parametrize("folder", [PACKAGE, TESTS], ids=lambda folder: folder.name)
def test_no_file_is_long(folder: Path) -> None:
    lines = {
        str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8").count("\n")
        for path in folder.rglob("*.py")
    }
    found = {name: count for name, count in lines.items() if count > MOST_LINES}
    assert not found, f"more than {MOST_LINES} lines; divide each by what its parts do: {found}"


def test_the_formatter_formats_the_code() -> None:
    found = {
        str(path.relative_to(REPOSITORY)): count
        for path in sources().values()
        if (count := len(re.findall(r"# fmt: (?:skip|off)", path.read_text(encoding="utf-8"))))
    }
    total = sum(found.values())
    assert total <= MOST_UNFORMATTED, (
        f"let ruff format these lines, as they are or grouped: {found}"
    )
    assert total == MOST_UNFORMATTED, f"there are fewer: set MOST_UNFORMATTED = {total}"


def modules_to_test() -> set[str]:
    """Every module with code, as a path below the package."""
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in sources().values()
        if path.name != "__init__.py"
    }


def own_test(module: str) -> Path:
    """Where the tests of a module are if they are at its mirrored path."""
    path = Path(module)
    return TESTS / path.parent / f"test_{path.name}"


def test_every_module_has_its_test_file() -> None:
    elsewhere = {module for modules in COVERED_BY.values() for module in modules}
    missing = sorted(
        module for module in modules_to_test() - elsewhere if not own_test(module).is_file()
    )
    assert not missing, (
        "write tests/FOLDER/test_MODULE.py for each of these, or name the file that runs it in "
        f"COVERED_BY (tests/test_structure.py): {missing}"
    )


def test_every_exception_is_still_one() -> None:
    for test, modules in COVERED_BY.items():
        assert (TESTS / test).is_file(), f"COVERED_BY names tests/{test}, which is not there"
        for module in modules:
            assert module in modules_to_test(), f"COVERED_BY names {module}, which is not there"
            assert not own_test(module).is_file(), f"{module} has tests: remove it from COVERED_BY"


def test_every_test_file_has_its_module() -> None:
    """The other way round: a test file below a folder of the package is named after a module."""


def canonical(requirement: str) -> str:
    """The name of a distribution in a requirement, as an index compares it."""
    name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> set[str]:
    """Distributions that pyproject.toml declares: those that are required, or of extras."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    required = [] if extras else project["dependencies"]
    optional = project["optional-dependencies"]
    return {
        canonical(name) for name in [*required, *(n for extra in extras for n in optional[extra])]
    }


def used(paths: list[Path]) -> dict[str, str]:
    """Distributions that files import, each with one of the files."""
    names = packages_distributions()
    own = {*sys.stdlib_module_names, "reap2gguf", "tests"}
    found = {}
    for path in paths:
        for module in {full.partition(".")[0] for full in imported(path)} - own:
            distributions = names.get(module, [module])  # the module's name if it is not installed
            found[canonical(distributions[0])] = str(path.relative_to(REPOSITORY))
    return found


def test_what_the_package_imports_is_declared() -> None:
    found = used(list(sources().values()))
    missing = found.keys() - declared() - declared("llama", "gpu") - NOT_DECLARED.keys()
    assert not missing, f"add to dependencies in pyproject.toml: {[(n, found[n]) for n in missing]}"
    assert NOT_DECLARED.keys() <= found.keys()


def test_what_is_declared_is_imported() -> None:
    unused = (declared() | declared("llama", "gpu")) - used(list(sources().values())).keys()
    assert unused == NOT_IMPORTED.keys() - {"reap2gguf"}, (
        "remove from pyproject.toml what is unused"
    )


def test_what_the_tests_import_is_declared() -> None:
    found = used(sorted(TESTS.rglob("*.py")))
    extras = declared("test", "fuzz", "llama")
    missing = found.keys() - declared() - extras
    assert not missing, f"add to the extra `test`: {[(n, found[n]) for n in missing]}"
    unused = extras - found.keys() - COMMANDS - NOT_IMPORTED.keys()
    assert not unused, f"no test imports these: {unused}"
