"""A matrix of the unpruned model, cut to what bundles and folders of `prune` keep."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

import reap2gguf
from reap2gguf.building.pruned_models import Origin, PrunedModel, read_pruned
from reap2gguf.building.slicing import slice_to
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.errors import ArtifactError, UsageError, VerificationError
from reap2gguf.gguf_files.imatrix import Imatrix, ImatrixEntry, load_imatrix, save_dat
from tests.conftest import Bundle
from tests.tiny import REPOSITORY

WHOLE = REPOSITORY / "tests" / "data" / "tiny-qwen3-moe.imatrix.gguf"  # of llama-imatrix


def stored(path: Path) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    """The tensors of a file as gguf-py reads them."""
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}


def test_experts_are_those_of_the_manifest(built: Bundle, tmp_path: Path) -> None:
    output = tmp_path / "cut.gguf"
    found = reap2gguf.slice_imatrix(WHOLE, built.hf, output)
    assert (found.n_before, found.n_after, found.left_out) == (16, 12, ())
    kept = Manifest.load(built.hf).pruning.kept
    before, after = stored(WHOLE), stored(output)
    assert after.keys() == before.keys()
    for name, values in after.items():
        expected = before[name].reshape(-1, values.shape[-1])  # ggml drops an axis of 1
        if "_exps" in name:
            expected = expected[list(kept[int(name.split(".")[1])])]
        np.testing.assert_array_equal(values, expected, err_msg=name)
    # the same by the other folder, by its GGUF files alone, and as the older format has it
    alone = tmp_path / "alone-GGUF"
    shutil.copytree(built.gguf, alone)
    for folder in (built.gguf, alone):
        other = reap2gguf.slice_imatrix(WHOLE, folder).imatrix
        for name, entry in other.entries.items():
            np.testing.assert_array_equal(entry.sums, found.imatrix.entries[name].sums)
    save_dat(load_imatrix(WHOLE), tmp_path / "whole.dat")
    older = reap2gguf.slice_imatrix(tmp_path / "whole.dat", built.hf)
    # the older format does not say how many tokens an expert saw
    assert older.coverage == replace(found.coverage, experts=())
    for name, entry in older.imatrix.entries.items():
        np.testing.assert_allclose(
            entry.importance(), found.imatrix.entries[name].importance(), rtol=1e-6
        )


def test_it_fits_the_pruned_model(built: Bundle, tmp_path: Path) -> None:
    """`quantize` takes it, and the same weights come of it in both formats."""
    reap2gguf.slice_imatrix(WHOLE, built.hf, tmp_path / "cut.gguf")
    for ending in ("gguf", "dat"):
        matrix = tmp_path / f"cut.{ending}"
        reap2gguf.quantize(str(built.hf), "q4km", tmp_path / f"{ending}.gguf", imatrix=matrix)
    ours, older = (stored(tmp_path / f"{ending}.gguf") for ending in ("gguf", "dat"))
    assert ours.keys() == older.keys()
    own = reap2gguf.slice_imatrix(built.gguf / "imatrix.gguf", built.hf)
    assert (own.n_before, own.n_after) == (12, 12)


def test_a_folder_that_prune_wrote(built: Bundle, tmp_path: Path) -> None:
    (observations,) = (built.output / ".work" / "observations").iterdir()
    pruned = reap2gguf.prune(str(built.source), observations, tmp_path / "pruned", keep_experts=12)
    by_folder = reap2gguf.slice_imatrix(WHOLE, pruned.folder)
    by_bundle = reap2gguf.slice_imatrix(WHOLE, built.hf)
    assert by_folder.coverage == by_bundle.coverage
    for name, entry in by_bundle.imatrix.entries.items():
        np.testing.assert_array_equal(entry.sums, by_folder.imatrix.entries[name].sums)


def test_the_original_of_a_model_pruned_twice() -> None:
    shapes = {"blk.0.ffn_up_exps.weight": (2, 3, 4)}
    model = PrunedModel(shapes, (Origin({0: (0, 2)}, 3), Origin({0: (1, 4)}, 5)))
    sums = np.arange(20, dtype=np.float32).reshape(5, 4)

    def given(rows: int) -> Imatrix:
        name = "blk.0.ffn_up_exps.weight"
        return Imatrix({name: ImatrixEntry(name, sums[:rows], np.ones(rows, int))}, "", 1, 8)

    for rows, ids in ((2, [0, 1]), (3, [0, 2]), (5, [1, 4])):
        (one,) = slice_to(given(rows), model, "file").imatrix.entries.values()
        np.testing.assert_array_equal(one.sums, sums[ids])
    with pytest.raises(ArtifactError, match=r"file: has 4 experts per layer, expected 3 or 5 \("):
        slice_to(given(4), model, "file")
    unknown = PrunedModel(shapes, (Origin({0: (0, 2)}, None),))
    with pytest.raises(ArtifactError, match=r"has 1 experts per layer, expected more \(before"):
        slice_to(given(1), unknown, "file")
    assert slice_to(given(4), unknown, "file").n_before == 4


def test_the_pruned_file_that_is_read_is_not_replaced(built: Bundle, tmp_path: Path) -> None:
    source = next(built.gguf.glob("*-BF16.gguf"))
    kept = {layer: tuple(range(8)) for layer in range(4)}
    pruned = reap2gguf.prune(source, None, tmp_path / "pruned.gguf", kept=kept).folder
    before = pruned.read_bytes()
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="would replace the input"):
            reap2gguf.slice_imatrix(
                built.gguf / "imatrix.gguf", pruned, pruned, overwrite=overwrite
            )
    assert pruned.read_bytes() == before


def test_what_cannot_be_cut_is_refused(built: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no reap2gguf.json and no kept_experts.json"):
        reap2gguf.slice_imatrix(WHOLE, built.source)
    with pytest.raises(UsageError, match=r"name the \.gguf file"):
        reap2gguf.slice_imatrix(WHOLE, built.hf, tmp_path / "x.dat")
    copy = Path(shutil.copy(WHOLE, tmp_path / "whole.gguf"))
    with pytest.raises(UsageError, match="would replace the input"):
        reap2gguf.slice_imatrix(copy, built.hf, copy)
    with pytest.raises(UsageError, match="is a bundle, and its files are those that were built"):
        reap2gguf.slice_imatrix(copy, built.hf, built.gguf / "cut.gguf")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(built.gguf / "reap2gguf.json", bare)
    with pytest.raises(UsageError, match="neither the safetensors nor a whole GGUF file"):
        reap2gguf.slice_imatrix(WHOLE, bare)
    record = json.loads((built.hf / "reap2gguf.json").read_text())
    (bare / "kept_experts.json").write_text(json.dumps(record["pruning"]["kept"]))
    (bare / "reap2gguf.json").unlink()
    with pytest.raises(VerificationError) as refused:
        read_pruned(bare)
    assert "config.json" in refused.value.violations[0]
