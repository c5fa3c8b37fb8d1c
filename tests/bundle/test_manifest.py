from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from reap2gguf.bundle.layout import MANIFEST_FILE
from reap2gguf.bundle.manifest import (
    CalibrationRecord,
    ComponentRecord,
    FileRecord,
    FolderRecord,
    GgufRecord,
    Manifest,
    PruningRecord,
    SourceRecord,
    hash_file,
)
from reap2gguf.errors import ArtifactError

RECIPE = 'title = "Q4"\n[[rule]]\nlayers = [0, 1]\ntensors = "größe \\\\ \\"x\\""\n'


def sample(recipe_source: str = RECIPE) -> Manifest:
    return Manifest(
        name="example",
        program={"reap2gguf": "0.1.0", "torch": "2.13.0"},
        source=SourceRecord("owner/name", "0123abcd", "f" * 64, "Qwen3MoeForCausalLM", 10, 20),
        pruning=PruningRecord(
            method="reap",
            n_experts=16,
            n_kept=3,
            experts_per_token=2,
            kept={0: (0, 5, 15), 1: (1, 2, 3), 10: (4, 5, 6)},
            observations_sha256="a" * 64,
            n_rows=7,
            n_tokens=700,
            n_dropped_rows=0,
        ),
        calibration=CalibrationRecord(
            "mix",
            "b" * 64,
            512,
            42,
            True,
            "text.txt",
            "c" * 64,
            9,
            512,
            (
                ComponentRecord("owner/data", "code", "train", "0" * 40, 5, 600, 9),
                ComponentRecord("mine.jsonl", None, None, None, 2, 100, 2),
            ),
        ),
        hf=FolderRecord("example", 1, 10, 20, {"config.json": FileRecord(3, "d" * 64)}),
        gguf=(
            GgufRecord(
                file="example-Q4.gguf",
                recipe="q4",
                title="Q4",
                label="Q4_K_M",
                file_type="MOSTLY_Q4_K_M",
                recipe_source=recipe_source,
                n_bytes=1000,
                bits_per_weight=4.52,
                tensors={"token_embd.weight": "Q6_K"},
            ),
        ),
        verification={"passed": True, "checks": ["a", 1, None]},
    )


def changed(folder: Path, *path: str | int, value: Any = None, remove: bool = False) -> None:
    file = folder / MANIFEST_FILE
    values = json.loads(file.read_text(encoding="utf-8"))
    inner = values
    for step in path[:-1]:
        inner = inner[step]
    if remove:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    file.write_text(json.dumps(values), encoding="utf-8")


def refusal(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        Manifest.load(folder)
    assert MANIFEST_FILE in str(caught.value)
    return str(caught.value)


def test_round_trip(tmp_path: Path) -> None:
    sample().save(tmp_path)
    assert Manifest.load(tmp_path) == sample()
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_FILE]


def test_saving_replaces(tmp_path: Path) -> None:
    sample().save(tmp_path)
    replace(sample(), name="another").save(tmp_path)
    assert Manifest.load(tmp_path).name == "another"


@pytest.mark.parametrize(
    "text",
    ["layers = [0,  1]", "a [ 1 ,2 ] b", "[1,\u00a02]", "[0,\t1]\n[2,\n  3]", "[, , ]", "[   ]"],
)
def test_texts_are_kept_as_they_are(tmp_path: Path, text: str) -> None:
    sample(text).save(tmp_path)
    assert Manifest.load(tmp_path).gguf[0].recipe_source == text


def test_it_is_json_with_expert_ids_on_one_line(tmp_path: Path) -> None:
    sample().save(tmp_path)
    text = (tmp_path / MANIFEST_FILE).read_text(encoding="utf-8")
    values = json.loads(text)
    assert values.pop("format") == 1
    assert values == json.loads(json.dumps(asdict(sample())))
    (line,) = (line for line in text.splitlines() if '"10":' in line)
    assert [int(word) for word in line.partition("[")[2].rstrip("], ").split(",")] == [4, 5, 6]
    assert "größe" in text


