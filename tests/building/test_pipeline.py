from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reap2gguf.api.builds import estimate
from reap2gguf.artifacts.observations import Observations
from reap2gguf.building import pipeline, record, stages, text_stage, workdir
from reap2gguf.building.needs.room import room_needs
from reap2gguf.building.plan import make_plan
from reap2gguf.building.workdir import Workdir
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.errors import (
    CheckpointError,
    OutputError,
    Reap2ggufError,
    UsageError,
    VerificationError,
)
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.options import BuildOptions, CalibrationOptions, ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.quantizing.quantizer import Quantizer
from reap2gguf.terminal.plan_json import plan_as_json
from reap2gguf.terminal.views import result_lines
from reap2gguf.verifying.bundle import verify_bundle
from tests.building.builds import (
    PROSE,
    build,
    contents,
    options,
    refuse_at,
    stages_reused,
    stop_at,
    stop_before_export,
    stop_while_naming,
)
from tests.conftest import Bundle
from tests.tiny import EXAMPLE, TinyQwen3Moe


def test_what_a_build_leaves(built: Bundle) -> None:
    assert {path.name for path in built.hf.iterdir()} == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors", "reap2gguf.json", "saliency.png", "tokenizer.json",
        "tokenizer_config.json", "usage.png",
    }  # fmt: skip
    assert {path.name for path in built.gguf.iterdir()} == {
        "Modelfile", "README.md", "SHA256SUMS", "bits.png", "calibration.txt",
        "example-BF16.gguf", "example-IQ4_K_M.gguf", "imatrix.dat", "imatrix.gguf",
        "observations.safetensors", "reap2gguf.json", "saliency.png", "usage.png",
    }  # fmt: skip


def test_sha256sum_agrees(built: Bundle) -> None:
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=built.gguf, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b": OK") == 12


def test_the_manifest_records_the_build(built: Bundle) -> None:
    manifest = Manifest.load(built.gguf)
    assert manifest == Manifest.load(built.hf)
    assert (manifest.pruning.n_experts, manifest.pruning.n_kept) == (16, 12)
    assert set(manifest.pruning.kept) == {0, 1, 2, 3}
    assert [record.file_type for record in manifest.gguf] == ["Q4_K_M", "BF16"]
    assert str(built.output) not in (built.gguf / "reap2gguf.json").read_text()


def test_the_gguf_tells_where_its_experts_come_from(built: Bundle) -> None:
    metadata = read_gguf_header(built.gguf / "example-IQ4_K_M.gguf").metadata
    kept = Manifest.load(built.gguf).pruning.kept
    flat = np.array(metadata["reap2gguf.kept_experts"]).reshape(4, 12)
    np.testing.assert_array_equal(flat, [kept[layer] for layer in range(4)])
    assert metadata["reap2gguf.source_expert_count"] == 16
    assert metadata["qwen3moe.expert_count"] == 12
    assert metadata["general.file_type"] == 15


def test_kept_experts_are_reaps_best(built: Bundle) -> None:
    (path,) = (built.output / ".work" / "observations").glob("*.safetensors")
    for layer, kept in Manifest.load(built.gguf).pruning.kept.items():
        seen = Observations.load(path).layers[layer]
        scores = seen.reap_sum / np.maximum(seen.count, 1)
        assert set(kept) == set(np.argsort(scores)[-12:])


def test_the_same_inputs_make_the_same_bundle(tiny: Path, tmp_path: Path) -> None:
    recipes = ("q4km", "bf16")
    bundles = [
        contents(
            build(
                tiny, tmp_path / str(threads), recipes=recipes, name="model",
                compute=ComputeOptions(device="cpu", threads=threads),
            )
        )
        for threads in (1, 2, 8)
    ]  # fmt: skip
    assert len(bundles[0]) == 22
    assert bundles[0].keys() == bundles[1].keys() == bundles[2].keys()
    for name, data in bundles[0].items():
        assert bundles[1][name] == data, name
        assert bundles[2][name] == data, name


