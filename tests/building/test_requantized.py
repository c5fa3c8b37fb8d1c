"""Files that a recipe makes of a GGUF source: tensors of the source's type keep its blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader

import reap2gguf
from reap2gguf.atomic import part_of
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.errors import ArtifactError, RecipeError
from reap2gguf.exporting import row_ranges
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.hub.opened import open_model
from reap2gguf.options import BuildOptions, CalibrationOptions, ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.quantizing.recipe import load_recipe
from reap2gguf.quantizing.resolve import resolve
from reap2gguf.terminal.plan_advice import copied_lines, odd_row_lines
from reap2gguf.verifying.report import Level
from tests.exporting.files import export_files, plain, random_imatrix, stored
from tests.exporting.files import gguf_tensors as tensors_of
from tests.families.gpt_oss import TINY as GPT_OSS
from tests.gguf_source.files import exported, in_parts
from tests.models.layouts import FIRST
from tests.models.oracles import of_file
from tests.quantized import as_mxfp4
from tests.test_cli import run
from tests.tiny import EXAMPLE

TEXT = "The river rose in the night, and by the morning the old bridge was gone. " * 40
CPU = ComputeOptions(device="cpu", threads=2, dtype="float32")
KEPT = {layer: [one for one in range(16) if one % 4 != layer] for layer in range(4)}
FILES = ("Q4_K_M", "Q8_0")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source, a text and a list of experts."""
    folder = tmp_path_factory.mktemp("made")
    found = export_files(EXAMPLE, folder, [plain("Q4_K_M")])
    found["Q4_K_M"].rename(folder / "Example-Q4_K_M.gguf")
    (folder / "text.txt").write_text(TEXT)
    (folder / "kept.json").write_text(json.dumps({str(k): v for k, v in KEPT.items()}))
    return folder


@pytest.fixture(scope="module")
def source(made: Path) -> Path:
    return made / "Example-Q4_K_M.gguf"


def options(made: Path, output: Path, **more: Any) -> BuildOptions:
    text = CalibrationOptions(str(made / "text.txt"), samples=8, max_length=64)
    given = {
        "model": str(made / "Example-Q4_K_M.gguf"),
        "calibration": text,
        "compute": CPU,
        "evaluate": "never",
        "recipes": FILES,
        "name": "x",
    }
    return BuildOptions(output=output, **{**given, **more})


@pytest.fixture(scope="module")
def bundle(made: Path) -> Path:
    notes: list[str] = []
    asked = options(made, made / "out", kept=made / "kept.json")
    assert reap2gguf.build(asked, progress=lambda event: notes.append(str(event))) is not None
    said = [note for note in notes if "tensors keep the source's blocks" in note]
    assert len(said) == len(FILES)
    assert "quantized a second time, and lose twice" in said[1]
    return made / "out" / "x-GGUF"


def by_gguf_py(source: Path, kept: dict[int, list[int]] | None) -> dict[str, tuple[str, Any]]:
    """Types and bytes of a file's tensors with those experts, as gguf-py reads them."""
    found = {}
    for one in GGUFReader(source).tensors:
        data = one.data
        if kept is not None and ("_exps" in one.name or "ffn_gate_inp." in one.name):
            data = data[kept[int(one.name.split(".")[1])]]
        found[one.name] = one.tensor_type.name, data
    return found


def n_equal(path: Path, expected: dict[str, tuple[str, Any]]) -> int:
    """How many tensors have the expected type; those have the expected bytes."""
    found = by_gguf_py(path, None)
    assert found.keys() == expected.keys()
    same = [name for name, (kind, _) in found.items() if kind == expected[name][0]]
    for name in same:
        np.testing.assert_array_equal(found[name][1], expected[name][1], err_msg=name)
    return len(same)


