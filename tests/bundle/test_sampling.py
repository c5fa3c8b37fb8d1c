"""The sampling of a generation config, in llama.cpp's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reap2gguf.bundle.sampling import GENERATION_FILE, Sampling, read_sampling


def read(folder: Path, values: dict[str, Any]) -> Sampling:
    (folder / GENERATION_FILE).write_text(json.dumps(values))
    return read_sampling(folder)


def test_every_value_has_its_name_and_type(tmp_path: Path) -> None:
    values = {
        "temperature": 1, "top_k": 20, "top_p": 0.95, "min_p": 0, "xtc_probability": 0.1,
        "xtc_threshold": 0.2, "penalty_last_n": -1, "repetition_penalty": 1.05, "mirostat": 2,
        "mirostat_tau": 5, "mirostat_eta": 0.1, "sequence": "penalties;top_k", "do_sample": True,
    }  # fmt: skip
    found = read(tmp_path, values)
    assert found.numbers == {
        "temp": 1.0, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "xtc_probability": 0.1,
        "xtc_threshold": 0.2, "penalty_last_n": -1, "penalty_repeat": 1.05, "mirostat": 2,
        "mirostat_tau": 5.0, "mirostat_eta": 0.1,
    }  # fmt: skip
    whole = {key for key, number in found.numbers.items() if type(number) is int}
    assert whole == {"top_k", "penalty_last_n", "mirostat"}
    assert found.sequence == "penalties;top_k"
    assert found.is_recommended
    assert found.problems == ()


def test_llama_cpps_own_name_comes_first(tmp_path: Path) -> None:
    assert read(tmp_path, {"penalty_repeat": 1.1, "repetition_penalty": 1.2}).numbers == {
        "penalty_repeat": 1.1
    }


@pytest.mark.parametrize(
    "values",
    [
        {"top_k": 20.0}, {"top_k": -1}, {"top_k": 2**40}, {"top_k": True}, {"temperature": "0.6"},
        {"temperature": -0.1}, {"temperature": 1e300}, {"top_p": 1.5}, {"min_p": [0]},
        {"repetition_penalty": 0}, {"penalty_last_n": 2**31}, {"mirostat": 3},
        {"sequence": "a\nb"}, {"sequence": 5}, {"sequence": "x" * 201},
    ],
)  # fmt: skip
def test_a_wrong_value_is_ignored_and_listed(values: dict[str, Any], tmp_path: Path) -> None:
    found = read(tmp_path, {**values, "xtc_threshold": 0.5})
    assert found.numbers == {"xtc_threshold": 0.5}
    assert found.sequence is None
    (problem,) = found.problems
    assert next(iter(values)) in problem
    assert problem.endswith("ignored")


def test_nothing_recommended(tmp_path: Path) -> None:
    assert read_sampling(tmp_path) == Sampling()
    assert not read(tmp_path, {"eos_token_id": 1, "temperature": None}).is_recommended
    found = read(tmp_path, {"do_sample": False, "temperature": 0.6})
    assert not found.is_recommended
    assert found.numbers == {"temp": 0.6}, "llama.cpp's converter writes it nevertheless"
    (tmp_path / GENERATION_FILE).write_text("{")
    (problem,) = read_sampling(tmp_path).problems
    assert problem.endswith("its sampling is ignored")
