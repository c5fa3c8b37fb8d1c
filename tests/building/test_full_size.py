"""The commands for the published models, planned against repositories of the true shapes."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest
from click.testing import CliRunner

from reap2gguf.cli import cli
from tests.loopback_hub.repository import Content, OnDisk, Repository
from tests.loopback_hub.server import Hub
from tests.tiny import REPOSITORY

ROOT = REPOSITORY
SHAPES = {"Qwen/Qwen3-30B-A3B": "qwen3-30b-a3b", "Qwen/Qwen3.5-35B-A3B": "qwen3.5-35b-a3b"}
# Bytes of the published tokenizers' files; the ones that stand in for them are filled up to it.
TOKENIZERS = {
    "Qwen/Qwen3-30B-A3B": {
        "tokenizer.json": 11_422_654, "vocab.json": 2_776_833, "merges.txt": 1_671_853,
    },
    "Qwen/Qwen3.5-35B-A3B": {
        "tokenizer.json": 12_807_982, "vocab.json": 6_722_759, "merges.txt": 3_354_000,
    },
}  # fmt: skip
MOST_BYTES = 20e6


def sparse_checkpoint() -> ModuleType:
    path = ROOT / "bench" / "sparse_checkpoint.py"
    spec = importlib.util.spec_from_file_location("sparse_checkpoint", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def repository(name: str, folder: Path) -> Repository:
    """A repository of a published model's shapes: its weights are holes, the rest is as large."""
    writer = sparse_checkpoint()
    config, shapes = writer.SHAPES[SHAPES[name]]
    writer.write(config, shapes(config), folder)
    files: dict[str, Content] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            files[path.name] = OnDisk(path, f"{hash(path.name) % 16**8:064x}")
        else:
            files[path.name] = path.read_bytes()
    for file, size in TOKENIZERS[name].items():
        content = files.get(file, b"{}")
        assert isinstance(content, bytes)
        files[file] = content.ljust(size)
    return Repository(name, files)


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> list[Repository]:
    base = tmp_path_factory.mktemp("published")
    return [repository(name, base / shape) for name, shape in SHAPES.items()]


@pytest.fixture
def hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, repositories: list[Repository]
) -> Iterator[Hub]:
    with Hub(repositories=repositories) as hub:
        hub.serve(monkeypatch, tmp_path / "cache")
        yield hub
    huggingface_hub.close_session()


def published_commands() -> list[str]:
    """The commands of docs/reproducing.md, each on one line."""
    text = (ROOT / "docs" / "reproducing.md").read_text().replace("\\\n", " ")
    return re.findall(r"^reap2gguf build Qwen/.*--calibration seed-.*$", text, re.MULTILINE)


def planned(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `plan --json` prints for a `build` command."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calibration_data_v5_rc.txt").write_text("the text of the card's own imatrix")
    program, _, *arguments = shlex.split(command)
    assert program == "reap2gguf"
    result = CliRunner().invoke(cli, ["plan", "--json", *arguments])
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


# of each card: experts kept, parameters in billions, file labels
CARDS = [
    ("Qwen3.5-35B-A3B-REAP-20pct", 205, (28, 29.5), {"IQ4_K_M"}),
    ("Qwen3.5-24B-A3B-REAP-0.32", 175, (24, 26), {"IQ4_K_M", "IQ4_K_S", "Q4_K_M"}),
    ("Qwen3-30B-A3B-REAP-50", 64, (15.5, 16.5), {"IQ4_K_M"}),
]


def test_the_docs_have_a_command_for_each_card() -> None:
    names = [shlex.split(command)[-1] for command in published_commands()]
    assert names == [name for name, *_ in CARDS]


@pytest.mark.parametrize("index", range(3), ids=[name for name, *_ in CARDS])
def test_a_published_model_is_planned_from_headers(
    index: int, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, kept, (least, most), labels = CARDS[index]
    plan = planned(published_commands()[index], tmp_path, monkeypatch)
    assert plan["name"] == name
    assert plan["experts"]["kept"] == kept
    assert least < plan["parameters"]["kept"] / 1e9 < most
    assert {file["file"] for file in plan["files"]} == {f"{name}-{label}.gguf" for label in labels}
    weights = sum(
        content.path.stat().st_size
        for content in hub.find(f"/api/models/{plan['source']}").files.values()  # type: ignore[union-attr]
        if isinstance(content, OnDisk)
    )
    assert plan["unfetched_bytes"] == weights > 50e9
    assert hub.bytes_sent < MOST_BYTES
