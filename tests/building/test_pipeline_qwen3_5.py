"""Whole builds of a Qwen3.5-MoE: MTP block kept, dropped or lost; the tower; damage to all that."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from reap2gguf.api.builds import estimate
from reap2gguf.artifacts.observations import Observations
from reap2gguf.building import pipeline, stages
from reap2gguf.building.plan import make_plan
from reap2gguf.bundle.layout import MANIFEST_FILE
from reap2gguf.bundle.manifest import Manifest, MtpRecord
from reap2gguf.bundle.sums import hash_folder, write_sums
from reap2gguf.gguf_files.imatrix import load_imatrix
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.options import BuildOptions, CalibrationOptions, ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.terminal.plan_json import plan_as_json
from reap2gguf.verifying.bundle import verify_bundle
from tests.building.builds import stop_at
from tests.tiny import REPOSITORY, TinyQwen35Moe

PROSE = REPOSITORY / "calibration" / "prose.txt"
LAST = 4  # the MTP block's layer
SOURCE = TinyQwen35Moe(n_shards=2)
# the same weights, re-saved: 2D throughout, one file
RESAVED = replace(SOURCE, fused=False, n_shards=1)


def options(model: Path, output: Path, **changes: Any) -> BuildOptions:
    values: dict[str, Any] = {
        "recipes": ("bf16", "q8_0"),
        "model": str(model),
        "output": output,
        "name": "out",
        "calibration": CalibrationOptions(str(PROSE), samples=4, max_length=96),
        "chunk": 96,
        "compute": ComputeOptions(device="cpu"),
    }
    return BuildOptions(**values | changes)


def build(model: Path, output: Path, **changes: Any) -> pipeline.BuildResult:
    return pipeline.build(make_plan(options(model, output, **changes)), Silent())


@dataclass(frozen=True)
class Built:
    """A finished build and its source."""

    source: Path
    result: pipeline.BuildResult

    @property
    def hf(self) -> Path:
        return self.result.hf_folder

    @property
    def gguf(self) -> Path:
        return self.result.gguf_folder

    @property
    def config(self) -> dict[str, Any]:
        found = json.loads((self.hf / "config.json").read_text())
        return found["text_config"]

    def tensors(self) -> dict[str, torch.Tensor]:
        return load_all(self.hf)


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SOURCE.write(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def kept(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The MTP block pruned with the layers."""
    output = tmp_path_factory.mktemp("kept")
    return Built(source, build(source, output, compression=0.25))


