"""Ctrl-C and SIGTERM while a process waits for a Hub that has gone silent."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.loopback_hub.model import ENDS, layered_files, shard_of
from tests.loopback_hub.server import Fault, Hub
from tests.tiny import REPOSITORY

PROSE = REPOSITORY / "calibration" / "prose.txt"
_SECONDS = 240  # for a process on a busy machine
PLAN = (
    "plan", "owner/name", "--recipe", "q8_0", "--compression", "0.25", "--calibration", str(PROSE),
)  # fmt: skip
QUANTIZE = ("quantize", "owner/name", "--recipe", "q8_0", "-o", "x.gguf")
OBSERVE = (
    "observe", "owner/name", "--calibration", str(PROSE), "--samples", "4", "--max-length", "64",
    "--device", "cpu", "-o", "observations.safetensors",
)  # fmt: skip


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub(dict(layered_files(tmp_path_factory.mktemp("source") / "tiny"))) as hub:
        yield hub


@pytest.mark.parametrize(
    ("command", "where", "fault", "number"),
    [
        (PLAN, "/api/models/", Fault(), signal.SIGINT),
        pytest.param(
            PLAN, "config.json", Fault(method="HEAD"), signal.SIGINT, marks=pytest.mark.slow
        ),
        (PLAN, "tokenizer.json", Fault(), signal.SIGTERM),
        pytest.param(PLAN, ENDS, Fault(), signal.SIGINT, marks=pytest.mark.slow),
        (QUANTIZE, shard_of(0), Fault(after=2_000, range_end="-"), signal.SIGINT),
        (OBSERVE, ENDS, Fault(after=2_000, range_end="-"), signal.SIGINT),
        pytest.param(
            OBSERVE,
            shard_of(1),
            Fault(after=2_000, range_end="-"),
            signal.SIGTERM,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["info", "config", "tokenizer", "header", "quantize", "embedding", "layer"],
)
def test_a_fetch_is_interrupted(
    command: tuple[str, ...], where: str, fault: Fault, number: signal.Signals, hub: Hub,
    tmp_path: Path,
) -> None:  # fmt: skip
    held = threading.Event()
    fault = Fault(where=where, method=fault.method, after=fault.after or 0, held=held,
                  range_end=fault.range_end)  # fmt: skip
    hub.faults = [fault]
    # requests that would not end by themselves before the test gives up
    patient = {"HF_HUB_DOWNLOAD_TIMEOUT": "600", "HF_HUB_ETAG_TIMEOUT": "600"}
    with subprocess.Popen(
        [sys.executable, "-c", _AS_ON_A_TERMINAL, *command], cwd=tmp_path,
        env=hub.environment(tmp_path / "home") | patient, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert fault.reached.wait(_SECONDS)
            time.sleep(0.3)
            process.send_signal(number)
            _, printed = process.communicate(timeout=_SECONDS)
        finally:
            held.set()
            process.kill()
    assert process.returncode == 130
    assert printed.splitlines()[-1].startswith("Interrupted.")
    assert "Traceback" not in printed
    assert "done" not in printed
    assert list((tmp_path / "home").rglob("*.incomplete")) == []


# a shell's background job, and all that it starts, would not hear of SIGINT
_AS_ON_A_TERMINAL = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from reap2gguf.cli import main
main()
"""
