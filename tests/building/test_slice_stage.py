"""Bundles of GGUF files: built by slicing or by a recipe, verified, resumed and planned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import reap2gguf
from reap2gguf.artifacts.observations import Observations
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.errors import ArtifactError, CheckpointError, UsageError, VerificationError
from reap2gguf.gguf_files.imatrix import load_imatrix
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.gguf_source import writing
from reap2gguf.options import BuildOptions, CalibrationOptions, ComputeOptions
from reap2gguf.quantizing.recipe import load_recipes
from reap2gguf.verifying.report import Level
from tests.exporting.files import export_files, plain, stored
from tests.gguf_source.files import in_parts
from tests.loopback_hub.model import serving
from tests.loopback_hub.repository import COMMIT
from tests.test_cli import run
from tests.tiny import EXAMPLE

TEXT = "The river rose in the night, and by the morning the old bridge was gone. " * 40
CPU = ComputeOptions(device="cpu", threads=2, dtype="float32")
NAME = "Example-REAP-0.25"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    found = export_files(EXAMPLE, folder, [plain("Q4_K_M")])
    found["Q4_K_M"].rename(folder / "Example-Q4_K_M.gguf")
    (folder / "text.txt").write_text(TEXT)
    return folder


def options(made: Path, output: Path, **more: Any) -> BuildOptions:
    text = CalibrationOptions(str(made / "text.txt"), samples=8, max_length=64)
    given = {"model": str(made / "Example-Q4_K_M.gguf"), "calibration": text, "compute": CPU}
    return BuildOptions(output=output, **{**given, "evaluate": "never", **more})


@pytest.fixture(scope="module")
def sliced(made: Path) -> Path:
    assert reap2gguf.build(options(made, made / "sliced")) is not None
    return made / "sliced" / f"{NAME}-GGUF"


def test_a_bundle_of_the_stored_blocks(made: Path, sliced: Path) -> None:
    assert sorted(path.name for path in (made / "sliced").iterdir() if path.name[0] != ".") == [
        sliced.name
    ]
    manifest = Manifest.load(sliced)
    assert manifest.hf is None
    origin = manifest.source.gguf
    assert origin is not None
    assert origin.file == "Example-Q4_K_M.gguf"
    assert manifest.n_parameters == origin.n_parameters < manifest.source.n_parameters
    assert not manifest.has_imatrix
    (record,) = manifest.gguf
    assert (record.file, record.adopted) == (f"{NAME}-Q4_K_M.gguf", True)
    # the same as by the commands of its stages
    expected = reap2gguf.prune(
        made / "Example-Q4_K_M.gguf", None, made / "alone.gguf", kept=manifest.pruning.kept
    ).folder
    assert stored(sliced / record.file) == stored(expected)
    header = read_gguf_header(sliced / record.file)
    assert header.metadata["general.name"] == NAME
    assert header.metadata["reap2gguf.method"] == "reap"
    card = (sliced / "README.md").read_text()
    assert "there are no safetensors of them" in card
    assert "nothing was\nquantized again" in card
    assert "- imatrix" not in card


def test_the_bundle_is_verified_byte_for_byte(made: Path, sliced: Path) -> None:
    report = reap2gguf.verify(sliced, source=made / "Example-Q4_K_M.gguf")
    assert not report.violations
    assert report.levels[f"{sliced.name}/{NAME}-Q4_K_M.gguf"] is Level.EXACT
    alone = reap2gguf.verify(sliced)
    assert not alone.violations
    assert any("--source Example-Q4_K_M.gguf" in line for line in alone.not_checked)


def test_a_changed_block_is_found(made: Path, sliced: Path, tmp_path: Path) -> None:
    folder = tmp_path / sliced.name
    folder.mkdir()
    for path in sliced.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    path = folder / f"{NAME}-Q4_K_M.gguf"
    info = read_gguf_header(path).tensors["blk.1.ffn_up_exps.weight"]
    with open(path, "r+b") as file:
        file.seek(info.offset + 100)
        byte = file.read(1)
        file.seek(info.offset + 100)
        file.write(bytes([byte[0] ^ 1]))
    report = reap2gguf.verify(folder, source=made / "Example-Q4_K_M.gguf")
    assert any("'blk.1.ffn_up_exps.weight': its expert 0" in one for one in report.violations)


def test_another_build_reuses_the_observations(
    made: Path, sliced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    more = {"keep_experts": 8, "name": "half"}
    reap2gguf.build(
        options(made, made / "sliced", **more), progress=lambda event: notes.append(str(event))
    )
    assert any("observe: up to date, reused" in note for note in notes)
    manifest = Manifest.load(made / "sliced" / "half-GGUF")
    assert manifest.pruning.n_kept == 8
    before = (sliced / "SHA256SUMS").read_text()
    reap2gguf.build(options(made, made / "sliced"))
    assert (sliced / "SHA256SUMS").read_text() == before


def test_an_interrupted_build_resumes(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, copied = writing._copy_tensor, []

    def interrupted(plan: Any, one: Any, *others: Any) -> None:
        if len(copied) == 5:
            raise KeyboardInterrupt
        copied.append(one.info.name)
        copy(plan, one, *others)

    asked = options(made, made / "again", kept=_kept(made))
    monkeypatch.setattr(writing, "_copy_tensor", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reap2gguf.build(asked)
    monkeypatch.setattr(writing, "_copy_tensor", copy)
    assert reap2gguf.build(asked) is not None
    folder = made / "again" / "Example-pruned-0.25-GGUF"
    assert not reap2gguf.verify(folder, source=made / "Example-Q4_K_M.gguf").violations


def _kept(made: Path) -> Path:
    path = made / "kept.json"
    path.write_text(json.dumps({str(layer): list(range(1, 13)) for layer in range(4)}))
    return path


def test_with_a_recipe_it_is_quantized_again(made: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    asked = options(made, tmp_path, recipes=("Q5_K_M",), name="five")
    reap2gguf.build(asked, progress=lambda event: notes.append(str(event)))
    assert any("lose twice" in note for note in notes)
    folder = tmp_path / "five-GGUF"
    manifest = Manifest.load(folder)
    assert manifest.hf is None
    assert manifest.has_imatrix
    header = read_gguf_header(folder / "five-Q5_K_M.gguf")
    source = read_gguf_header(made / "Example-Q4_K_M.gguf")
    tokenizer = [key for key in source.metadata if key.startswith("tokenizer.")]
    assert {key: header.metadata.get(key) for key in tokenizer} == {
        key: source.metadata[key] for key in tokenizer
    }
    assert "have lost precision twice" in (folder / "README.md").read_text()
    report = reap2gguf.verify(folder, source=made / "Example-Q4_K_M.gguf")
    assert not report.violations


def test_with_the_recipe_of_its_source(made: Path, tmp_path: Path) -> None:
    """The headers name the same recipe then; the manifest says how many blocks were copied."""
    source = tmp_path / "Source-Q4_K_M.gguf"
    export_files(EXAMPLE, tmp_path, load_recipes(("q4km",), {}))["q4km"].rename(source)
    more = {"model": str(source), "kept": _kept(made), "recipes": ("q4km",), "name": "four"}
    reap2gguf.build(options(made, tmp_path, **more))
    folder = tmp_path / "four-GGUF"
    (record,) = Manifest.load(folder).gguf
    headers = map(read_gguf_header, (folder / record.file, source))
    assert {header.metadata["reap2gguf.recipe"] for header in headers} == {"q4km"}
    assert not record.adopted
    assert record.source_blocks > 0
    assert not reap2gguf.verify(folder, source=source).violations


def test_a_bundle_of_a_pruned_file(made: Path, tmp_path: Path) -> None:
    """Its file says which experts of the original it has, and `verify` expects that."""
    kept = {layer: list(range(14)) for layer in range(4)}
    pruned = tmp_path / "Pruned-Q4_K_M.gguf"
    reap2gguf.prune(made / "Example-Q4_K_M.gguf", None, pruned, kept=kept)
    reap2gguf.build(options(made, tmp_path, model=str(pruned), kept=_kept(made), name="twice"))
    folder = tmp_path / "twice-GGUF"
    (record,) = Manifest.load(folder).gguf
    keys = read_gguf_header(folder / record.file).metadata
    assert keys["reap2gguf.original.source"] == "Example-Q4_K_M.gguf"
    assert not reap2gguf.verify(folder).violations
    assert not reap2gguf.verify(folder, source=pruned).violations


def test_observations_of_the_original_are_of_the_bundle(made: Path, tmp_path: Path) -> None:
    """Their fingerprint is the safetensors'; architecture and tokens must be the file's."""
    given = tmp_path / "observations.safetensors"
    asked = options(made, tmp_path)
    reap2gguf.observe(EXAMPLE, given, calibration=asked.calibration, compute=CPU)
    reap2gguf.build(options(made, tmp_path, observations=given, name="seen"))
    folder = tmp_path / "seen-GGUF"
    source = made / "Example-Q4_K_M.gguf"
    seen = Observations.load(folder / given.name)
    assert seen.model_fingerprint != Manifest.load(folder).source.fingerprint
    assert not reap2gguf.verify(folder, source=source).violations
    assert not reap2gguf.verify(folder).violations
    for other, problem in (
        (replace(seen, architecture="other"), "are of the architecture 'other', expected 'qwen3"),
        (replace(seen, tokens_sha256="0" * 64), "other tokens than seen-Q4_K_M.gguf"),
    ):
        other.save(folder / given.name)
        found = reap2gguf.verify(folder).violations
        assert any(problem in one for one in found), found


def test_an_importance_matrix_is_cut_with_the_experts(made: Path, tmp_path: Path) -> None:
    reap2gguf.build(options(made, tmp_path, imatrix_from="source", name="cut"))
    folder = tmp_path / "cut-GGUF"
    manifest = Manifest.load(folder)
    assert manifest.calibration.imatrix_cut_from == 16
    entry = load_imatrix(folder / "imatrix.gguf").entries["blk.0.ffn_up_exps.weight"]
    assert len(entry.counts) == 12
    report = reap2gguf.verify(folder, source=made / "Example-Q4_K_M.gguf")
    assert not report.violations


def test_parts_stay_parts(made: Path, tmp_path: Path) -> None:
    parts = in_parts(made / "Example-Q4_K_M.gguf", tmp_path / "parts", 2_500_000)
    reap2gguf.build(options(made, tmp_path, model=str(parts[0]), kept=_kept(made), name="x"))
    folder = tmp_path / "x-GGUF"
    (record,) = Manifest.load(folder).gguf
    assert len(record.files) == len(parts) > 1
    assert not reap2gguf.verify(folder, source=parts[0]).violations


def test_a_plan(made: Path, tmp_path: Path) -> None:
    source = made / "Example-Q4_K_M.gguf"
    text = "--calibration", made / "text.txt", "--max-length", 64
    result = run("plan", source, "--output", tmp_path, *text)
    assert result.exit_code == 0, result.output
    assert f"{NAME}-Q4_K_M.gguf" in result.output
    assert "of safetensors" not in result.output
    assert not list(tmp_path.iterdir())
    sliced = reap2gguf.plan(options(made, tmp_path))
    assert (sliced.slices, sliced.writes_hf, sliced.computes_imatrix) == (True, False, False)
    again = reap2gguf.plan(options(made, tmp_path, recipes=("Q4_K_M",)))
    assert (again.slices, again.writes_hf, again.computes_imatrix) == (False, False, True)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"compression": 0}, "nothing would change"),
        ({"repair": "ridge"}, "--repair: it makes new weights"),
        ({"dequantize": "bf16"}, "--dequantize: no safetensors"),
        ({"tensor_types": ("attn_v=Q8_0",)}, "stay as they are, .* pass --recipe too"),
        ({"labels": {"Q4_K_M": "mine"}}, "--label: without --recipe the blocks"),
    ],
)
def test_refused(made: Path, tmp_path: Path, more: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        reap2gguf.plan(options(made, tmp_path, **more))


def test_types_by_role_need_a_recipe(made: Path, tmp_path: Path) -> None:
    source = made / "Example-Q4_K_M.gguf"
    text = "--calibration", made / "text.txt", "--max-length", 64
    asked = "--output", tmp_path, *text, "--set", "experts.down=Q6_K"
    result = run("plan", source, *asked)
    assert result.exit_code == 2
    assert "pass --recipe too" in result.output
    result = run("plan", source, *asked, "--recipe", "q4km")
    assert result.exit_code == 0, result.output


def test_a_manifest_that_contradicts_itself(sliced: Path, tmp_path: Path) -> None:
    values = json.loads((sliced / "reap2gguf.json").read_text())
    values["source"]["gguf"] = None
    (tmp_path / "reap2gguf.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="hf is null"):
        Manifest.load(tmp_path)
    values["source"]["gguf"] = {"file": "x.gguf", "n_parameters": 10**12}
    (tmp_path / "reap2gguf.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="n_parameters of what is left"):
        Manifest.load(tmp_path)


def test_the_same_again(made: Path, sliced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the options that its manifest records."""
    monkeypatch.chdir(made)
    again = reap2gguf.options_like(sliced, model=str(made / "Example-Q4_K_M.gguf"))
    assert reap2gguf.plan(again).slices
    result = run("plan", "Example-Q4_K_M.gguf", "--like", sliced / "reap2gguf.json")
    assert result.exit_code == 0, result.output
    assert f"{NAME}-Q4_K_M.gguf" in result.output