@pytest.fixture(scope="module")
def dropped(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The MTP block left out."""
    output = tmp_path_factory.mktemp("dropped")
    return Built(source, build(source, output, compression=0.25, mtp="drop"))


@pytest.mark.parametrize("which", ["kept", "dropped"])
def test_the_bundle_is_sound(which: str, request: pytest.FixtureRequest) -> None:
    built: Built = request.getfixturevalue(which)
    assert verify_bundle(built.gguf, 2, Silent()).violations == ()
    assert verify_bundle(built.hf, 2, Silent()).violations == ()
    names = {path.name for path in built.gguf.glob("*.gguf")}
    assert names == {"imatrix.gguf", "out-BF16.gguf", "out-Q8_0.gguf", "mmproj-out-F16.gguf"}


@pytest.mark.parametrize("which", ["kept", "dropped"])
def test_everything_agrees_on_the_mtp_block(which: str, request: pytest.FixtureRequest) -> None:
    built: Built = request.getfixturevalue(which)
    has_mtp = which == "kept"
    assert built.config["mtp_num_hidden_layers"] == int(has_mtp)
    assert built.config["num_experts"] == 6
    tensors = built.tensors()
    assert any(name.startswith("mtp.") for name in tensors) is has_mtp
    routers = {name: t for name, t in tensors.items() if name.endswith("mlp.gate.weight")}
    assert len(routers) == LAST + has_mtp
    assert {tensor.shape for tensor in routers.values()} == {(6, 64)}
    assert set(built.result.manifest.pruning.kept) == set(range(LAST + has_mtp))
    for path in built.gguf.glob("out-*.gguf"):
        header = read_gguf_header(path)
        assert header.metadata["qwen35moe.block_count"] == LAST + has_mtp
        assert header.metadata.get("qwen35moe.nextn_predict_layers", 0) == int(has_mtp)
        assert len(header.metadata["qwen35moe.attention.recurrent_layers"]) == LAST + has_mtp
        assert header.metadata["qwen35moe.expert_count"] == 6
        assert (f"blk.{LAST}.nextn.eh_proj.weight" in header.tensors) is has_mtp
        for layer in range(LAST + has_mtp):
            assert header.tensors[f"blk.{layer}.ffn_gate_inp.weight"].shape == (6, 64)
            assert header.tensors[f"blk.{layer}.ffn_down_exps.weight"].shape == (6, 64, 32)
        assert not any(name.startswith(f"blk.{LAST + has_mtp}.") for name in header.tensors)


def test_the_trunk_does_not_depend_on_the_mtp_block(kept: Built, dropped: Built) -> None:
    with_it, without = kept.result.manifest.pruning.kept, dropped.result.manifest.pruning.kept
    assert {layer: with_it[layer] for layer in without} == without
    one, other = kept.tensors(), dropped.tensors()
    assert one.keys() - other.keys() == {name for name in one if name.startswith("mtp.")}
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_kept_experts_are_reaps_best(kept: Built) -> None:
    (path,) = (kept.hf.parent / ".work" / "observations").glob("*.safetensors")
    for layer, chosen in kept.result.manifest.pruning.kept.items():
        seen = Observations.load(path).layers[layer]
        scores = seen.reap_sum / np.maximum(seen.count, 1)
        assert set(chosen) == set(np.argsort(scores)[-6:])


def test_stored_tensors_are_sliced_and_nothing_else(kept: Built) -> None:
    before, after = load_all(kept.source), kept.tensors()
    chosen = kept.result.manifest.pruning.kept
    for layer in range(LAST):
        mlp = f"model.language_model.layers.{layer}.mlp."
        rows = list(chosen[layer])
        for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
            assert torch.equal(after.pop(mlp + name), before.pop(mlp + name)[rows])
    mlp = "mtp.layers.0.mlp."
    rows = list(chosen[LAST])
    assert torch.equal(after.pop(mlp + "gate.weight"), before.pop(mlp + "gate.weight")[rows])
    for part in ("gate", "up", "down"):
        for place, expert in enumerate(rows):
            found = after.pop(f"{mlp}experts.{place}.{part}_proj.weight")
            assert torch.equal(found, before[f"{mlp}experts.{expert}.{part}_proj.weight"])
    others = {name for name in before if not name.startswith(mlp + "experts.")}
    assert set(after) == others
    assert all(torch.equal(after[name], before[name]) for name in others)
    assert sum(name.startswith("model.visual.") for name in others) == 33


def test_config_files_travel(kept: Built) -> None:
    name = "preprocessor_config.json"
    assert (kept.hf / name).read_bytes() == (kept.source / name).read_bytes()
    before = json.loads((kept.source / "config.json").read_text())
    after = json.loads((kept.hf / "config.json").read_text())
    before["text_config"]["num_experts"] = 6
    assert after == before


def test_the_manifest_tells_of_the_mtp_block(kept: Built, dropped: Built) -> None:
    mtp = kept.result.manifest.pruning.mtp
    assert mtp.state == "pruned"
    assert mtp.n_tokens == 4 * (96 - 2)
    assert 0 <= mtp.hits_before <= mtp.n_tokens
    assert 0 <= mtp.hits_after <= mtp.n_tokens
    assert dropped.result.manifest.pruning.mtp == MtpRecord("dropped", 0, 0, 0)
    for built in (kept, dropped):
        assert Manifest.load(built.gguf) == Manifest.load(built.hf) == built.result.manifest


def test_the_manifest_tells_of_the_projector(kept: Built) -> None:
    (side,) = kept.result.manifest.side_files
    header = read_gguf_header(kept.gguf / side.file)
    assert side.file == "mmproj-out-F16.gguf"
    assert header.metadata["general.type"] == "mmproj"
    assert header.metadata["general.architecture"] == "clip"
    assert {n: info.tensor_type.name for n, info in header.tensors.items()} == dict(side.tensors)


def test_the_cards(kept: Built, dropped: Built) -> None:
    for folder in (kept.hf, kept.gguf):
        card = (folder / "README.md").read_text()
        assert "| multi-token prediction (MTP) | pruned like the other layers; " in card
        assert "top-1 accuracy" in card
        assert "Calibration used text only" in card
    for folder in (dropped.hf, dropped.gguf):
        assert "| multi-token prediction (MTP) | dropped |" in (folder / "README.md").read_text()
    assert "`mmproj-out-F16.gguf`" in (kept.gguf / "README.md").read_text()


@pytest.mark.parametrize("which", ["kept", "dropped"])
@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModelForImageTextToText])
def test_transformers_loads_it(which: str, kind: Any, request: pytest.FixtureRequest) -> None:
    built: Built = request.getfixturevalue(which)
    model, report = kind.from_pretrained(built.hf, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    with torch.inference_mode():
        logits = model(torch.arange(20)[None]).logits
    assert logits.shape == (1, 20, SOURCE.vocab)
    assert bool(torch.isfinite(logits).all())


def test_the_plan_says_it(source: Path, tmp_path: Path) -> None:
    for mtp, state, layers in (("prune", "pruned", 5), ("drop", "dropped", 4)):
        plan = make_plan(options(source, tmp_path, mtp=mtp))
        values = plan_as_json(plan, estimate(plan))
        assert (values["mtp"], values["experts"]["layers"]) == (state, layers)
        assert values["side_files"] == ["mmproj-out-F16.gguf"]
        for words in (
            "text alone",
            "form NFC",
            "as Qwen3_5Tokenizer, which splits text like qwen35",
        ):
            assert any(words in caveat for caveat in values["caveats"])


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A source whose config claims an MTP block that its tensors lack."""
    root = tmp_path_factory.mktemp("lost")
    folder = replace(SOURCE, mtp=False).write(root / "tiny")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    return Built(folder, build(folder, root / "out", recipes=("bf16",)))


def test_a_lost_mtp_block_is_no_longer_claimed(lost: Built) -> None:
    assert lost.config["mtp_num_hidden_layers"] == 0
    assert lost.result.manifest.pruning.mtp.state == "none"
    header = read_gguf_header(lost.gguf / "out-BF16.gguf")
    assert header.metadata["qwen35moe.block_count"] == LAST
    assert "qwen35moe.nextn_predict_layers" not in header.metadata
    assert verify_bundle(lost.gguf, 2, Silent()).violations == ()
    assert "multi-token" not in (lost.hf / "README.md").read_text()
    plan = make_plan(options(lost.source, lost.hf.parent.parent))
    assert any("MTP block that the checkpoint does not contain" in c for c in plan.model.caveats())


def test_a_resaved_copy_gives_the_same_result(kept: Built, tmp_path: Path) -> None:
    folder = RESAVED.write(tmp_path / "tiny")
    result = build(folder, tmp_path / "out", recipes=("bf16", "q8_0"), compression=0.25)
    assert result.manifest.pruning.kept == kept.result.manifest.pruning.kept
    assert result.manifest.pruning.mtp == kept.result.manifest.pruning.mtp
    for name in ("out-BF16.gguf", "out-Q8_0.gguf", "mmproj-out-F16.gguf"):
        one, other = read_gguf_header(result.gguf_folder / name), read_gguf_header(kept.gguf / name)
        assert one.tensors.keys() == other.tensors.keys()
        for tensor in one.tensors:
            np.testing.assert_array_equal(one.read(tensor), other.read(tensor), err_msg=tensor)
    ours = load_imatrix(result.gguf_folder / "imatrix.gguf").entries
    theirs = load_imatrix(kept.gguf / "imatrix.gguf").entries
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name].sums, theirs[name].sums) for name in ours)


