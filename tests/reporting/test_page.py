"""The whole page: its numbers are the manifest's, nothing is loaded, and all can read it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise

import pytest

from reap2gguf.bundle.card_choice import choice_section, how_chosen
from reap2gguf.bundle.evaluation import Estimate, Evaluation, TaskScore
from reap2gguf.bundle.manifest import NO_METHOD, ImportanceRecord
from reap2gguf.reporting import grids
from reap2gguf.reporting.experts import heat
from reap2gguf.reporting.facts import ReportFacts
from reap2gguf.reporting.page import page
from reap2gguf.reporting.precision import bits_of, look
from tests.evaluations import EXAMPLE, Q4, Q8
from tests.reporting.test_html import HOSTILE
from tests.reports import Node, facts_of, read_page, table_of, without_evaluation

SECTIONS = [
    "summary", "files", "damage", "tasks", "speed", "experts", "bits", "run", "calibration",
    "caveats", "provenance",
]  # fmt: skip

CHOICE = "Which file for how much memory"


@pytest.fixture(scope="module")
def facts() -> ReportFacts:
    return facts_of()


@pytest.fixture(scope="module")
def tree(facts: ReportFacts) -> Node:
    return read_page(page(facts))


def value(cell: Node) -> float:
    return float(cell.attributes["data-value"] or "")


def error(cell: Node) -> float:
    return float(cell.one("span", "error").attributes["data-error"] or "")


def is_estimate(cell: Node, found: Estimate) -> bool:
    return (value(cell), error(cell)) == (found.value, found.error)


# ------------------------------------------------------------------------------ the structure


def test_headings_and_contents(tree: Node) -> None:
    assert [node.attributes["id"] for node in tree.all("section")] == SECTIONS
    assert [node.text for node in tree.all("h1")] == ["tiny"]
    links = [node.attributes["href"] for node in tree.one("nav").all("a")]
    assert links == [f"#{name}" for name in SECTIONS]
    levels = [int(n.name[1]) for n in tree.all() if re.fullmatch("h[1-6]", n.name)]
    assert all(below <= above + 1 for above, below in pairwise(levels))
    assert tree.one("html").attributes["lang"] == "en"
    for section in tree.all("section"):
        title = section.one("h2").attributes["id"]
        assert section.attributes["aria-labelledby"] == title


def test_ids_are_used_once(tree: Node) -> None:
    ids = [node.attributes["id"] for node in tree.all() if "id" in node.attributes]
    assert len(ids) == len(set(ids))


def test_every_table_has_a_caption_and_every_figure_a_title(tree: Node) -> None:
    assert len(list(tree.all("table"))) > 10
    assert all(table.one("caption").text for table in tree.all("table"))
    assert all(figure.one("figcaption").one("strong").text for figure in tree.all("figure"))
    for mark in tree.all("g", "mark"):
        assert mark.one("title").text


def test_every_cell_of_a_column_of_numbers_can_be_sorted(tree: Node) -> None:
    for table in tree.all("table", "sortable"):
        for cell in [*table.one("tbody").all("td"), *table.one("tbody").all("th")]:
            shown = cell.attributes.get("data-value")
            assert shown is not None or next(cell.all("span", "none"))
            if "number" in (cell.attributes.get("class") or "") and shown is not None:
                float(shown)


def test_nothing_is_loaded_from_elsewhere(facts: ReportFacts, tree: Node) -> None:
    for node in tree.all():
        for name in ("href", "src", "srcset", "action", "data", "poster"):
            link = node.attributes.get(name)
            assert link is None or link.startswith(("#", "https://huggingface.co/"))
        assert node.name not in (
            "link",
            "img",
            "iframe",
            "object",
            "embed",
            "base",
            "form",
            "image",
        )
        assert not any(one.startswith("on") or one == "style" for one in node.attributes)
    style, (*data, script) = tree.one("style").text, tree.all("script")
    assert "url(" not in style
    assert "@import" not in style
    assert all(one.attributes["type"] == "application/json" for one in data)
    assert not re.search(r"https?:|fetch\(|import\(|XMLHttp|eval\(|innerHTML", script.text)
    policy = next(
        node.attributes["content"] or ""
        for node in tree.all("meta")
        if node.attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'; ")
    for text in (style, script.text):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_the_same_facts_make_the_same_bytes(facts: ReportFacts) -> None:
    assert page(facts) == page(facts_of())


def test_a_hostile_manifest_is_only_text(facts: ReportFacts) -> None:
    manifest = facts.manifest
    task = TaskScore(HOSTILE, "source", HOSTILE, Estimate(0.5, 0.1), 10)
    assert manifest.options is not None
    strange = replace(
        manifest,
        name=HOSTILE,
        program={HOSTILE: HOSTILE},
        source=replace(manifest.source, label=HOSTILE, revision=HOSTILE, architecture=HOSTILE),
        pruning=replace(manifest.pruning, observations_file=HOSTILE),
        calibration=replace(
            manifest.calibration,
            spec=HOSTILE,
            imatrix_text=HOSTILE,
            components=[replace(manifest.calibration.components[0], name=HOSTILE)],
        ),
        options=replace(manifest.options, spec=HOSTILE),
        gguf=[
            replace(one, file=f"{n}{HOSTILE}", label=f"{n}{HOSTILE}", title=HOSTILE,
                    recipe=HOSTILE, recipe_source=HOSTILE, made_by={HOSTILE: HOSTILE},
                    tensors={HOSTILE: "Q4_K", f"blk.0.{HOSTILE}": "Q6_K"})
            for n, one in enumerate(manifest.gguf)
        ],
        verification={"summary": HOSTILE, "passed": [HOSTILE]},
        caveats=(HOSTILE,),
        evaluation=replace(
            EXAMPLE, tasks=[task], device=HOSTILE, made_with={HOSTILE: HOSTILE},
            text=replace(EXAMPLE.text, label=HOSTILE),
        ),
    )  # fmt: skip
    tree = read_page(page(replace(facts, manifest=strange, sizes={})))
    assert [node.attributes["id"] for node in tree.all("section")] == SECTIONS
    assert not list(tree.all("img"))
    scripts = [node.attributes.get("type") for node in tree.all("script")]
    assert scripts == ["application/json", None]
    for node in tree.all():
        assert not any(one.startswith("on") for one in node.attributes)
        if node.name in ("h1", "td", "th", "title", "li", "code"):
            assert "\u202e" not in node.text
    assert tree.one("h1").text.startswith('"><script>alert(1)</script>')


# -------------------------------------------------------------------------------- the numbers


def test_files(facts: ReportFacts, tree: Node) -> None:
    rows = table_of(tree, "GGUF files of this bundle")
    assert len(rows) == len(facts.manifest.gguf)
    for record, row in zip(facts.manifest.gguf, rows, strict=True):
        variant, found = EXAMPLE.variant(record.file), EXAMPLE.divergence(record.file, "source")
        assert variant is not None
        assert found is not None
        assert row["file"].attributes["data-value"] == record.file
        assert value(row["size"]) == record.n_bytes
        assert value(row["bits per weight"]) == record.bits_per_weight
        assert is_estimate(row["perplexity"], variant.perplexity)
        assert is_estimate(row["KL divergence"], found.mean)
        assert is_estimate(row["same top token"], found.same_top)


def test_pruning_and_quantizing_apart(tree: Node) -> None:
    rows = table_of(tree, "Pruning damage and quantizing damage")
    quantiles = table_of(tree, "Quantiles of the KL divergence, in nats")
    names = {"pruned": "pruned", Q4: "Q4_K_M", Q8: "Q8_0"}
    kinds = {"source": "both together", "pruned": "quantizing"}
    assert len(rows) == len(quantiles) == len(EXAMPLE.comparisons)
    assert rows[0]["damage of"].text == "pruning"
    for one in EXAMPLE.comparisons:
        kind = "pruning" if one.variant == "pruned" else kinds[one.reference]
        key, found = (names[one.variant], kind), one.divergence
        (row,) = [r for r in rows if (r["variant"].text, r["damage of"].text) == key]
        assert is_estimate(row["KL divergence"], found.mean)
        assert is_estimate(row["same top token"], found.same_top)
        assert is_estimate(row["RMS of probability"], found.rms_probability)
        assert is_estimate(row["perplexity"], found.perplexity_ratio)
        (row,) = [r for r in quantiles if (r["variant"].text, r["damage of"].text) == key]
        assert is_estimate(row["median"], found.median)
        assert is_estimate(row["90 %"], found.p90)
        assert is_estimate(row["99 %"], found.p99)
        assert is_estimate(row["99.9 %"], found.p999)
        assert value(row["maximum"]) == found.maximum


def test_perplexities(tree: Node) -> None:
    for one, row in zip(EXAMPLE.variants, table_of(tree, "Perplexity"), strict=True):
        assert is_estimate(row["perplexity"], one.perplexity)
        assert value(row["experts"]) == one.n_experts
        assert value(row["size"]) == one.n_bytes
        assert value(row["bits per weight"]) == one.bits_per_weight


def test_tasks_and_their_changes(tree: Node) -> None:
    rows = table_of(tree, "Scores and changes")
    assert [row["metric"].text for row in rows] == ["acc", "acc_norm"]
    names = {"source": "source", "pruned": "pruned", Q4: "Q4_K_M", Q8: "Q8_0"}
    for row in rows:
        scores = {
            one.variant: one.score for one in EXAMPLE.tasks if one.metric == row["metric"].text
        }
        for variant, score in scores.items():
            assert is_estimate(row[names[variant]], score)
            if variant != "source":
                change = row[f"{names[variant]} \u2212 source"]
                assert value(change) == score.value - scores["source"].value
                assert error(change) > score.error


def test_speeds(tree: Node) -> None:
    for one, row in zip(EXAMPLE.speeds, table_of(tree, "Speed of the files"), strict=True):
        assert row["test"].text == one.test
        assert is_estimate(row["tokens per second"], one.tokens_per_second)
        assert value(row["peak memory"]) == one.peak_bytes
        assert row["on"].text == "CPU, 2 threads"


def test_kept_experts(facts: ReportFacts, tree: Node) -> None:
    kept = facts.manifest.pruning.kept
    data = json.loads(tree.one("script", id="experts-data").text)
    assert data["layers"] == sorted(kept)
    for layer, marks in zip(data["layers"], data["kept"], strict=True):
        assert tuple(i for i, one in enumerate(marks) if one == "1") == kept[layer]
    for layer, row in zip(sorted(kept), table_of(tree, "Kept experts"), strict=True):
        scores = facts.scores()[layer]
        share = 100 * scores[list(kept[layer])].sum() / scores.sum()
        assert value(row["share of the scores"]) == pytest.approx(share)
    assert facts.observations is not None
    for layer, before in zip(data["layers"], data["before"], strict=True):
        assert before == facts.observations.layers[layer].count.tolist()
    for layer, order in zip(data["layers"], data["order"], strict=True):
        assert set(order[:12]) == set(kept[layer])


def test_both_orders_of_the_grid_show_what_is_kept(facts: ReportFacts, tree: Node) -> None:
    by_number, by_score = tree.one("figure", id="grid").all("div", "canvas")
    for canvas in (by_number, by_score):
        n_cells = {"kept": 0, "dropped": 0}
        for path in canvas.one("svg", "cells").all("path"):
            kind = (path.attributes["class"] or "").split()[0]
            if kind in n_cells:
                n_cells[kind] += (path.attributes["d"] or "").count("M")
        assert n_cells == {"kept": 4 * 12, "dropped": 4 * 4}
    assert by_score.one("path", "cut").attributes["d"] == "M12 -.5V3.5"


def test_types_and_bits(tree: Node) -> None:
    rows = table_of(tree, f"Types in {Q4}")
    types = {row["tensor"].text: row["types"].text for row in rows}
    assert types["ffn_down_exps"] == "Q6_K in 0, 3; Q4_K in 1\u20132"
    assert types["attn_q"] == "Q4_K"
    assert (bits_of("Q4_K"), bits_of("Q8_0"), bits_of("F32")) == (4.5, 8.5, 32)
    assert [look(bits) for bits in (2.06, 3.4375, 4.5, 5.5, 6.5625, 8.5, 16)] == [
        f"b{step}" for step in range(7)
    ]
    for row in table_of(tree, "Weights and bits by role"):
        assert value(row["Q4_K_M"]) == 8 * 700 / 1000
    assert [heat(one) for one in (0, 0.25, 0.5, 1, 2, 4, 8)] == list(range(7))


def test_versions_and_hashes(facts: ReportFacts, tree: Node) -> None:
    hashes = {
        r["file"].text: r["SHA-256"].text for r in table_of(tree, "SHA-256 of inputs and files")
    }
    assert hashes[Q4] == facts.hashes[Q4]
    assert hashes["tiny/model.safetensors"] == "78" * 32
    assert hashes["observations"] == facts.manifest.pruning.observations_sha256
    assert EXAMPLE.text is not None
    assert hashes["text scored: wikitext2"] == EXAMPLE.text.sha256
    versions = [tuple(c.text for c in row.values()) for row in table_of(tree, "Versions")]
    assert ("build", "torch", "2.13.0") in versions
    assert ("evaluation", "torch", "2.13.0") in versions
    code = [node.text for node in tree.one("section", id="provenance").all("pre")]
    assert "reap2gguf build owner/model --like reap2gguf.json" in code


# -------------------------------------------------------------- what is not there, and choices


def section(facts: ReportFacts, name: str) -> Node:
    return read_page(page(facts)).one("section", id=name)


def test_what_was_not_measured_is_said(facts: ReportFacts) -> None:
    bare = ReportFacts(without_evaluation(facts).manifest)
    said = {name: section(bare, name).text for name in SECTIONS}
    assert "How good these files are was not measured." in said["files"]
    assert "What pruning and quantizing cost was not measured" in said["damage"]
    assert "No tasks were run" in said["tasks"]
    assert "How quickly the files run was not measured" in said["speed"]
    assert "The observations that ranked the experts are not beside this bundle" in said["experts"]
    assert "How often each expert is used is not known" in said["experts"]
    assert "No GGUF file lies beside this bundle" in said["bits"]
    assert "Quality was not measured." in said["caveats"]
    assert said["summary"].count("cost not measured") == 2


def test_only_tasks_were_measured(facts: ReportFacts) -> None:
    some = Evaluation("streamed", None, tasks=EXAMPLE.tasks)
    only = replace(facts, manifest=replace(facts.manifest, evaluation=some))
    assert "was not measured" in section(only, "damage").text
    assert "Scores and changes" in section(only, "tasks").text


def test_nothing_was_pruned(facts: ReportFacts) -> None:
    evaluation = replace(
        EXAMPLE,
        variants=[one for one in EXAMPLE.variants if one.kind != "pruned"],
        comparisons=[
            one for one in EXAMPLE.comparisons if "pruned" not in (one.reference, one.variant)
        ],
    )
    manifest = facts.manifest
    whole = replace(
        manifest,
        hf=None,
        evaluation=evaluation,
        pruning=replace(manifest.pruning, method=NO_METHOD, n_kept=16),
    )
    tree = read_page(page(ReportFacts(whole)))
    assert "with all of its 16 experts" in tree.one("header").text
    assert [node.text for node in tree.one("div", "ledger").all("h3")] == ["Source", "Quantized"]
    rows = table_of(tree, "Pruning damage and quantizing damage")
    assert {row["damage of"].text for row in rows} == {"quantizing"}
    assert "keeps its 16 experts" in tree.one("section", id="experts").text


def test_no_difference_can_be_drawn(facts: ReportFacts) -> None:
    """The BF16 file of a pruned BF16 model diverges by zero."""
    zero = replace(EXAMPLE.comparisons[1].divergence, mean=Estimate(0, 0), maximum=0.0)
    first, second, *others = EXAMPLE.comparisons
    evaluation = replace(EXAMPLE, comparisons=[first, replace(second, divergence=zero), *others])
    same = replace(facts, manifest=replace(facts.manifest, evaluation=evaluation))
    rows = table_of(read_page(page(same)), "Pruning damage and quantizing damage")
    assert "0 ± 0" in [row["KL divergence"].text for row in rows]


def test_recommendations_are_those_of_the_card(facts: ReportFacts) -> None:
    big = [
        replace(one, n_bytes=n * 2**30) for one, n in zip(facts.manifest.gguf, (12, 7), strict=True)
    ]
    found = replace(facts, manifest=replace(facts.manifest, gguf=big))
    for manifest in (found.manifest, without_evaluation(found).manifest):
        rows = table_of(read_page(page(replace(facts, manifest=manifest))), CHOICE)
        shown = [(row["memory"].text, row["file"].text) for row in rows]
        assert shown == [("from 12 GiB", Q4), ("from 16 GiB", Q8)]
        card = choice_section(manifest)
        assert all(f"| {memory} | " in card and f"`{file}`" in card for memory, file in shown)
        assert how_chosen(manifest) in section(replace(facts, manifest=manifest), "files").text
    needs = [row["needs"].text for row in table_of(read_page(page(found)), CHOICE)]
    assert needs == ["8.70 GiB", "14.20 GiB"]
    huge = replace(facts, manifest=replace(facts.manifest, gguf=[replace(big[0], n_bytes=2**41)]))
    assert "from 2.20 TiB" in section(huge, "files").text


def test_large_models_make_small_pages() -> None:
    large = page(facts_of(94, 512, 384))
    assert len(large) < 3_000_000
    read_page(large)


# --------------------------------------------------------------------------------- the colours

_COLOUR = re.compile(r"--([\w-]+): (#[0-9a-f]{6});")
MARKS = ("source", "pruning", "quantizing", "both", "file-2", "file-3", "file-4", "file-5")


def schemes() -> list[dict[str, str]]:
    """The colours of the light and of the dark scheme."""
    style = files("reap2gguf.reporting").joinpath("style.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    found = [dict(_COLOUR.findall(block)) for block in (light, dark)]
    assert found[0].keys() == found[1].keys()
    return found


def luminance(colour: str) -> float:
    """https://www.w3.org/TR/WCAG21/#dfn-relative-luminance"""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", schemes(), ids=("light", "dark"))
