from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from huggingface_hub import ModelCard

from reap2gguf.bundle.card import gguf_body, gguf_card, hf_body, hf_card, local_names
from reap2gguf.bundle.card_quality import figure, quality_section
from reap2gguf.bundle.evaluation import Estimate, Evaluation, evaluation_of
from reap2gguf.bundle.layout import PICTURES
from reap2gguf.bundle.manifest import Manifest
from tests.conftest import Bundle
from tests.evaluations import EXAMPLE, Q4, Q8

# code, differences, words with digits, and quantiles in headings
NO_FIGURES = r"`[^`]*`|\([+-][\d.]+\)|[A-Za-z]+[\w.-]*\d[\w.-]*|\d+-bit|KL [\d.]+ %"


@pytest.fixture(scope="module")
def evaluation(built: Bundle) -> Evaluation:
    """Of the files of the bundle."""
    first, second = Manifest.load(built.gguf).gguf
    text = json.dumps(EXAMPLE.as_json()).replace(Q4, first.file).replace(Q8, second.file)
    return evaluation_of(json.loads(text))


@pytest.fixture(scope="module")
def manifest(built: Bundle, evaluation: Evaluation) -> Manifest:
    return replace(Manifest.load(built.gguf), evaluation=evaluation, pictures=PICTURES)


