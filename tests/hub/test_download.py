from __future__ import annotations

import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from reap2gguf.hub.download import remove_partial_files, run_in_threads


def test_results_are_in_order() -> None:
    def late(number: int) -> int:
        time.sleep(0.01 * (5 - number))
        return number

    assert run_in_threads([partial(late, number) for number in range(5)], 3) == list(range(5))
    assert run_in_threads([], 3) == []


def test_an_error_does_not_wait_for_the_others() -> None:
    held = threading.Event()
    begun: list[int] = []
    ended: list[int] = []

    def fail() -> None:
        begun.append(0)
        raise LookupError("no")

    def wait() -> None:
        begun.append(1)
        held.wait(60)
        ended.append(1)

    with pytest.raises(LookupError):
        run_in_threads([fail, wait, wait, wait], 2)
    assert not ended
    assert len(begun) <= 3  # what was not begun will not be
    held.set()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system names no open files")
def test_only_what_this_process_writes_is_removed(tmp_path: Path) -> None:
    blobs, other = tmp_path / "blobs", tmp_path / "other"
    blobs.mkdir()
    other.mkdir()
    code = f"f = open({str(blobs / 'theirs.incomplete')!r}, 'w'); print(flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    ours, whole, elsewhere = blobs / "ours.incomplete", blobs / "whole", other / "x.incomplete"
    with ours.open("w"), whole.open("w"), elsewhere.open("w"):
        remove_partial_files(blobs)
    assert sorted(path.name for path in blobs.iterdir()) == ["theirs.incomplete", "whole"]
    assert elsewhere.exists()
    process.communicate(b"\n")
