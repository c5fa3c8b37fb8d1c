"""Two processes on machines of their own: each has its checkpoint, and one has the output.

Each process runs in a folder of its own, and all paths are relative: so they see nothing of each
other, as on two machines.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from reap2gguf.bundle.layout import OBSERVATIONS_FILE
from tests.observing.compute.ranks_child import DIED, NOBODY
from tests.observing.compute.test_ranks import TIMEOUT, free_port
from tests.tiny import REPOSITORY, TinyQwen3Moe, child_environment

pytestmark = pytest.mark.slow
CHILD = "tests.observing.compute.ranks_child"
COMPUTE = ("--calibration", "text.txt", "--device", "cpu", "--dtype", "float32", "--threads", "2")
OBSERVE = ("observe", "ckpt", "--max-length", "256", "--samples", "12", *COMPUTE, "-o")
BUILD = (
    *("build", "ckpt", "--recipe", "q8_0", "--name", "m", "--max-length", "512", "--samples", "5"),
    *("--chunk", "512", "--imatrix-text", "text.txt", "--output", "out", *COMPUTE),
)


@dataclass
class Nodes:
    """Two folders that stand for machines, and what the last processes in them printed."""

    folder: Path
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        text = (REPOSITORY / "calibration" / "prose.txt").read_text()[:20000]
        for node in self.nodes:
            TinyQwen3Moe().write(node / "ckpt")
            (node / "text.txt").write_text(text)

    @property
    def nodes(self) -> list[Path]:
        return [self.folder / "first", self.folder / "second"]

    def start(self, *arguments: str, dies: int = NOBODY, silence: int = 0) -> list[Process]:
        """A process on each; `dies` is the rank that dies before a layer, see `ranks_child`."""
        shared = {
            "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
            "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", CHILD, "node", str(dies), str(silence), *arguments]
        running = []
        for rank, node in enumerate(self.nodes):
            more = {**shared, "RANK": str(rank), "GROUP_RANK": str(rank)}
            with (node / "err").open("w") as err, (node / "stdout").open("w") as out:
                running.append(
                    subprocess.Popen(
                        command, cwd=node, env=child_environment(more), stdout=out, stderr=err
                    )
                )
        return running

    def run(self, *arguments: str, dies: int = NOBODY) -> list[int]:
        """The exit codes of both processes."""
        return self.wait(self.start(*arguments, dies=dies))

    def wait(self, running: list[Process]) -> list[int]:
        try:
            codes = [process.wait(TIMEOUT) for process in running]
        finally:
            for process in running:
                process.kill()
        self.errors = [(node / "err").read_text() for node in self.nodes]
        return codes

    def error_lines(self) -> list[list[str]]:
        """The messages of both processes."""
        lines = [errors.splitlines() for errors in self.errors]
        return [[line for line in some if line.startswith("Error:")] for some in lines]


Process = subprocess.Popen[bytes]


@pytest.fixture
def nodes(tmp_path: Path) -> Nodes:
    return Nodes(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".work" not in path.parts
    }


def test_a_build_on_two_machines_is_that_of_one(nodes: Nodes) -> None:
    assert nodes.run(*BUILD) == [0, 0], nodes.errors
    assert "computing on 2 x the CPU" in nodes.errors[0]
    assert "Importance matrix: 10.2 k tokens" in nodes.errors[0], "of both machines"
    first, second = nodes.nodes
    assert not (second / "out").exists()
    together = contents(first / "out")
    shutil.rmtree(first / "out")
    environment = child_environment({"OMP_NUM_THREADS": "1"})
    command = [sys.executable, "-m", CHILD, "node", str(NOBODY), "0", *BUILD]
    done = subprocess.run(command, cwd=first, env=environment, capture_output=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    alone = contents(first / "out")
    assert alone.keys() == together.keys()
    for name in alone:
        # sums of the observations may differ in the last bits; the records name their hash
        if name.endswith(OBSERVATIONS_FILE):
            assert_same_sums(alone[name], together[name])
        elif not name.endswith((".json", ".md", "SHA256SUMS")):
            assert alone[name] == together[name], name


def assert_same_sums(one: bytes, other: bytes) -> None:
    first, second = load(one), load(other)
    assert first.keys() == second.keys()
    for name, values in first.items():
        torch.testing.assert_close(values, second[name], rtol=1e-6, atol=0, msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What two machines observe where nothing happens to them."""
    nodes = Nodes(tmp_path_factory.mktemp("whole"))
    assert nodes.run(*OBSERVE, "whole.safetensors") == [0, 0], nodes.errors
    return (nodes.nodes[0] / "whole.safetensors").read_bytes()


@pytest.mark.parametrize("dies", [0, 1])
def test_a_killed_machine(nodes: Nodes, whole: bytes, dies: int) -> None:
    """The other one ends, and both resume from the layer that both have saved."""
    output = ("obs/ervations.safetensors",)
    (nodes.nodes[0] / "obs").mkdir()
    codes = nodes.run(*OBSERVE, *output, dies=dies)
    assert codes[dies] == DIED
    assert codes[1 - dies] == 2, nodes.errors
    assert nodes.error_lines()[1 - dies] == [
        "Error: another process of this run ended; see its own message"
    ]
    states = [
        sorted(path.name for path in (node / "obs").iterdir() if path.suffix != ".lock")
        for node in nodes.nodes  # one that was killed leaves its lock, which holds nobody
    ]
    assert states == [[f"ervations.safetensors.state.{rank}-of-2"] for rank in (0, 1)]
    assert nodes.run(*OBSERVE, *output) == [0, 0], nodes.errors
    assert "resuming from layer 1 of 2" in nodes.errors[0]
    first, second = nodes.nodes
    assert (first / output[0]).read_bytes() == whole
    assert [path.name for path in (first / "obs").iterdir()] == ["ervations.safetensors"]
    assert not list((second / "obs").iterdir())


def test_other_inputs(nodes: Nodes) -> None:
    second = nodes.nodes[1]
    TinyQwen3Moe(seed=5).write(second / "ckpt")
    assert nodes.run(*BUILD) == [2, 2], nodes.errors
    first, other = nodes.error_lines()
    assert first == other
    assert first[0].startswith("Error: the checkpoint of process 2 of 2, on ")
    assert first[0].endswith("copy the same files to all machines, or pin the revision")

    TinyQwen3Moe().write(second / "ckpt")
    (second / "text.txt").write_text("Other words. " * 2000)
    assert nodes.run(*BUILD) == [2, 2], nodes.errors
    assert "the hash of the calibration rows of process 2 of 2" in nodes.error_lines()[0][0]

    shutil.rmtree(second / "ckpt")
    assert nodes.run(*OBSERVE, "o.safetensors") == [2, 2], nodes.errors
    first, other = nodes.error_lines()
    assert "ckpt" in other[0]
    assert first[0].startswith("Error: process 2 of 2, on ")
    assert other[0].removeprefix("Error: ") in first[0], "the first machine shows it too"


def test_a_machine_that_falls_silent(nodes: Nodes) -> None:
    """As one whose network fails: its connections are not closed."""
    running = nodes.start(*OBSERVE, "o.safetensors", dies=1, silence=3)
    is_stopped = False
    try:
        while running[0].poll() is None:
            if not is_stopped and "STOPPED" in (nodes.nodes[1] / "stdout").read_text():
                is_stopped = True
            time.sleep(0.1)
    finally:
        running[1].send_signal(signal.SIGKILL)
    assert is_stopped
    assert nodes.wait(running)[0] == 2
    (line,) = nodes.error_lines()[0]
    assert "has given no sign of life for 3 seconds; check that machine" in line
