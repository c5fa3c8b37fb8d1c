from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard, ModelCardData

from reap2gguf.bundle.card import gguf_body, gguf_card, hf_body, hf_card, local_names
from reap2gguf.bundle.card_files import CardNames
from reap2gguf.bundle.front_matter import PrunedFrom, pruned_values
from reap2gguf.bundle.manifest import ComponentRecord, Manifest, SideRecord
from reap2gguf.bundle.modelfile import modelfile
from reap2gguf.bundle.source_card import SourceCard, read_card
from reap2gguf.gguf_files.imatrix import load_imatrix
from reap2gguf.gguf_files.imatrix_coverage import layer_hits
from reap2gguf.pruning.coverage import importance_record
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
    assert f"\n- {caveat}.\n" in (built.gguf / "README.md").read_text()


def test_a_caveat_is_only_text(built: Bundle, manifest: Manifest) -> None:
    strange = replace(manifest, caveats=("the text </s> [x](y) is `one`\n# token",))
    card = gguf_body(strange, local_names(strange))
    assert "\n- the text &#60;/s&#62; &#91;x&#93;(y) is &#96;one&#96;&#92;n# token.\n" in card


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


HUB = CardNames("me/thing", "me/thing-GGUF", on_hub=True)


@pytest.fixture(scope="module")
def multimodal(manifest: Manifest) -> Manifest:
    """As of a Qwen3.5 with a tower and an MTP block."""
    mtp = replace(manifest.pruning.mtp, state="pruned", hits_before=3, hits_after=2, n_tokens=10)
    return replace(
        manifest,
        pruning=replace(manifest.pruning, mtp=mtp),
        source=replace(manifest.source, architecture="Qwen3_5MoeForConditionalGeneration"),
        side_files=(SideRecord("mmproj-example-F16.gguf", "vision projector", 5, {}),),
    )


def test_files_without_the_mtp_block_draft_nothing(multimodal: Manifest, tmp_path: Path) -> None:
    """As of a DeepSeek-V3: the safetensors alone have the block."""
    source = tmp_path / "none"
    assert "--spec-type draft-mtp" in gguf_card(multimodal, source)
    mtp = replace(multimodal.pruning.mtp, in_gguf=False)
    without = replace(multimodal, pruning=replace(multimodal.pruning, mtp=mtp))
    card = gguf_card(without, source)
    assert "draft" not in card
    assert "| multi-token prediction (MTP) | pruned" in card
    assert "draft_num_predict" not in modelfile(without, tmp_path)
    assert "--speculative-config" in hf_card(without, source)


def test_tables_have_a_header(built: Bundle) -> None:
    for folder in (built.hf, built.gguf):
        text = (folder / "README.md").read_text()
        assert "| | |" not in text
        assert "| property | value |\n| --- | --- |\n| source |" in text


def test_text_models_are_offered_as_such(built: Bundle, manifest: Manifest) -> None:
    one, other = ((folder / "README.md").read_text() for folder in (built.hf, built.gguf))
    assert "from transformers import AutoModelForCausalLM, AutoTokenizer" in one
    assert "AutoModelForImageTextToText" not in one
    for text in (one, other):
        assert "mmproj" not in text
        assert "MTP" not in text
        assert "ik_llama.cpp (" not in text


@pytest.mark.parametrize(
    ("architecture", "classes", "family"),
    [
        (
            "Qwen3VLMoeForConditionalGeneration",
            "AutoModelForImageTextToText, AutoProcessor",
            "qwen3_vl_moe",
        ),
        (
            "Qwen3OmniMoeForConditionalGeneration",
            "Qwen3OmniMoeThinkerForConditionalGeneration, AutoProcessor",
            "qwen3_omni_moe",
        ),
    ],
)
def test_what_causal_lm_does_not_load_is_offered_otherwise(
    manifest: Manifest, architecture: str, classes: str, family: str
) -> None:
    source = replace(manifest.source, architecture=architecture)
    changed = replace(manifest, source=source)
    assert PrunedFrom.of(changed).family == family
    one = hf_body(changed, HUB)
    assert f"from transformers import {classes}\n" in one
    assert "AutoModelForCausalLM" not in one