def test_contrast(scheme: dict[str, str]) -> None:
    for ground in ("paper", "raised"):
        for text in ("ink", "soft", "link", "pruning", "quantizing"):
            assert contrast(scheme[text], scheme[ground]) >= 4.5, (text, ground)
    for mark in MARKS:
        assert contrast(scheme[mark], scheme["paper"]) >= 3, mark
    steps = [contrast(scheme[f"h{n}"], scheme["paper"]) for n in range(7)]
    assert steps == sorted(steps)
    assert steps[0] >= 1.3
    assert all(more / less >= 1.1 for less, more in pairwise(steps))


def test_there_is_a_rule_for_every_tab() -> None:
    style = files("reap2gguf.reporting").joinpath("style.css").read_text(encoding="utf-8")
    assert style.count(":checked ~ .pane:nth-of-type") == grids._MOST_TABS


def test_what_the_importance_matrix_saw(facts: ReportFacts) -> None:
    covered = ImportanceRecord(0, 150, 1, 2, 100, {0: (0, 50, 150, 300), 1: (120, 150, 160, 170)})
    manifest = facts.manifest
    known = replace(manifest, calibration=replace(manifest.calibration, imatrix_coverage=covered))
    tree = read_page(page(replace(facts, manifest=known))).one("section", id="calibration")
    text = tree.text
    assert "tokens of the importance matrix" in text
    assert f"{149 * 512:,}" in text
    assert "median 150, fewest 0; 2 of 8 experts (25.0%) saw under 100" in text
    rows = table_of(tree, "Tokens of the importance matrix that the experts of each layer saw")
    cells = [[row[name].text for name in ("fewest tokens", "median")] for row in rows]
    assert cells == [["0", "100"], ["120", "155"]]
    assert [row["experts under 100"].text for row in rows] == ["2", "0"]
    assert [row["experts without any"].text for row in rows] == ["1", "0"]
    before = read_page(page(facts)).one("section", id="calibration").text
    assert "tokens per expert" not in before