def test_tensors_of_the_same_type_keep_their_blocks(bundle: Path, source: Path) -> None:
    manifest, expected = Manifest.load(bundle), by_gguf_py(source, KEPT)
    counts = {}
    for record in manifest.gguf:
        counts[record.file] = n_equal(bundle / record.file, expected)
        assert record.source_blocks == counts[record.file]
        assert not record.adopted
    total = len(expected)
    assert counts["x-Q4_K_M.gguf"] > 0.9 * total
    # what is never quantized has the same type everywhere
    assert 0 < counts["x-Q8_0.gguf"] < 0.6 * total
    card = (bundle / "README.md").read_text()
    assert all(f"- `{name}`: {count} of {total}\n" in card for name, count in counts.items())
    assert "quantized a second time, and have lost precision twice" in card


def test_the_bundle_is_verified(bundle: Path, source: Path) -> None:
    for exact in (False, True):
        report = reap2gguf.verify(bundle, source=source, exact=exact)
        assert not report.violations
        assert report.levels[f"{bundle.name}/x-Q4_K_M.gguf"] is Level.EXACT
        assert report.levels[f"{bundle.name}/x-Q8_0.gguf"] is Level.EXACT
    assert not reap2gguf.verify(bundle).violations


@pytest.mark.parametrize("name", ["blk.1.ffn_up_exps.weight", "blk.0.attn_norm.weight"])
def test_a_changed_bit_is_found(bundle: Path, source: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / bundle.name
    folder.mkdir()
    for path in bundle.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    info = read_gguf_header(folder / "x-Q4_K_M.gguf").tensors[name]
    with open(folder / "x-Q4_K_M.gguf", "r+b") as file:
        file.seek(info.offset + 16)
        byte = file.read(1)
        file.seek(info.offset + 16)
        file.write(bytes([byte[0] ^ 1]))
    found = reap2gguf.verify(folder, source=source).violations
    limit = f"expected the source's blocks of {info.tensor_type.name}, byte for byte"
    assert any(name in one and limit in one for one in found), found


def test_the_manifest_counts_them(bundle: Path, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / bundle.name
    folder.mkdir()
    for path in bundle.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    values = json.loads((bundle / "reap2gguf.json").read_text())
    values["gguf"][0]["source_blocks"] -= 1
    (folder / "reap2gguf.json").write_text(json.dumps(values))
    found = reap2gguf.verify(folder, source=source).violations
    assert any("source_blocks" in one for one in found), found
    values["gguf"][0]["source_blocks"] = 10**6
    (folder / "reap2gguf.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="source_blocks"):
        Manifest.load(folder)


def test_an_interrupted_build_resumes(
    made: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, done = row_ranges.BlockMaker.make, []

    def interrupted(self: Any, batch: Any, types: Any) -> Any:
        if len(done) == 20:
            raise KeyboardInterrupt
        done.append(batch)
        return make(self, batch, types)

    asked = options(made, tmp_path, kept=made / "kept.json")
    monkeypatch.setattr(row_ranges.BlockMaker, "make", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reap2gguf.build(asked)
    monkeypatch.setattr(row_ranges.BlockMaker, "make", make)
    reap2gguf.build(asked)
    assert len(done) == 20
    for name in ("x-Q4_K_M.gguf", "x-Q8_0.gguf"):
        assert stored(tmp_path / "x-GGUF" / name) == stored(bundle / name)


def test_all_experts_in_the_same_types(made: Path, source: Path, tmp_path: Path) -> None:
    """llama.cpp computes what it computes with the source."""
    more = {"keep_experts": 16, "compression": None, "recipes": ("Q4_K_M",)}
    reap2gguf.build(options(made, tmp_path, **more))
    folder = tmp_path / "x-GGUF"
    (record,) = Manifest.load(folder).gguf
    assert record.source_blocks == len(record.tensors)
    assert n_equal(folder / record.file, by_gguf_py(source, None)) == len(record.tensors)
    vocab = json.loads((EXAMPLE / "config.json").read_text())["vocab_size"]
    assert torch.equal(of_file(folder / record.file, vocab), of_file(source, vocab))
    assert not reap2gguf.verify(folder, source=source).violations
    card = (folder / "README.md").read_text()
    assert "nothing was\nquantized again.\nOf the experts, nothing was removed" in card


@pytest.mark.parametrize("weighted", [False, True])
def test_quantize_keeps_blocks(source: Path, tmp_path: Path, weighted: bool) -> None:
    """Importance changes nothing of them: their values are known only as they were rounded."""
    imatrix = random_imatrix(tensors_of(EXAMPLE)) if weighted else None
    output, notes = tmp_path / "again.gguf", list[str]()
    reap2gguf.quantize(
        source,
        "Q4_K_M",
        output,
        imatrix=imatrix,
        progress=lambda event: notes.append(str(event)),
    )
    expected = by_gguf_py(source, None)
    same = n_equal(output, expected)
    assert same > 0.9 * len(expected)  # with importance, llama.cpp's mixture gives other types
    count = f"all {same}" if same == len(expected) else f"{same} of {len(expected)}"
    assert any(f"{count} tensors keep the source's blocks" in note for note in notes)


def test_files_alone_are_verified(bundle: Path, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "eight.gguf"
    reap2gguf.quantize(source, "Q8_0", output)
    report = reap2gguf.verify(output, bundle / "x-Q8_0.gguf", source=source)
    assert not report.violations
    assert list(report.levels.values()) == [Level.EXACT, Level.EXACT]
    info = read_gguf_header(output).tensors["blk.2.attn_norm.weight"]
    with open(output, "r+b") as file:
        file.seek(info.offset)
        file.write(b"\1\2\3\4")
    (found,) = reap2gguf.verify(output, source=source).violations
    assert "blk.2.attn_norm.weight" in found
    assert "expected the source's blocks of F32, byte for byte" in found


def test_types_that_need_importance_do_not_where_blocks_are_kept(
    made: Path, tmp_path: Path
) -> None:
    imatrix = random_imatrix(tensors_of(EXAMPLE))
    first = tmp_path / "first.gguf"
    reap2gguf.quantize(EXAMPLE, "IQ2_XS", first, imatrix=imatrix)
    with pytest.raises(RecipeError, match="needs an importance"):
        reap2gguf.quantize(EXAMPLE, "IQ2_XS", tmp_path / "none.gguf")
    types = {one.name: one.tensor_type.name for one in GGUFReader(first).tensors}
    recipe = tmp_path / "same.toml"
    recipe.write_text(_recipe_of(types))
    reap2gguf.quantize(first, recipe, tmp_path / "again.gguf")
    assert stored(tmp_path / "again.gguf") == stored(first)


def _recipe_of(types: dict[str, str]) -> str:
    rules = [
        f'[[rules]]\nmatch = "{name}"\ntype = "{kind}"\n'
        for name, kind in types.items()
        if kind != "F32"
    ]
    return 'title = "the same"\nlabel = "SAME"\nfile_type = "IQ2_XS"\n' + "\n".join(rules)


def test_of_parts(source: Path, made: Path, bundle: Path, tmp_path: Path) -> None:
    """A source in parts gives what the whole one does."""
    parts = in_parts(source, tmp_path / "parts", 2_500_000)
    assert len(parts) > 1
    for name, file in (("of_parts", parts[0]), ("of_whole", source)):
        reap2gguf.quantize(file, "Q8_0", tmp_path / f"{name}.gguf")
    assert stored(tmp_path / "of_parts.gguf") == stored(tmp_path / "of_whole.gguf")
    reap2gguf.build(options(made, tmp_path, model=str(parts[0]), kept=made / "kept.json"))
    folder = tmp_path / "x-GGUF"
    assert stored(folder / "x-Q4_K_M.gguf") == stored(bundle / "x-Q4_K_M.gguf")
    assert not reap2gguf.verify(folder, source=parts[0]).violations


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_of_every_architecture(case: Any, tmp_path: Path) -> None:
    """Norms to which one is added, heads in another order, biases: all have the source's bytes."""
    source = exported(case.tiny, tmp_path, "Q8_0")
    reap2gguf.quantize(source, "Q8_0", tmp_path / "again.gguf")
    assert stored(tmp_path / "again.gguf") == stored(source)
    assert not part_of(tmp_path / "again.gguf").exists()


def test_mxfp4_stays_where_another_type_has_no_fewer_bits(tmp_path: Path) -> None:
    """A recipe gives a GGUF file of gpt-oss the types that it gives the safetensors."""
    folder = as_mxfp4(GPT_OSS).write(tmp_path / "model")
    for recipe in ("MXFP4_MOE", "q4km"):
        reap2gguf.quantize(folder, recipe, tmp_path / f"{recipe}.gguf")
    reap2gguf.quantize(tmp_path / "MXFP4_MOE.gguf", "q4km", tmp_path / "again.gguf")
    found, expected = stored(tmp_path / "again.gguf"), stored(tmp_path / "q4km.gguf")
    assert {name: kind for name, (kind, *_) in found.items()} == {
        name: kind for name, (kind, *_) in expected.items()
    }
    experts = [name for name in expected if "_exps.weight" in name]
    assert {name: found[name] for name in experts} == {name: expected[name] for name in experts}
    with open_model(str(tmp_path / "MXFP4_MOE.gguf"), Silent()) as opened:
        tensors = opened.model.gguf_tensors(opened.checkpoint.tensors)
        facts = opened.model.facts
        resolved = resolve(load_recipe("q4km"), tensors, facts, facts.n_experts, True)
    said = list(copied_lines(resolved))
    assert "tensors keep the source's blocks" in said[0]
    assert f"{len(experts)} tensors stay in the MXFP4" in said[1]
    assert not any("_exps" in line for line in odd_row_lines(resolved))


def test_a_plan_says_it(made: Path, source: Path, tmp_path: Path) -> None:
    text = "--calibration", made / "text.txt", "--max-length", 64
    asked = "--output", tmp_path, *text, "--recipe", "Q8_0"
    result = run("plan", source, *asked)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "tensors keep the source's blocks; the others are quantized a second time" in said
    result = run("plan", source, "--output", tmp_path, *text)
    assert "tensors keep the source's blocks" in " ".join(result.output.split())


def test_a_bundle_is_evaluated(made: Path, bundle: Path, source: Path) -> None:
    """Beside the source, and beside the source without the experts that were removed."""
    asked = reap2gguf.EvaluateOptions(text=str(made / "text.txt"), chunk=64, chunks=2)
    found = reap2gguf.evaluate(bundle, source=source, options=asked, compute=CPU)
    kinds = {one.name: (one.kind, one.n_experts) for one in found.variants}
    names = ["x-Q4_K_M.gguf", "x-Q8_0.gguf"]
    expected = {"source": ("source", 16), "pruned": ("pruned", 12)}
    assert kinds == expected | {name: ("gguf", 12) for name in names}
    divergence = {
        (one.variant, one.reference): one.divergence.mean.value for one in found.comparisons
    }
    of_file = sum(one.data.nbytes for one in GGUFReader(bundle / names[0]).tensors)
    sizes = {one.name: one.n_bytes for one in found.variants}
    assert sizes["pruned"] == sizes[names[0]] == of_file  # it has the blocks of all its tensors
    assert divergence[names[0], "pruned"] == pytest.approx(0, abs=1e-6)
    assert divergence["pruned", "source"] > 10 * divergence[names[1], "pruned"] >= 0
    assert divergence[names[0], "source"] == pytest.approx(divergence["pruned", "source"])


def test_a_build_evaluates_it(made: Path, tmp_path: Path) -> None:
    asked = options(made, tmp_path, kept=made / "kept.json", evaluate="always")
    found = reap2gguf.plan(asked)
    assert found.n_variants == 4
    reap2gguf.build(asked)
    folder = tmp_path / "x-GGUF"
    evaluation = Manifest.load(folder).evaluation
    assert evaluation is not None
    assert [one.name for one in evaluation.variants][:2] == ["source", "pruned"]
    pruned = evaluation.variant("pruned")
    assert pruned is not None
    assert 4 < pruned.bits_per_weight < 8
    assert not reap2gguf.verify(folder, source=made / "Example-Q4_K_M.gguf").violations
