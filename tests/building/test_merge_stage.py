"""Builds whose experts are merged: what is written, compared, resumed and recorded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import reap2gguf
from reap2gguf.building import stages
from reap2gguf.building.merge_stage import Merge
from reap2gguf.building.verify_stage import Verify
from reap2gguf.bundle.bounds import check_bounds
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import UsageError
from reap2gguf.merging.folder import MergeFolder
from reap2gguf.options import CalibrationOptions, ComputeOptions
from reap2gguf.pruning.layer_files import tensors_sha256
from tests.building.builds import PROSE, build, contents, options, stages_reused, stop_at
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

CHANGES: dict[str, Any] = {
    "calibration": CalibrationOptions(str(PROSE), samples=12, max_length=64),
    "keep_experts": 4,
    "method": "ream",
    "group_size": 3,
    "name": "merged",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyQwen3Moe().write(tmp_path_factory.mktemp("merge") / "tiny")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A build with a merge that nothing interrupted."""
    return build(model, tmp_path_factory.mktemp("whole"), **CHANGES)


def test_the_manifest_says_which_experts_became_one_and_all_else_is_the_sources(
    model: Path, whole: Any
) -> None:
    pruning = whole.manifest.pruning
    record = pruning.merge
    assert (record.method, record.group_size, record.n_rows) == ("ream", 3, 12)
    assert pruning.n_tokens == record.n_tokens == 12 * 64
    assert list(record.layers) == [0, 1]
    n_tensors = 0
    with Checkpoint.open(model) as before, Checkpoint.open(whole.hf_folder) as after:
        for layer, one in record.layers.items():
            assert [group[0] for group in one.groups] == list(pruning.kept[layer])
            assert sorted(e for group in one.groups for e in group) == list(range(8))
            assert max(map(len, one.groups)) == 3
            assert all(sum(shares) == pytest.approx(1) for shares in one.shares)
            changed = []
            for number, group in enumerate(one.groups):
                for name in ("gate_proj", "up_proj", "down_proj"):
                    path = f"model.layers.{layer}.mlp.experts.{{}}.{name}.weight"
                    old, new = before.read(path.format(group[0])), after.read(path.format(number))
                    assert (old.tobytes() != new.tobytes()) == (len(group) > 1)
                    changed += [path.format(number)] if len(group) > 1 else []
            assert one.sha256 == tensors_sha256(after, changed)
            n_tensors += len(changed)
            router = f"model.layers.{layer}.mlp.gate.weight"
            rows = before.read_float32(router)[list(pruning.kept[layer])]
            assert rows.tobytes() == after.read_float32(router).tobytes()
    assert record.n_tensors == n_tensors


def test_the_cards_say_it(whole: Any) -> None:
    for folder in (whole.gguf_folder, whole.hf_folder):
        card = (folder / "README.md").read_text()
        assert "50% of its experts merged into the others by REAM" in card
        assert "| merging method | ream |" in card
        assert "Routers keep the rows of the experts that stay." in card
        assert "--method ream" in card
        assert "--group-size 3" in card
        assert "with the lowest scores" not in card
        assert "<summary>Experts merged in each layer</summary>" in card
        assert "importance matrix was computed on the merged model" in card
        assert "- merged\n" in card
        assert "- reap\n" not in card


def test_a_bundle_with_a_merge_verifies(model: Path, whole: Any) -> None:
    assert not reap2gguf.verify(whole.gguf_folder).violations
    report = reap2gguf.verify(whole.gguf_folder, source=str(model), exact=True)
    assert not report.violations
    assert any("merge of the experts is not computed again" in n for n in report.not_checked)
    reap2gguf.report(whole.gguf_folder, whole.gguf_folder.parent / "report.html")
    page = (whole.gguf_folder.parent / "report.html").read_text()
    assert "merged by" in page
    assert "merged into the others by" in page
    assert "Merged experts, by their numbers in the source" in page


