"""Sizes of a plan against those of the files that are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import reap2gguf
from reap2gguf.messages import size
from reap2gguf.options import BuildOptions, CalibrationOptions, ComputeOptions
from tests.exporting.files import export_files, plain
from tests.gguf_source.files import in_parts
from tests.test_cli import run
from tests.tiny import EXAMPLE

CPU = ComputeOptions(device="cpu", threads=2, dtype="float32")


@pytest.mark.parametrize("max_bytes", [None, 2_500_000])
def test_planned_sizes_are_those_of_the_files(tmp_path: Path, max_bytes: int | None) -> None:
    """With their headers, of one file and of parts, whichever experts stay."""
    made = export_files(EXAMPLE, tmp_path, [plain("Q8_0")])["Q8_0"]
    source = made.rename(tmp_path / "Example-Q8_0.gguf")
    if max_bytes is not None:
        source = in_parts(source, tmp_path / "parts", max_bytes)[0]
    (tmp_path / "text.txt").write_text("A text of a few words that is long enough. " * 40)
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps({str(layer): list(range(layer, 12 + layer)) for layer in range(4)}))
    output = tmp_path / "out"
    text = CalibrationOptions(str(tmp_path / "text.txt"), samples=8, max_length=64)
    more: dict[str, Any] = {"calibration": text, "compute": CPU, "evaluate": "never"}
    asked = BuildOptions(model=str(source), output=output, kept=kept, name="x", **more)
    plan = reap2gguf.plan(asked)
    sizes = plan.file_sizes(plan.recipes[0])
    assert (len(sizes) > 1) == (max_bytes is not None)
    result = run("plan", source, "--output", output, "--kept", kept, "--name", "x")
    assert result.exit_code == 0, result.output
    parts = f" in {len(sizes)} parts" if max_bytes is not None else ""
    assert f"x-Q8_0.gguf  {size(sum(sizes))}{parts}\n" in result.output
    reap2gguf.build(asked)
    assert [one.stat().st_size for one in sorted((output / "x-GGUF").glob("x-*.gguf"))] == sizes
    assert sum(sizes) > plan.recipes[0].n_bytes