TOP = ["name", "program", "source", "pruning", "calibration", "hf", "gguf"]


@pytest.mark.parametrize("key", [*TOP, "verification"])
def test_missing_key(tmp_path: Path, key: str) -> None:
    sample().save(tmp_path)
    changed(tmp_path, key, remove=True)
    assert key in refusal(tmp_path)


@pytest.mark.parametrize(
    "path",
    [
        ("source", "fingerprint"),
        ("pruning", "kept"),
        ("pruning", "n_rows"),
        ("calibration", "seed"),
        ("calibration", "packed"),
        ("calibration", "components"),
        ("calibration", "components", 1, "tokens"),
        ("calibration", "components", 1, "samples"),
        ("hf", "files"),
        ("hf", "files", "config.json", "sha256"),
        ("gguf", 0, "tensors"),
    ],
)
def test_missing_inner_key(tmp_path: Path, path: tuple[str | int, ...]) -> None:
    sample().save(tmp_path)
    changed(tmp_path, *path, remove=True)
    assert str(path[-1]) in refusal(tmp_path)


@pytest.mark.parametrize("path", [("source", "x"), ("gguf", 0, "x"), ("hf", "x")])
def test_unknown_inner_key(tmp_path: Path, path: tuple[str | int, ...]) -> None:
    sample().save(tmp_path)
    changed(tmp_path, *path, value=1)
    refusal(tmp_path)


@pytest.mark.parametrize("key", TOP[1:])
@pytest.mark.parametrize("value", [None, 7, "text", [7]])
def test_values_of_the_wrong_kind(tmp_path: Path, key: str, value: Any) -> None:
    sample().save(tmp_path)
    changed(tmp_path, key, value=value)
    refusal(tmp_path)


@pytest.mark.parametrize("kept", [{"x": [1]}, {"0": ["a"]}, {"0": 1}, {"0": None}, [1], None])
def test_kept_experts_of_the_wrong_kind(tmp_path: Path, kept: Any) -> None:
    sample().save(tmp_path)
    changed(tmp_path, "pruning", "kept", value=kept)
    refusal(tmp_path)


@pytest.mark.parametrize("key", ["name", "subset", "revision", "rows", "tokens", "samples"])
@pytest.mark.parametrize("value", [[7], {}, True, 1.5, 2**63])
def test_components_of_the_wrong_kind(tmp_path: Path, key: str, value: Any) -> None:
    sample().save(tmp_path)
    changed(tmp_path, "calibration", "components", 0, key, value=value)
    assert key in refusal(tmp_path)


@pytest.mark.parametrize("value", [None, 1, "true", [True]])
def test_packed_of_the_wrong_kind(tmp_path: Path, value: Any) -> None:
    sample().save(tmp_path)
    changed(tmp_path, "calibration", "packed", value=value)
    assert "packed" in refusal(tmp_path)


@pytest.mark.parametrize("value", [None, {}, "text", [7], [None]])
def test_components_that_are_no_list(tmp_path: Path, value: Any) -> None:
    sample().save(tmp_path)
    changed(tmp_path, "calibration", "components", value=value)
    refusal(tmp_path)


def test_how_a_component_is_called() -> None:
    names = [("a/b", None, None), ("a/b", "code", "train"), ("a/b", None, "tool")]
    found = [ComponentRecord(*name, None, 1, 2, 1).title for name in names]
    assert found == ["a/b", "a/b[code]", "a/b(tool)"]


@pytest.mark.parametrize("number", [0, 2, "1", None])
def test_wrong_format(tmp_path: Path, number: Any) -> None:
    sample().save(tmp_path)
    changed(tmp_path, "format", value=number)
    assert "format 1" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"format": NaN}'])
def test_broken_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(content)
    refusal(tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    refusal(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 2**20 + 3])
def test_hash_file(tmp_path: Path, size: int) -> None:
    content = bytes(i % 251 for i in range(size))
    (tmp_path / "x").write_bytes(content)
    assert hash_file(tmp_path / "x") == FileRecord(size, hashlib.sha256(content).hexdigest())
