"""A limited sweep gives back what it frees, and keeps its limit as a process."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from reap2gguf.observing import allocator
from tests.tiny import EXAMPLE, TinyQwen35Moe

MIB = 2**20
# Blocks of 4 MiB, every second of which is freed: holes, which a heap cannot give back. A larger
# block is freed before, which lets glibc take them from its heap.
HOLES = """
import ctypes
from contextlib import nullcontext
from reap2gguf.machine import resident_bytes
from reap2gguf.observing.allocator import frees_at_once
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.free(libc.malloc(2**24))
def held():
    before = resident_bytes()
    blocks = []
    for _ in range(64):
        blocks.append(libc.malloc(2**22))
        ctypes.memset(blocks[-1], 1, 2**22)
    for block in blocks[::2]:
        libc.free(block)
    now = resident_bytes() - before
    for block in blocks[1::2]:
        libc.free(block)
    return now
usual = held()
with frees_at_once():
    limited = held()
again = held()
print(usual, limited, again)
"""
# A limit is given, and lowered to the least with which the pass is not refused.
RUN = """
import sys
from dataclasses import replace
from reap2gguf.__main__ import main
from reap2gguf.errors import UsageError
from reap2gguf.machine import peak_bytes
from reap2gguf.observing import sweep_plan
def fit(need, device, memory, spool, fit=sweep_plan.fit):
    refused, enough = 0, memory.allowed
    while enough - refused > 2**18:
        middle = (refused + enough) // 2
        try:
            fit(need, device, replace(memory, allowed=middle), spool)
            enough = middle
        except UsageError:
            refused = middle
    sys.stdout.write(f"limit {memory.limit - memory.allowed + enough}\\n")
    return fit(need, device, replace(memory, allowed=enough), spool)
sweep_plan.fit = fit
try:
    main()
finally:
    sys.stdout.write(f"peak {peak_bytes()}\\n")
"""


def run(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_blocks_are_returned_while_it_holds() -> None:
    found = run(HOLES)
    assert not found.stderr
    usual, limited, again = (int(n_bytes) / MIB for n_bytes in found.stdout.split())
    assert usual > 240  # of 256 MiB; half of them are free
    assert again > 240
    assert limited < 136


def test_another_allocator_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    with allocator.frees_at_once():
        pass
    allocator.return_free_memory()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_free_memory_is_returned() -> None:
    program = HOLES.partition("usual = held()")[0].replace(
        "    now = resident", "    return_free_memory()\n    now = resident"
    )
    found = run(f"{program.replace('frees_at_once', 'return_free_memory')}print(held())")
    assert not found.stderr
    assert int(found.stdout) / MIB < 136


@pytest.mark.slow
@pytest.mark.parametrize("command", ["imatrix", "observe"])
@pytest.mark.parametrize(("shape", "n_threads"), [("qwen3", 2), ("qwen3.5", 12)])
def test_a_process_keeps_the_least_limit(
    shape: str, n_threads: int, command: str, tmp_path: Path
) -> None:
    model = EXAMPLE if shape == "qwen3" else TinyQwen35Moe().write(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{n} times {n} is {n * n}, as one may see." for n in range(2000)))
    texts = {
        "imatrix": ("--text", text, "--chunks", "24", "--chunk", "256"),
        "observe": ("--calibration", text, "--samples", "24", "--max-length", "256"),
    }[command]
    compute = ("--device", "cpu", "--threads", str(n_threads), "--memory", "64GiB")
    done = run(RUN, command, model, *texts, *compute, "-o", tmp_path / "sums")
    assert done.returncode == 0, done.stderr
    (limit,) = re.findall(r"^limit (\d+)$", done.stdout, re.MULTILINE)
    (peak,) = re.findall(r"^peak (\d+)$", done.stdout, re.MULTILINE)
    assert int(peak) < int(limit)
