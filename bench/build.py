"""Builds a large synthetic checkpoint on the CPU and says how much memory each stage took.

    python bench/build.py --gigabytes 8 --memory 3GiB

The checkpoint has Qwen3-30B-A3B's layer shape, random weights, and as many layers as fill the size.
`reap2gguf build` runs on it as a user runs it, in a process of its own; resident memory is the
kernel's count of that process, as the build keeps it for each stage.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from synthetic import write_checkpoint

LAYER_BYTES = 1.25e9


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--memory", default="3GiB")
    parser.add_argument("--samples", type=int, default=32, help="rows of 512 tokens")
    parser.add_argument("--compression", default="0.5")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        source = Path(work) / "source"
        source.mkdir()
        layers = math.ceil(arguments.gigabytes * 1e9 / LAYER_BYTES)
        write_checkpoint("qwen3-30b-a3b", layers, source)
        n_bytes = sum(shard.stat().st_size for shard in source.glob("*.safetensors"))
        command = [
            sys.executable, "-m", "reap2gguf", "build", str(source), "--recipe", "unsloth-iq4km",
            "--compression", arguments.compression, "--memory", arguments.memory,
            "--samples", str(arguments.samples), "--max-length", "512", "--device", "cpu",
            "--output", str(Path(work) / "build"), "--name", "large",
        ]  # fmt: skip
        begun = time.monotonic()
        subprocess.run(command, check=True)
        finished = json.loads((Path(work) / "build/.work/.large.finished.json").read_text())
        print(json.dumps({
            "checkpoint_gb": round(n_bytes / 1e9, 2),
            "memory": arguments.memory,
            "seconds": round(time.monotonic() - begun),
            "stages_seconds_and_peak_resident_gib": {
                stage["name"]: [stage["seconds"], round(stage["peak_bytes"] / 2**30, 2)]
                for stage in finished["stages"]
            },
        }))  # fmt: skip


if __name__ == "__main__":
    main()
