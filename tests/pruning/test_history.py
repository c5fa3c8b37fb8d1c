"""A bundle that is pruned again records the original, and a bundle without pruning is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from reap2gguf.api.builds import estimate
from reap2gguf.building.pipeline import BuildResult
from reap2gguf.building.plan import make_plan
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from reap2gguf.pruning.history import read_history
from reap2gguf.terminal.plan_json import plan_as_json
from reap2gguf.terminal.plan_views import plan_lines
from reap2gguf.verifying.bundle import verify_bundle
from tests.building.builds import build, options
from tests.tiny import TinyQwen3Moe


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyQwen3Moe(n_experts=10).write(tmp_path_factory.mktemp("original") / "tiny")


@pytest.fixture(scope="module")
def twice(original: Path) -> tuple[BuildResult, BuildResult]:
    """The original with 7 of 10 experts, and that with 5 of the 7."""
    first = build(original, original.parent / "first", keep_experts=7)
    second = build(first.hf_folder, original.parent / "second", keep_experts=5, method="frequency")
    return first, second


@pytest.fixture
def source(twice: tuple[BuildResult, BuildResult], tmp_path: Path) -> Path:
    """A copy of the bundle that was pruned once."""
    return Path(shutil.copytree(twice[0].hf_folder, tmp_path / "source"))


def test_experts_are_traced_to_the_original(
    original: Path, twice: tuple[BuildResult, BuildResult]
) -> None:
    first, second = twice
    assert first.manifest.source.earlier is None
    earlier = second.manifest.source.earlier
    assert earlier is not None
    assert (earlier.label, earlier.revision, earlier.n_experts) == ("tiny", None, 10)
    assert earlier.methods == ("reap",)
    before, after = load_file(original / "model.safetensors"), {}
    for shard in second.hf_folder.glob("*.safetensors"):
        after |= load_file(shard)
    for layer, ids in earlier.kept.items():
        assert len(ids) == 5
        for new, old in enumerate(ids):
            name = "model.layers.{}.mlp.experts.{}.up_proj.weight"
            assert torch.equal(after[name.format(layer, new)], before[name.format(layer, old)])


def test_three_prunings_in_a_row(
    original: Path, twice: tuple[BuildResult, BuildResult], tmp_path: Path
) -> None:
    third = build(twice[1].hf_folder, tmp_path, keep_experts=4)
    earlier = third.manifest.source.earlier
    assert earlier is not None
    assert (earlier.label, earlier.n_experts) == ("tiny", 10)
    assert earlier.methods == ("reap", "frequency")
    before = load_file(original / "model.safetensors")
    after = load_file(third.hf_folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.{}.down_proj.weight"
    for new, old in enumerate(earlier.kept[1]):
        assert torch.equal(after[name.format(new)], before[name.format(old)])


def test_the_gguf_and_the_cards_name_the_original(twice: tuple[BuildResult, BuildResult]) -> None:
    first, second = twice
    assert not verify_bundle(second.gguf_folder, 2, Silent()).violations
    (record,) = second.manifest.gguf
    metadata = read_gguf_header(second.gguf_folder / record.file).metadata
    earlier = second.manifest.source.earlier
    assert earlier is not None
    assert metadata["reap2gguf.original.source"] == "tiny"
    assert metadata["reap2gguf.original.expert_count"] == 10
    flat = [expert for layer in sorted(earlier.kept) for expert in earlier.kept[layer]]
    np.testing.assert_array_equal(metadata["reap2gguf.original.kept_experts"], flat)
    assert metadata["reap2gguf.source_expert_count"] == 7
    for folder in (second.hf_folder, second.gguf_folder):
        card = (folder / "README.md").read_text()
        assert "names `tiny` with 10 experts per layer as the original. 5 of these 10" in card
    (record,) = first.manifest.gguf
    metadata = read_gguf_header(first.gguf_folder / record.file).metadata
    assert not [key for key in metadata if key.startswith("reap2gguf.original")]
    assert "pruned before" not in (first.hf_folder / "README.md").read_text()


def test_a_plan_says_that_the_source_was_pruned(source: Path, tmp_path: Path) -> None:
    plan = make_plan(options(source, tmp_path / "out"))
    needs = estimate(plan)
    assert any("7 of the 10 experts of tiny" in line for line in plan_lines(plan, needs))
    assert plan_as_json(plan, needs)["original"] == {"source": "tiny", "experts": 10}


def _edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "reap2gguf.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return edit


def _kept(values: dict[str, Any]) -> Any:
    return values["pruning"]["kept"]


HOSTILE = {
    "no JSON": lambda folder: (folder / "reap2gguf.json").write_text("{"),
    "another object": lambda folder: (folder / "reap2gguf.json").write_text('{"format": 1}'),
    "a pipe of bytes": lambda folder: (folder / "reap2gguf.json").write_bytes(bytes(range(256))),
    "another count": _edited(lambda found: found["pruning"].update(n_kept=6)),
    "another top-k": _edited(lambda found: found["pruning"].update(experts_per_token=1)),
    "another size": _edited(lambda found: found["hf"].update(n_bytes=1)),
    "other parameters": _edited(lambda found: found["hf"].update(n_parameters=1)),
    "another class": _edited(lambda found: found["source"].update(architecture="Other")),
    "a label with Markdown": _edited(lambda found: found["source"].update(label="[a](http://b)")),
    "a label of lines": _edited(lambda found: found["source"].update(label="a\n# b")),
    "a label with an escape": _edited(lambda found: found["source"].update(label="\x1b[2Jx")),
    "a long label": _edited(lambda found: found["source"].update(label="x" * 10**6)),
    "a revision of words": _edited(lambda found: found["source"].update(revision="main`x")),
    "an unknown method": _edited(lambda found: found["pruning"].update(method="`magic`")),
    "a layer missing": _edited(lambda found: _kept(found).pop("1")),
    "ids missing": _edited(lambda found: _kept(found)["1"].pop()),
    "ids twice": _edited(lambda found: _kept(found).update({"1": [0] * 7})),
    "ids out of order": _edited(lambda found: _kept(found)["1"].reverse()),
    "ids out of range": _edited(lambda found: _kept(found).update({"1": [3, 4, 5, 6, 7, 8, 99]})),
    "no experts": _edited(lambda found: found["pruning"].update(n_experts=0)),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_manifest_that_does_not_fit_is_ignored_and_reported(name: str, source: Path) -> None:
    HOSTILE[name](source)
    notes: list[str] = []
    with Checkpoint.open(source) as checkpoint:
        assert read_history(checkpoint, describe(checkpoint).facts, notes.append) is None
    (note,) = notes
    assert note.startswith(f"{source / 'reap2gguf.json'}: does not fit this checkpoint (")
    assert len(note) < 2000


def test_a_source_without_a_manifest_has_no_history(tiny: Path) -> None:
    notes: list[str] = []
    with Checkpoint.open(tiny) as checkpoint:
        assert read_history(checkpoint, describe(checkpoint).facts, notes.append) is None
    assert not notes


def test_a_bundle_with_all_experts_that_was_pruned_before_is_a_pruned_one(
    source: Path, tmp_path: Path
) -> None:
    result = build(source, tmp_path / "out", compression=0.0)
    assert result.manifest.source.earlier is not None
    assert result.manifest.source.earlier.n_experts == 10
    assert result.hf_folder is None
    card = (result.gguf_folder / "README.md").read_text()
    assert "- pruned" in card.split("---")[1]
    assert "The source had been pruned before" in card
    metadata = read_gguf_header(next(result.gguf_folder.glob("*Q8_0.gguf"))).metadata
    assert metadata["reap2gguf.original.expert_count"] == 10
    assert metadata["reap2gguf.method"] == "none"
