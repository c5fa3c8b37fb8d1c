from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reap2gguf.bundle.layout import MANIFEST_FILE
from reap2gguf.bundle.manifest import (
    CalibrationRecord,
    ComponentRecord,
    EarlierPruning,
    FileRecord,
    FolderRecord,
    GgufRecord,
    ImportanceRecord,
    Manifest,
    PruningRecord,
    SourceRecord,
    hash_file,
)
from reap2gguf.errors import ArtifactError
from reap2gguf.evaluating.figures import perplexity
from reap2gguf.pruning.coverage import importance_record
from tests.evaluations import EXAMPLE

RECIPE = 'title = "Q4"\n[[rule]]\nlayers = [0, 1]\ntensors = "größe \\\\ \\"x\\""\n'


def sample(recipe_source: str = RECIPE) -> Manifest:
    return Manifest(
        name="example",
        program={"reap2gguf": "0.1.0", "torch": "2.13.0"},
        source=SourceRecord("owner/name", "0123abcd", "f" * 64, "Qwen3MoeForCausalLM", 10, 20),
        pruning=PruningRecord(
            method="reap",
            n_experts=16,
            n_kept=3,
            experts_per_token=2,
            kept={0: (0, 5, 15), 1: (1, 2, 3), 10: (4, 5, 6)},
            observations_sha256="a" * 64,
            n_rows=7,
            n_tokens=700,
            n_dropped_rows=0,
        ),
        calibration=CalibrationRecord(
            "mix",
            "b" * 64,
            512,
            42,
            True,
            "text.txt",
            "c" * 64,
            9,
            512,
            (
                ComponentRecord("owner/data", "code", "train", "0" * 40, 5, 600, 9),
                ComponentRecord("mine.jsonl", None, None, None, 2, 100, 2),
            ),
        ),
        hf=FolderRecord("example", 1, 10, 20, {"config.json": FileRecord(3, "d" * 64)}),
        gguf=(
            GgufRecord(
                file="example-Q4.gguf",
                recipe="q4",
                title="Q4",
                label="Q4_K_M",
                file_type="MOSTLY_Q4_K_M",
                recipe_source=recipe_source,
                n_bytes=1000,
                bits_per_weight=4.52,
                tensors={"token_embd.weight": "Q6_K"},
            ),
        ),
        verification={"passed": True, "checks": ["a", 1, None]},
    )


def changed(folder: Path, *path: str | int, value: Any = None, remove: bool = False) -> None:
    file = folder / MANIFEST_FILE
    values = json.loads(file.read_text(encoding="utf-8"))
    inner = values
    for step in path[:-1]:
        inner = inner[step]
    if remove:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    file.write_text(json.dumps(values), encoding="utf-8")


def refusal(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        Manifest.load(folder)
    assert MANIFEST_FILE in str(caught.value)
    return str(caught.value)


def test_round_trip(tmp_path: Path) -> None:
    sample().save(tmp_path)
    assert Manifest.load(tmp_path) == sample()
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_FILE]


def test_saving_replaces(tmp_path: Path) -> None:
    sample().save(tmp_path)
    replace(sample(), name="another").save(tmp_path)
    assert Manifest.load(tmp_path).name == "another"


@pytest.mark.parametrize(
    "text",
    ["layers = [0,  1]", "a [ 1 ,2 ] b", "[1,\u00a02]", "[0,\t1]\n[2,\n  3]", "[, , ]", "[   ]"],
)
def test_texts_are_kept_as_they_are(tmp_path: Path, text: str) -> None:
    sample(text).save(tmp_path)
    assert Manifest.load(tmp_path).gguf[0].recipe_source == text


def test_it_is_json_with_expert_ids_on_one_line(tmp_path: Path) -> None:
    sample().save(tmp_path)
    text = (tmp_path / MANIFEST_FILE).read_text(encoding="utf-8")
    values = json.loads(text)
    assert values.pop("format") == 1
    assert values == json.loads(json.dumps(asdict(sample())))
    (line,) = (line for line in text.splitlines() if '"10":' in line)
    assert [int(word) for word in line.partition("[")[2].rstrip("], ").split(",")] == [4, 5, 6]
    assert "größe" in text


