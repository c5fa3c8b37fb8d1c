"""Observes a model that lies on a Hub, and the same model in a folder: seconds, memory, requests.

    python bench/from_hub.py --layers 4

A stand-in for the Hub on the loopback interface (that of the tests) serves a synthetic checkpoint
of Qwen3-30B-A3B's layer shape, with `--megabytes` a second for each connection where that is given.
`reap2gguf observe` runs on both in processes of their own; memory is their largest resident set.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tests.loopback_hub.server as hub_module  # noqa: E402
from tests.loopback_hub.repository import OnDisk, Repository  # noqa: E402
from tests.loopback_hub.server import Hub  # noqa: E402

LARGE = (".safetensors", ".gguf")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8, help="rows of 512 tokens")
    parser.add_argument("--megabytes", type=float, help="a second and connection; no limit else")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        source = Path(work) / "model"
        source.mkdir()
        write_model(arguments.layers, source)
        files = {path.name: content(path) for path in source.iterdir()}
        if arguments.megabytes:
            slow_down(arguments.megabytes * 1e6)
        found = {}
        with Hub(repositories=[Repository("owner/model", files)]) as hub:
            environment = hub.environment(Path(work) / "home")
            found["plan"] = run("plan", "owner/model", work, environment, "--recipe", "q8_0")
            found["plan"]["megabytes_sent"] = round(hub.bytes_sent / 1e6, 2)
            before = hub.bytes_sent
            rows = ("--samples", str(arguments.samples), "--max-length", "512", "--device", "cpu")
            found["hub"] = run("observe", "owner/model", work, environment, *rows)
            found["hub"]["megabytes_sent"] = round((hub.bytes_sent - before) / 1e6, 2)
            found["cache"] = run("observe", "owner/model", work, environment, *rows)
        found["folder"] = run("observe", str(source), work, environment, *rows)
        n_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        print(json.dumps({"checkpoint_megabytes": round(n_bytes / 1e6, 2), **found}, indent=1))


def write_model(layers: int, folder: Path) -> None:
    # in a process of its own: what this one holds would count as its children's
    code = (
        "import sys, pathlib; from synthetic import write_checkpoint; "
        "write_checkpoint('qwen3-30b-a3b', int(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(layers), str(folder)]
    subprocess.run(command, check=True, cwd=Path(__file__).parent)


def content(path: Path) -> OnDisk | bytes:
    if path.suffix not in LARGE:
        return path.read_bytes()
    with path.open("rb") as file:
        return OnDisk(path, hashlib.file_digest(file, "sha256").hexdigest())


def slow_down(bytes_a_second: float) -> None:
    """Let every connection carry so many bytes a second."""
    real = hub_module._blocks

    def slowly(answer, count):
        for block in real(answer, count):
            time.sleep(len(block) / bytes_a_second)
            yield block

    hub_module._blocks = slowly


def run(verb: str, model: str, work: str, environment: dict[str, str], *options: str) -> dict:
    """Seconds and peak memory of a command."""
    command = [sys.executable, "-m", "reap2gguf", verb, model, *options]
    if verb == "observe":
        command += ["-o", str(Path(work) / "observations.safetensors")]
    begun = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command}: exit {process.returncode}")
    seconds = time.monotonic() - begun
    return {"seconds": round(seconds, 1), "peak_gib": round(usage.ru_maxrss / 2**20, 2)}


if __name__ == "__main__":
    main()
