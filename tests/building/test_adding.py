"""Files that are added to a finished bundle are those of a build with all recipes."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import reap2gguf
from reap2gguf.api.quantizing import quantize
from reap2gguf.building import adding, pipeline
from reap2gguf.errors import OutputError, RecipeError, UsageError, VerificationError
from reap2gguf.exporting import gguf_export
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.options import AddOptions, CheckQuants, ComputeOptions
from reap2gguf.progress import ProgressEvent, Silent
from reap2gguf.verifying.bundle import verify_bundle
from tests.building.builds import build, contents, stop_while_naming
from tests.tiny import TinyQwen3Moe

LONG = ("prune", "observe", "compute_imatrix", "write_pruned")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyQwen3Moe().write(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A bundle that was built with both recipes at once."""
    return contents(build(model, tmp_path_factory.mktemp("whole"), recipes=("q8_0", "q4km")))


@pytest.fixture
def first(model: Path, tmp_path: Path) -> pipeline.BuildResult:
    """A finished bundle with one file."""
    return build(model, tmp_path / "out", recipes=("q8_0",))


@contextmanager
def nothing_else(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails if anything is observed, pruned or swept."""

    def refuse(*arguments: Any, **named: Any) -> None:
        raise AssertionError("a finished bundle was computed again")

    with monkeypatch.context() as patch:
        for stage in (pipeline.Observe, pipeline.Prune, pipeline.Importance, pipeline.ReadTexts):
            patch.setattr(stage, "compute", refuse)
        yield


def no_difference(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def add(bundle: Path, *recipes: str, **more: Any) -> pipeline.BuildResult:
    return reap2gguf.add(bundle, recipes=recipes, threads=1, **more)


def test_a_build_with_one_more_recipe_adds_its_file(
    model: Path, first: pipeline.BuildResult, whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = first.gguf_folder / "tiny-REAP-0.25-Q8_0.gguf"
    node = path.stat().st_ino
    with nothing_else(monkeypatch):
        result = build(model, first.hf_folder.parent, recipes=("q8_0", "q4km"))
    assert [stage.name for stage in result.stages] == ["export", "verify"]
    no_difference(contents(result), whole)
    assert path.stat().st_ino == node  # the same file, not a copy
    assert path.stat().st_nlink == 1


def test_a_build_that_names_only_the_new_recipe_keeps_the_rest(
    model: Path, first: pipeline.BuildResult, whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with nothing_else(monkeypatch):
        result = build(model, first.hf_folder.parent, recipes=("q4km",))
    no_difference(contents(result), whole)
    again = build(model, first.hf_folder.parent, recipes=("q4km",))
    assert again.stages == ()
    assert again.manifest == result.manifest


def test_add_needs_no_source(
    first: pipeline.BuildResult, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Not even the work folder: the bundle may be a download."""
    shutil.rmtree(first.hf_folder.parent / ".work")
    moved = tmp_path / "elsewhere"
    first.hf_folder.parent.rename(moved)
    result = add(moved / first.gguf_folder.name, "q4km")
    no_difference(contents(result), whole)
    assert verify_bundle(result.gguf_folder, 1, Silent()).violations == ()


def test_what_is_added_is_quantized_as_the_command_says(
    model: Path, first: pipeline.BuildResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, float]] = []
    export = adding.export_model

    def told(*arguments: Any) -> None:
        asked.append(arguments[-2:])
        export(*arguments)

    monkeypatch.setattr(adding, "export_model", told)
    notes: list[str] = []
    said = lambda event: notes.append(event.text) if event.kind == "note" else None  # noqa: E731
    add(first.hf_folder, "q4km", device="cpu", check_quants="all", progress=said)
    compute = ComputeOptions("cpu", threads=1, check_quants=CheckQuants.NONE)
    build(model, first.hf_folder.parent, recipes=("Q6_K",), compute=compute)
    assert asked == [("cpu", 1.0), ("cpu", 0.0)]
    assert any(note.startswith("quantizing: ") for note in notes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_refused(first: pipeline.BuildResult, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--device cuda: torch sees no CUDA device"):
        add(first.hf_folder, "q4km", device="cuda")
    with pytest.raises(UsageError, match="--device cuda: torch sees no CUDA device"):
        quantize(first.hf_folder, "q8_0", tmp_path / "file.gguf", device="cuda")
    assert not (tmp_path / "file.gguf").exists()


def test_a_file_that_is_there_is_not_written_again(first: pipeline.BuildResult) -> None:
    notes: list[ProgressEvent] = []
    result = add(first.hf_folder, "q8_0", progress=notes.append)
    assert result.stages == ()
    assert [note.text for note in notes] == ["tiny-REAP-0.25-Q8_0.gguf: the bundle has it already"]


def test_another_recipe_of_the_same_label_replaces_the_file(
    first: pipeline.BuildResult, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('title = "Mine"\nlabel = "Q8_0"\nfile_type = "Q6_K"\n')
    result = add(first.hf_folder, str(mine))
    (record,) = result.manifest.gguf
    assert (record.file, record.title) == ("tiny-REAP-0.25-Q8_0.gguf", "Mine")
    assert verify_bundle(result.gguf_folder, 1, Silent()).violations == ()


def test_an_addition_resumes_where_it_was_killed(
    model: Path, first: pipeline.BuildResult, whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The journal names the tensors that are written; the finished bundle is whole meanwhile."""
    before = contents(first)
    monkeypatch.setattr("reap2gguf.exporting.journal.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("reap2gguf.exporting.journal.MAX_TIME_SHARE", 1e9)
    run, done = gguf_export._Job.run, []

    def stop(job: Any, batch: Any) -> None:
        if len(done) == 20:
            raise KeyboardInterrupt
        done.append(batch)
        run(job, batch)

    with monkeypatch.context() as patch:
        patch.setattr(gguf_export._Job, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            add(first.hf_folder, "q4km")
    no_difference(contents(first), before)
    written = []
    monkeypatch.setattr(
        gguf_export._Job, "run", lambda job, batch: (written.append(batch), run(job, batch))[1]
    )
    result = add(first.hf_folder, "q4km")
    assert len(written) < len(done) + len(written)
    assert {batch[0].tensor.name for batch in written}.isdisjoint(
        {batch[0].tensor.name for batch in done[:10]}
    )
    no_difference(contents(result), whole)


@pytest.mark.parametrize("n_renames", [0, 1, 2, 3])
def test_an_addition_that_is_killed_while_folders_are_named(
    n_renames: int, model: Path, first: pipeline.BuildResult, whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    output = first.hf_folder.parent
    replace, done = os.replace, []
    finals = (first.hf_folder, first.gguf_folder)

    def replace_some(source: Any, target: Any) -> None:
        if Path(source) in finals or Path(target) in finals:
            if len(done) == n_renames:
                raise KeyboardInterrupt
            done.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_some)
        with pytest.raises(KeyboardInterrupt):
            build(model, output, recipes=("q4km",))
    result = build(model, output, recipes=("q4km",))
    assert result.stages == ()  # what was begun is finished first
    no_difference(contents(result), whole)


def test_a_wrong_new_file_leaves_the_bundle_as_it_was(
    first: pipeline.BuildResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(first)
    export = adding.export_model

    def damage(weights: Any, model: Any, names: Any, files: Any, *more: Any) -> None:
        export(weights, model, names, files, *more)
        for path in files:
            with path.open("r+b") as file:  # as long as before: it may be read meanwhile
                file.seek(-64, os.SEEK_END)
                file.write(b"\xff" * 64)

    with monkeypatch.context() as patch:
        patch.setattr(adding, "export_model", damage)
        with pytest.raises(VerificationError, match="the bundle is as it was"):
            add(first.hf_folder, "q4km")
    no_difference(contents(first), before)
    assert len(add(first.hf_folder, "q4km").manifest.gguf) == 2


def test_safetensors_that_changed_are_not_quantized(first: pipeline.BuildResult) -> None:
    path = first.hf_folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(VerificationError, match="nothing was added") as caught:
        add(first.hf_folder, "q4km")
    assert "different SHA-256" in caught.value.violations[0]


def test_files_with_another_time_and_the_same_bytes_are_taken(
    first: pipeline.BuildResult,
) -> None:
    for file in (*first.hf_folder.iterdir(), *first.gguf_folder.iterdir()):
        os.utime(file, (1, 1))
    assert len(add(first.hf_folder, "q4km").manifest.gguf) == 2


def test_a_file_that_is_no_part_of_the_bundle_is_not_lost(first: pipeline.BuildResult) -> None:
    (first.gguf_folder / "notes.txt").write_text("mine")
    with pytest.raises(VerificationError) as caught:
        add(first.hf_folder, "q4km")
    assert "notes.txt is not part of the bundle; move it away" in caught.value.violations[0]
    assert (first.gguf_folder / "notes.txt").read_text() == "mine"


def test_a_file_that_was_removed_by_hand_is_no_longer_listed(
    model: Path, first: pipeline.BuildResult
) -> None:
    (first.gguf_folder / "tiny-REAP-0.25-Q8_0.gguf").unlink()
    notes: list[ProgressEvent] = []
    result = build(model, first.hf_folder.parent, recipes=("q4km",))
    assert [record.label for record in result.manifest.gguf] == ["Q4_K_M"]
    again = add(result.hf_folder, "q8_0", progress=notes.append)
    assert [record.label for record in again.manifest.gguf] == ["Q4_K_M", "Q8_0"]
    assert verify_bundle(again.gguf_folder, 1, Silent()).violations == ()


def test_replace_deletes_what_is_not_named(
    model: Path, first: pipeline.BuildResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    with nothing_else(monkeypatch):
        result = build(model, first.hf_folder.parent, recipes=("q4km",), replace=True)
    assert [record.label for record in result.manifest.gguf] == ["Q4_K_M"]
    assert not (result.gguf_folder / "tiny-REAP-0.25-Q8_0.gguf").exists()
    assert verify_bundle(result.gguf_folder, 1, Silent()).violations == ()


def test_files_of_other_inputs_are_deleted_only_with_replace(
    model: Path, first: pipeline.BuildResult
) -> None:
    """Another method keeps other experts: the old file is of another model."""
    changes: dict[str, Any] = {"recipes": ("q4km",), "method": "frequency"}
    output = first.hf_folder.parent
    before = contents(first)
    with pytest.raises(OutputError, match=r"Q8_0\.gguf \(.* would be deleted: .* --replace"):
        build(model, output, **changes)
    no_difference(contents(first), before)
    result = build(model, output, replace=True, **changes)
    assert [record.label for record in result.manifest.gguf] == ["Q4_K_M"]
    # a build that names every file that is there makes all of them again
    named = build(model, output, recipes=("q4km",))
    assert named.stages[0].name == "texts"


def test_what_is_not_a_bundle(tmp_path: Path, first: pipeline.BuildResult) -> None:
    with pytest.raises(UsageError, match="not a bundle"):
        add(tmp_path, "q8_0")
    with pytest.raises(UsageError, match="nothing to add"):
        AddOptions(first.hf_folder)
    with pytest.raises(RecipeError, match="no recipe 'q9'"):
        add(first.hf_folder, "q9")


def test_a_later_version_adds_a_file(
    first: pipeline.BuildResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest says which version wrote which file, and verification goes by it."""
    for module in ("building.adding", "exporting.header_facts", "verifying.gguf_header",
                   "verifying.bundle"):  # fmt: skip
        monkeypatch.setattr(f"reap2gguf.{module}.__version__", "99.0")
    result = add(first.hf_folder, "q4km")
    one, other = result.manifest.gguf
    assert (one.made_by, other.made_by) == ({}, {"reap2gguf": "99.0"})
    assert result.manifest.card_version == "99.0"
    header = read_gguf_header(result.gguf_folder / other.file)
    assert header.metadata["reap2gguf.version"] == "99.0"
    report = verify_bundle(result.gguf_folder, 1, Silent())
    assert report.violations == ()
    assert "made with reap2gguf 99.0" in (result.gguf_folder / "README.md").read_text().lower()


def test_a_killed_addition_is_run_again(
    first: pipeline.BuildResult, whole: dict[str, bytes], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also where a whole folder has no name but the one in .work."""
    start = first.hf_folder.parent
    replace = os.replace

    def add_until(output: Path, n_left: int) -> bool:
        done: list[Any] = []

        def replace_some(source: Any, target: Any) -> None:
            if len(done) == n_left:
                raise KeyboardInterrupt
            done.append(target)
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace_some)
            try:
                add(output / first.gguf_folder.name, "q4km")
            except KeyboardInterrupt:
                return False
        return True

    n_left, is_whole = 0, False
    while not is_whole:
        output = tmp_path / f"out{n_left}"
        shutil.copytree(start, output, copy_function=shutil.copy2)
        is_whole = add_until(output, n_left)
        n_left += 1
        result = add(output / first.gguf_folder.name, "q4km")
        no_difference(contents(result), whole)
    assert n_left > 8


def test_a_bundle_of_another_name_on_the_disk(first: pipeline.BuildResult, tmp_path: Path) -> None:
    """A download may be called anything."""
    for folder, name in ((first.hf_folder, "mine"), (first.gguf_folder, "mine-GGUF")):
        assert folder is not None
        folder.rename(tmp_path / name)
    result = add(tmp_path / "mine", "q4km")
    assert [record.file for record in result.manifest.gguf] == [
        f"tiny-REAP-0.25-{label}.gguf" for label in ("Q8_0", "Q4_K_M")
    ]
    assert verify_bundle(tmp_path / "mine-GGUF", 1, Silent()).violations == ()


def test_another_bundle_in_the_place_of_the_recorded_one(
    model: Path, first: pipeline.BuildResult, tmp_path: Path
) -> None:
    output = first.gguf_folder.parent
    other = build(model, tmp_path / "other", name="tiny-REAP-0.25", keep_experts=4)
    for old, new in ((first.hf_folder, other.hf_folder), (first.gguf_folder, other.gguf_folder)):
        assert old is not None
        assert new is not None
        shutil.rmtree(old)
        new.rename(old)
    add(first.gguf_folder, "q4km")
    again = build(model, output, recipes=("q8_0", "q4km"))
    assert again.manifest.pruning.n_kept == 6
    assert {stage.name for stage in again.stages} > {"prune", "imatrix"}


def test_files_of_the_user_are_not_deleted(model: Path, first: pipeline.BuildResult) -> None:
    output = first.gguf_folder.parent
    for folder, name in ((first.gguf_folder, "thesis.txt"), (first.hf_folder, "notes.txt")):
        assert folder is not None
        (folder / name).write_text("mine")
        for changes in ({"keep_experts": 4, "name": "tiny-REAP-0.25"}, {"fresh": True}):
            with pytest.raises(OutputError, match=f"{name}: no part of the bundle"):
                build(model, output, replace=True, **changes)
        assert (folder / name).read_text() == "mine"
        (folder / name).unlink()


@pytest.mark.parametrize("place", ["hf_folder", "gguf_folder"])
def test_a_source_in_a_folder_of_the_bundle_is_not_deleted(
    place: str, model: Path, first: pipeline.BuildResult
) -> None:
    inside = getattr(first, place) / "source"
    shutil.copytree(model, inside)
    with pytest.raises(UsageError, match="the result would replace the source"):
        build(inside, first.gguf_folder.parent, name="tiny-REAP-0.25")
    assert (inside / "config.json").is_file()


def test_a_source_at_the_name_of_a_killed_build_is_not_deleted(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build was killed while it named its folders; then the source was put at that name."""
    output = tmp_path / "out"
    for n_renames in (0, 1):
        source = output / "X"
        stop_while_naming(n_renames, model, output, monkeypatch, name="X")
        for folder in (source, output / "X-GGUF"):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(model, source)
        before = {file.name: file.read_bytes() for file in source.iterdir()}
        with contextlib.suppress(OutputError):
            build(source, output, compression=0)
        assert {file.name: file.read_bytes() for file in source.iterdir()} == before
        shutil.rmtree(output)


# ------------------------------------------------------------------------------------- adopting


def quantized(first: pipeline.BuildResult, path: Path, recipe: str = "q4km") -> Path:
    quantize(first.hf_folder, recipe, path, threads=1)
    return path


def test_a_file_beside_the_others_is_adopted(first: pipeline.BuildResult) -> None:
    path = quantized(first, first.gguf_folder / "tiny-REAP-0.25-Q4_K_M.gguf")
    assert verify_bundle(first.gguf_folder, 1, Silent()).violations != ()
    data = path.read_bytes()
    result = add(first.gguf_folder, *()) if False else reap2gguf.add(first.gguf_folder, path)
    assert path.read_bytes() == data
    record = result.manifest.gguf[1]
    assert (record.label, record.file_type, record.adopted) == ("Q4_K_M", "Q4_K_M", True)
    report = verify_bundle(result.gguf_folder, 1, Silent())
    assert report.violations == ()
    assert str(report.levels[f"{result.gguf_folder.name}/{path.name}"]) == "values"
    assert "made by another command" in (result.gguf_folder / "README.md").read_text()


def test_a_file_from_elsewhere_is_adopted_under_a_name_of_the_bundle(
    first: pipeline.BuildResult, tmp_path: Path
) -> None:
    path = quantized(first, tmp_path / "model.gguf")
    data = path.read_bytes()
    reap2gguf.add(first.hf_folder, path)
    labelled = reap2gguf.add(first.hf_folder, path, labels={str(path): "OWN"})
    files = [record.file for record in labelled.manifest.gguf]
    assert files == [f"tiny-REAP-0.25-{label}.gguf" for label in ("Q8_0", "Q4_K_M", "OWN")]
    assert (labelled.gguf_folder / files[2]).read_bytes() == data
    assert path.read_bytes() == data
    assert verify_bundle(labelled.gguf_folder, 1, Silent()).violations == ()


def test_a_file_of_another_model_is_not_adopted(
    first: pipeline.BuildResult, model: Path, tmp_path: Path
) -> None:
    before = contents(first)
    path = tmp_path / "unpruned.gguf"
    quantize(model, "q8_0", path, threads=1)
    with pytest.raises(VerificationError, match="the file was not added"):
        reap2gguf.add(first.hf_folder, path)
    no_difference(contents(first), before)


@pytest.mark.parametrize(
    "label", ["00001-of-00002", "imatrix", "a/b", "a\nb", "a`|b", "\x1b[31m", ""]
)
def test_a_label_that_no_file_can_have(
    label: str, first: pipeline.BuildResult, tmp_path: Path
) -> None:
    path = quantized(first, tmp_path / "model.gguf")
    before = contents(first)
    with pytest.raises(RecipeError, match="label"):
        reap2gguf.add(first.hf_folder, path, labels={str(path): label})
    no_difference(contents(first), before)


def test_a_link_to_a_file_is_adopted_as_the_file(
    first: pipeline.BuildResult, tmp_path: Path
) -> None:
    path = quantized(first, tmp_path / "model.gguf")
    (tmp_path / "link.gguf").symlink_to(path)
    result = reap2gguf.add(first.hf_folder, tmp_path / "link.gguf")
    file = result.gguf_folder / "tiny-REAP-0.25-Q4_K_M.gguf"
    assert not file.is_symlink()
    assert file.read_bytes() == path.read_bytes()


def test_two_new_files_with_one_name(first: pipeline.BuildResult, tmp_path: Path) -> None:
    path = quantized(first, tmp_path / "model.gguf")
    with pytest.raises(UsageError, match="two of the new files have the label 'Q4_K_M'"):
        reap2gguf.add(first.hf_folder, path, recipes=("q4km",))