TOP = ["name", "program", "source", "pruning", "calibration", "hf", "gguf"]


@pytest.mark.parametrize("key", [*TOP, "verification"])
def test_missing_key(tmp_path: Path, key: str) -> None:
    sample().save(tmp_path)
    changed(tmp_path, key, remove=True)
    assert key in refusal(tmp_path)


@pytest.mark.parametrize(
    "path",
    [
        ("source", "fingerprint"),
        ("pruning", "kept"),
        ("pruning", "n_rows"),
        ("calibration", "seed"),
        ("calibration", "packed"),
        ("calibration", "components"),
        ("calibration", "components", 1, "tokens"),
        ("calibration", "components", 1, "samples"),
        ("hf", "files"),
        ("hf", "files", "config.json", "sha256"),
        ("gguf", 0, "tensors"),
    ],
)
def test_missing_inner_key(tmp_path: Path, path: tuple[str | int, ...]) -> None:
    sample().save(tmp_path)
    changed(tmp_path, *path, remove=True)
    assert str(path[-1]) in refusal(tmp_path)


@pytest.mark.parametrize("path", [("source", "x"), ("gguf", 0, "x"), ("hf", "x")])
def test_unknown_inner_key(tmp_path: Path, path: tuple[str | int, ...]) -> None:
    sample().save(tmp_path)
    changed(tmp_path, *path, value=1)
    refusal(tmp_path)


@pytest.mark.parametrize("key", TOP[1:])
@pytest.mark.parametrize("value", [None, 7, "text", [7]])
def test_values_of_the_wrong_kind(tmp_path: Path, key: str, value: Any) -> None:
    sample().save(tmp_path)
    changed(tmp_path, key, value=value)
    refusal(tmp_path)


@pytest.mark.parametrize("kept", [{"x": [1]}, {"0": ["a"]}, {"0": 1}, {"0": None}, [1], None])
def test_kept_experts_of_the_wrong_kind(tmp_path: Path, kept: Any) -> None:
    sample().save(tmp_path)
    changed(tmp_path, "pruning", "kept", value=kept)
    refusal(tmp_path)


@pytest.mark.parametrize("key", ["name", "subset", "revision", "rows", "tokens", "samples"])
@pytest.mark.parametrize("value", [[7], {}, True, 1.5, 2**63])
def test_components_of_the_wrong_kind(tmp_path: Path, key: str, value: Any) -> None:
    sample().save(tmp_path)
    changed(tmp_path, "calibration", "components", 0, key, value=value)
    assert key in refusal(tmp_path)


@pytest.mark.parametrize("value", [1, "true", [True]])
def test_packed_of_the_wrong_kind(tmp_path: Path, value: Any) -> None:
    sample().save(tmp_path)
    changed(tmp_path, "calibration", "packed", value=value)
    assert "packed" in refusal(tmp_path)


@pytest.mark.parametrize("value", [None, {}, "text", [7], [None]])
def test_components_that_are_no_list(tmp_path: Path, value: Any) -> None:
    sample().save(tmp_path)
    changed(tmp_path, "calibration", "components", value=value)
    refusal(tmp_path)


def test_how_a_component_is_called() -> None:
    names = [("a/b", None, None), ("a/b", "code", "train"), ("a/b", None, "tool")]
    found = [ComponentRecord(*name, None, 1, 2, 1).title for name in names]
    assert found == ["a/b", "a/b[code]", "a/b(tool)"]


@pytest.mark.parametrize("number", [0, 2, "1", None])
def test_wrong_format(tmp_path: Path, number: Any) -> None:
    sample().save(tmp_path)
    changed(tmp_path, "format", value=number)
    assert "format 1" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"format": NaN}'])
def test_broken_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(content)
    refusal(tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    refusal(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 2**20 + 3])
