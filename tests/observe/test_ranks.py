"""Two processes that share out the rows, started by torchrun, against one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from reap2gguf.artifacts.imatrix import load_imatrix
from reap2gguf.artifacts.manifest import Manifest
from reap2gguf.artifacts.observations import Observations
from reap2gguf.processes import Processes, processes

CALIBRATION = Path(__file__).resolve().parents[2] / "calibration"
COMPUTE = ("--device", "cpu", "--dtype", "float32", "--threads", "1")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """All of the embedded texts in one file: about 40,000 tokens, which make several batches."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(file.read_text() for file in sorted(CALIBRATION.glob("*.txt"))))
    return path


def reap2gguf(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [
        sys.executable, *(launcher if processes > 1 else []), "-m", "reap2gguf",
        *map(str, arguments),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def test_observations(tiny: Path, text: Path, tmp_path: Path) -> None:
    # five batches: one process has one more than the other
    asked = ("--calibration", text, "--max-length", 1000, "--samples", 33, *COMPUTE)
    seen = {}
    for count in (1, 2):
        path = tmp_path / f"{count}.safetensors"
        done = reap2gguf("observe", tiny, *asked, "-o", path, processes=count)
        assert done.stdout.count(" rows, ") == 1, "one process speaks"
        seen[count] = Observations.load(path)
    alone, shared = seen[1], seen[2]
    assert (shared.n_rows, shared.n_tokens) == (alone.n_rows, alone.n_tokens) == (33, 33000)
    assert shared.layers.keys() == alone.layers.keys()
    for layer, expected in alone.layers.items():
        found = shared.layers[layer]
        np.testing.assert_array_equal(found.count, expected.count)
        np.testing.assert_array_equal(found.norm_max, expected.norm_max)
        for name in ("reap_sum", "gate_sum", "norm_sum"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12)


def test_importance(tiny: Path, text: Path, tmp_path: Path) -> None:
    asked = ("--text", text, "--chunk", 2048, *COMPUTE)
    found = {}
    for count in (1, 2):
        path = tmp_path / f"{count}.gguf"
        reap2gguf("imatrix", tiny, *asked, "-o", path, processes=count)
        found[count] = load_imatrix(path)
    assert found[2].n_chunks == found[1].n_chunks
    assert found[2].entries.keys() == found[1].entries.keys()
    for name, expected in found[1].entries.items():
        np.testing.assert_array_equal(found[2].entries[name].counts, expected.counts)
        np.testing.assert_allclose(found[2].entries[name].sums, expected.sums, rtol=1e-12)


def test_a_build(tiny: Path, text: Path, tmp_path: Path) -> None:
    asked = (
        "build", tiny, "--recipe", "q8_0", "--name", "shared", "--calibration", text,
        "--max-length", 1000, "--samples", 17, "--chunk", 2048, *COMPUTE,
    )  # fmt: skip
    kept = {}
    for count in (1, 2):
        output = tmp_path / str(count)
        done = reap2gguf(*asked, "--output", output, processes=count)
        assert done.stdout.count("experts:") == 1, "one process speaks"
        kept[count] = Manifest.load(output / "shared-GGUF").pruning.kept
    assert kept[2] == kept[1]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Processes()),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Processes()),  # a job scheduler's, not torchrun's
        (
            {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a",
             "MASTER_PORT": "1"},
            Processes(3, 1, 4),
        ),
        (
            {"RANK": "x", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a",
             "MASTER_PORT": "1"},
            Processes(),
        ),
    ],
)  # fmt: skip
def test_place_among_processes(
    environment: dict[str, str], expected: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes() == expected
