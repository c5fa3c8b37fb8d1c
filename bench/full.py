"""Times a build of a full-size model, stage by stage, with the peaks of GPU, host and disk.

    python bench/full.py /dev/shm/model qwen3-30b-a3b --output build
    python bench/full.py /dev/shm/model qwen3-30b-a3b --output build --cold
    python bench/full.py /dev/shm/model qwen3.5-35b-a3b --output build

writes the model first (48 or 40 layers of its shape and random bfloat16 weights, 57 or 62 GiB,
made on a GPU where there is one), and a text to calibrate on. Then it builds as a user does, in a
process of its own, from an empty cache of compiled kernels with --fresh-caches. `--layers` and
`--experts` make it smaller. --cold drops the model from the page cache first, where the disk has
one. Other options are given to `build`. --evaluate-chunks N then measures the bundle: the source,
the pruned model and all GGUF files on N chunks of 512 tokens, in one sweep.

Qwen3: half of the experts, 1,024 rows of 2,048 tokens, three recipes. Qwen3.5: half of the experts,
1,000 rows of 4,096 tokens, one recipe, `--memory 12GiB --spool disk`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plan import Sampler, folder_bytes, long_text
from synthetic import write_apart

GIB = 2**30
LAYERS = {"qwen3-30b-a3b": 48, "qwen3.5-35b-a3b": 40}
OPTIONS = {
    "qwen3-30b-a3b": (
        *("--recipe", "unsloth-iq4km,unsloth-iq4ks,q4km", "--compression", "0.5"),
        *("--samples", "1024", "--max-length", "2048"),
    ),
    "qwen3.5-35b-a3b": (
        *("--recipe", "unsloth-iq4km", "--compression", "0.5"),
        *("--samples", "1000", "--max-length", "4096", "--memory", "12GiB", "--spool", "disk"),
    ),
}
# Where programs keep what they compiled for this machine's GPU.
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")


@dataclass
class GpuSampler(Sampler):
    """Watches the memory of the first GPU too."""

    gpu: int = 0

    def sample(self) -> None:
        super().sample()
        self.gpu = max(self.gpu, gpu_bytes())


def gpu_bytes() -> int:
    """What all programs hold in the memory of the first GPU; 0 where there is none."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except FileNotFoundError:
        return 0  # no driver of NVIDIA
    except subprocess.SubprocessError as error:
        print(f"the memory of the GPU is not known this time: {error}", file=sys.stderr)
        return 0
    return 2**20 * int(said.stdout.split()[0])


def write_model(
    shape: str, folder: Path, layers: int, experts: int | None, same_layers: bool
) -> float:
    """Write the model unless it is there; the seconds that took."""
    begun = time.monotonic()
    if not folder.is_dir():
        made = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        others = {} if experts is None else {"num_experts": experts}
        write_apart(shape, layers, made, same_layers, **others)
        made.rename(folder)
    return time.monotonic() - begun


def drop_from_cache(folder: Path) -> None:
    """Let the kernel forget the files of a folder; what is in /dev/shm stays in memory."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def watch(command: Sequence[str], output: Path, log: Path, fresh_caches: bool) -> GpuSampler:
    """Run a command to its end, watched."""
    environment = dict(os.environ)
    with tempfile.TemporaryDirectory() as empty, log.open("wb") as file:
        if fresh_caches:
            environment |= dict.fromkeys(CACHES, empty)
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        sampler = GpuSampler(process, output)
        thread = threading.Thread(target=sampler.run)
        thread.start()
        failed = process.wait()
        thread.join()
    if failed:
        raise SystemExit(log.read_text()[-3000:])
    return sampler


def peaks(watched: GpuSampler) -> str:
    return (
        f"peaks: host {watched.memory / GIB:.2f} GiB, GPU {watched.gpu / GIB:.2f} GiB, disk "
        f"{watched.disk / GIB:.2f} GiB; processor seconds {watched.last_cpu:.0f}"
    )


def evaluate(arguments: argparse.Namespace, log: Path) -> None:
    """Measure all variants of the bundle in one sweep."""
    n_chunks, found = arguments.evaluate_chunks, arguments.output / "evaluation.json"
    command = [
        *(sys.executable, "-m", "reap2gguf", "evaluate", str(arguments.output / "full")),
        *("--source", str(arguments.folder), "--text", f"{arguments.folder}.txt"),
        *("--chunks", str(n_chunks), "--device", arguments.device, "--output", str(found)),
    ]
    begun = time.monotonic()
    watched = watch(command, arguments.output, log, fresh_caches=False)
    seconds = time.monotonic() - begun
    print(f"evaluated on {512 * n_chunks:,} tokens in **{seconds:.1f} s**; {peaks(watched)}")
    print(log.read_text())


def main() -> None:
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="where the model is, or is written")
    parser.add_argument("shape", choices=sorted(LAYERS))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--experts", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--same-layers", action="store_true", help="write the model quickly")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--fresh-caches", action="store_true")
    parser.add_argument("--keep", action="store_true", help="leave the bundle there")
    parser.add_argument("--evaluate-chunks", type=int)
    arguments, more = parser.parse_known_args()  # others are options of `build`
    shape = arguments.shape
    layers = arguments.layers or LAYERS[shape]
    same = arguments.same_layers
    wrote = write_model(shape, arguments.folder, layers, arguments.experts, same)
    text = arguments.folder.with_name(f"{arguments.folder.name}.txt")
    text.write_text(long_text())
    if arguments.cold:
        drop_from_cache(arguments.folder)
    shutil.rmtree(arguments.output, ignore_errors=True)
    command = [
        *(sys.executable, "-m", "reap2gguf", "build", str(arguments.folder), "--name", "full"),
        *("--calibration", str(text), *OPTIONS[shape], "--device", arguments.device),
        *("--output", str(arguments.output), *more),
    ]
    begun = time.monotonic()
    log = arguments.folder.with_name(f"{arguments.folder.name}.log")
    watched = watch(command, arguments.output, log, arguments.fresh_caches)
    seconds = time.monotonic() - begun
    record = json.loads((arguments.output / ".work/.full.finished.json").read_text())
    size = folder_bytes(arguments.folder) / GIB
    print(f"{shape}, {layers} layers, {size:.1f} GiB, written in {wrote:.0f} s")
    stages = ", ".join(f"{stage['name']} {stage['seconds']:.1f}" for stage in record["stages"])
    print(f"**{seconds:.1f} s** from the start of the program to its end: {stages}")
    print(peaks(watched))
    if arguments.evaluate_chunks:
        evaluate(arguments, log)
    if not arguments.keep:
        shutil.rmtree(arguments.output)


if __name__ == "__main__":
    main()
