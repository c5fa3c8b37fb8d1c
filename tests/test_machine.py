"""Memory as the system tells it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from reap2gguf import machine
from reap2gguf.machine import available_bytes, peak_bytes, resident_bytes


def test_amounts_are_in_order() -> None:
    assert 2**23 < resident_bytes() <= peak_bytes()
    assert available_bytes() > 2**27


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
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes() > 600000


def test_a_child_does_not_count_what_its_parent_held() -> None:
    ballast = bytearray(2**29)
    ballast[::4096] = b"x" * len(ballast[::4096])
    script = "from reap2gguf.machine import peak_bytes; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert int(done.stdout) < 2**29 < peak_bytes()
    del ballast
