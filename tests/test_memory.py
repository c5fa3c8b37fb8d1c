"""Memory as the system tells it."""

from __future__ import annotations

import subprocess
import sys

from reap2gguf.memory import available_bytes, peak_bytes, resident_bytes


def test_amounts_are_in_order() -> None:
    assert 2**23 < resident_bytes() <= peak_bytes()
    assert available_bytes() > 2**27


def test_a_child_does_not_count_what_its_parent_held() -> None:
    ballast = bytearray(2**29)
    ballast[::4096] = b"x" * len(ballast[::4096])
    script = "from reap2gguf.memory import peak_bytes; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert int(done.stdout) < 2**29 < peak_bytes()
    del ballast
