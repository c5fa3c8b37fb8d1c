"""What was verified is what is published: files that change between stages of a build."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reap2gguf.artifacts.observations import Observations
from reap2gguf.artifacts.texts import Texts
from reap2gguf.atomic import OutputFile, part_of
from reap2gguf.building import pipeline, seals, stages, verify_stage
from reap2gguf.building.pipeline import BuildResult
from reap2gguf.building.seals import Seal, changed, read_seals, seal, stamps, unsealed
from reap2gguf.building.workdir import Workdir
from reap2gguf.errors import ArtifactError, OutputError, VerificationError
from reap2gguf.progress import Silent
from reap2gguf.verifying.bundle import verify_bundle
from tests.building import builds

RECIPES = ("bf16", "q8_0")
NAME = "tiny-REAP-0.25"


def build(source: Path, output: Path) -> BuildResult:
    return builds.build(source, output, recipes=RECIPES)


def stopped_before(
    step: str, module: Any, source: Path, output: Path, patch: pytest.MonkeyPatch
) -> Workdir:
    """The work folder of a build that was interrupted at a function of a module."""
    with patch.context() as patched:
        builds.refuse_at(patched, module, step)
        with pytest.raises(KeyboardInterrupt):
            build(source, output)
    return Workdir(output, NAME)


def damage(path: Path, keep_time: bool) -> None:
    """Change one byte in the middle of a file."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(stat.st_size * 3 // 4)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x55]))
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


FILES = [
    f"{NAME}/model.safetensors",
    f"{NAME}-GGUF/{NAME}-BF16.gguf",
    f"{NAME}-GGUF/imatrix.gguf",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (f"{NAME}/tokenizer.json", f"{NAME}/config.json", f"{NAME}-GGUF/imatrix.dat")
    ),
]


