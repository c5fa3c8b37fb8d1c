from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from reap2gguf.bundle.card import gguf_body, gguf_card, hf_card, local_names
from reap2gguf.bundle.manifest import Manifest
from tests.conftest import Bundle


@pytest.fixture(scope="module")
def manifest(built: Bundle) -> Manifest:
    return Manifest.load(built.gguf)


def test_both_cards_have_front_matter_the_hub_reads(built: Bundle) -> None:
    for folder, library in ((built.hf, "transformers"), (built.gguf, "gguf")):
        data = ModelCard.load(folder / "README.md").data.to_dict()
        assert data["library_name"] == library
        assert data["license"] == "apache-2.0"
        assert "reap" in data["tags"]
        assert data["pipeline_tag"] == "text-generation"


def test_the_numbers_are_this_runs(built: Bundle, manifest: Manifest) -> None:
    for folder in (built.hf, built.gguf):
        text = (folder / "README.md").read_text()
        assert "12 of 16" in text
        assert f"{manifest.pruning.n_tokens:,}" in text
        assert f"{manifest.hf.n_parameters:,}" in text
        assert "3 checks passed" in text
        assert "{" not in text.split("```bibtex")[0]


def test_every_file_is_listed_under_an_honest_name(built: Bundle, manifest: Manifest) -> None:
    text = (built.gguf / "README.md").read_text()
    for record in manifest.gguf:
        assert f"`{record.file}`" in text
    assert "`IQ4_K_M` is llama.cpp's file type Q4_K_M" in text
    assert "`BF16` is llama.cpp's" not in text


def test_what_differs_between_programs_is_said(built: Bundle, manifest: Manifest) -> None:
    (caveat,) = manifest.caveats
    assert "form NFC first and llama.cpp does not" in caveat
    assert f"\nNote: {caveat}.\n" in (built.gguf / "README.md").read_text()


def test_a_caveat_is_only_text(built: Bundle, manifest: Manifest) -> None:
    strange = replace(manifest, caveats=("the text </s> [x](y) is `one`\n# token",))
    card = gguf_body(strange, local_names(strange))
    assert "\nNote: the text &#60;/s&#62; &#91;x&#93;(y) is &#96;one&#96;&#92;n# token.\n" in card


def test_a_model_of_the_hub_is_named_as_base_model(manifest: Manifest, tmp_path: Path) -> None:
    source = replace(manifest.source, label="Qwen/Qwen3-30B-A3B", revision="ad44e777bcd18fa4")
    published = replace(manifest, source=source)
    data = ModelCard(gguf_card(published, tmp_path / "none")).data
    assert data.base_model == "Qwen/Qwen3-30B-A3B"
    assert data.base_model_relation == "quantized"
    assert data.license is None
    assert "Qwen/Qwen3-30B-A3B at ad44e777bcd1" in hf_card(published, tmp_path / "none")


def test_a_source_card_without_front_matter_is_no_obstacle(
    manifest: Manifest, tmp_path: Path
) -> None:
    card = tmp_path / "README.md"
    card.write_text("---\n: not yaml [\n---\n# Model")
    assert hf_card(manifest, card).startswith("---\n")
