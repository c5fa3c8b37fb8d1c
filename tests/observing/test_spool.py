"""Every spool returns what was stored, in any order of spans."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from reap2gguf.errors import OutputError
from reap2gguf.observing import spool as spool_module
from reap2gguf.observing.spool import open_spool
from tests.observing.devices import GPU

KINDS = [
    ("device", "cpu"),
    ("disk", "cpu"),
    *(pytest.param(kind, "cuda", marks=GPU) for kind in ("device", "host", "disk")),
]


@pytest.mark.parametrize(("kind", "device"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_batches(kind: str, device: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """What a sweep does: every span is loaded, changed and stored, layer after layer."""
    width, spans = 48, [(0, 64), (64, 70), (70, 134), (134, 135)]
    where = torch.device(device)
    spool = open_spool(kind, (135, width), dtype, where, tmp_path)
    expected = torch.randn(135, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    for begin, end in spans:
        spool.store((begin, end), expected[begin:end].to(where))
    spool.flush()
    for _ in range(5):
        for index, span in enumerate(spans):
            following = spans[index + 1] if index + 1 < len(spans) else None
            hidden = spool.load(span, following)
            assert hidden.device.type == device
            spool.store(span, hidden * 2 + 1)
        spool.flush()
        expected = expected * 2 + 1
    for begin, end in reversed(spans):
        assert torch.equal(spool.load((begin, end)).cpu(), expected[begin:end])
    spool.close()


def test_halves_of_a_span_that_was_prefetched(tmp_path: Path) -> None:
    spool = open_spool("disk", (8, 4), torch.float32, torch.device("cpu"), tmp_path)
    expected = torch.arange(32.0).view(8, 4)
    spool.store((0, 8), expected)
    spool.flush()
    spool.load((0, 4), following=(4, 8))
    assert torch.equal(spool.load((4, 6), following=(6, 8)), expected[4:6])
    assert torch.equal(spool.load((6, 8)), expected[6:8])
    spool.close()


def test_no_file_is_left_behind(tmp_path: Path) -> None:
    spool = open_spool("disk", (8, 4), torch.float32, torch.device("cpu"), tmp_path)
    spool.store((0, 8), torch.zeros(8, 4))
    assert list(tmp_path.iterdir()) == []
    spool.close()


def test_a_full_disk_is_an_error_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, first: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"no room for 128 bytes of activations \(No space"):
        open_spool("disk", (8, 4), torch.float32, torch.device("cpu"), tmp_path)


def test_a_write_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int, buffers: object, position: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    spool = open_spool("disk", (8, 4), torch.float32, torch.device("cpu"), tmp_path)
    monkeypatch.setattr(spool_module.os, "pwritev", broken)
    spool.store((0, 8), torch.zeros(8, 4))
    with pytest.raises(OutputError, match="cannot be written"):
        spool.flush()
    spool.close()
