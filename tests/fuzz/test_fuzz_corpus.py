"""Every input that a fuzzer kept: those that crashed a reader once, and one of each outcome."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS, run

CORPUS = Path(__file__).resolve().parent / "corpus"
INPUTS = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


@pytest.mark.parametrize("source", INPUTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_kept_inputs(tmp_path: Path, source: Path) -> None:
    target = TARGETS[source.parent.name]
    path = tmp_path / f"input{target.suffix}"
    path.write_bytes(source.read_bytes())
    run(target, path)


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_is_read_as_well_as_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "input"
    outcomes = set()
    for source in INPUTS:
        if source.parent.name == name:
            path.write_bytes(source.read_bytes())
            outcomes.add(run(TARGETS[name], path))
    assert outcomes == {True, False}


def test_the_corpus_is_small() -> None:
    assert {path.parent.name for path in INPUTS} == set(TARGETS)
    assert sum(path.stat().st_size for path in INPUTS) < 200_000