@pytest.mark.parametrize("gone", [False, True], ids=["changed", "gone"])
def test_a_file_that_is_not_as_it_was_is_sliced_again(
    made: Path, tmp_path: Path, gone: bool
) -> None:
    built = options(made, tmp_path / "out")
    first = reap2gguf.build(built)
    (file,) = first.gguf_folder.glob("*.gguf")
    expected = file.read_bytes()
    manifest = Manifest.load(first.gguf_folder)
    if gone:
        file.unlink()
    else:
        file.write_bytes(expected[:-1] + bytes([expected[-1] ^ 1]))
    again = reap2gguf.build(built)
    assert file.read_bytes() == expected
    assert Manifest.load(again.gguf_folder).gguf == manifest.gguf
    source = made / "Example-Q4_K_M.gguf"
    assert not reap2gguf.verify(again.gguf_folder, source=source).violations


def with_nan(made: Path, folder: Path) -> Path:
    """The source with NaN for the scale of a block of expert 3."""
    source = made / "Example-Q4_K_M.gguf"
    info = read_gguf_header(source).tensors["blk.1.ffn_gate_exps.weight"]
    assert info.tensor_type.name == "Q4_K"
    content = bytearray(source.read_bytes())
    place = info.offset + 3 * info.shape[1] * info.row_bytes
    content[place : place + 2] = b"\xff\x7e"  # begins a block: a float16
    path = folder / "damaged-Q4_K_M.gguf"
    path.write_bytes(content)
    return path


