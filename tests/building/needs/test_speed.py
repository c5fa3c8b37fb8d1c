"""Rates that are measured once and kept; how large they are is nobody's promise."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Type

from reap2gguf.building.needs import speed
from reap2gguf.building.needs.speed import NANOSECONDS, Speed, machine_speed, measure
from reap2gguf.errors import DependencyError
from reap2gguf.ggml import STORABLE
from reap2gguf.quantizing.kernels.compiled import VARIABLE, load_kernels


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refuse(folder: Path) -> Speed:
    raise AssertionError("measured again")


def test_every_type_has_a_rate() -> None:
    assert NANOSECONDS.keys() == {one.name for one in STORABLE}
    for one in STORABLE:
        assert Speed().quantize_seconds(one, 10**9) == pytest.approx(NANOSECONDS[one.name])
    slower = Speed(quantize={"plain": 1.0, "k": 2.0, "iq4": 3.0, "ggml": 4.0})
    for kind, factor in (("Q8_0", 1), ("Q6_K", 2), ("IQ3_S", 2), ("IQ4_NL", 3), ("IQ1_S", 4)):
        usual = Speed().quantize_seconds(Type[kind], 100)
        assert slower.quantize_seconds(Type[kind], 100) == pytest.approx(factor * usual)


def test_measuring_finds_what_a_machine_may_have(tmp_path: Path) -> None:
    found, usual = asdict(measure(tmp_path)), asdict(Speed())
    for one in fields(Speed):
        if one.name != "quantize":
            assert usual[one.name] / 30 <= found[one.name] <= usual[one.name] * 30
    assert found["quantize"].keys() == {"plain", "k", "iq4", "ggml"}
    assert not list(tmp_path.iterdir())  # the file that it writes has no name


def test_it_is_measured_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine_speed()
    (file,) = (cache / "reap2gguf").iterdir()
    assert json.loads(file.read_text()) == asdict(found)
    monkeypatch.setattr(speed, "measure", refuse)
    assert machine_speed() == found


def _damages() -> list[str]:
    whole = asdict(Speed())
    changes: list[Any] = [
        {"flops": "fast"}, {"flops": -1.0}, {"flops": True}, {"flops": None}, {"quantize": {}},
        {"quantize": [1, 2]}, {"quantize": whole["quantize"] | {"k": -1.0}}, {"more": 1.0},
    ]  # fmt: skip
    texts = [json.dumps(whole | change) for change in changes]
    texts.append(json.dumps({name: value for name, value in whole.items() if name != "python"}))
    not_json = ["", "{", "[]", "nan", "[" * 5000, "x" * 2**15]
    return [*texts, *not_json, json.dumps(whole).replace("125000000000.0", "Infinity")]


@pytest.mark.parametrize("text", _damages(), ids=lambda text: text[:40])
def test_a_damaged_file_is_measured_again(
    text: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "measure", lambda folder: Speed(python=2.0))
    machine_speed()
    (file,) = (cache / "reap2gguf").iterdir()
    file.write_text(text)
    monkeypatch.setattr(speed, "measure", lambda folder: Speed(python=3.0))
    assert machine_speed().python == 3.0
    assert json.loads(file.read_text())["python"] == 3.0


def test_kept_rates_that_no_machine_has_are_bounded(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "measure", lambda folder: Speed(flops=1e30))
    machine_speed()
    assert machine_speed().flops == 30 * Speed().flops


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = machine_speed()
    assert (found.write_bytes, found.read_bytes) == (Speed().write_bytes, Speed().read_bytes)


def test_without_libggml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise DependencyError("libggml was not found")

    monkeypatch.setattr(speed, "load_ggml", missing)
    monkeypatch.setattr(speed, "load_quantizer", missing)
    assert machine_speed().quantize == Speed().quantize


def test_what_libggml_takes_without_kernels_is_measured(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And kept in a file of its own."""
    with_kernels = machine_speed()
    monkeypatch.setenv(VARIABLE, "off")
    without = machine_speed()
    if load_kernels() is not None or with_kernels.quantize["k"] < 3:
        assert without.quantize["k"] > 3 * with_kernels.quantize["k"]
        assert len(list((cache / "reap2gguf").iterdir())) == 2
    assert without.quantize["k"] > 3
