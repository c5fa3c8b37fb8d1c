from __future__ import annotations

import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from reap2gguf.artifacts.observations import LayerObservation, Observations
from reap2gguf.checkpoint.writer import CHECKSUM
from reap2gguf.errors import ArtifactError, OutputError

PARTS = tuple(part.name for part in fields(LayerObservation))
OLD_PARTS = ("count", "reap_sum", "gate_sum", "norm_sum", "norm_max")  # of format 1


def layer(n_experts: int, seed: int) -> LayerObservation:
    generator = np.random.default_rng(seed)
    sums = (generator.random(n_experts) for _ in PARTS[1:])
    return LayerObservation(generator.integers(0, 2**40, n_experts), *sums)


def sample() -> Observations:
    return Observations(
        layers={1: layer(4, 1), 12: layer(4, 2), 3: layer(4, 3)},
        model_fingerprint="0123abcd",
        calibration="mix: größe=1, 'quoted' \"text\"",
        calibration_sha256="ff" * 32,
        n_rows=7,
        n_tokens=2**40,
        n_dropped_rows=1,
        made_with={"reap2gguf": "0.1.0", "torch": "2.13.0"},
    )


def saved(folder: Path) -> Path:
    path = folder / "observations.safetensors"
    sample().save(path)
    return path


def rewrite(path: Path, metadata: dict[str, str | None] | None = None, **arrays: Any) -> None:
    """Save the file again by the library, with some of its arrays or metadata changed."""
    with safe_open(path, framework="np") as file:
        words = dict(file.metadata())
    values = load_file(path)
    for name, value in arrays.items():
        full = name.replace("_in_", ".")
        if value is None:
            del values[full]
        else:
            values[full] = np.asarray(value)
    for name, word in (metadata or {}).items():
        if word is None:
            del words[name]
        else:
            words[name] = word
    save_file(values, path, words)