def test_blocks_with_nan_are_not_copied(made: Path, sliced: Path, tmp_path: Path) -> None:
    source = with_nan(made, tmp_path)
    kept = {layer: (0, 1, 2, 3, 4, 5, 6, 7) for layer in range(4)}
    with pytest.raises(VerificationError) as caught:
        reap2gguf.prune(source, None, tmp_path / "pruned.gguf", kept=kept)
    (violation,) = caught.value.violations
    assert f"expert 3 holds NaN or infinite values, which {source} holds too" in violation
    assert not (tmp_path / "pruned.gguf").exists()
    with pytest.raises(CheckpointError, match="holds NaN or infinite values"):
        reap2gguf.quantize(source, "Q4_K_M", tmp_path / "same.gguf")
    without = {layer: (0, 1, 2, 4, 5, 6, 7, 8) for layer in range(4)}
    sound = reap2gguf.prune(source, None, tmp_path / "sound.gguf", kept=without).folder
    assert not reap2gguf.verify(sound, source=source).violations


def test_a_file_on_the_hub(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle that is built of it, but for where it came from."""
    files = {"Example-Q4_K_M.gguf": (made / "Example-Q4_K_M.gguf").read_bytes()}
    with serving(files, monkeypatch, tmp_path / "cache"):
        name = "owner/name:Example-Q4_K_M.gguf"
        reap2gguf.build(options(made, tmp_path / "out", model=name, kept=_kept(made)))
        folder = tmp_path / "out" / "Example-pruned-0.25-GGUF"
        manifest = Manifest.load(folder)
        assert (manifest.source.label, manifest.source.revision) == ("owner/name", COMMIT)
        assert manifest.source.gguf is not None
        assert manifest.source.gguf.file == name
        assert not reap2gguf.verify(folder, source=name).violations
    alone = reap2gguf.prune(
        made / "Example-Q4_K_M.gguf", None, tmp_path / "alone.gguf", kept=_kept(made)
    ).folder
    assert stored(folder / "Example-pruned-0.25-Q4_K_M.gguf") == stored(alone)


def test_a_bundle_is_evaluated_beside_its_source(made: Path, sliced: Path) -> None:
    asked = reap2gguf.EvaluateOptions(text=str(made / "text.txt"), chunk=64, chunks=2)
    found = reap2gguf.evaluate(
        sliced, source=made / "Example-Q4_K_M.gguf", options=asked, compute=CPU
    )
    kinds = {variant.name: variant.kind for variant in found.variants}
    assert kinds == {"source": "source", f"{NAME}-Q4_K_M.gguf": "gguf"}
    (one,) = found.comparisons
    assert (one.reference, one.variant) == ("source", f"{NAME}-Q4_K_M.gguf")