def test_an_interrupted_build_goes_on(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_before_export(tiny, tmp_path / "out", monkeypatch)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".work"]
    result = build(tiny, tmp_path / "out")
    assert stages_reused(result) == {
        "texts": True, "observe": True, "prune": True, "imatrix": True, "export": False,
        "verify": False,
    }  # fmt: skip
    fresh = build(tiny, tmp_path / "out", fresh=True)
    assert not any(stages_reused(fresh).values())


def test_a_finished_build_has_nothing_to_do(tiny: Path, tmp_path: Path) -> None:
    first = build(tiny, tmp_path / "out")
    path = first.gguf_folder / "tiny-REAP-0.25-Q8_0.gguf"
    written = path.stat().st_mtime_ns
    second = build(tiny, tmp_path / "out")
    assert second.stages == ()
    assert second.manifest == first.manifest
    assert path.stat().st_mtime_ns == written
    path.unlink()
    assert stages_reused(build(tiny, tmp_path / "out")) == {"export": False, "verify": False}
    assert path.is_file()


def test_a_demand_to_start_over_outlives_an_interruption(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tiny, tmp_path / "out")
    with monkeypatch.context() as patch:
        refuse_at(patch, text_stage, "read_texts")
        with pytest.raises(KeyboardInterrupt):
            build(tiny, tmp_path / "out", fresh=True)
    with monkeypatch.context() as patch:
        refuse_at(patch, stages, "write_pruned")
        with pytest.raises(KeyboardInterrupt):
            build(tiny, tmp_path / "out")
    reused = stages_reused(build(tiny, tmp_path / "out"))
    assert [name for name in ("texts", "observe", "prune") if reused[name]] == ["texts", "observe"]