def refusal(path: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        Observations.load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_round_trip(tmp_path: Path) -> None:
    before, after = sample(), Observations.load(saved(tmp_path))
    assert list(after.layers) == [1, 3, 12]
    for number, expected in before.layers.items():
        for part in PARTS:
            found = getattr(after.layers[number], part)
            assert found.dtype == getattr(expected, part).dtype
            assert np.array_equal(found, getattr(expected, part))
    assert replace(after, layers={}) == replace(before, layers={})


def test_the_library_reads_it(tmp_path: Path) -> None:
    found = load_file(saved(tmp_path))
    assert set(found) == {f"layers.{n}.{part}" for n in (1, 3, 12) for part in PARTS}
    assert found["layers.12.count"].dtype == np.int64
    assert found["layers.12.reap_sum"].dtype == np.float64


def test_the_same_observations_give_the_same_bytes(tmp_path: Path) -> None:
    first = saved(tmp_path).read_bytes()
    for _ in range(8):
        assert saved(tmp_path).read_bytes() == first
    end = 8 + int.from_bytes(first[:8], "little")
    assert end % 8 == 0
    names = list(json.loads(first[8:end])["__metadata__"])
    assert names == sorted(names)


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    path = tmp_path / "none" / "observations.safetensors"
    with pytest.raises(OutputError, match="cannot be written"):
        sample().save(path)


def test_saving_leaves_no_other_file(tmp_path: Path) -> None:
    path = saved(tmp_path)
    sample().save(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("version", ["0", "3", "", None])
def test_wrong_version(tmp_path: Path, version: str | None) -> None:
    path = saved(tmp_path)
    rewrite(path, {"format_version": version})
    assert f"format version {version!r}" in refusal(path)


def old(seen: Observations) -> Observations:
    """As an earlier version observed it."""
    layers = {
        number: LayerObservation(**{part: getattr(one, part) for part in OLD_PARTS})
        for number, one in seen.layers.items()
    }
    return replace(seen, layers=layers)


def test_files_of_format_1_are_still_read(tmp_path: Path) -> None:
    path = tmp_path / "observations.safetensors"
    old(sample()).save(path)
    with safe_open(path, framework="np") as file:
        assert file.metadata()["format_version"] == "1"
        assert set(file.keys()) == {f"layers.{n}.{part}" for n in (1, 3, 12) for part in OLD_PARTS}
    found = Observations.load(path)
    for number, one in sample().layers.items():
        for part in OLD_PARTS:
            assert np.array_equal(getattr(found.layers[number], part), getattr(one, part))
        assert found.layers[number].output_max is None
        assert not found.layers[number].is_complete
    again = tmp_path / "again.safetensors"
    found.save(again)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("version", ["1", "2"])
def test_arrays_of_the_other_format_are_refused(tmp_path: Path, version: str) -> None:
    path = tmp_path / "observations.safetensors"
    (sample() if version == "1" else old(sample())).save(path)
    rewrite(path, {"format_version": version})
    expected = "holds tensors that are not observations" if version == "1" else "is missing"
    assert expected in refusal(path)


OPTIONAL = ("layers", "made_with", "imatrix", "architecture", "tokens_sha256")
NEEDED = [f.name for f in fields(Observations) if f.name not in OPTIONAL]


@pytest.mark.parametrize("name", NEEDED)
def test_missing_metadata(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path)
    rewrite(path, {name: None})
    assert name in refusal(path)


def without_checksum(path: Path, **metadata: str | None) -> None:
    """As another program would write it: nothing but the checks of each value is left."""
    rewrite(path, {CHECKSUM: None, **metadata})


def test_observations_of_an_earlier_program_name_no_versions(tmp_path: Path) -> None:
    path = saved(tmp_path)
    without_checksum(path, made_with=None)
    assert Observations.load(path).made_with == {}


@pytest.mark.parametrize(
    "text",
    ["", "[]", "5", '{"torch": 2}', '{"torch": null}', "[" * 100_000,
     json.dumps({"torch": "x" * 129}), json.dumps({str(n): "1" for n in range(33)})],
)  # fmt: skip
def test_versions_that_are_none(tmp_path: Path, text: str) -> None:
    path = saved(tmp_path)
    without_checksum(path, made_with=text)
    assert "its metadata is incomplete" in refusal(path)


@pytest.mark.parametrize("word", ["", "many", "1.5", "nan"])
def test_counts_that_are_no_integers(tmp_path: Path, word: str) -> None:
    path = saved(tmp_path)
    rewrite(path, {"n_rows": word})
    refusal(path)


@pytest.mark.parametrize("part", PARTS)
def test_missing_array(tmp_path: Path, part: str) -> None:
    path = saved(tmp_path)
    rewrite(path, **{f"layers_in_3_in_{part}": None})
    assert f"layers.3.{part}" in refusal(path)


@pytest.mark.parametrize("part", PARTS)
def test_uneven_sizes(tmp_path: Path, part: str) -> None:
    path = saved(tmp_path)
    rewrite(path, **{f"layers_in_3_in_{part}": np.zeros(5)})
    assert "layer 3" in refusal(path)


@pytest.mark.parametrize("part", PARTS[1:])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(tmp_path: Path, part: str, value: float) -> None:
    path = saved(tmp_path)
    rewrite(path, **{f"layers_in_12_in_{part}": np.array([1.0, value, 1.0, 1.0])})
    assert "layer 12" in refusal(path)


@pytest.mark.parametrize("name", ["layers_in_3_in_other", "weight", "layers_in_x_in_count"])
def test_unknown_arrays(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path)
    rewrite(path, **{name: np.zeros(4)})
    refusal(path)


def test_foreign_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file as save_torch

    path = tmp_path / "model.safetensors"
    save_torch({"w": torch.ones(2, dtype=torch.bfloat16)}, path, {"format": "pt"})
    assert "format version None" in refusal(path)
    save_torch({"w": torch.ones(2, dtype=torch.bfloat16)}, path)
    assert "format version None" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"GGUF", bytes(100), b"text that is no header" * 9],
    ids=["empty", "short", "zeros", "text"],
)
def test_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "observations.safetensors"
    path.write_bytes(content)
    refusal(path)


def test_missing_file(tmp_path: Path) -> None:
    refusal(tmp_path / "gone.safetensors")


def test_truncated_file(tmp_path: Path) -> None:
    path = saved(tmp_path)
    os.truncate(path, path.stat().st_size - 1)
    assert "truncated" in refusal(path)


@pytest.mark.parametrize("metadata", ['{"format_version":"1","n_rows":[1]}', "[1]", '"x"', "7"])
def test_metadata_that_is_no_map_of_words(tmp_path: Path, metadata: str) -> None:
    path = saved(tmp_path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    raw = json.dumps(header | {"__metadata__": json.loads(metadata)}).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])
    refusal(path)
