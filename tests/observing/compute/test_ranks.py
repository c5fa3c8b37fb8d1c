"""Two processes that divide the rows, against one process."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from reap2gguf import cli
from reap2gguf.api.evaluating import evaluate
from reap2gguf.artifacts.observations import Observations
from reap2gguf.building.pipeline import build
from reap2gguf.building.plan import make_plan
from reap2gguf.bundle.evaluation import Evaluation
from reap2gguf.errors import PeerError
from reap2gguf.evaluating.options import EvaluateOptions
from reap2gguf.observing import budget
from reap2gguf.observing.compute import ranks as ranks_module
from reap2gguf.options import BuildOptions, CalibrationOptions, ComputeOptions
from reap2gguf.progress import Silent
from tests.evaluating.tasks.task_folders import write_pruned_copy, write_three_tasks
from tests.observing.compute.ranks_child import BATCH_TOKENS, COMPUTE, DIED, OBSERVE
from tests.tiny import EXAMPLE, REPOSITORY, TinyQwen3Moe, child_environment

CHILD = "tests.observing.compute.ranks_child"
TIMEOUT = 300


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def two_processes(folder: Path, *arguments: str) -> list[str]:
    """Two processes that die as planned; what they print.

    torchrun would end one as soon as the other dies.
    """
    shared = {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    running = []
    for rank in ("0", "1"):
        environment = child_environment({**shared, "RANK": rank, "LOCAL_RANK": rank})
        command = [sys.executable, "-m", CHILD, *arguments]
        with (folder / f"{rank}.out").open("w") as out, (folder / f"{rank}.err").open("w") as err:
            running.append(subprocess.Popen(command, env=environment, stdout=out, stderr=err))
    codes = [process.wait(TIMEOUT) for process in running]
    assert codes == [DIED, DIED], [(folder / f"{rank}.err").read_text() for rank in (0, 1)]
    return [(folder / f"{rank}.out").read_text() for rank in (0, 1)]


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Two processes as users start them."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", CHILD, *map(str, arguments),
    ]  # fmt: skip
    environment = child_environment({"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"})
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert not done.returncode, done.stderr
    return done


@dataclass(frozen=True)
class Shared:
    """What two processes did in `ranks_child.compute`."""

    folder: Path
    outputs: list[str]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """A few thousand tokens, which make several batches, on two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    text = (REPOSITORY / "calibration" / "prose.txt").read_text()
    (folder / "text.txt").write_text(text[:20000])
    TinyQwen3Moe().write(folder / "tiny")
    outputs = two_processes(folder, "compute", str(folder))
    return Shared(folder, outputs)


def test_one_process_reports_and_writes(shared: Shared) -> None:
    assert [text.count("experts: keeps") for text in shared.outputs] == [1, 0]
    assert [text.count(".safetensors: 12 rows, ") for text in shared.outputs] == [1, 0]
    assert Observations.load(shared.folder / "whole.safetensors").n_tokens == 12 * 256
    assert [path.name for path in shared.folder.glob("*whole*")] == ["whole.safetensors"]


@pytest.mark.slow  # starts three processes; test_state resumes one
def test_an_interrupted_sweep_resumes_in_all_processes(shared: Shared) -> None:
    folder = shared.folder
    assert len(list(folder.glob("resumed.safetensors.state.?-of-2"))) == 2
    asked = ("--calibration", folder / "text.txt", *OBSERVE, "-o", folder / "resumed.safetensors")
    done = torchrun("resume", "observe", EXAMPLE, *asked)
    assert done.stdout.count(".safetensors: 12 rows, ") == 1
    assert "resuming from layer 2 of 4" in done.stderr
    resumed, whole = (folder / f"{name}.safetensors" for name in ("resumed", "whole"))
    assert resumed.read_bytes() == whole.read_bytes()
    assert not list(folder.glob("*.state*"))


def test_a_build_is_the_same(
    shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sweeps, over three batches: one process has one more than the other."""
    monkeypatch.setitem(budget.MOST_TOKENS, "cpu", BATCH_TOKENS)
    text = shared.folder / "text.txt"
    options = BuildOptions(
        recipes=("q8_0",),
        model=str(shared.folder / "tiny"),
        name="shared",
        chunk=512,
        calibration=CalibrationOptions(str(text), samples=5, max_length=512),
        imatrix_text=text,
        compute=ComputeOptions("cpu", "float32", threads=1),
        output=tmp_path / "alone",
    )
    build(make_plan(options), Silent())
    outputs = (tmp_path / "alone", shared.folder / "shared")
    alone, together = (output / "shared-GGUF" for output in outputs)
    for file in ("imatrix.gguf", "imatrix.dat", "shared-Q8_0.gguf"):
        assert (together / file).read_bytes() == (alone / file).read_bytes(), file
    seen = [
        Observations.load(next((output / ".work" / "observations").iterdir())) for output in outputs
    ]
    assert seen[0].n_tokens == seen[1].n_tokens == 5 * 512
    for layer, expected in seen[0].layers.items():
        found = seen[1].layers[layer]
        np.testing.assert_array_equal(found.count, expected.count)
        np.testing.assert_array_equal(found.norm_max, expected.norm_max)
        for name in ("reap_sum", "gate_sum", "norm_sum"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12)


@pytest.mark.slow  # two processes load torch and lm-eval
def test_an_evaluation_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches of a text and of tasks; the first process alone prints and writes."""
    monkeypatch.setitem(budget.MOST_TOKENS, "cpu", BATCH_TOKENS)
    tasks = write_three_tasks(tmp_path / "tasks")
    options = EvaluateOptions(
        chunk=64, chunks=40, tasks=("plain", "normed", "rolling"), task_folder=tasks
    )
    compute = ComputeOptions("cpu", "float32", threads=1)
    pruned = write_pruned_copy(EXAMPLE, tmp_path / "pruned", 12)
    alone = evaluate(EXAMPLE, pruned, options=options, compute=compute)
    output = tmp_path / "out" / "evaluation.json"
    output.parent.mkdir()
    done = torchrun(
        "resume", "evaluate", EXAMPLE, pruned, "--chunk", 64, "--chunks", 40, *COMPUTE,
        "--tasks", "plain,normed,rolling", "--task-folder", tasks, "-o", output, "--json",
    )  # fmt: skip
    found = Evaluation.load(output)
    assert found == alone
    assert found.as_json() == json.loads(done.stdout)
    assert [path.name for path in output.parent.iterdir()] == ["evaluation.json"]
    assert done.stderr.count("Evaluating: done") == 1


def test_a_lost_process_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*arguments: object) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")

    monkeypatch.setattr(ranks_module.dist, "all_reduce", lost)
    with pytest.raises(PeerError, match="another process of this run ended"):
        ranks_module.Ranks(0, 0, 2).total([1])


def test_others_that_are_gone_at_the_end_are_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone() -> None:
        raise PeerError("another process of this run ended; see its own message")

    ended: list[int] = []
    monkeypatch.setattr(ranks_module, "leave", gone)
    monkeypatch.setattr(cli.os, "_exit", ended.append)
    cli._leave_others(0)
    assert ended == [2]
    assert capsys.readouterr().err.startswith("Error: another process of this run ended")