def test_low_bits_have_importance(tmp_path: Path) -> None:
    tiny = TinyQwen35Moe(
        hidden=256, width=256, n_experts=3, layers="lf", head_dim=128, linear_dim=32, vision=False
    )
    folder = tiny.write(tmp_path / "tiny")
    result = build(folder, tmp_path / "out", recipes=("iq3s-multimodal",), keep_experts=2)
    assert verify_bundle(result.gguf_folder, 2, Silent()).violations == ()
    entries = load_imatrix(result.gguf_folder / "imatrix.gguf").entries
    kinds = result.manifest.gguf[0].tensors
    low = {name for name, kind in kinds.items() if kind.startswith(("IQ2", "IQ3"))}
    experts = {
        f"blk.{layer}.ffn_{part}_exps.weight"
        for layer in range(3)  # the MTP block's among them
        for part in ("gate", "up", "down")
    }
    assert experts <= low <= entries.keys()
    for name in low:
        assert len(entries[name].counts) == (2 if name in experts else 1)
        assert (entries[name].counts > 0).all(), name
        assert (entries[name].sums > 0).all(), name
    in_blocks = {n for n, kind in kinds.items() if n.startswith("blk.") and kind != "F32"}
    assert in_blocks <= entries.keys()
    assert kinds["blk.2.nextn.eh_proj.weight"] == "Q8_0"
    assert kinds["blk.0.ssm_out.weight"] == "Q6_K"
    assert kinds["blk.0.ssm_conv1d.weight"] == "F32"