def numbers(value: Any) -> Iterator[float]:
    """Every number in JSON."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from numbers(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def estimates(value: Any) -> Iterator[tuple[float, float]]:
    """Every figure with its standard error."""
    if isinstance(value, dict) and value.keys() == {"value", "error"}:
        yield value["value"], value["error"]
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from estimates(one)


def rounds_to(shown: str, value: float) -> bool:
    """Whether a number of a card is `value` with as many decimals as it shows."""
    decimals = len(shown.partition(".")[2])
    return f"{value:.{decimals}f}" == shown


@pytest.mark.parametrize("of_files", [False, True])
def test_every_figure_is_the_manifests(manifest: Manifest, of_files: bool) -> None:
    section = quality_section(manifest, of_files=of_files)
    found = re.findall(r"(-?\d+\.?\d*) ± (\d+\.?\d*)( %)?", section)
    assert len(found) > (60 if of_files else 12)
    assert manifest.evaluation is not None
    known = list(estimates(manifest.evaluation.as_json()))
    for value, error, unit in found:
        factor = 100 if unit else 1
        assert any(
            rounds_to(value, one * factor) and rounds_to(error, other * factor)
            for one, other in known
        ), (value, error)


@pytest.mark.parametrize("body", [hf_body, gguf_body])
def test_every_number_in_a_table_is_the_manifests(manifest: Manifest, body: Any) -> None:
    """But for sizes in other units, differences, and numbers inside names."""
    card = body(manifest, local_names(manifest))
    values = json.loads(manifest.text())
    known = set(numbers(values))
    known |= {100 * one for one in numbers(values["evaluation"])}
    known |= {n / 2**power for n in known if n > 2**10 for power in (10, 20, 30)}  # sizes
    expected = manifest.pruning
    known |= {expected.n_experts * 4, expected.n_kept * 4}  # of all layers
    known |= {float(n) for ids in expected.kept.values() for n in set(range(16)) - {*ids}}
    known |= {0.0, 1.0, 2.0, 3.0}  # layers
    seen = manifest.calibration.imatrix_coverage
    assert seen is not None
    known |= {float(int(median(tokens))) for tokens in seen.tokens.values()}
    lines = [line for line in card.splitlines() if line.startswith("| ")]
    assert len(lines) > 25
    for line in lines:
        bare = re.sub(NO_FIGURES, "", line)
        for shown in re.findall(r"(?<![\w.])\d[\d,]*\.?\d*", bare):
            shown = shown.replace(",", "")
            assert any(rounds_to(shown, one) for one in known), (shown, line)


def test_damages_are_told_apart(manifest: Manifest) -> None:
    text = quality_section(manifest, of_files=True)
    assert (
        "- **Pruning** (16 to 12 experts per layer): perplexity goes from 9.540 ± 0.080 to "
        "9.910 ± 0.080; mean KL divergence 0.1200 ± 0.0024, the same top token for "
        "88.00 ± 0.20 % of the tokens." in text
    )
    assert "- **Quantizing** to `IQ4_K_M`, from the pruned model: mean KL divergence 0.021" in text
    assert "In every file, pruning costs more than quantizing." in text
    assert "| arc_easy | acc | 0 | 250 | 48.0 ± 3.0 % | 45.0 ± 3.0 % (-3.0) |" in text
    assert "| `IQ4_K_M` | pp512 | 812.5 ± 4.1 | 2 | CPU | 61.04 MiB |" in text
    of_folder = quality_section(manifest, of_files=False)
    assert "IQ4_K_M" not in of_folder
    assert "quality.png" not in of_folder


def test_which_damage_is_larger_is_said_by_file(manifest: Manifest, evaluation: Evaluation) -> None:
    first = manifest.gguf[0]
    worse = [
        replace(one, divergence=replace(one.divergence, mean=Estimate(0.5, 0.01)))
        if (one.variant, one.reference) == (first.file, "pruned")
        else one
        for one in evaluation.comparisons
    ]
    changed = replace(manifest, evaluation=replace(evaluation, comparisons=worse))
    text = quality_section(changed, of_files=True)
    assert "Quantizing costs more than pruning in `IQ4_K_M`; in the other files, less." in text


def test_without_an_evaluation_it_is_said_once(built: Bundle) -> None:
    manifest = Manifest.load(built.gguf)
    for body in (hf_body, gguf_body):
        card = body(manifest, local_names(manifest))
        assert card.count("Quality was not measured.") == 1
        assert "`reap2gguf evaluate .`" in card
        assert "perplexity |" not in card
        assert "model-index" not in card


def test_figures_have_two_digits_of_error() -> None:
    assert figure(Estimate(9.5403, 0.0823)) == "9.540 ± 0.082"
    assert figure(Estimate(0.000812, 0.0000163)) == "0.000812 ± 0.000016"
    assert figure(Estimate(812.5, 41.2)) == "812 ± 41"
    assert figure(Estimate(1.5, 0.0)) == "1.5000 ± 0.0000"
    assert figure(Estimate(1e-9, 1e-10)) == "0.000000 ± 0.000000"
    assert figure(Estimate(9.0497e22, 2.43e22)) == "9.050e+22 ± 2.4e+22"
    assert figure(None) == "-"


def test_the_hub_reads_the_results(manifest: Manifest, tmp_path: Path) -> None:
    data = ModelCard(hf_card(manifest, tmp_path / "none")).data
    found = {(one.metric_type, one.metric_name): one.metric_value for one in data.eval_results}
    assert found == {
        ("perplexity", "perplexity"): 9.91,
        ("kl_divergence", "mean KL divergence from the source model"): 0.12,
        ("accuracy", "acc, 0-shot"): 0.45,
        ("acc_norm", "acc_norm, 0-shot"): 0.44,
    }
    assert data.model_name == manifest.name
    assert {one.task_type for one in data.eval_results} == {"text-generation"}
    text = next(one for one in data.eval_results if one.metric_type == "perplexity")
    assert (text.dataset_type, text.dataset_config) == ("Salesforce/wikitext", "wikitext-2-raw-v1")


def test_each_file_has_results_of_its_own(manifest: Manifest, tmp_path: Path) -> None:
    data = ModelCard(gguf_card(manifest, tmp_path / "none")).data
    names = [one.metric_name for one in data.eval_results]
    assert len(names) == 2 * (3 + 2) == len(set(names))
    for record in manifest.gguf:
        assert f"perplexity, {record.label}" in names
    assert ModelCard(f"---\n{data.to_yaml()}\n---\n").data.to_dict() == data.to_dict()


NASTY = ["a\nb: c", "---\n# x", "\u202e", "", "x" * 4000, "'\"{}[]", "<img src=x>", "| a |"]


@pytest.mark.parametrize("text", NASTY)
def test_names_in_an_evaluation_change_nothing(
    manifest: Manifest, evaluation: Evaluation, text: str, tmp_path: Path
) -> None:
    assert evaluation.text is not None
    strange = replace(
        evaluation,
        text=replace(evaluation.text, label=text),
        dtype=text,
        device=text,
        tasks=[replace(one, task=text) for one in evaluation.tasks],
        speeds=[replace(one, test=text) for one in evaluation.speeds],
    )
    usual = gguf_card(manifest, tmp_path / "none")
    card = gguf_card(replace(manifest, evaluation=strange), tmp_path / "none")
    assert len(card.splitlines()) <= len(usual.splitlines())
    assert "<img" not in re.sub(r"`[^`\n]*`", "", card)
    assert len(ModelCard(card).data.eval_results) == 10