def test_hash_file(tmp_path: Path, size: int) -> None:
    content = bytes(i % 251 for i in range(size))
    (tmp_path / "x").write_bytes(content)
    assert hash_file(tmp_path / "x") == FileRecord(size, hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("gguf",), [], "gguf is empty"),
        (("pruning", "n_experts"), 0, "n_experts is 0"),
        (("pruning", "n_experts"), 2**40, "n_experts is"),
        (("pruning", "n_experts"), 10, "expert 15 in layer 0"),
        (("pruning", "n_kept"), 0, "n_kept is 0"),
        (("pruning", "n_kept"), 17, "n_kept is 17"),
        (("pruning", "experts_per_token"), 0, "experts_per_token is 0"),
        (("pruning", "experts_per_token"), 4, "experts_per_token is 4"),
        (("pruning", "n_rows"), -1, "n_rows is -1"),
        (("pruning", "n_tokens"), -1, "n_tokens is -1"),
        (("pruning", "n_dropped_rows"), 8, "n_dropped_rows is 8"),
        (("pruning", "mtp"), {"state": "x"}, "mtp is 'x'"),
        (("pruning", "mtp"), {"hits_after": 2, "n_tokens": 1}, "hits_after is 2"),
        (("hf", "n_shards"), 0, "n_shards is 0"),
        (("hf", "n_bytes"), -5, "n_bytes is -5"),
        (("source", "n_parameters"), -5, "n_parameters is -5"),
        (("calibration", "imatrix_chunk_size"), -5, "imatrix_chunk_size is -5"),
        (("gguf", 0, "bits_per_weight"), 0, "bits_per_weight is 0"),
        (("gguf", 0, "bits_per_weight"), 1000.0, "bits_per_weight is 1000.0"),
        (("gguf", 0, "parts"), ["x"] * 20_001, "parts holds 20,001 values"),
        (("side_files",), [{}] * 1001, "side_files holds 1,001 values"),
        (("calibration", "components"), [{}] * 1001, "components holds 1,001 values"),
        (("hf", "files"), {str(n): {} for n in range(20_001)}, "files holds 20,001 values"),
    ],
)  # fmt: skip
def test_numbers_that_no_bundle_has(
    tmp_path: Path, path: tuple[str | int, ...], value: Any, words: str
) -> None:
    sample().save(tmp_path)
    changed(tmp_path, *path, value=value)
    assert words in refusal(tmp_path)


@pytest.mark.parametrize(
    "layer", ["-1", "1_0", "\u0661", " 1", "01", "+1", "1.0", "", "4097", "9" * 5000, "1\n"]
)
def test_layers_have_plain_numbers(tmp_path: Path, layer: str) -> None:
    sample().save(tmp_path)
    changed(tmp_path, "pruning", "kept", layer, value=[1, 2, 3])
    assert "is not the number of a layer" in refusal(tmp_path)


@pytest.mark.parametrize("expert", [-1, 2**16, 2**63, True, 1.0, None])
def test_experts_have_plain_numbers(tmp_path: Path, expert: Any) -> None:
    sample().save(tmp_path)
    changed(tmp_path, "pruning", "kept", "1", value=[1, 2, expert])
    assert "is not an expert id" in refusal(tmp_path)


def test_many_layers_are_refused_before_they_are_read(tmp_path: Path) -> None:
    sample().save(tmp_path)
    changed(tmp_path, "pruning", "kept", value={str(n): [0] for n in range(90_000)})
    assert "kept holds 90,000 values, expected at most 4,097" in refusal(tmp_path)


def test_a_manifest_of_many_megabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / MANIFEST_FILE).open("wb") as file:
        file.truncate(2**24 + 1)
    assert "16,777,217 bytes, expected at most 16,777,216" in refusal(tmp_path)


def test_a_million_experts_are_refused(tmp_path: Path) -> None:
    sample().save(tmp_path)
    changed(tmp_path, "pruning", "kept", value={"0": [0] * 10**6})
    assert "kept holds 1,000,000 expert ids" in refusal(tmp_path)


