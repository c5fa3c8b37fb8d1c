"""What each of two processes does for test_ranks: `compute FOLDER`, or `resume ARGUMENTS...`.

For test_nodes: `node DIES SILENCE ARGUMENTS...` runs the program. The process of the rank DIES dies
before the last layer, or, where SILENCE is not zero, stands still there; the others wait SILENCE
seconds for it.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from reap2gguf import cli
from reap2gguf.machine import processes
from reap2gguf.observing import budget, state
from reap2gguf.observing.compute import pulse
from reap2gguf.observing.compute.ranks import HostPeers, _host_peers, join
from reap2gguf.observing.sweep import Sweep
from tests.tiny import EXAMPLE

COMPUTE = ("--device", "cpu", "--dtype", "float32", "--threads", "2")
OBSERVE = ("--max-length", "256", "--samples", "12", *COMPUTE)
BUILD = ("--recipe", "q8_0", "--name", "shared", "--max-length", "512", "--samples", "5")
BATCH_TOKENS = 1024  # so that few rows make several batches
DIES_BEFORE = 2  # layers
DIED = 9
NOBODY = -1


def exchange() -> None:
    """Every way in which processes exchange numbers."""
    ranks = join()
    assert ranks.total([ranks.rank, 1]) == [1, 2]
    assert ranks.least(ranks.rank + 5) == 5
    assert ranks.broadcast("first" if ranks.is_first else None) == "first"
    assert ranks.share([10, 11, 12]) == [[10, 12], [11]][ranks.rank]
    sums, peak = torch.tensor([1.0 + ranks.rank]), torch.tensor([1.0 + ranks.rank])
    works = (ranks.begin_sum(sums), ranks.begin_max(peak))
    for work in works:
        assert work is not None
        ranks.finish(work)
    assert (float(sums), float(peak)) == (3, 2)
    peers = _host_peers(ranks)
    assert peers == HostPeers(ranks.rank, 2, None)
    whole = torch.zeros(6, dtype=torch.uint8)
    whole[3 * ranks.rank : 3 * ranks.rank + 3] = 5 + ranks.rank
    peers.exchange(whole).wait()
    assert whole.tolist() == [5, 5, 5, 6, 6, 6]


def die_before(layer: int) -> None:
    """Let sweeps save their state after every layer, and the process die before `layer`."""
    compute = Sweep.run_layers

    def layer_or_death(self: Sweep, layers: range, task: Any) -> None:
        if layers[0] == layer:
            os._exit(DIED)
        compute(self, layers, task)

    state.MOST_OF_TIME = 1e9
    Sweep.run_layers = layer_or_death  # type: ignore[method-assign]


def compute(folder: Path) -> None:
    """A build, a whole `observe`, and one that dies halfway."""
    exchange()
    text = str(folder / "text.txt")
    run("build", folder / "tiny", *BUILD, "--calibration", text, "--chunk", "512",
        "--imatrix-text", text, *COMPUTE, "--output", folder / "shared")  # fmt: skip
    observe = ("observe", EXAMPLE, "--calibration", text, *OBSERVE, "-o")
    run(*observe, folder / "whole.safetensors")
    die_before(DIES_BEFORE)
    run(*observe, folder / "resumed.safetensors")


def run(*arguments: object) -> None:
    cli.cli([*map(str, arguments)], standalone_mode=False)


def stand_still(self: Sweep, layers: range, task: Any) -> None:
    """A layer in a process that nobody hears of any more."""
    print("STOPPED", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)


def on_node(dies: int, silence: int, *arguments: str) -> None:
    """The program on a machine of its own; states are saved after every layer."""
    state.MOST_OF_TIME = 1e9
    if silence:
        pulse.PATIENCE_TICKS = silence
    if processes().rank == dies and silence:
        Sweep.run_layers = stand_still  # type: ignore[method-assign]
    elif processes().rank == dies:
        die_before(1)
    sys.argv = ["reap2gguf", *arguments]
    cli.main()


def resume(*arguments: str) -> None:
    """The program itself, to its end; no thread of the connections may outlive it.

    One that is left when the interpreter ends may abort the process.
    """
    sys.argv = ["reap2gguf", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, end.code
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in names if "gloo" in name], names


if __name__ == "__main__":
    budget.MOST_TOKENS["cpu"] = BATCH_TOKENS
    if sys.argv[1] == "compute":
        compute(Path(sys.argv[2]))
    elif sys.argv[1] == "node":
        on_node(int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
    else:
        resume(*sys.argv[2:])