def test_one_output_folder_for_both_fates_of_the_block(source: Path, tmp_path: Path) -> None:
    """Observations without the block must not pass for observations with it."""
    first = build(source, tmp_path / "out", recipes=("bf16",), mtp="drop")
    assert set(first.manifest.pruning.kept) == set(range(LAST))
    second = build(source, tmp_path / "out", recipes=("bf16",), mtp="prune")
    assert set(second.manifest.pruning.kept) == set(range(LAST + 1))
    assert second.manifest.pruning.mtp.state == "pruned"
    assert second.manifest.pruning.mtp.n_tokens == 4 * (96 - 2)


def test_an_interrupted_build_keeps_its_hits(
    kept: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, stages.Export)
        with pytest.raises(KeyboardInterrupt):
            build(kept.source, tmp_path, compression=0.25)
    result = build(kept.source, tmp_path, compression=0.25)
    reused = {stage.name: stage.reused for stage in result.stages}
    assert reused["imatrix"]
    assert not reused["export"]
    assert result.manifest.pruning.mtp == kept.result.manifest.pruning.mtp
    assert (result.gguf_folder / MMPROJ).is_file()


# Damage


def copy_of(built: Built, target: Path) -> tuple[Path, Path]:
    for folder in (built.hf, built.gguf):
        shutil.copytree(folder, target / folder.name)
    return target / built.hf.name, target / built.gguf.name


def mend_hashes(hf: Path, gguf: Path) -> None:
    """Make every recorded hash fit the damaged files."""
    manifest = Manifest.load(gguf)
    files = hash_folder(hf, 1)
    del files[MANIFEST_FILE]
    manifest = replace(manifest, hf=replace(manifest.hf, files=files))
    manifest.save(hf)
    manifest.save(gguf)
    write_sums(gguf, 1)


def change_gguf(path: Path, name: str, change: Callable[[np.ndarray], Any]) -> None:
    header = read_gguf_header(path)
    rows = header.read(name)
    change(rows)
    with path.open("r+b") as file:
        file.seek(header.tensors[name].offset)
        file.write(rows.tobytes())