EARLIER = EarlierPruning("owner/original", None, 20, ("reap",), {0: (0, 7, 19), 1: (1, 2, 3)})


def test_the_record_of_an_earlier_pruning(tmp_path: Path) -> None:
    manifest = replace(sample(), source=replace(sample().source, earlier=EARLIER))
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest


def test_a_manifest_from_before_there_was_such_a_record(tmp_path: Path) -> None:
    sample().save(tmp_path)
    changed(tmp_path, "source", "earlier", remove=True)
    assert Manifest.load(tmp_path) == sample()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("label", 7), ("revision", 7), ("n_experts", 0), ("n_experts", 15), ("n_experts", "20"),
        ("n_experts", 19), ("methods", "reap"), ("methods", [7]), ("methods", ["reap"] * 65),
        ("kept", None), ("kept", {"-1": [0]}), ("kept", {"0": [-1]}), ("kept", {"0": [20]}),
        ("x", 1),
    ],
)  # fmt: skip
def test_a_broken_record_of_an_earlier_pruning(tmp_path: Path, key: str, value: Any) -> None:
    replace(sample(), source=replace(sample().source, earlier=EARLIER)).save(tmp_path)
    changed(tmp_path, "source", "earlier", key, value=value)
    refusal(tmp_path)


@pytest.mark.parametrize("value", [7, "x", [], {}])
def test_an_earlier_pruning_of_the_wrong_kind(tmp_path: Path, value: Any) -> None:
    sample().save(tmp_path)
    changed(tmp_path, "source", "earlier", value=value)
    refusal(tmp_path)


def test_an_evaluation_is_part_of_it(tmp_path: Path) -> None:
    manifest = replace(sample(), evaluation=EXAMPLE)
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest


def test_a_manifest_from_before_quality_was_measured(tmp_path: Path) -> None:
    sample().save(tmp_path)
    changed(tmp_path, "evaluation", remove=True)
    assert Manifest.load(tmp_path) == sample()


DIVERGENCE = ("comparisons", 0, "divergence")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ((), 7, "evaluation is 7"),
        ((), [], "evaluation is []"),
        (("text",), 7, "not subscriptable"),
        (("engine",), "x", "none of streamed"),
        (("made_with",), {str(n): "1" for n in range(17)}, "made_with holds 17 values"),
        (("made_with",), {"torch": "1" * 201}, "is not a version"),
        (("variants", 0, "n_experts"), 0, "n_experts is 0"),
        (("variants", 0, "bits_per_weight"), 65.0, "bits_per_weight is 65.0"),
        (("variants", 0, "perplexity", "value"), -1.0, "perplexity is -1.0"),
        (("variants", 0, "perplexity", "value"), 1e301, "perplexity is"),
        (("variants", 0, "perplexity", "error"), 1e301, "the error of perplexity is"),
        (("variants", 0, "perplexity", "error"), -0.1, "the error of perplexity is -0.1"),
        (("variants",), EXAMPLE.as_json()["variants"] * 2, "the same variant twice"),
        ((*DIVERGENCE, "same_top", "value"), 1.5, "same_top is 1.5"),
        ((*DIVERGENCE, "mean", "value"), -2.0, "mean is -2.0"),
        ((*DIVERGENCE, "maximum"), 1e300, "maximum is 1e+300"),
        (("comparisons", 2, "variant"), "pruned", "evaluation has the same comparison twice"),
        (("tasks", 0, "score", "value"), 1e13, "score is"),
        (("tasks", 1, "metric"), "acc", "evaluation has the same score twice"),
        (("speeds", 0, "tokens_per_second", "value"), -1.0, "tokens_per_second is -1.0"),
    ],
)
def test_figures_that_no_evaluation_has(
    tmp_path: Path, path: tuple[str | int, ...], value: Any, words: str
) -> None:
    replace(sample(), evaluation=EXAMPLE).save(tmp_path)
    changed(tmp_path, "evaluation", *path, value=value)
    assert words in refusal(tmp_path)


