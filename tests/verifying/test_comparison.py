"""Blocks that are made again: once for all files, and called exact only where all are equal."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import DependencyError
from reap2gguf.exporting.row_ranges import BlockMaker, RowRange
from reap2gguf.ggml import load_ggml
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from reap2gguf.quantizing.kernels.compiled import VARIABLE, load_kernels
from reap2gguf.quantizing.quantizer import Quantizer, load_quantizer
from reap2gguf.verifying.exactness import EXACT_TYPES, QUICK_TYPES, Exactness
from reap2gguf.verifying.gguf_values import FileValues, compare_files
from tests.exporting.files import export_files, gguf_tensors, random_imatrix
from tests.verifying.gguf_changes import change_rows
from tests.verifying.test_gguf_values import checkpoint_of, flip, make, of_type


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(tmp_path_factory.mktemp("random"), lambda tensors: None)


QUICK = sorted(QUICK_TYPES - EXACT_TYPES, key=lambda one: one.name)
needs_kernels = pytest.mark.skipif(load_kernels() is None, reason="no kernels are compiled here")


@needs_kernels
@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
def test_equal_bytes_of_quick_types_are_exact(weighted: bool, folder: Path, tmp_path: Path) -> None:
    imatrix = random_imatrix(gguf_tensors(folder)) if weighted else None
    quantizer = load_quantizer()
    assert all(quantizer.uses_kernel(one, weighted) for one in QUICK)
    for tensor_type in QUICK:
        made = make(folder, tmp_path, tensor_type, imatrix)
        found = made.compared(made.within_bounds)
        assert (found.violations, found.is_exact, found.differing) == ([], True, [])
    # not where the importance is unknown, or another program made it
    for exactness in (Exactness(imatrix=imatrix, tries_bytes=False), Exactness()):
        is_exact = made.compared(exactness).is_exact
        assert is_exact == (exactness.tries_bytes and not weighted)


@needs_kernels
def test_bytes_that_differ_within_bounds_are_not_called_exact(folder: Path, tmp_path: Path) -> None:
    made = make(folder, tmp_path, GGMLQuantizationType.Q4_K, None)
    name = "blk.0.attn_q.weight"
    change_rows(made.path, name, partial(flip, byte=144 * 9 + 20, bit=0))  # one step of one weight
    found = made.compared(made.within_bounds)
    assert (found.violations, found.is_exact, found.differing) == ([], False, ["Q4_K"])


def test_a_type_without_a_kernel_is_not_called_exact(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(folder, tmp_path, GGMLQuantizationType.Q4_K, None)
    monkeypatch.setenv(VARIABLE, "off")
    found = made.compared(made.within_bounds)
    assert (found.violations, found.is_exact, found.differing) == ([], False, [])
    assert made.compared(made.exact).is_exact


def test_files_are_compared_in_one_pass(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each range is read once, each type of it is made once, and damage is named by its file."""
    recipes = [of_type(GGMLQuantizationType[name]) for name in ("Q4_K", "Q6_K", "Q8_0")]
    paths = list(export_files(folder, tmp_path, recipes, None, 1).values())
    twin = tmp_path / "twin.gguf"
    twin.write_bytes(paths[0].read_bytes())
    name = "blk.0.ffn_up_exps.weight"
    change_rows(paths[1], name, lambda rows: rows[300].fill(0))
    change_rows(twin, name, lambda rows: rows[7].fill(0))
    reads: list[RowRange] = []
    makes: list[tuple[RowRange, GGMLQuantizationType]] = []
    read, quantize = BlockMaker.read, BlockMaker.quantize

    def count_read(self: BlockMaker, rows: RowRange) -> Any:
        reads.append(rows)
        return read(self, rows)

    def count_quantize(self: BlockMaker, rows: RowRange, stored: Any, kind: Any) -> Any:
        makes.append((rows, kind))
        return quantize(self, rows, stored, kind)

    monkeypatch.setattr(BlockMaker, "read", count_read)
    monkeypatch.setattr(BlockMaker, "quantize", count_quantize)
    with Checkpoint.open(folder) as checkpoint:
        tensors = describe(checkpoint).gguf_tensors(checkpoint.tensors)
        exactness = Exactness(True, None, load_ggml().label)
        files = [FileValues(read_gguf_header(path), tensors, exactness) for path in (*paths, twin)]
        found = compare_files(files, checkpoint, 1, Silent())
    assert [len(one.violations) for one in found] == [0, 1, 0, 1]
    assert found[1].violations[0].startswith(f"Q6_K.gguf: {name} expert 1")
    assert found[3].violations[0].startswith(f"twin.gguf: {name} expert 0")
    assert len(set(map(id, reads))) == len(reads)
    assert len({(id(rows), kind) for rows, kind in makes}) == len(makes)
    matrices = [one for one in reads if one.tensor.name == name]
    assert [one.matrix for one in matrices] == [0, 1, 2]
    # after its violation, Q6_K's file needs no more of this tensor
    assert sum(rows.tensor.name == name for rows, _ in makes) == 3 * 3 - 1


def test_a_faulty_kernel_is_no_violation_of_a_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(folder, tmp_path, GGMLQuantizationType.Q4_K, None)

    def fail(*_: Any) -> None:
        raise DependencyError("the compiled kernel and libggml make different bytes")

    monkeypatch.setattr(Quantizer, "quantize", fail)
    for exactness in (made.within_bounds, made.exact):
        with pytest.raises(DependencyError, match="different bytes"):
            made.compared(exactness)
