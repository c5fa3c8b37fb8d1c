"""`choose`, as it is typed and as it is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import reap2gguf
from reap2gguf.artifacts.observations import Observations
from reap2gguf.cli import cli
from reap2gguf.errors import ArtifactError, UsageError
from reap2gguf.options import CalibrationOptions, ComputeOptions
from tests.building.builds import PROSE
from tests.tiny import REPOSITORY, TinyQwen3Moe

CODE = REPOSITORY / "calibration" / "code.txt"
CPU = ComputeOptions(device="cpu", threads=1)
TEXTS = CalibrationOptions(str(PROSE), samples=6, max_length=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyQwen3Moe(vocab=4096).write(tmp_path_factory.mktemp("choose") / "model")


def choose(model: Path, **changes: Any) -> reap2gguf.Choice:
    values: dict[str, Any] = {
        "keep_experts": 4,
        "text": CODE,
        "candidates": "reap,frequency",
        "calibration": TEXTS,
        "compute": CPU,
    }
    return reap2gguf.choose(model, **values | changes)


def run(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, ["choose", *words])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_prints_the_table_and_writes_the_choice(model: Path, tmp_path: Path) -> None:
    output, seen = tmp_path / "choice.json", tmp_path / "seen.safetensors"
    words = [
        *(str(model), "--keep-experts", "4", "--candidates", "reap,frequency,ean_sum"),
        *("--calibration", str(PROSE), "--samples", "6", "--max-length", "64", "--device", "cpu"),
        *("--choose-text", str(CODE), "--observations", str(seen), "-o", str(output)),
    ]
    code, printed, _ = run(*words)
    assert code == 0
    found = json.loads(output.read_text())
    assert f"chosen: {found['method']}" in printed
    assert "KL held-out" in printed
    assert "cost: " in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["choice.json", "seen.safetensors"]
    assert Observations.load(seen).n_rows == 4
    kept = reap2gguf.select(model, seen, keep_experts=4, method=found["method"]).kept
    assert found["kept"] == {str(layer): list(ids) for layer, ids in kept.items()}
    assert (found["n_experts"], found["n_kept"]) == (8, 4)
    assert [one["name"] for one in found["record"]["candidates"]] == [
        *("reap", "frequency", "ean_sum")
    ]
    code, printed, notes = run(*words, "--json")
    assert (code, printed) == (2, "")
    assert f"{output}: exists already" in notes
    code, printed, notes = run(*words, "--json", "--overwrite")
    assert code == 0
    again = json.loads(printed)
    assert again["record"] == found["record"]
    assert f"{seen}: reused" in notes


def test_it_chooses_as_a_build_does(model: Path, tmp_path: Path) -> None:
    found = choose(model)
    options = reap2gguf.BuildOptions(
        recipes=("q8_0",),
        model=str(model),
        output=tmp_path,
        method="auto",
        keep_experts=4,
        candidates=("reap", "frequency"),
        choose_text=CODE,
        calibration=TEXTS,
        chunk=64,
        compute=CPU,
        evaluate="never",
    )
    result = reap2gguf.build(options)
    assert result is not None
    assert result.manifest.choice == found.record
    assert result.manifest.pruning.kept == found.kept
    assert set(found.seconds) == {"observing", "measuring"}


def test_an_interrupted_choice_resumes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the observations that were kept, and from the layers that the state holds."""
    output, seen = tmp_path / "choice.json", tmp_path / "seen.safetensors"

    def stop(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("reap2gguf.evaluating.engine.Head", stop)
        with pytest.raises(KeyboardInterrupt):
            choose(model, output=output, observations=seen)
    assert seen.is_file()
    assert not output.exists()
    assert choose(model, output=output, observations=seen).record == choose(model).record
    assert sorted(path.name for path in tmp_path.iterdir()) == ["choice.json", "seen.safetensors"]


def test_observations_of_all_rows_are_refused(model: Path, tmp_path: Path) -> None:
    seen = tmp_path / "all.safetensors"
    reap2gguf.observe(model, seen, calibration=TEXTS, compute=CPU)
    with pytest.raises(ArtifactError, match=r"observed on 6 rows .* the 4 rows .* held out"):
        choose(model, observations=seen)


def test_a_text_or_model_is_not_replaced(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("Some words. " * 400)
    with pytest.raises(UsageError, match="would replace the input"):
        choose(model, text=text, output=text)
    with pytest.raises(UsageError, match="replace"):
        choose(model, output=model / "config.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--candidates", "best"], "candidates names 'best'"),
        (["--keep-experts", "1"], "keep at least 2"),
        (["--choose-text", "none.txt"], "none.txt"),
        (["--samples", "2"], "2 rows, but"),
    ],
)
def test_what_cannot_be_used_is_one_line(model: Path, words: list[str], message: str) -> None:
    given = [str(model), "--calibration", str(PROSE), "--max-length", "64", "--device", "cpu"]
    code, _, errors = run(*given, *words)
    assert code == 2
    assert message in errors.splitlines()[-1]