def test_two_runs_and_runs_that_are_interrupted_give_the_same_bytes(
    model: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = MergeFolder.save

    def stop(self: MergeFolder, layer: int, *rest: Any) -> Any:
        if layer == 1:
            raise KeyboardInterrupt
        return save(self, layer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(MergeFolder, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            build(model, tmp_path, **CHANGES)
    for kind in (stages.Export, Verify):
        with monkeypatch.context() as patch:
            stop_at(patch, kind)
            with pytest.raises(KeyboardInterrupt):
                build(model, tmp_path, **CHANGES)
    result = build(model, tmp_path, **CHANGES)
    assert stages_reused(result)["merge"]
    assert contents(result) == contents(whole)


def test_a_changed_file_of_the_merge_is_made_again(
    model: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, stages.Export)
        with pytest.raises(KeyboardInterrupt):
            build(model, tmp_path, **CHANGES)
    file = next((tmp_path / ".work" / "merged" / ".merged").iterdir())
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    result = build(model, tmp_path, **CHANGES)
    assert not stages_reused(result)["merge"]
    assert contents(result) == contents(whole)


def test_another_size_of_groups_is_another_build(model: Path, whole: Any, tmp_path: Path) -> None:
    result = build(model, tmp_path, **{**CHANGES, "group_size": 5})
    merge = result.manifest.pruning.merge
    assert merge is not None
    assert max(len(group) for group in merge.layers[0].groups) == 5
    assert merge.layers[0].groups != whole.manifest.pruning.merge.layers[0].groups


def test_clusters_and_an_mtp_block_that_is_pruned(tmp_path: Path) -> None:
    model = TinyQwen35Moe(layers="lf").write(tmp_path / "tiny")
    changes = {**CHANGES, "method": "hc_smoe", "group_size": None, "protect": "0:3"}
    result = build(model, tmp_path / "out", **changes)
    record = result.manifest.pruning.merge
    assert record is not None
    assert (record.method, record.group_size, list(record.layers)) == ("hc_smoe", None, [0, 1])
    assert (3,) in record.layers[0].groups
    assert not reap2gguf.verify(result.gguf_folder, source=str(model)).violations
    card = (result.hf_folder / "README.md").read_text()
    assert "HC-SMoE" in card
    assert "was pruned by REAP, and merges nothing" in card


def test_a_manifest_with_a_merge_is_read_as_it_was_written(model: Path, whole: Any) -> None:
    assert Manifest.load(whole.gguf_folder) == whole.manifest
    like = reap2gguf.options_like(
        whole.gguf_folder, model=model, calibration=CHANGES["calibration"]
    )
    assert (like.method, like.group_size) == ("ream", 3)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ({"method": "hc_smoe"}, "merge is by 'hc_smoe', expected ream"),
        ({"layers": {}}, "names other layers"),
        ({"groups": ((0,),) * 4}, "do not fit the kept experts"),
        ({"shares": ((1.0,),) * 4}, "other shares than experts"),
        ({"sha256": "0"}, "sha256 of layer 0 of the merge"),
    ],
)
def test_a_record_that_cannot_be_is_refused(
    damage: dict[str, Any], problem: str, whole: Any
) -> None:
    pruning = whole.manifest.pruning
    merge = pruning.merge
    if damage.keys() <= {"groups", "shares", "sha256"}:
        layers = {**merge.layers, 0: replace(merge.layers[0], **damage)}
        damage = {"layers": layers}
    wrong = replace(pruning, merge=replace(merge, **damage))
    with pytest.raises(ValueError, match=problem):
        check_bounds(replace(whole.manifest, pruning=wrong))


def test_what_does_not_go_together_is_refused(model: Path, whole: Any, tmp_path: Path) -> None:
    def planned(**changes: Any) -> reap2gguf.Plan:
        return reap2gguf.plan(options(model, tmp_path, **{**CHANGES, **changes}))

    with pytest.raises(UsageError, match="nothing to merge"):
        planned(keep_experts=None, compression=0.0)
    with pytest.raises(UsageError, match="gives experts new weights itself"):
        planned(repair="ridge")
    with pytest.raises(UsageError, match="group_size is for the method ream"):
        planned(method="hc_smoe")
    with pytest.raises(UsageError, match="cannot hold the 4 experts"):
        planned(group_size=2, protect="1:3")
    with pytest.raises(UsageError, match="--method ream merges experts, in no pass"):
        planned(imatrix_from="source")
    with pytest.raises(UsageError, match="--observations were given"):
        planned(observations=model / "config.json")


def test_a_plan_says_what_a_merge_takes(model: Path, tmp_path: Path) -> None:
    ream = reap2gguf.plan(options(model, tmp_path, **CHANGES))
    changes = {**CHANGES, "method": "reap", "group_size": None}
    reap = reap2gguf.plan(options(model, tmp_path, **changes))
    assert (ream.n_sweeps, reap.n_sweeps) == (2, 2)
    assert (ream.observes, ream.merges) == (False, True)
    needs = reap2gguf.estimate(ream)
    assert needs.stages["merge"] > 0
    assert needs.stages["observe"] == 0
    assert reap2gguf.estimate(reap).stages["merge"] == 0
    assert needs.disk.repaired == 2 * 4 * 3 * 64 * 32 * 2  # layers, experts, matrices in bfloat16
    assert Merge.name in needs.stages


def test_an_evaluation_is_of_the_merged_model(model: Path, tmp_path: Path) -> None:
    result = build(model, tmp_path, **CHANGES, evaluate="always")
    evaluation = result.manifest.evaluation
    assert evaluation is not None
    source, folder = str(model), str(result.hf_folder)
    text = reap2gguf.EvaluateOptions(text="held-out", chunks=evaluation.text.n_chunks)
    again = reap2gguf.evaluate(source, folder, options=text, compute=ComputeOptions(device="cpu"))
    pruned = [one.perplexity.value for one in evaluation.variants if one.kind == "pruned"]
    assert pruned == [one.perplexity.value for one in again.variants if one.kind == "pruned"]