def test_the_perplexity_of_a_broken_model_is_read_again(tmp_path: Path) -> None:
    """A model that is sure of wrong tokens has one of any size, and its bundle stays a bundle."""
    found = perplexity(np.array([600.0, 680.0]))
    assert found.value > 1e270
    first, *others = EXAMPLE.variants
    evaluation = replace(EXAMPLE, variants=(replace(first, perplexity=found), *others))
    manifest = replace(sample(), evaluation=evaluation)
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pictures", "bits.png"), ("pictures", [7]), ("pictures", ["../bits.png"]),
        ("pictures", ["bits.png", "bits.png"]), ("has_observations", 1),
        ("has_observations", None),
    ],
)  # fmt: skip
def test_only_known_pictures_are_named(tmp_path: Path, key: str, value: Any) -> None:
    manifest = replace(sample(), pictures=("bits.png", "usage.png"), has_observations=True)
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    changed(tmp_path, key, value=value)
    assert key in refusal(tmp_path) or "picture" in refusal(tmp_path)


TOKENS = {0: (0, 7, 300), 1: (100, 99, 5), 10: (1, 2, 3)}
IMPORTANCE = ImportanceRecord(0, 5, 1, 7, 100, TOKENS)


def covered(**changes: Any) -> Manifest:
    calibration = replace(
        sample().calibration,
        imatrix_unseen=1,
        imatrix_coverage=replace(IMPORTANCE, **changes),
    )
    return replace(sample(), calibration=calibration)


def test_the_tokens_of_an_importance_matrix(tmp_path: Path) -> None:
    covered().save(tmp_path)
    assert Manifest.load(tmp_path) == covered()
    assert importance_record(TOKENS) == IMPORTANCE
    assert importance_record({}) is None
    text = (tmp_path / MANIFEST_FILE).read_text(encoding="utf-8")
    assert '"10": [ 1, 2, 3 ]' in text
    changed(tmp_path, "calibration", "imatrix_coverage", remove=True)
    assert Manifest.load(tmp_path).calibration.imatrix_coverage is None  # of an earlier version


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("fewest", 1, "fewest is 1, expected 0 by the tokens"),
        ("median", 8, "median is 8, expected 5 by the tokens"),
        ("n_few", 6, "n_few is 6, expected 7 by the tokens"),
        ("n_unseen", 0, "n_unseen is 0, expected 1 by the tokens"),
        ("few_below", 0, "n_few is 7, expected 0"),
        ("few_below", -1, "few_below is -1"),
        ("tokens", {}, "tokens is empty"),
        ("tokens", [], "tokens is [], expected numbers of tokens by layer"),
        ("tokens", {"0": []}, "a layer without experts"),
        ("tokens", {"0": [1.5]}, "1.5 is not a number of tokens"),
        ("tokens", {"0": [-1]}, "-1 is not a number of tokens"),
        ("tokens", {"0": [2**53]}, "is not a number of tokens"),
        ("tokens", {"a": [1]}, "'a' is not the number of a layer"),
        ("tokens", {"0": 5}, "something else than lists of numbers of tokens"),
        ("tokens", {"0": [0] * 2**18}, "tokens holds 262,144 numbers of tokens, expected at most"),
        ("x", 1, "unexpected keyword argument"),
    ],
)
def test_tokens_of_the_wrong_kind(tmp_path: Path, key: str, value: Any, words: str) -> None:
    covered().save(tmp_path)
    changed(tmp_path, "calibration", "imatrix_coverage", key, value=value)
    assert words in refusal(tmp_path)


def test_tokens_agree_with_what_else_is_said_of_the_matrix(tmp_path: Path) -> None:
    covered().save(tmp_path)
    changed(tmp_path, "calibration", "imatrix_unseen", value=0)
    assert "imatrix_unseen is 0, expected 1 by the tokens" in refusal(tmp_path)
    covered().save(tmp_path)
    for key in ("text", "chunks", "chunk_size", "sha256"):
        changed(tmp_path, "calibration", f"imatrix_{key}", value=None)
    assert "imatrix_coverage is of an unknown importance matrix" in refusal(tmp_path)
