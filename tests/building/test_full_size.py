"""The commands for the published models, planned against repositories of the true shapes."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from click.testing import CliRunner

from reap2gguf.cli import cli
from reap2gguf.models.shared import DecoderModel
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

sys.path.append(str(ROOT / "bench"))
BENCH = import_module("sparse_checkpoint")


def repository(name: str, folder: Path) -> Repository:
    """A repository of a published model's shapes: its weights are holes, the rest is as large."""
    config, shapes = BENCH.SHAPES[SHAPES[name]]
    BENCH.write(config, shapes(config), folder)
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


# as each is named: parameters in billions, tensors that GGUF files have
SIZES = {
    "qwen3-next-80b-a3b": (80, 863),
    "qwen3-coder-next": (80, 843),
    "qwen3.6-35b-a3b": (35, 753),
    "qwen3.5-122b-a10b": (122, 899),
    "qwen3.5-397b-a17b": (397, 1118),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_model_is_planned_at_its_size(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also that each of up to 76,000 names is asked for its role once: plans must be quick."""
    billions, n_tensors = SIZES[name]
    config, shapes = BENCH.SHAPES[name]
    BENCH.write(config, shapes(config), tmp_path / name)
    asked: list[str] = []
    find = DecoderModel._role

    def counting(model: DecoderModel, stored: str) -> Any:
        asked.append(stored)
        return find(model, stored)

    monkeypatch.setattr(DecoderModel, "_role", counting)
    command = f"reap2gguf build {tmp_path / name} --recipe unsloth-iq4km,Q8_0 --compression 0.5"
    plan = planned(command, tmp_path, monkeypatch)
    experts, parameters = plan["experts"], plan["parameters"]
    n_experts = config.get("text_config", config)["num_experts"]
    assert (experts["source"], experts["kept"]) == (n_experts, n_experts // 2)
    assert 0.995 * billions < parameters["source"] / 1e9 < 1.04 * billions
    assert 0.49 < parameters["kept"] / parameters["source"] < 0.56
    assert [len(file["tensors"]) for file in plan["files"]] == [n_tensors] * 2
    n_stored = sum(1 for _ in shapes(config))
    assert len(asked) <= 2 * n_stored  # of the source, and of the pruned model