def test_a_disk_that_is_too_full_is_said_before_the_work(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = room_needs(make_plan(options(tiny, tmp_path / "out"))).room_bytes
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(workdir.shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(OutputError, match=rf"writes {needed:,} bytes .* {needed - 1:,} are free"):
        build(tiny, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    monkeypatch.setattr(workdir.shutil, "disk_usage", lambda path: usage._replace(free=needed))
    build(tiny, tmp_path / "out")


def test_a_tilde_is_the_home_folder(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copyfile(PROSE, tmp_path / "prose.txt")
    calibration = CalibrationOptions("~/prose.txt", samples=4, max_length=128)
    plan = make_plan(options(tiny, tmp_path / "out", calibration=calibration))
    assert estimate(plan).seconds > 0
    result = pipeline.build(plan, Silent())
    assert result.manifest.calibration.imatrix_text == "prose.txt"
    assert result.manifest.pruning.n_rows == 4


def test_a_build_that_fails_its_check_leaves_no_final_name(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = Quantizer.quantize

    def quantize_wrongly(self: Quantizer, rows: Any, *arguments: Any) -> Any:
        return quantize(self, rows[::-1], *arguments)

    monkeypatch.setattr(Quantizer, "quantize", quantize_wrongly)
    with pytest.raises(VerificationError) as caught:
        build(tiny, tmp_path / "out")
    assert any("attn_q.weight differs" in violation for violation in caught.value.violations)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".work"]


def test_experts_that_a_type_would_lose_are_refused_with_what_helps(tmp_path: Path) -> None:
    """Half-precision experts so small that Q8_0 would store zeros: no second run changes that."""
    spec = TinyQwen3Moe(dtype=torch.float16)
    folder = spec.write(tmp_path / "model")
    tensors = {
        name: tensor * 2.0**-14 if ".down_proj" in name else tensor
        for name, tensor in spec.tensors().items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"down_proj.*are too small for Q8_0.*give this tensor the type BF16"
    ):
        build(folder, tmp_path / "out")
    build(folder, tmp_path / "out", recipes=("bf16",))


def test_the_command_to_try_is_one_that_a_shell_reads(tiny: Path, tmp_path: Path) -> None:
    result = build(tiny, tmp_path / "out dir; x")
    (line,) = [line for line in result_lines(result) if line.startswith("Try it:")]
    assert shlex.split(line)[2:] == ["reap2gguf", "chat", str(result.gguf_folder)]


def test_a_second_build_replaces_the_first(tiny: Path, tmp_path: Path) -> None:
    build(tiny, tmp_path / "out")
    second = build(tiny, tmp_path / "out", recipes=("bf16",), replace=True)
    names = {path.name for path in second.gguf_folder.glob("*.gguf")}
    assert names == {"imatrix.gguf", "tiny-REAP-0.25-BF16.gguf"}


def test_a_folder_of_someone_else_is_not_replaced(tiny: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "out" / "mine-GGUF"
    theirs.mkdir(parents=True)
    (theirs / "thesis.txt").write_text("")
    with pytest.raises(OutputError, match="is not an earlier build of mine"):
        build(tiny, tmp_path / "out", name="mine")
    assert (theirs / "thesis.txt").exists()


def test_a_layout_changes_nothing_but_the_storage(tmp_path: Path) -> None:
    recipes = ("bf16",)
    apart = build(
        TinyQwen3Moe().write(tmp_path / "2d"), tmp_path / "out", recipes=recipes, name="a"
    )
    fused = build(
        TinyQwen3Moe(fused=True, n_shards=3).write(tmp_path / "3d"),
        tmp_path / "out", recipes=recipes, name="b",
    )  # fmt: skip
    assert apart.manifest.pruning.kept == fused.manifest.pruning.kept
    one = read_gguf_header(apart.gguf_folder / "a-BF16.gguf")
    other = read_gguf_header(fused.gguf_folder / "b-BF16.gguf")
    for name in one.tensors:
        np.testing.assert_array_equal(one.read(name), other.read(name))


def test_the_record_counts_the_experts_that_are_kept(tmp_path: Path) -> None:
    folder = TinyQwen3Moe().write(tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    wide = {name: t.float() if ".experts.3." in name else t for name, t in tensors.items()}
    save_file(wide, file, {"format": "pt"})
    result = build(folder, tmp_path / "out", compression=0.5)
    sizes = [t.nbytes for t in load_file(result.hf_folder / file.name).values()]
    assert result.manifest.hf.n_bytes == sum(sizes)
    assert not verify_bundle(result.gguf_folder, 2, Silent()).violations


def test_a_text_too_short_is_known_before_the_work(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("far too short")
    with pytest.raises(Reap2ggufError, match=r"short\.txt: \d+ tokens do not fill"):
        build(tiny, tmp_path / "out", imatrix_text=text)
    assert not list((tmp_path / "out" / ".work" / "observations").iterdir())
    assert not list((tmp_path / "out" / ".work" / "texts").iterdir())


def test_a_plan_is_what_the_build_does(built: Bundle) -> None:
    plan = make_plan(
        BuildOptions(recipes=("unsloth-iq4km", "bf16"), model=str(EXAMPLE), name="example")
    )
    manifest = Manifest.load(built.gguf)
    assert plan.n_parameters == manifest.hf.n_parameters
    for recipe, written in zip(plan.recipes, manifest.gguf, strict=True):
        assert {n: k.name for n, k in recipe.tensor_types().items()} == dict(written.tensors)
        header = read_gguf_header(built.gguf / written.file)
        assert recipe.n_bytes == sum(info.n_bytes for info in header.tensors.values())
    values = plan_as_json(plan, estimate(plan))
    assert values["experts"]["kept"] == 12
    assert json.loads(json.dumps(values)) == values


def test_names(tiny: Path, tmp_path: Path) -> None:
    assert make_plan(options(tiny, tmp_path)).name == "tiny-REAP-0.25"
    assert make_plan(options(tiny, tmp_path, keep_experts=5)).name == "tiny-REAP-0.375"
    for name in ("../x", "observations", "x-GGUF"):
        with pytest.raises(UsageError, match=f"the name '{name}' is not allowed"):
            make_plan(options(tiny, tmp_path, name=name))
    with pytest.raises(UsageError, match="the result would replace the source"):
        make_plan(options(tiny, tiny.parent, name="tiny"))
    with pytest.raises(UsageError, match="two recipes have the label"):
        make_plan(options(tiny, tmp_path, recipes=("q8_0", "bf16"), labels={"bf16": "Q8_0"}))


def test_an_output_that_cannot_be_written(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        build(tiny, tmp_path / "file")


@pytest.mark.parametrize("step", ["gguf_card", "compose_sums", "hash_file", "hf_card"])
def test_an_interrupted_record_is_written_anew(
    step: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        refuse_at(patch, record, step)
        with pytest.raises(KeyboardInterrupt):
            build(tiny, tmp_path / "out")
    result = build(tiny, tmp_path / "out")
    assert verify_bundle(result.gguf_folder, 1, Silent()).violations == ()


@pytest.mark.parametrize("n_renames", [0, 1])
def test_an_interrupted_publication_is_carried_through(
    n_renames: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_while_naming(n_renames, tiny, tmp_path / "out", monkeypatch)
    result = build(tiny, tmp_path / "out")
    assert stages_reused(result) == {}, "nothing was left to do but to give names"
    assert verify_bundle(result.gguf_folder, 1, Silent()).violations == ()
    left = {path.name for path in (tmp_path / "out" / ".work").iterdir() if path.is_dir()}
    assert left == {"observations", "texts", "tiny-REAP-0.25"}


def test_a_killed_export_leaves_nothing_in_the_bundle(tiny: Path, tmp_path: Path) -> None:
    first = make_plan(options(tiny, tmp_path / "out"))
    work = Workdir(tmp_path / "out", first.name)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, stages.Export)
        with pytest.raises(KeyboardInterrupt):
            pipeline.build(first, Silent())
    (work.gguf / "tiny-REAP-0.25-Q8_0.gguf.part").write_bytes(b"half")
    result = build(tiny, tmp_path / "out")
    assert not list(result.gguf_folder.glob("*.part"))


def test_a_tokenizer_llama_cpp_does_not_know_is_refused_by_the_plan(
    tiny: Path, tmp_path: Path
) -> None:
    path = tiny / "tokenizer.json"
    path.write_text(path.read_text().replace("(?i:'s|'t", "(?i:'x|'t"))
    with pytest.raises(Reap2ggufError, match="nothing is written"):
        make_plan(options(tiny, tmp_path))


def test_a_text_that_is_not_there_is_refused_by_the_plan(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(Reap2ggufError, match=r"gone\.txt: no such file"):
        make_plan(options(tiny, tmp_path, imatrix_text=tmp_path / "gone.txt"))


def test_a_matrix_of_zeros_in_the_source_is_the_sources(tmp_path: Path) -> None:
    spec = TinyQwen3Moe()
    folder = spec.write(tmp_path / "zero")
    tensors = spec.tensors()
    tensors["model.layers.0.mlp.experts.3.up_proj.weight"].zero_()
    save_file(tensors, folder / "model.safetensors")
    result = build(folder, tmp_path / "out", compression=0)
    assert result.manifest.pruning.n_kept == 8


@pytest.mark.parametrize(
    ("record_text", "commit"),
    [
        (None, None),
        ('{"url": "file:///here", "dir_info": {"editable": true}}', None),
        ('{"url": "https://host/x", "vcs_info": {"vcs": "git", "commit_id": "abc"}}', "abc"),
    ],
)
def test_a_program_from_a_repository_records_its_commit(
    record_text: str | None, commit: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Installed:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return record_text

    monkeypatch.setattr(record, "distribution", lambda name: Installed())
    assert record.program_versions().get("reap2gguf commit") == commit
