"""Pages of bundles whose experts were merged or repaired, or cut out of a GGUF file."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from reap2gguf.bundle.records import (
    GgufOrigin,
    MergedLayerRecord,
    MergeRecord,
    RepairedLayerRecord,
    RepairRecord,
)
from reap2gguf.pruning.inspection import BundleInspection, KeptLayer
from reap2gguf.reporting.experts import GRID_DATA
from reap2gguf.reporting.facts import ReportFacts
from reap2gguf.reporting.page import page
from reap2gguf.terminal.inspect_views import as_lines, as_values
from tests.reports import Node, facts_of, read_page, table_of

SHA256 = "ab" * 32


def merged() -> ReportFacts:
    """Every layer's dropped experts are merged into the first that stays."""
    facts = facts_of()
    pruning, layers = facts.manifest.pruning, {}
    for layer, kept in pruning.kept.items():
        gone = tuple(e for e in range(pruning.n_experts) if e not in kept)
        groups = ((kept[0], *gone), *((one,) for one in kept[1:]))
        shares = tuple(tuple(1 / len(group) for _ in group) for group in groups)
        layers[layer] = MergedLayerRecord(groups, shares, SHA256)
    merge = MergeRecord("ream", 16, "texts", SHA256, 58, 76_708, 12, layers)
    changed = replace(pruning, method="ream", merge=merge, coverage=None)
    return replace(facts, manifest=replace(facts.manifest, pruning=changed), observations=None)


def text_of(facts: ReportFacts) -> tuple[Node, str]:
    tree = read_page(page(facts))
    return tree, tree.one("main").text


def test_a_merged_model_is_never_called_pruned() -> None:
    facts = merged()
    tree, text = text_of(facts)
    assert "with 25 % of its experts merged into the others by REAM" in text
    assert "from the merged model" in text
    assert "Merging damage and quantizing damage" in text
    assert "Experts were merged by what they did on the calibration texts" in text
    assert "The experts were judged by" not in text
    without_options = text.replace("mtpprune", "").replace("imatrix frompruned", "")
    assert "prun" not in without_options
    rows = table_of(tree, "Merged experts, by their numbers in the source")
    merge = facts.manifest.pruning.merge
    assert merge is not None
    assert len(rows) == len(merge.layers)
    for row, (layer, one) in zip(rows, sorted(merge.layers.items()), strict=True):
        cell = row["experts that became it, with their shares"].text
        members = tuple(int(part.split(" ")[0]) for part in cell.split(", "))
        assert members == one.groups[0]
        assert (row["layer"].text, row["stays"].text) == (str(layer), str(members[0]))


def test_the_grid_knows_into_which_expert_one_was_merged() -> None:
    facts = merged()
    data = data_of(facts)
    merge = facts.manifest.pruning.merge
    assert merge is not None
    for row, one in enumerate(merge.layers.values()):
        for group in one.groups:
            assert {data["into"][row][expert] for expert in group} == {group[0]}
    assert data["act"] == "merging"


def data_of(facts: ReportFacts) -> dict[str, Any]:
    tree = read_page(page(facts))
    found: dict[str, Any] = json.loads(tree.one("script", id=GRID_DATA).text)
    return found


def test_a_repaired_model_says_so() -> None:
    facts = facts_of()
    layers = {k: RepairedLayerRecord(1.0, 0.2, 0.1, SHA256) for k in facts.manifest.pruning.kept}
    repair = RepairRecord("ridge", "texts", SHA256, 4_096, 512, 4, layers)
    pruning = replace(facts.manifest.pruning, repair=repair)
    _, text = text_of(replace(facts, manifest=replace(facts.manifest, pruning=pruning)))
    assert "and their weights were repaired" in text
    assert "ridge, fitted on 4,096 tokens" in text
    assert "from the repaired model" in text
    assert "fitted to the calibration texts by least squares" in text
    assert "Nothing was retrained" not in text


def test_a_gguf_file_that_was_cut_has_no_pruned_model_beside_it() -> None:
    facts = facts_of()
    manifest, evaluation = facts.manifest, facts.evaluation
    assert evaluation is not None
    apart = [one for one in evaluation.comparisons if "pruned" not in (one.reference, one.variant)]
    cut = replace(
        manifest,
        source=replace(manifest.source, gguf=GgufOrigin("source-Q4_K_M.gguf", 11_287_296)),
        hf=None,
        gguf=tuple(replace(one, adopted=True) for one in manifest.gguf),
        evaluation=replace(
            evaluation,
            variants=tuple(one for one in evaluation.variants if one.name != "pruned"),
            comparisons=tuple(apart),
        ),
    )
    found = replace(facts, manifest=cut)
    assert {found.damage(one) for one in apart} == {"pruning"}
    _, text = text_of(found)
    assert "the source is a GGUF file, and its experts were cut there" in text
    assert "nothing was pruned" not in text
    assert "Here in 2 GGUF files" in text


def test_inspect_shows_the_groups() -> None:
    manifest = merged().manifest
    layers = tuple(
        KeptLayer(k, 16, 12, None, None) for k in sorted(manifest.pruning.kept)
    )  # fmt: skip
    found = BundleInspection(manifest, "ream", layers)
    lines = [*as_lines(found, "x")]
    assert any("the others were merged into them by" in line for line in lines)
    assert not any("observations" in line or "ranked" in line for line in lines)
    merge = manifest.pruning.merge
    assert merge is not None
    rows = [line for line in lines if "<-" in line]
    assert len(rows) == len(merge.layers)
    for row, (layer, one) in zip(rows, sorted(merge.layers.items()), strict=True):
        assert row.split()[:3] == [str(layer), str(one.groups[0][0]), "<-"]
    assert as_values(found)["merge"]["layers"][0]["groups"][0] == merge.layers[0].groups[0]