def test_tower_and_mtp_block_are_offered(multimodal: Manifest, tmp_path: Path) -> None:
    one, other = hf_body(multimodal, HUB), gguf_body(multimodal, HUB)
    assert "from transformers import AutoModelForImageTextToText, AutoProcessor" in one
    config = """--speculative-config '{"method": "mtp", "num_speculative_tokens": 1}'"""
    assert f"vllm serve me/thing {config}\n" in one
    run = "llama-server -m example-IQ4_K_M.gguf --mmproj mmproj-example-F16.gguf"
    assert f"\n{run}\n" in other
    assert f"\n{run} --spec-type draft-mtp --spec-draft-n-max 2\n" in other
    assert "PARAMETER draft_num_predict 2" in other
    assert "it loads `example-IQ4_K_M.gguf` and the projector." in other
    assert "ik_llama.cpp (ik-llama-cpp-python 0.1.5) computes something else" in other
    assert "It does not load files with an MTP block." in other
    assert "hf download me/thing-GGUF mmproj-example-F16.gguf --local-dir ." in other
    for card in (hf_card, gguf_card):
        data = ModelCard(card(multimodal, tmp_path / "none")).data
        assert data.pipeline_tag == "image-text-to-text"
        assert "qwen3_5_moe" in data.tags


def test_a_dropped_mtp_block_needs_a_flag_of_the_converter(multimodal: Manifest) -> None:
    mtp = replace(multimodal.pruning.mtp, state="dropped", n_tokens=0)
    dropped = replace(multimodal, pruning=replace(multimodal.pruning, mtp=mtp))
    assert "`convert_hf_to_gguf.py`, add `--no-mtp`" in hf_body(dropped, HUB)
    assert "speculative" not in hf_body(dropped, HUB) + gguf_body(dropped, HUB)
    assert "computes something else" in gguf_body(dropped, HUB)
    assert "It does not load" not in gguf_body(dropped, HUB)


def test_sampling_is_promised_only_where_there_is_one(
    built: Bundle, manifest: Manifest, tmp_path: Path
) -> None:
    assert "sampling" not in (built.gguf / "README.md").read_text()
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true}')
    card = gguf_card(manifest, tmp_path / "README.md")
    assert "llama.cpp takes the sampling that the model's own `generation_config.json`" in card
    assert "it loads `example-IQ4_K_M.gguf`, with the same sampling." in card


def test_each_file_has_a_tag_that_finds_it(manifest: Manifest) -> None:
    first, second = manifest.gguf
    plain = replace(second, file="example-Q4_K_M.gguf", label="Q4_K_M", title="Plain")
    card = gguf_body(replace(manifest, gguf=(first, plain)), HUB)
    assert re.search(r"\| `example-IQ4_K_M.gguf` \| .* \| `IQ4_K_M` \|", card)
    assert re.search(r"\| `example-Q4_K_M.gguf` \| .* \| `example-Q4_K_M` \| Plain \|", card)
    assert "\nllama-server -hf me/thing-GGUF:IQ4_K_M\n" in card
    assert "\nollama run hf.co/me/thing-GGUF:example-IQ4_K_M.gguf\n" in card
    by_name = "`example-IQ4_K_M.gguf`, `example-Q4_K_M.gguf`"
    assert f"For Ollama, the tag is the whole file name of {by_name}." in card
    assert "The Hub shows files with the label IQ4_K_M as Q4_K_M." in card
    assert "\nhf download me/thing-GGUF example-Q4_K_M.gguf --local-dir .\n" in card
    assert "LM Studio finds the files under `me/thing-GGUF`" in card
    local = gguf_body(manifest, CardNames("example", "example-GGUF"))
    assert "llama-server -hf OWNER/example-GGUF:IQ4_K_M" in local
    assert "hf download" not in local