def change_tensors(hf: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    (path,) = hf.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def change_expert_count(hf: Path) -> None:
    path = hf / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["num_experts"] = 8
    path.write_text(json.dumps(config))


def nan(rows: np.ndarray) -> None:
    rows.reshape(-1).view(np.uint16)[7] = 0x7E00


MMPROJ = "mmproj-out-F16.gguf"
BF16 = "out-BF16.gguf"
TOWER = "model.visual.blocks.1.attn.proj.weight"
DAMAGE: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "projector: zeroed matrix": (
        lambda hf, gguf: change_gguf(gguf / MMPROJ, "mm.0.weight", lambda rows: rows.fill(0)),
        f"{MMPROJ}: mm.0.weight holds only zeros",
    ),
    "projector: NaN": (
        lambda hf, gguf: change_gguf(gguf / MMPROJ, "v.blk.0.attn_qkv.weight", nan),
        f"{MMPROJ}: v.blk.0.attn_qkv.weight holds NaN",
    ),
    "projector: other values": (
        lambda hf, gguf: change_gguf(
            gguf / MMPROJ, "v.patch_embd.weight.1", lambda rows: np.copyto(rows, rows[::-1].copy())
        ),
        f"{MMPROJ}: v.patch_embd.weight.1 differs from model.visual.patch_embed.proj.weight",
    ),
    "projector: missing": (
        lambda hf, gguf: (gguf / MMPROJ).unlink(),
        f"{MMPROJ} is missing",
    ),
    "projector: cut off": (
        lambda hf, gguf: (gguf / MMPROJ).write_bytes((gguf / MMPROJ).read_bytes()[:-5000]),
        MMPROJ,
    ),
    "GGUF: NaN in the MTP block": (
        lambda hf, gguf: change_gguf(
            gguf / BF16,
            "blk.4.nextn.eh_proj.weight",
            lambda rows: rows.reshape(-1).view(np.uint16).fill(0x7FC0),
        ),
        f"{BF16}: blk.4.nextn.eh_proj.weight holds NaN",
    ),
    "GGUF: value heads in another order": (
        lambda hf, gguf: change_gguf(
            gguf / BF16, "blk.1.ssm_alpha.weight", lambda rows: np.copyto(rows, rows[::-1].copy())
        ),
        f"{BF16}: blk.1.ssm_alpha.weight differs from ",
    ),
    "safetensors: zeroed matrix of the tower": (
        lambda hf, gguf: change_tensors(hf, lambda tensors: tensors[TOWER].zero_()),
        f"{MMPROJ}: v.blk.1.attn_out.weight differs from {TOWER} in row 0 where only zeros are",
    ),
    "safetensors: matrix of the tower missing": (
        lambda hf, gguf: change_tensors(hf, lambda tensors: tensors.pop(TOWER)),
        TOWER,
    ),
    "safetensors: router of the MTP block": (
        lambda hf, gguf: change_tensors(
            hf,
            lambda tensors: tensors.update(
                {"mtp.layers.0.mlp.gate.weight": torch.ones(8, 64, dtype=torch.bfloat16)}
            ),
        ),
        "mtp.layers.0.mlp.gate.weight: shape [8, 64], expected 6 experts",
    ),
    "safetensors: expert of the MTP block missing": (
        lambda hf, gguf: change_tensors(
            hf, lambda tensors: tensors.pop("mtp.layers.0.mlp.experts.5.up_proj.weight")
        ),
        "layer 4: up of expert 5 is missing",
    ),
    "safetensors: the MTP block missing": (
        lambda hf, gguf: change_tensors(
            hf,
            lambda tensors: [tensors.pop(n) for n in list(tensors) if n.startswith("mtp.")],
        ),
        "out-BF16.gguf: qwen35moe.block_count is 5, expected 4",
    ),
    "config: expert count": (
        lambda hf, gguf: change_expert_count(hf),
        "8 experts",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named(name: str, kept: Built, tmp_path: Path) -> None:
    hf, gguf = copy_of(kept, tmp_path)
    damage, words = DAMAGE[name]
    damage(hf, gguf)
    if "missing" not in name or "safetensors" in name:
        mend_hashes(hf, gguf)
    violations = verify_bundle(gguf, 2, Silent()).violations
    assert any(words in violation for violation in violations), violations


def test_a_missing_projector_is_found_with_mended_hashes(kept: Built, tmp_path: Path) -> None:
    hf, gguf = copy_of(kept, tmp_path)
    (gguf / MMPROJ).unlink()
    mend_hashes(hf, gguf)
    violations = verify_bundle(gguf, 2, Silent()).violations
    assert any(MMPROJ in violation for violation in violations), violations


@pytest.mark.parametrize("which", ["kept", "dropped"])
def test_a_config_at_odds_about_the_mtp_block(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """What loads the safetensors believes the config; it and the tensors must agree."""
    hf, gguf = copy_of(request.getfixturevalue(which), tmp_path)
    path = hf / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["mtp_num_hidden_layers"] = int(which == "dropped")
    path.write_text(json.dumps(config))
    mend_hashes(hf, gguf)
    for folder in (gguf, hf):
        violations = verify_bundle(folder, 2, Silent()).violations
        assert any("mtp" in violation.lower() for violation in violations), violations
