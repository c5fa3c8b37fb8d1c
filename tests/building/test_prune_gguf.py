"""GGUF files without some experts: their blocks, and all else that must stay or follow."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader

import reap2gguf
from reap2gguf.atomic import part_of
from reap2gguf.errors import (
    ArtifactError,
    OutputError,
    Reap2ggufError,
    UnsupportedModelError,
    UsageError,
    VerificationError,
)
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.gguf_files.split import read_whole_header
from reap2gguf.gguf_source import checking, writing
from reap2gguf.gguf_source.inspection import GgufInspection
from reap2gguf.hub.opened import open_model
from reap2gguf.models.from_gguf import model_from_gguf
from reap2gguf.models.table import BY_GGUF
from reap2gguf.progress import Silent
from tests.exporting.files import random_imatrix, stored
from tests.gguf_source.files import exported, exported_after_pruning, in_parts, kept_of
from tests.models.layouts import FIRST, Case
from tests.models.oracles import of_file
from tests.test_cli import run
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

MODEL = TinyQwen3Moe(hidden=256, width=256, n_experts=6)
KEPT = {0: (0, 1, 3, 5), 1: (0, 2, 3, 4)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("files")
    exported(MODEL, made, "Q4_K_M").rename(made / "Tiny-Q4_K_M.gguf")
    return made


@pytest.fixture
def source(files: Path) -> Path:
    return files / "Tiny-Q4_K_M.gguf"


def pruned(source: Path, output: Path, kept: Any = KEPT, **more: Any) -> Path:
    return reap2gguf.prune(source, None, output, kept=kept, **more).folder


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_blocks_are_those_of_the_pruned_safetensors(case: Case, tmp_path: Path) -> None:
    """Of every architecture: sliced blocks equal those that pruning before quantizing gives."""
    source = exported(case.tiny, tmp_path, "Q8_0")
    kept = kept_of(model_from_gguf(read_gguf_header(source), BY_GGUF).model)
    full = kept_of(case.model) if case.model.facts.has_mtp else kept
    (tmp_path / "other").mkdir()
    expected = exported_after_pruning(tmp_path / "model", full, tmp_path / "other", "Q8_0")
    found = pruned(source, tmp_path / "out.gguf", kept)
    assert stored(found) == stored(expected)
    ours, theirs = read_gguf_header(found), read_gguf_header(expected)
    assert {n: t.shape for n, t in ours.tensors.items()} == {
        n: t.shape for n, t in theirs.tensors.items()
    }
    of_model = [key for key in theirs.metadata if key.startswith(f"{case.model.gguf_arch}.")]
    assert {k: ours.metadata.get(k) for k in of_model} == {k: theirs.metadata[k] for k in of_model}
    report = reap2gguf.verify(found, source=source)
    assert not report.violations


@pytest.mark.parametrize("file_type", ["BF16", "Q4_K_M", "IQ4_NL"])
@pytest.mark.parametrize("tiny", [MODEL, TinyQwen35Moe(hidden=256, width=256)], ids=["3", "3.5"])
def test_blocks_of_other_types(tiny: Any, file_type: str, tmp_path: Path) -> None:
    source = exported(tiny, tmp_path, file_type)
    kept = kept_of(model_from_gguf(read_gguf_header(source), BY_GGUF).model, n_dropped=2)
    (tmp_path / "other").mkdir()
    found = pruned(source, tmp_path / "out.gguf", kept)
    ours = stored(found)
    theirs = stored(exported_after_pruning(tmp_path / "model", kept, tmp_path / "other", file_type))
    # llama.cpp's mixture may give a tensor another type where there are fewer experts
    same = {name for name in theirs if ours[name][0] == theirs[name][0]}
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    assert len(same) > len(ours) / 2


def test_blocks_by_gguf_py(source: Path, tmp_path: Path) -> None:
    """gguf-py reads from both files the same experts, under their old and their new numbers."""
    found = pruned(source, tmp_path / "out.gguf")
    before, after = ({t.name: t for t in GGUFReader(path).tensors} for path in (source, found))
    assert list(before) == list(after)
    for name, tensor in after.items():
        old = before[name]
        assert tensor.tensor_type == old.tensor_type
        is_cut = "_exps" in name or "ffn_gate_inp." in name
        chosen = list(KEPT[int(name.split(".")[1])]) if is_cut else slice(None)
        np.testing.assert_array_equal(tensor.data, old.data[chosen], err_msg=name)


def test_the_header_keeps_all_but_what_changes(source: Path, tmp_path: Path) -> None:
    found = pruned(source, tmp_path / "Small-Q4_K_M.gguf")
    before, after = read_gguf_header(source), read_gguf_header(found)
    added = {key: after.metadata[key] for key in after.metadata.keys() - before.metadata.keys()}
    assert added == {
        "reap2gguf.version": reap2gguf.__version__,
        "reap2gguf.source": "Tiny-Q4_K_M.gguf",
        "reap2gguf.method": "given",
        "reap2gguf.source_expert_count": 6,
        "reap2gguf.kept_experts": [*KEPT[0], *KEPT[1]],
    }
    changed = {key for key, value in before.metadata.items() if after.metadata.get(key) != value}
    assert changed == {"general.name", "qwen3moe.expert_count", "general.size_label"}
    assert after.metadata["general.name"] == "Small"
    assert after.metadata["qwen3moe.expert_count"] == 4
    assert {key: after.kinds[key] for key in before.kinds} == before.kinds
    assert list(after.metadata)[: len(before.metadata)] == list(before.metadata)


def test_llama_cpp_computes_what_it_makes_of_the_pruned_safetensors(
    source: Path, files: Path, tmp_path: Path
) -> None:
    found = pruned(files / "Tiny-Q4_K_M.gguf", tmp_path / "out.gguf")
    expected = exported_after_pruning(files / "model", KEPT, tmp_path, "Q4_K_M")
    assert torch.equal(of_file(found, MODEL.vocab), of_file(expected, MODEL.vocab))


def test_a_block_for_multi_token_prediction_is_dropped(tmp_path: Path) -> None:
    tiny = TinyQwen35Moe(hidden=256, width=256)
    source = exported(tiny, tmp_path, "Q8_0")
    model = model_from_gguf(read_gguf_header(source), BY_GGUF, keep_mtp=False).model
    found = pruned(source, tmp_path / "out.gguf", kept_of(model), mtp="drop")
    header = read_gguf_header(found)
    last = f"blk.{model.facts.n_layers}."
    assert not [name for name in header.tensors if name.startswith(last)]
    assert header.metadata["qwen35moe.block_count"] == model.facts.n_layers
    assert "qwen35moe.nextn_predict_layers" not in header.metadata
    assert not model_from_gguf(header, BY_GGUF).model.facts.has_mtp
    assert not reap2gguf.verify(found, source=source).violations


def test_parts_stay_parts(source: Path, tmp_path: Path) -> None:
    parts = in_parts(source, tmp_path / "parts", 400_000)
    assert len(parts) > 2
    whole = pruned(source, tmp_path / "whole.gguf")
    first = pruned(parts[0], tmp_path / "out.gguf")
    assert first.name == f"out-00001-of-{len(parts):05d}.gguf"
    assert len(list(tmp_path.glob("out-*.gguf"))) == len(parts)
    ours, expected = read_whole_header(first), read_gguf_header(whole)
    assert {n: t.shape for n, t in ours.tensors.items()} == {
        n: t.shape for n, t in expected.tensors.items()
    }
    for name in expected.tensors:
        np.testing.assert_array_equal(ours.read(name), expected.read(name))
    for old, new in zip(parts, sorted(tmp_path.glob("out-*.gguf")), strict=True):
        assert list(read_gguf_header(old).tensors) == list(read_gguf_header(new).tensors)
    assert not reap2gguf.verify(first, source=parts[0]).violations


def test_the_name_of_a_first_part_is_one_of_all(source: Path, tmp_path: Path) -> None:
    """What is printed is there, whichever name was typed, and no number comes twice."""
    parts = in_parts(source, tmp_path / "parts", 400_000)
    n = len(parts)
    expected = [f"out-{at + 1:05d}-of-{n:05d}.gguf" for at in range(n)]
    (tmp_path / "kept.json").write_text(json.dumps({str(k): v for k, v in KEPT.items()}))
    for typed in ("out.gguf", expected[0]):
        folder = tmp_path / typed.removesuffix(".gguf")
        folder.mkdir()
        words = "prune", parts[0], "--kept", tmp_path / "kept.json", "-o", folder / typed
        result = run(*words)
        assert result.exit_code == 0, result.output
        assert f"{folder / expected[0]}: keeps 4 of 6 experts per layer" in result.output
        assert sorted(path.name for path in folder.iterdir()) == expected
        assert read_gguf_header(folder / expected[0]).metadata["general.name"] == "out"
        assert f"{folder / expected[0]}: exists already" in run(*words).output
        assert run(*words, "--overwrite").exit_code == 0
        assert sorted(path.name for path in folder.iterdir()) == expected


@pytest.mark.parametrize(
    ("typed", "is_split", "message"),
    [
        ("o-00001-of-00009.gguf", True, r"is the name of part 1 of 9, and MODEL has \d+ parts"),
        ("o-00002-of-00002.gguf", False, "is the name of part 2 of 2, and MODEL has one part"),
    ],
)
def test_the_name_of_another_part(
    source: Path, tmp_path: Path, typed: str, is_split: bool, message: str
) -> None:
    model = in_parts(source, tmp_path / "parts", 400_000)[0] if is_split else source
    with pytest.raises(UsageError, match=f"{message}; pass o.gguf"):
        pruned(model, tmp_path / typed)
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize("n_named", [0, 1, 2])
def test_interrupted_while_parts_get_their_names(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_named: int
) -> None:
    parts = in_parts(source, tmp_path / "parts", 400_000)
    rename, named = writing.rename, []

    def interrupted(old: Path, new: Path) -> None:
        if len(named) == n_named:
            raise KeyboardInterrupt
        named.append(new)
        rename(old, new)

    with monkeypatch.context() as broken:
        broken.setattr(writing, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pruned(parts[0], tmp_path / "out.gguf")
    if n_named:  # of other experts, it is another call: it replaces nothing
        other = {0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}
        with pytest.raises(OutputError, match="exists already"):
            pruned(parts[0], tmp_path / "out.gguf", other)
    first = pruned(parts[0], tmp_path / "out.gguf")
    assert not reap2gguf.verify(first, source=parts[0]).violations
    assert len(list(tmp_path.glob("out*"))) == len(parts)


def test_quantizing_a_pruned_file_keeps_what_it_says(source: Path, tmp_path: Path) -> None:
    once = pruned(source, tmp_path / "once.gguf")
    twice = pruned(once, tmp_path / "twice.gguf", {0: (0, 2, 3), 1: (1, 2, 3)})
    for file in (once, twice):
        made = reap2gguf.quantize(file, "Q8_0", tmp_path / f"q8-{file.name}").path
        before, after = read_gguf_header(file).metadata, read_gguf_header(made).metadata
        of_pruning = {k: v for k, v in before.items() if k.startswith("reap2gguf.")}
        assert len(of_pruning) > 5
        assert {k: after[k] for k in of_pruning if k != "reap2gguf.recipe"} == {
            k: v for k, v in of_pruning.items() if k != "reap2gguf.recipe"
        }
        assert after["reap2gguf.recipe"] == "q8_0"
        found = reap2gguf.inspect(made)
        assert isinstance(found, GgufInspection)
        assert found.kept == reap2gguf.inspect(file).kept  # type: ignore[union-attr]
    whole = reap2gguf.quantize(source, "Q8_0", tmp_path / "whole.gguf").path
    assert {k for k in read_gguf_header(whole).metadata if k.startswith("reap2gguf.")} <= {
        *("reap2gguf.recipe", "reap2gguf.version", "reap2gguf.source")
    }


def test_keys_that_do_not_fit_are_not_repeated(source: Path, tmp_path: Path) -> None:
    once = pruned(source, tmp_path / "once.gguf")
    raw = once.read_bytes()
    assert raw.count(b"Tiny-Q4_K_M.gguf") == 1
    once.write_bytes(raw.replace(b"Tiny-Q4_K_M.gguf", b"Tiny\x1b[2JK_M.gguf"))
    notes: list[str] = []
    made = reap2gguf.quantize(
        once, "Q8_0", tmp_path / "q8.gguf", progress=lambda event: notes.append(str(event))
    ).path
    assert "reap2gguf.kept_experts" not in read_gguf_header(made).metadata
    assert any("do not fit it" in note for note in notes)


def test_a_file_that_was_quantized_again(source: Path, tmp_path: Path) -> None:
    once = pruned(source, tmp_path / "once.gguf")
    made = reap2gguf.quantize(once, "Q8_0", tmp_path / "q8.gguf").path
    for origin in (source, once):  # its header says which experts of the first it has
        assert not reap2gguf.verify(made, source=origin).violations
    damaged = bytearray(made.read_bytes())
    damaged[-1_000:-900] = bytes(100)
    made.write_bytes(damaged)
    for origin in (source, once):
        assert reap2gguf.verify(made, source=origin).violations


def test_pruned_twice_says_what_it_has_of_the_original(source: Path, tmp_path: Path) -> None:
    once = pruned(source, tmp_path / "once.gguf")
    twice = pruned(once, tmp_path / "twice.gguf", {0: (0, 2, 3), 1: (1, 2, 3)})
    keys = read_gguf_header(twice).metadata
    assert keys["reap2gguf.source"] == "once.gguf"
    assert keys["reap2gguf.kept_experts"] == [0, 2, 3, 1, 2, 3]
    assert keys["reap2gguf.original.source"] == "Tiny-Q4_K_M.gguf"
    assert keys["reap2gguf.original.expert_count"] == 6
    assert keys["reap2gguf.original.kept_experts"] == [0, 3, 5, 2, 3, 4]
    assert not reap2gguf.verify(twice, source=once).violations
    again = reap2gguf.quantize(twice, "Q8_0", tmp_path / "q8.gguf").path
    for file in (twice, again):
        (violation,) = reap2gguf.verify(file, source=source).violations
        assert "was made from 'once.gguf', of 4 experts per layer, and" in violation


@pytest.mark.parametrize("after", [0, 3, 9])
def test_an_interrupted_call_resumes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    whole = pruned(source, tmp_path / "whole.gguf")
    copy, copied = writing._copy_tensor, []

    def counted(plan: Any, one: Any, file: Any, journal: Any, task: Any) -> None:
        if one.info.name not in journal:
            copied.append(one.info.name)
        copy(plan, one, file, journal, task)

    def interrupted(*arguments: Any) -> None:
        if len(copied) >= after:
            raise KeyboardInterrupt
        counted(*arguments)

    output = tmp_path / "out.gguf"
    monkeypatch.setattr(writing, "_copy_tensor", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pruned(source, output)
    assert not output.exists()
    monkeypatch.setattr(writing, "_copy_tensor", counted)
    assert pruned(source, output) == output
    names = list(read_gguf_header(source).tensors)
    assert copied == names  # none twice
    assert stored(output) == stored(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "whole.gguf"]


def test_what_is_written_wrongly_gets_no_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = writing.violations_in

    def damaged(slices: Any, files: Any, progress: Any) -> Any:
        (path, _, start), *_ = files
        with open(path, "r+b") as file:
            file.seek(start.offsets["blk.1.ffn_up_exps.weight"] + 1)
            file.write(b"\xff\xfe\xfd")
        return rename(slices, files, progress)

    monkeypatch.setattr(writing, "violations_in", damaged)
    with pytest.raises(VerificationError) as caught:
        pruned(source, tmp_path / "out.gguf")
    assert (
        "'blk.1.ffn_up_exps.weight': its expert 0 is not the source's" in caught.value.violations[0]
    )
    assert not list(tmp_path.iterdir())


def test_a_source_that_ends_early(source: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(source.read_bytes()[:-5000])
    with pytest.raises(ArtifactError, match=r"short.gguf: .*truncated"):
        pruned(short, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("output", "more", "problem"),
    [
        ("out", {}, "pass a name that ends in .gguf"),
        ("out.gguf", {"repair": "ridge"}, "--repair: it makes new weights"),
        ("out.gguf", {"method": "ream"}, "--method ream: it makes new weights"),
        ("out.gguf", {"dequantize": "bf16"}, "--dequantize: the blocks of a GGUF file stay"),
        ("out.gguf", {"kept": {0: [0, 1]}}, "layer 1 is missing"),
        ("out.gguf", {"kept": {0: [0, 6], 1: [0, 1]}}, "layer 0 keeps expert 6"),
    ],
)
def test_refused(
    source: Path, tmp_path: Path, output: str, more: dict[str, Any], problem: str
) -> None:
    with pytest.raises(Reap2ggufError, match=problem):
        pruned(source, tmp_path / output, **{"kept": KEPT, **more})
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_there(source: Path, tmp_path: Path) -> None:
    pruned(source, tmp_path / "out.gguf")
    with pytest.raises(OutputError, match="exists already"):
        pruned(source, tmp_path / "out.gguf")


def test_the_source_is_not_replaced(source: Path) -> None:
    before = source.read_bytes()
    with pytest.raises((OutputError, UsageError)):
        pruned(source, source)
    assert source.read_bytes() == before


def test_an_architecture_that_is_not_known(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "falcon")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="architecture 'falcon' is not implemented"):
        pruned(tmp_path / "x.gguf", tmp_path / "out.gguf")


def test_pruned_by_the_weights_alone(source: Path, files: Path, tmp_path: Path) -> None:
    """By blocks that hold the same values, the same experts stay."""
    lossless = exported(MODEL, tmp_path, "BF16")
    of_file = reap2gguf.select(lossless, method="aimer", keep_experts=4)
    of_folder = reap2gguf.select(files / "model", method="aimer", keep_experts=4)
    assert of_file.kept == of_folder.kept


def test_as_it_is_typed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept.json").write_text(json.dumps({str(k): v for k, v in KEPT.items()}))
    output = tmp_path / "out.gguf"
    result = run("prune", source, "--kept", tmp_path / "kept.json", "-o", output)
    assert result.exit_code == 0, result.output
    assert "keeps 4 of 6 experts per layer" in result.output
    result = run("verify", "out.gguf", "--source", source)
    assert result.exit_code == 0, result.output
    assert "exact, every byte made or read again: out.gguf" in result.output


def test_a_changed_block_is_found(source: Path, tmp_path: Path) -> None:
    output = pruned(source, tmp_path / "out.gguf")
    info = read_gguf_header(output).tensors["blk.0.ffn_gate_inp.weight"]
    with open(output, "r+b") as file:
        file.seek(info.offset + 3 * info.row_bytes)
        file.write(b"\1\2\3\4")
    report = reap2gguf.verify(output, source=source)
    (found,) = report.violations
    assert found.startswith("out.gguf: tensor 'blk.0.ffn_gate_inp.weight': its expert 3 is not the")


@pytest.mark.parametrize("size", [2**12, 2**30])
def test_large_tensors_are_read_in_steps(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    expected = stored(pruned(source, tmp_path / "whole.gguf"))
    monkeypatch.setattr("reap2gguf.gguf_source.slices._READ_BYTES", size)
    monkeypatch.setattr(checking, "_READ_BYTES", size)
    assert stored(pruned(source, tmp_path / "out.gguf")) == expected


def test_unfinished_files_of_another_source(source: Path, tmp_path: Path) -> None:
    """A journal of other experts is not resumed."""
    output = tmp_path / "out.gguf"
    journal = writing.journal_path(output)
    journal.write_text(json.dumps({"key": "x", "done": {"output.weight": ""}}))
    part_of(output).write_bytes(os.urandom(100))
    assert stored(pruned(source, output)) == stored(pruned(source, tmp_path / "whole.gguf"))
    assert not journal.exists()


def test_inspected(source: Path, tmp_path: Path) -> None:
    """By gguf-py the same types and sizes."""
    found = reap2gguf.inspect(pruned(source, tmp_path / "Small-Q4_K_M.gguf"))
    assert isinstance(found, GgufInspection)
    tensors = GGUFReader(tmp_path / "Small-Q4_K_M.gguf").tensors
    for one in found.types:
        sizes = [int(t.n_bytes) for t in tensors if t.tensor_type.name == one.type]
        assert (one.n_tensors, one.n_bytes) == (len(sizes), sum(sizes))
    assert found.n_parameters == sum(int(t.n_elements) for t in tensors)
    assert (found.n_experts, found.source_experts, found.source) == (4, 6, "Tiny-Q4_K_M.gguf")
    assert found.kept == {layer: list(ids) for layer, ids in KEPT.items()}
    result = run("inspect", tmp_path / "Small-Q4_K_M.gguf")
    assert "keeps 4 of 6 experts of Tiny-Q4_K_M.gguf, chosen by given" in result.output
    assert "experts in each of 2 layers" in run("inspect", source).output
    values = json.loads(run("inspect", source, "--json").output)
    assert (values["kind"], values["kept"]) == ("gguf", {})
    assert run("inspect", source, "--csv").output.startswith("type,n_tensors,n_bytes")


def test_an_importance_matrix_is_cut_to_a_pruned_file(source: Path, tmp_path: Path) -> None:
    """The rows of the experts that stay, of the original's matrix, for a file pruned twice."""
    with open_model(str(source), Silent()) as opened:
        matrix = random_imatrix(opened.model.gguf_tensors(opened.checkpoint.tensors))
    once = pruned(source, tmp_path / "once.gguf")
    twice = pruned(once, tmp_path / "twice.gguf", {0: (0, 2, 3), 1: (1, 2, 3)})
    for file, ids in ((once, KEPT[1]), (twice, (2, 3, 4))):
        cut = reap2gguf.slice_imatrix(matrix, file).imatrix
        name = "blk.1.ffn_up_exps.weight"
        np.testing.assert_array_equal(cut.entries[name].sums, matrix.entries[name].sums[list(ids)])
    with pytest.raises(UsageError, match="does not say which experts it keeps"):
        reap2gguf.slice_imatrix(matrix, source)
