"""`evaluate` as it is typed: a bundle, and single folders and files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from reap2gguf.bundle.evaluation import Evaluation
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.terminal.evaluate_views import evaluation_lines
from tests.conftest import Bundle
from tests.evaluations import EXAMPLE as EVALUATION
from tests.test_cli import run
from tests.tiny import EXAMPLE, TinyQwen3Moe

SMALL = ("--chunks", 2, "--chunk", 64, "--device", "cpu")


def evaluated(*arguments: object) -> dict[str, Any]:
    result = run("evaluate", *arguments, *SMALL, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_bundle(built: Bundle, tmp_path: Path) -> None:
    output = tmp_path / "evaluation.json"
    found = evaluated(built.gguf, "--source", EXAMPLE, "-o", output)
    assert Evaluation.load(output).as_json() == found
    names = [one["name"] for one in found["variants"]]
    files = sorted(path.name for path in built.gguf.glob("*.gguf") if "imatrix" not in path.name)
    assert names[:2] == ["source", "pruned"]
    assert sorted(names[2:]) == files
    compared = {(one["reference"], one["variant"]) for one in found["comparisons"]}
    expected = {("source", "pruned")}
    expected |= {(kind, file) for kind in ("source", "pruned") for file in files}
    assert compared == expected
    text = found["text"]
    assert (text["label"], text["n_chunks"], text["n_scored"]) == ("held-out", 2, 62)
    assert not list(tmp_path.glob("*.state*"))


def test_a_bundle_without_its_source(built: Bundle) -> None:
    result = run("evaluate", built.hf, *SMALL)
    assert result.exit_code == 0, result.output
    assert "is not on the Hub; pass it as --source" in result.output
    assert "perplexity" in result.output
    assert "source  " not in result.output


def test_a_chunk_longer_than_the_context_is_said(tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text("several words of a text " * 2000)
    for command in ("evaluate", "compare"):
        result = run(command, EXAMPLE, "--text", text, "--chunk", 9999, "--device", "cpu")
        assert result.exit_code == 0, result.output
        assert "chunks have 2,048 tokens, since the context" in result.output


def test_single_files(built: Bundle) -> None:
    file = next(path for path in built.gguf.glob("*.gguf") if "imatrix" not in path.name)
    found = evaluated(EXAMPLE, built.hf, file)
    assert [one["kind"] for one in found["variants"]] == ["source", "pruned", "gguf"]


def test_a_bundle_gets_the_figures(built: Bundle, tmp_path: Path) -> None:
    output = tmp_path / "output"
    shutil.copytree(built.output, output, ignore=shutil.ignore_patterns(".work"))
    folder = output / built.gguf.name
    found = evaluated(folder, "--source", EXAMPLE, "--update")
    kept = Manifest.load(folder).evaluation
    assert kept is not None
    assert kept.as_json() == found
    assert "perplexity" in (folder / "README.md").read_text()
    assert "update writes into a bundle alone" in failure(EXAMPLE, built.hf, "--update")
    with (folder / "calibration.txt").open("a") as file:
        file.write("more")
    result = run("evaluate", folder, "--source", EXAMPLE, "--update", *SMALL)
    assert result.exit_code == 1, result.output
    assert "calibration.txt has a different SHA-256" in result.output
    assert "Evaluating" not in result.output  # nothing is measured for it


def failure(*arguments: object) -> str:
    result = run("evaluate", *arguments, *SMALL)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    return result.output


def test_what_does_not_fit_is_one_line(built: Bundle, tmp_path: Path) -> None:
    file = next(path for path in built.gguf.glob("*.gguf") if "imatrix" not in path.name)
    assert "has 12 experts per layer, and the folders that were given have 16" in failure(
        EXAMPLE, file
    )
    copy = tmp_path / file.name
    shutil.copy(file, copy)
    assert "two files are called" in failure(EXAMPLE, built.hf, file, copy)
    assert "source is for a bundle" in failure(EXAMPLE, built.hf, "--source", EXAMPLE)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    assert "broken.gguf: truncated" in failure(EXAMPLE, tmp_path / "broken.gguf")
    assert "none.gguf: cannot be read" in failure(EXAMPLE, tmp_path / "none.gguf")
    (tmp_path / "short.txt").write_text("a few words")
    assert "do not fill one chunk of 64" in failure(EXAMPLE, "--text", tmp_path / "short.txt")
    assert "or use a smaller --max-length (--chunk of" in failure(EXAMPLE, "--memory", "9MiB")
    other = TinyQwen3Moe(n_layers=3, vocab=4096).write(tmp_path / "other")
    assert "only variants of one model" in failure(EXAMPLE, other)


def test_no_input_is_replaced(built: Bundle, tmp_path: Path) -> None:
    file = next(path for path in built.gguf.glob("*.gguf") if "imatrix" not in path.name)
    copy, part, text = tmp_path / "a.gguf", tmp_path / "b.gguf", tmp_path / "text.txt"
    for path in (copy, part):
        shutil.copy(file, path)
    text.write_text("several words of a text " * 100)
    model = EXAMPLE, built.hf, copy
    for output in (copy, part, text):
        before = output.read_bytes()
        assert "pass another output" in failure(*model, "--text", text, "-o", output)
        assert output.read_bytes() == before
    for folder in (built.hf, built.gguf):
        inside = folder / "evaluation.json"
        assert "is in a folder of a bundle" in failure(built.gguf, "-o", inside)
        assert not inside.exists()


def test_lines_have_every_figure() -> None:
    lines = list(evaluation_lines(EVALUATION))
    text = "\n".join(lines)
    assert "30,600 tokens scored, in 120 chunks of 512" in text
    for one in EVALUATION.variants:
        assert f"{one.perplexity.value:.4f} ± {one.perplexity.error:.4f}" in text
    for compared in EVALUATION.comparisons:
        row = next(
            line for line in lines if line.split()[:2] == [compared.variant, compared.reference]
        )
        assert f"{compared.divergence.mean.value:.4f}" in row
        assert f"{100 * compared.divergence.same_top.value:.2f}" in row
    assert all(len(line) <= 120 for line in lines)


@pytest.mark.parametrize("option", ["--chunk", "--chunks"])
def test_numbers_that_cannot_be(option: str) -> None:
    result = run("evaluate", EXAMPLE, option, 1)
    assert result.exit_code == 2
    assert option in result.output