@pytest.mark.parametrize("file", FILES)
def test_damage_after_the_verification_is_not_published(
    file: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a new time of change, the stage that wrote it is done again."""
    output = tmp_path / "out"
    work = stopped_before("write_record", pipeline, tiny, output, monkeypatch)
    damage(work.root / file, keep_time=False)
    result = build(tiny, output)
    assert builds.stages_reused(result)["verify"] is False
    assert verify_bundle(result.gguf_folder, 1, Silent()).violations == ()


@pytest.mark.parametrize("file", FILES)
def test_damage_that_keeps_the_time_is_not_published(
    file: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash differs, so it is verified again, and refused."""
    output = tmp_path / "out"
    work = stopped_before("write_record", pipeline, tiny, output, monkeypatch)
    damage(work.root / file, keep_time=True)
    if "imatrix" in file:  # an input of what follows: made again
        result = build(tiny, output)
        assert builds.stages_reused(result)["imatrix"] is False
        assert verify_bundle(result.gguf_folder, 1, Silent()).violations == ()
        return
    with pytest.raises(VerificationError) as caught:
        build(tiny, output)
    (violation,) = caught.value.violations
    assert violation == f"{work.root / file}: its SHA-256 is not that of what was verified"
    assert not work.final_hf.exists()
    assert not work.final_gguf.exists()
    assert verify_bundle(build(tiny, output).gguf_folder, 1, Silent()).violations == ()


def test_an_interrupted_build_reuses_what_is_unchanged(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    stopped_before("write_record", pipeline, tiny, output, monkeypatch)
    assert all(builds.stages_reused(build(tiny, output)).values())


def test_a_damaged_export_is_not_verified_but_made_again(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    work = stopped_before("check_ggufs", verify_stage, tiny, output, monkeypatch)
    damage(work.gguf / f"{NAME}-Q8_0.gguf", keep_time=False)
    result = build(tiny, output)
    assert builds.stages_reused(result)["prune"] is True
    assert builds.stages_reused(result)["imatrix"] is True
    assert builds.stages_reused(result)["export"] is False
    assert verify_bundle(result.gguf_folder, 1, Silent()).violations == ()


def test_a_file_that_changes_while_it_is_verified(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = verify_stage.check_ggufs

    def then_damage(files: Any, *arguments: Any) -> Any:
        found = check(files, *arguments)
        damage(files[0].path, keep_time=False)
        return found

    monkeypatch.setattr(verify_stage, "check_ggufs", then_damage)
    with pytest.raises(OutputError, match="was changed by another program while the build"):
        build(tiny, tmp_path / "out")
    assert not (tmp_path / "out" / NAME).exists()


def test_a_file_that_changes_before_the_record(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = pipeline.write_record

    def after_damage(plan: Any, work: Workdir, evidence: Any, written: Any) -> Any:
        damage(work.gguf / f"{NAME}-BF16.gguf", keep_time=False)
        return write(plan, work, evidence, written)

    monkeypatch.setattr(pipeline, "write_record", after_damage)
    with pytest.raises(OutputError, match="was changed by another program"):
        build(tiny, tmp_path / "out")
    assert not (tmp_path / "out" / NAME).exists()


@pytest.mark.parametrize("place", ["hf", "gguf"])
def test_a_stray_in_the_work_folder_is_not_published(
    place: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    work = stopped_before("check_ggufs", verify_stage, tiny, output, monkeypatch)
    (getattr(work, place) / "model-00009-of-00009.safetensors").write_bytes(b"stray")
    with pytest.raises(VerificationError) as caught:
        build(tiny, output)
    assert "model-00009-of-00009.safetensors is not part of the bundle" in str(
        caught.value.violations
    )
    assert not work.final_hf.exists()


@pytest.mark.parametrize("n_renames", [0, 1])
def test_damage_while_the_folders_get_their_names(
    n_renames: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    builds.stop_while_naming(n_renames, tiny, output, monkeypatch, recipes=RECIPES)
    work = Workdir(output, NAME)
    damage((work.hf if n_renames == 0 else work.final_hf) / "model.safetensors", keep_time=False)
    result = build(tiny, output)
    assert verify_bundle(result.gguf_folder, 1, Silent()).violations == ()
    assert builds.stages_reused(result)["prune"] is False


@pytest.mark.parametrize(
    ("folder", "load"), [("observations", Observations.load), ("texts", Texts.load)]
)
def test_damaged_input_of_other_builds_is_refused(
    folder: str, load: Callable[[Path], object], tiny: Path, tmp_path: Path
) -> None:
    build(tiny, tmp_path / "out")
    (path,) = (tmp_path / "out" / ".work" / folder).iterdir()
    load(path)
    damage(path, keep_time=True)
    with pytest.raises(ArtifactError, match="damaged"):
        load(path)


def test_stamps_and_seals(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("folder/a", "b"):
        (tmp_path / name).write_text(name)
    kept = stamps(tmp_path, [tmp_path / "folder", tmp_path / "b", tmp_path / "gone"])
    assert kept.keys() == {"folder/a", "b"}
    assert changed(tmp_path, kept) == []
    sealed = seal(tmp_path, kept, 1, Silent())
    as_json = json.loads(json.dumps({name: vars(one) for name, one in sealed.items()}))
    assert read_seals(as_json) == sealed
    assert unsealed(tmp_path, sealed, 1, Silent()) == []
    damage(tmp_path / "b", keep_time=True)
    assert changed(tmp_path, kept) == []
    assert unsealed(tmp_path, sealed, 1, Silent()) == ["b"]
    (tmp_path / "b").unlink()
    (tmp_path / "b").symlink_to("folder/a")
    assert changed(tmp_path, kept) == ["b"]
    with pytest.raises(OutputError, match="was changed by another program"):
        seal(tmp_path, kept, 1, Silent())
    assert read_seals(None) == read_seals({"b": {"sha256": 1}}) == {}
    assert Seal(1, 2, "x").record.n_bytes == 1


def test_what_was_hashed_while_it_was_written_is_not_read_for_its_hash(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    sha256 = seals.file_sha256

    def noted(path: Path, *arguments: Any, **named: Any) -> str:
        hashed.append(path.name)
        return sha256(path, *arguments, **named)

    monkeypatch.setattr(seals, "file_sha256", noted)
    result = build(tiny, tmp_path / "out")
    assert hashed
    assert not [name for name in hashed if name.endswith((".safetensors", "BF16.gguf"))]
    assert not [name for name in hashed if name.endswith("Q8_0.gguf")]
    assert verify_bundle(result.gguf_folder, 1, Silent()).violations == ()


@pytest.mark.parametrize("file", [f"{NAME}/model.safetensors", f"{NAME}-GGUF/{NAME}-BF16.gguf"])
def test_a_file_that_changes_while_it_is_written(
    file: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hash may be of the bytes before the change, but what is on the disk is verified."""
    finish = OutputFile.finish

    def after_damage(written: OutputFile) -> None:
        if written.path.name == Path(file).name:
            damage(part_of(written.path), keep_time=False)
        finish(written)

    monkeypatch.setattr(OutputFile, "finish", after_damage)
    with pytest.raises(VerificationError):
        build(tiny, tmp_path / "out")
    assert not (tmp_path / "out" / NAME).exists()


@pytest.mark.parametrize("keep_time", [True, False])
def test_a_hash_counts_only_for_the_file_that_has_its_stamp(
    keep_time: bool, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    (n_bytes, changed_ns) = stamps(tmp_path, [path])["file"]
    written = {"file": Seal(n_bytes, changed_ns, "of what was written"), "gone": Seal(1, 2, "")}
    if not keep_time:
        os.utime(path, ns=(changed_ns, changed_ns + 1))
    kept = stamps(tmp_path, [path])
    found = seal(tmp_path, kept, 1, Silent(), written)
    assert list(found) == ["file"]
    assert (found["file"].sha256 == "of what was written") is keep_time
    assert (found["file"].n_bytes, found["file"].changed_ns) == kept["file"]


def test_a_shard_of_an_interrupted_build_is_hashed_too(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    stopped_before("written_seals", stages, tiny, output, monkeypatch)
    result = build(tiny, output)
    assert builds.stages_reused(result)["prune"] is False
    assert verify_bundle(result.gguf_folder, 1, Silent()).violations == ()
