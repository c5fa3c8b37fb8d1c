"""Memory and processes, as the system and the environment give them."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from reap2gguf import machine
from reap2gguf.machine import (
    Processes,
    available_bytes,
    available_threads,
    container_limit,
    peak_bytes,
    processes,
    resident_bytes,
    total_bytes,
)


def test_amounts_are_in_order() -> None:
    assert 2**23 < resident_bytes() <= peak_bytes()
    assert 2**27 < available_bytes() <= total_bytes()


def test_a_container_s_file_cache_is_as_good_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {
        "memory.max": "1000000\n", "memory.current": "900000\n",
        "memory.stat": "anon 1\ninactive_file 300000\nactive_file 200000\nslab 7\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert available_bytes() == 600000
    assert container_limit() == 1000000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes() > 600000
    assert container_limit() is None


@pytest.fixture
def mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system without /proc and cgroups, as macOS is; where its `vm_stat` would be."""
    for name in ("_STATUS", "_MEMINFO", "_CGROUP", "_VM_STAT"):
        monkeypatch.setattr(machine, name, tmp_path / name)
    return tmp_path / "_VM_STAT"


def write_program(path: Path, lines: str) -> None:
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)


def test_a_mac_s_free_memory(mac: Path) -> None:
    answer = """cat << end
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               100.
Pages active:                          200000.
Pages inactive:                            20.
Pages speculative:                          3.
Pages purgeable:                           50.
File-backed pages:                     100000.
end"""
    write_program(mac, answer)
    assert available_bytes() == 123 * 16384
    assert container_limit() is None
    assert total_bytes() > 2**27


@pytest.mark.parametrize("lines", ["exit 1", "echo what", "printf '\\377'", ""])
def test_a_mac_that_does_not_say(lines: str, mac: Path) -> None:
    if lines:
        write_program(mac, lines)
    assert available_bytes() == total_bytes()


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("linux", 1024)])
def test_units_of_the_peak(
    platform: str, unit: int, mac: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(sys, "platform", platform)
    assert peak_bytes() == resident_bytes() == pytest.approx(peak * unit, rel=0.01)


def test_processors_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert available_threads() == os.cpu_count()


def test_a_child_does_not_count_what_its_parent_held() -> None:
    ballast = bytearray(2**29)
    ballast[::4096] = b"x" * len(ballast[::4096])
    script = "from reap2gguf.machine import peak_bytes; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert int(done.stdout) < 2**29 < peak_bytes()
    del ballast


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Processes()),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Processes()),  # a job scheduler's, not torchrun's
        (
            {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a",
             "MASTER_PORT": "1"},
            Processes(3, 1, 4, 4),
        ),
        (
            {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2",
             "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            Processes(3, 1, 4, 2),
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
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes() == expected
