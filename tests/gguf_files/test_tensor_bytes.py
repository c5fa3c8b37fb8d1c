"""Rows of open files are those that the header reads, also of a file in parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reap2gguf.errors import ArtifactError
from reap2gguf.gguf_files import tensor_bytes
from reap2gguf.gguf_files.reader import GgufHeader, read_gguf_header
from reap2gguf.gguf_files.split import SplitHeader
from reap2gguf.gguf_files.tensor_bytes import opened_tensors
from tests.exporting.files import export_files, plain


@pytest.fixture
def header(tiny: Path, tmp_path: Path) -> GgufHeader:
    path = export_files(tiny, tmp_path, [plain("Q8_0")])["Q8_0"]
    return read_gguf_header(path)


@pytest.mark.parametrize("most", [2**30, 1000])
def test_rows_are_those_of_the_header(
    most: int, header: GgufHeader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_bytes, "_READ_BYTES", most)
    whole = SplitHeader(header.path, header.metadata, header.tensors, parts=[header])
    for one in (header, whole):
        with opened_tensors(one) as tensors:
            for name, info in header.tensors.items():
                n_rows = info.n_bytes // info.row_bytes
                buffer = np.empty((n_rows - n_rows // 2) * info.row_bytes, np.uint8)
                tensors.read(name, n_rows // 2, buffer)
                assert np.array_equal(buffer, header.read(name, n_rows // 2).reshape(-1)), name


def test_a_file_that_was_cut_is_named(header: GgufHeader, tmp_path: Path) -> None:
    info = next(iter(header.tensors.values()))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(header.path.read_bytes()[: info.offset + 5])
    moved = GgufHeader(cut, header.metadata, header.tensors)
    with (
        opened_tensors(moved) as tensors,
        pytest.raises(ArtifactError, match=r"cut\.gguf: ends inside tensor"),
    ):
        tensors.read(info.name, 0, np.empty(info.n_bytes, np.uint8))
    with (
        pytest.raises(OSError, match="gone"),
        opened_tensors(GgufHeader(tmp_path / "gone", {}, header.tensors)),
    ):
        raise AssertionError