def test_front_matter_names_what_it_is_made_of(manifest: Manifest, tmp_path: Path) -> None:
    data = ComponentRecord("owner/data", None, "train", "abc", 1, 2, 3)
    components = (data, data, replace(data, name="text.txt", revision=None))
    calibration = replace(manifest.calibration, components=components)
    made = replace(manifest, calibration=calibration)
    card = tmp_path / "README.md"
    card.write_text(
        "---\nlicense: other\nlicense_name: qwen\npipeline_tag: image-text-to-text\n"
        "datasets: [some/more]\ntags: [chat, gguf, 'base_model:a/b', moe, MLX, safetensors]\n"
        "author: Somebody\n---\n"
    )
    found = ModelCard(gguf_card(made, card)).data.to_dict()
    assert found == {
        "library_name": "gguf",
        "license": "other",
        "license_name": "qwen",
        "pipeline_tag": "text-generation",  # this bundle has no projector
        "datasets": ["some/more", "owner/data"],
        "tags": ["reap", "moe", "expert-pruning", "pruned", "qwen3_moe", "chat", "gguf", "imatrix"],
    }


def test_front_matter_can_be_made_again_from_a_bundle(tmp_path: Path) -> None:
    pruned = PrunedFrom("Qwen/Qwen3-30B-A3B", "Qwen3MoeForCausalLM", False, ("owner/data",))
    lists = {
        "license": ["mit"],
        "tags": ["chat", "pruned"],
        "datasets": ["a/b"],
        "language": ["no"],
    }
    once = pruned_values(SourceCard({"pipeline_tag": "text2text-generation"}, lists), pruned)
    card = tmp_path / "README.md"
    card.write_text(f"---\n{ModelCardData(**once).to_yaml()}\n---\n")
    assert pruned_values(read_card(card), pruned) == once
    assert once["base_model"] == "Qwen/Qwen3-30B-A3B"
    assert once["datasets"] == ["a/b", "owner/data"]


def test_an_unpruned_model_is_not_tagged_as_pruned() -> None:
    whole = PrunedFrom("a/b", "Qwen3MoeForCausalLM", methods=(), drops_experts=False)
    assert pruned_values(SourceCard(), whole)["tags"] == ["moe", "qwen3_moe"]
    assert pruned_values(SourceCard(), replace(whole, architecture="; rm"))["tags"] == ["moe"]


def test_the_tokens_of_the_importance_matrix(built: Bundle, manifest: Manifest) -> None:
    hits = layer_hits(load_imatrix(built.gguf / "imatrix.gguf"))
    covered = manifest.calibration.imatrix_coverage
    assert covered is not None
    assert covered.tokens == hits
    every = np.concatenate(list(hits.values()))
    few = int((every < 100).sum())
    text = (built.gguf / "README.md").read_text()
    (row,) = (line for line in text.splitlines() if line.startswith("| importance matrix "))
    assert f"median {int(np.median(every)):,} tokens per expert, fewest {every.min():,}" in row
    assert (f"; {few} of 48 experts" in row) is (few > 0)
    folded = text.split("<summary>Tokens of the importance matrix that the experts saw")[1]
    table = [
        line.split(" | ") for line in folded.split("</details>")[0].splitlines() if "|" in line
    ]
    assert len(table) == 2 + 4
    for layer, cells in enumerate(table[2:]):
        below = sum(count < 100 for count in hits[layer])
        assert cells[1:3] == [f"{min(hits[layer]):,}", f"{int(np.median(hits[layer])):,}"]
        assert cells[3] == f"{below} of 12 ({below / 12:.1%})"
    assert "Tokens of the importance matrix" not in (built.hf / "README.md").read_text()
    unknown = replace(manifest.calibration, imatrix_coverage=None)
    card = gguf_body(replace(manifest, calibration=unknown), local_names(manifest))
    assert "Tokens of the importance matrix" not in card


def test_experts_of_few_tokens_and_of_none(manifest: Manifest) -> None:
    tokens = {0: (0, 5, 300), 1: (100, 99, 7)}
    covered = importance_record(tokens)
    calibration = replace(manifest.calibration, imatrix_coverage=covered, imatrix_unseen=1)
    changed = replace(manifest, calibration=calibration)
    card = gguf_body(changed, local_names(changed))
    (row,) = (line for line in card.splitlines() if line.startswith("| importance matrix "))
    assert (
        "; median 53 tokens per expert, fewest 0; 4 of 6 experts (66.7%) saw under 100 tokens; no "
        "token reached 1 of 6 experts, which are quantized unweighted, as by llama-quantize"
    ) in row
    assert "| 0 | 0 | 5 | 2 of 3 (66.7%) | 1 |" in card
