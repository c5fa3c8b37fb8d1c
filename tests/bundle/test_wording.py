"""What was done to experts is said in the same words everywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from reap2gguf.bundle.card import gguf_body, gguf_card, hf_body, local_names
from reap2gguf.bundle.evaluation import Evaluation
from reap2gguf.bundle.front_matter import PrunedFrom, methods_of, pruned_values
from reap2gguf.bundle.manifest import EarlierPruning, GgufOrigin, Manifest
from reap2gguf.bundle.records import (
    MergedLayerRecord,
    MergeRecord,
    RepairedLayerRecord,
    RepairRecord,
)
from reap2gguf.bundle.source_card import SourceCard
from reap2gguf.bundle.wording import PRUNED, wording
from tests.conftest import Bundle
from tests.evaluations import EXAMPLE

SHA256 = "ab" * 32


@pytest.fixture(scope="module")
def pruned(built: Bundle) -> Manifest:
    """As it was built, with figures of its first file."""
    manifest = Manifest.load(built.gguf)
    return replace(manifest, evaluation=_measured(manifest))


def _measured(manifest: Manifest) -> Evaluation:
    """The figures of the first GGUF file of another bundle, as those of this one's first."""
    old = next(one.name for one in EXAMPLE.variants if one.kind == "gguf")
    new = manifest.gguf[0].file

    def name(variant: str) -> str:
        return new if variant == old else variant

    return replace(
        EXAMPLE,
        variants=tuple(replace(one, name=name(one.name)) for one in EXAMPLE.variants),
        comparisons=tuple(
            replace(one, variant=name(one.variant)) for one in EXAMPLE.comparisons
        ),
        tasks=(),
        speeds=(),
    )  # fmt: skip


def _repaired(manifest: Manifest) -> Manifest:
    layers = {layer: RepairedLayerRecord(1.0, 0.2, 0.1, SHA256) for layer in manifest.pruning.kept}
    repair = RepairRecord("ridge", "text", SHA256, 10, 5, 4, layers)
    return replace(manifest, pruning=replace(manifest.pruning, repair=repair))


def _merged(manifest: Manifest, method: str = "ream") -> Manifest:
    """The experts that are gone, merged into the last that stays and the one before it."""
    pruning, layers = manifest.pruning, {}
    for layer, kept in pruning.kept.items():
        gone = [e for e in range(pruning.n_experts) if e not in kept]
        into = {kept[-1]: gone[1:], kept[-2]: gone[:1]}
        groups = tuple((one, *into.get(one, ())) for one in kept)
        shares = tuple(tuple(1 / len(group) for _ in group) for group in groups)
        layers[layer] = MergedLayerRecord(groups, shares, SHA256)
    merge = MergeRecord(method, 16, "text", SHA256, 3, 4_096, 12, layers)
    changed = replace(pruning, method=method, merge=merge, coverage=None)
    return replace(manifest, pruning=changed, has_observations=False, pictures=())


def test_each_change_has_its_words(pruned: Manifest) -> None:
    assert wording(pruned.pruning) is PRUNED
    assert wording(_repaired(pruned).pruning).name("pruned") == "repaired"
    merged = wording(_merged(pruned).pruning)
    assert (merged.model, merged.title) == ("merged", "Merging")
    assert (merged.name("pruned"), merged.name("source")) == ("merged", "source")


def test_cards_of_a_pruned_model(pruned: Manifest) -> None:
    card = gguf_body(pruned, local_names(pruned))
    assert "<summary>Experts removed in each layer</summary>" in card
    assert "is the importance matrix of the pruned model" in card
    assert "- **Pruning** (" in card
    assert "merg" not in card
    assert "repair" not in card


def test_cards_of_a_repaired_model(pruned: Manifest) -> None:
    found = _repaired(pruned)
    card = gguf_body(found, local_names(found))
    assert "<summary>Experts removed in each layer</summary>" in card
    assert "is the importance matrix of the repaired model" in card
    assert "importance matrix was computed on the repaired model" in card
    assert "- **Pruning with repair** (" in card
    assert "| KL from repaired |" in card
    assert "file, from the repaired model" in card
    assert "\n| repaired |" in hf_body(found, local_names(found))


