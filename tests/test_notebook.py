"""The notebook in examples/: its form, and its cells as they run in a kernel."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

import reap2gguf
from tests.tiny import REPOSITORY

NOTEBOOK = REPOSITORY / "examples" / "first-build.ipynb"
_MAGIC = "%pip install -q git+"


def cells(kind: str) -> list[dict[str, Any]]:
    return [cell for cell in notebook()["cells"] if cell["cell_type"] == kind]


def notebook() -> dict[str, Any]:
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def code(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_it_is_a_notebook_without_outputs() -> None:
    found = notebook()
    assert set(found) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    assert found["metadata"]["kernelspec"]["name"] == "python3"
    names = [cell["id"] for cell in found["cells"]]
    assert len(names) == len({*names})
    for cell in found["cells"]:
        assert re.fullmatch(r"[\w-]{1,64}", cell["id"])
        assert isinstance(cell["metadata"], dict)
        lines = cell["source"]
        assert all(line.endswith("\n") for line in lines[:-1])
        if cell["cell_type"] == "code":
            assert (cell["execution_count"], cell["outputs"]) == (None, [])
        else:
            assert cell["cell_type"] == "markdown"
            assert set(cell) == {"cell_type", "id", "metadata", "source"}
    assert NOTEBOOK.stat().st_size < 20_000


def test_one_cell_installs_from_the_project_s_address() -> None:
    settings = (REPOSITORY / "pyproject.toml").read_text()
    (address,) = re.findall(r'^Homepage = "(.+)"$', settings, re.MULTILINE)
    assert [code(cell) for cell in cells("code") if code(cell).startswith("%")] == [
        f"{_MAGIC}{address.removeprefix('git+')}"
    ]


def test_it_uses_public_names_only() -> None:
    for cell in cells("code"):
        if code(cell).startswith("%"):
            continue
        for node in ast.walk(ast.parse(code(cell))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("reap2gguf"):
                assert node.module == "reap2gguf"
                assert {name.name for name in node.names} <= {*reap2gguf.__all__}


@pytest.mark.slow
def test_its_cells_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {}
    sizes = 0
    for cell in cells("code"):
        if code(cell).startswith("%"):
            continue
        body, n_changed = re.subn(r"^SAMPLES, MAX_LENGTH = .*", "SAMPLES, MAX_LENGTH = 4, 32",
                                  code(cell), flags=re.MULTILINE)  # fmt: skip
        sizes += n_changed
        exec(compile(body, cell["id"], "exec"), values)
    assert sizes == 1
    printed = capsys.readouterr().out
    assert "tiny-REAP-0.25: keeps 12 of 16 experts per layer" in printed
    assert "build/tiny-REAP-0.25-GGUF/tiny-REAP-0.25-IQ4_K_M.gguf" in printed
    assert "no violations" in printed
    assert printed.count("{0: [") == 3
