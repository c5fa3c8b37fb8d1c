"""Two processes that share out the rows, started by torchrun, against one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from reap2gguf import cli
from reap2gguf.artifacts.observations import Observations
from reap2gguf.building.pipeline import build
from reap2gguf.building.plan import make_plan
from reap2gguf.errors import PeerError
from reap2gguf.machine import Processes, processes
from reap2gguf.observing.compute import ranks as ranks_module
from reap2gguf.options import BuildOptions, CalibrationOptions, ComputeOptions
from reap2gguf.progress import Silent
from tests.tiny import REPOSITORY

CALIBRATION = REPOSITORY / "calibration"
COMPUTE = ("--device", "cpu", "--dtype", "float32", "--threads", "1")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """All of the embedded texts in one file: about 40,000 tokens, which make several batches."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(file.read_text() for file in sorted(CALIBRATION.glob("*.txt"))))
    return path


def torchrun(
    *arguments: object,
    program: tuple[object, ...] = ("-m", "reap2gguf"),
    is_whole: bool = True,
) -> subprocess.CompletedProcess[str]:
    """The program in two processes."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        *map(str, program), *map(str, arguments),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert (done.returncode == 0) == is_whole, done.stderr
    return done


def test_nothing_outlives_the_processes_meeting(tmp_path: Path) -> None:
    """A thread of the connections that is left at the interpreter's end may abort the process."""
    script = tmp_path / "meet.py"
    script.write_text(
        "import torch\n"
        "from pathlib import Path\n"
        "from reap2gguf.observing.compute.ranks import join, leave\n"
        "ranks = join()\n"
        "import transformers.models.qwen3_moe.modeling_qwen3_moe\n"
        "assert ranks.total([ranks.rank, 1]) == [1, 2]\n"
        "assert ranks.least(ranks.rank + 5) == 5\n"
        "assert ranks.tell('first' if ranks.is_first else None) == 'first'\n"
        "peak = torch.tensor([1.0 + ranks.rank])\n"
        "ranks.peak([peak])\n"
        "assert float(peak) == 2\n"
        "leave()\n"
        "names = [path.read_text() for path in Path('/proc/self/task').glob('*/comm')]\n"
        "assert not [name for name in names if 'gloo' in name], names\n"
    )
    torchrun(program=(script,))


def test_a_lost_process_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*arguments: object) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")

    monkeypatch.setattr(ranks_module.dist, "all_reduce", lost)
    with pytest.raises(PeerError, match="another process of this run ended"):
        ranks_module.Ranks(0, 0, 2).total([1])


def test_others_that_are_gone_at_the_end_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone() -> None:
        raise PeerError("another process of this run ended; its own message says why")

    ended: list[int] = []
    monkeypatch.setattr(ranks_module, "leave", gone)
    monkeypatch.setattr(cli.os, "_exit", ended.append)
    cli._leave_others(0)
    assert ended == [2]
    assert capsys.readouterr().err.startswith("Error: another process of this run ended")


def test_observe_writes_once(tiny: Path, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "observations.safetensors"
    asked = ("--calibration", text, "--max-length", 512, "--samples", 17, *COMPUTE)
    done = torchrun("observe", tiny, *asked, "-o", path)
    assert done.stdout.count(" rows, ") == 1, "one process speaks"
    assert Observations.load(path).n_tokens == 17 * 512
    assert list(tmp_path.glob("*observations*")) == [path]


@pytest.mark.slow
def test_a_build_is_the_same(tiny: Path, text: Path, tmp_path: Path) -> None:
    """Both sweeps, over three batches: one process has one more than the other."""
    options = BuildOptions(
        recipes=("q8_0",), model=str(tiny), name="shared", chunk=512,
        calibration=CalibrationOptions(str(text), samples=33, max_length=512),
        imatrix_text=text, compute=ComputeOptions("cpu", "float32", threads=1),
        output=tmp_path / "alone",
    )  # fmt: skip
    build(make_plan(options), Silent())
    done = torchrun(
        "build", tiny, "--recipe", "q8_0", "--name", "shared", "--calibration", text,
        "--max-length", 512, "--samples", 33, "--chunk", 512, "--imatrix-text", text, *COMPUTE,
        "--output", tmp_path / "shared",
    )  # fmt: skip
    assert done.stdout.count("experts:") == 1, "one process speaks"
    alone, shared = (tmp_path / name / "shared-GGUF" for name in ("alone", "shared"))
    for file in ("imatrix.gguf", "imatrix.dat", "shared-Q8_0.gguf"):
        assert (shared / file).read_bytes() == (alone / file).read_bytes(), file
    seen = [
        Observations.load(next((tmp_path / name / ".work/observations").iterdir()))
        for name in ("alone", "shared")
    ]
    assert seen[0].n_tokens == seen[1].n_tokens == 33 * 512
    for layer, expected in seen[0].layers.items():
        found = seen[1].layers[layer]
        np.testing.assert_array_equal(found.count, expected.count)
        np.testing.assert_array_equal(found.norm_max, expected.norm_max)
        for name in ("reap_sum", "gate_sum", "norm_sum"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12)


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_in_all_processes(
    example: Path, text: Path, tmp_path: Path
) -> None:
    script = tmp_path / "stop.py"
    script.write_text(
        "import os\n"
        "from reap2gguf import cli\n"
        "from reap2gguf.observing import run, state\n"
        "state.MOST_OF_TIME = 1e9\n"
        "layer = run.SweepRun.layer\n"
        "def stop(self, index, task):\n"
        "    if index == 2:\n"
        "        os._exit(9)\n"
        "    layer(self, index, task)\n"
        "run.SweepRun.layer = stop\n"
        "cli.main()\n"
    )
    asked = ("--calibration", text, "--max-length", 256, "--samples", 40, *COMPUTE)
    whole, resumed = tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors"
    torchrun("observe", example, *asked, "-o", whole)
    torchrun("observe", example, *asked, "-o", resumed, program=(script,), is_whole=False)
    assert len(list(tmp_path.glob("resumed.safetensors.state.?-of-2"))) == 2
    done = torchrun("observe", example, *asked, "-o", resumed)
    assert "going on from layer 2 of 4" in done.stderr
    assert resumed.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.state*"))


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