@pytest.mark.parametrize(("method", "name"), [("ream", "REAM"), ("hc_smoe", "HC-SMoE")])
def test_cards_of_a_merged_model(pruned: Manifest, method: str, name: str) -> None:
    found = _merged(pruned, method)
    names = local_names(found)
    for card in (gguf_body(found, names), hf_body(found, names)):
        assert f"merged into the others by {name}" in card
        assert "<summary>Experts merged in each layer</summary>" in card
        assert "removed in each layer" not in card
        assert "importance matrix was computed on the merged model" in card
        assert "- **Merging** (" in card
        assert "\n| merged |" in card
        assert "from the pruned" not in card
        assert "pruned model" not in card
        assert "`reap2gguf.json` lists all groups (`pruning.merge.layers`)" in card
        assert f"title         = {{{{{name}}}}}" in card
        assert ("lasby-reap" in card) == (method == "ream")
    assert "is the importance matrix of the merged model" in gguf_body(found, names)


def test_groups_are_those_of_the_manifest(pruned: Manifest) -> None:
    found = _merged(pruned)
    assert found.pruning.merge is not None
    for layer, one in found.pruning.merge.layers.items():
        groups = [group for group in one.groups if len(group) > 1]
        rows = [line for line in hf_body(found, local_names(found)).splitlines() if "←" in line]
        (row,) = (line for line in rows if line.startswith(f"| {layer} |"))
        shown = {
            int(part.split(" ← ")[0]): _numbers(part.split(" ← ")[1])
            for part in row.split("|")[2].strip().split("; ")
        }
        assert shown == {group[0]: [*group[1:]] for group in groups}


def _numbers(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(", "):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def test_tags_say_what_was_done(pruned: Manifest, tmp_path: Path) -> None:
    def tags(manifest: Manifest) -> list[str]:
        return list(pruned_values(SourceCard(), PrunedFrom.of(manifest))["tags"])

    assert tags(pruned) == ["reap", "moe", "expert-pruning", "pruned", "qwen3_moe"]
    repaired = ["reap", "moe", "expert-pruning", "pruned", "repaired", "qwen3_moe"]
    assert tags(_repaired(pruned)) == repaired
    assert tags(_merged(pruned)) == ["ream", "moe", "expert-merging", "merged", "qwen3_moe"]
    assert tags(_merged(pruned, "hc_smoe"))[0] == "hc-smoe"
    by_weights = replace(pruned, pruning=replace(pruned.pruning, method="aimer"))
    assert tags(by_weights) == ["moe", "expert-pruning", "pruned", "qwen3_moe"]
    card = gguf_card(_merged(pruned), tmp_path / "none")
    assert "- merged\n" in card
    assert "- reap\n" not in card
    assert "mean KL divergence from the merged model" in card


def test_tags_name_earlier_methods_too(pruned: Manifest) -> None:
    earlier = EarlierPruning("a/b", None, 32, ("msan",), pruned.pruning.kept)
    again = _merged(replace(pruned, source=replace(pruned.source, earlier=earlier)))
    tags = pruned_values(SourceCard(), PrunedFrom.of(again))["tags"]
    assert {"reap", "ream", "pruned", "merged"} <= set(tags)
    assert methods_of("none", earlier) == ("msan",)
    assert methods_of("none", None) == ()


def test_a_pruned_gguf_file_names_what_was_lost_and_the_file(pruned: Manifest) -> None:
    origin = GgufOrigin("source-Q4_K_M.gguf", pruned.n_parameters)
    measured = pruned.evaluation
    assert measured is not None
    kept = [one for one in measured.comparisons if "pruned" not in (one.reference, one.variant)]
    found = replace(
        pruned,
        source=replace(pruned.source, gguf=origin),
        hf=None,
        gguf=tuple(replace(one, adopted=True, recipe="") for one in pruned.gguf),
        evaluation=replace(
            measured,
            variants=tuple(one for one in measured.variants if one.name != "pruned"),
            comparisons=tuple(kept),
        ),
    )
    card = gguf_body(found, local_names(found))
    assert "KL from pruned" not in card
    assert f"experts per layer), in `{found.gguf[0].label}`: perplexity goes from" in card
    assert "where MODEL is `source-Q4_K_M.gguf`" in card
    assert "reap2gguf build source-Q4_K_M.gguf" in card
