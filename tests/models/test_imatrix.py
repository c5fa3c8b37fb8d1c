"""Entries of an importance matrix are those that llama-imatrix collects, for every architecture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reap2gguf.observing.importance import ImportanceObserver
from tests.exporting.files import export_files, plain
from tests.models.layouts import FIRST, Case
from tests.observing.llama_collector import collect
from tests.observing.sweeps import rows_of, run_sweep


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_names_counts_and_sums(case: Case, tmp_path: Path) -> None:
    """The MTP block apart, which llama.cpp computes only when it drafts."""
    folder = case.tiny.write(tmp_path / "model")
    rows = rows_of(40, 32, 19)
    theirs = collect(export_files(folder, tmp_path, [plain("F32")])["F32"], rows)
    observer, _ = run_sweep(ImportanceObserver, folder, rows)
    block = f"blk.{case.model.facts.mtp_layer}."
    assert {name for name in observer.entries if not name.startswith(block)} == set(theirs.sums)
    for name, sums in theirs.sums.items():
        ours = observer.entries[name]
        np.testing.assert_array_equal(ours.counts, theirs.counts[name], err_msg=name)
        # llama-imatrix has as many rows as counts
        expected = sums.reshape(len(theirs.counts[name]), -1)
        assert ours.sums.shape == expected.shape
        np.testing.assert_allclose(
            ours.sums, expected, rtol=1e-3, atol=1e-4 * expected.max(), err_msg=name
        )
