from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from reap2gguf.publishing import pace
from reap2gguf.publishing.pace import paced


class Told:
    def __init__(self) -> None:
        self.amounts: list[float] = []

    def advance(self, amount: float = 1) -> None:
        self.amounts.append(amount)

    def wait(self, total: int) -> None:
        for _ in range(200):
            if sum(self.amounts) == total:
                return
            time.sleep(0.01)
        raise AssertionError(self.amounts)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_what_is_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_SECONDS", 0.01)
    path, told = tmp_path / "file", Told()
    path.write_bytes(bytes(1000))
    with paced({path: 1000}, 1200, told), path.open("rb", buffering=0) as file:
        file.read(400)
        told.wait(400)
        file.seek(100)  # a part is sent again
        file.read(100)
        time.sleep(0.03)
        assert sum(told.amounts) == 400
        file.read(500)
        told.wait(700)
    assert sum(told.amounts) == 1200


def test_without_proc_a_file_counts_when_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "_SECONDS", 0.01)
    monkeypatch.setattr(pace, "_OPEN", tmp_path / "missing")
    path, told = tmp_path / "file", Told()
    path.write_bytes(bytes(1000))
    with paced({path: 1000}, 1000, told), path.open("rb", buffering=0) as file:
        file.read(400)
        time.sleep(0.03)
        assert told.amounts == []
    assert told.amounts == [1000]


def test_what_failed_is_not_told_as_done(tmp_path: Path) -> None:
    told = Told()
    with pytest.raises(ValueError, match="no"), paced({}, 1000, told):
        raise ValueError("no")
    assert told.amounts == []
