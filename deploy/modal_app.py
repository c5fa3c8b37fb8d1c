"""A build on a machine that Modal rents. docs/rented-machines.md explains it.

    modal secret create huggingface HF_TOKEN=...
    modal run --detach deploy/modal_app.py --push owner/Qwen3-30B-A3B-REAP-0.25 \
        --build "Qwen/Qwen3-30B-A3B --recipe q4km --compression 0.25"

`modal run` plans the build here, so that GPU, memory, disk and time limit fit it; `reap2gguf` must
be on the PATH. If Modal takes the machine away, it starts the function again on another one, and
the build resumes from the volume. The same command resumes a build that failed or was stopped.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from pathlib import Path

import modal

REF = os.environ.get("REAP2GGUF_REF", "v0.1.0")
HOME = "https://github.com/reap2gguf/reap2gguf"
PACKAGE = os.environ.get("REAP2GGUF_PACKAGE", f"reap2gguf[gpu] @ {HOME}/archive/{REF}.tar.gz")
MOUNT = "/storage"
OUTPUT = "/root/reap2gguf/build"  # on the container's own disk
DISK_GIB = int(os.environ.get("REAP2GGUF_DISK_GIB", "512"))
CORES = 16.0
COMMIT_SECONDS = 60.0
GRACE_SECONDS = 25.0  # Modal gives 30
# Modal's GPUs, the cheapest first: gigabytes, and the model whose time limit `jobs needs` prints
GPUS = (
    ("L4", 24, "L4"),
    ("L40S", 48, "L40S"),
    ("A100-80GB", 80, "A100"),
    ("H100", 80, "H100"),
    ("H200", 141, "H200"),
)

app = modal.App("reap2gguf")
image = (
    modal.Image.debian_slim(python_version="3.12")
    .apt_install("build-essential")  # triton compiles a small launcher
    .uv_pip_install(PACKAGE)
)
volume = modal.Volume.from_name("reap2gguf-work", create_if_missing=True)
secret = modal.Secret.from_name("huggingface", required_keys=["HF_TOKEN"])


@app.function(
    image=image,
    gpu="H100",
    cpu=CORES,
    memory=64 * 1024,
    # Modal gives 512 GiB to every container; more has to be asked for
    ephemeral_disk=DISK_GIB * 1024 if DISK_GIB > 512 else None,
    timeout=24 * 3600,
    volumes={MOUNT: volume},
    secrets=[secret],
)
def work(words: list[str], push: str, private: bool) -> None:
    """Restore, build, save and push, on the rented machine. The token is in its environment."""
    kind = "--private" if private else "--public"
    here = ["reap2gguf", "jobs", "here", "--output", OUTPUT, "--storage", f"{MOUNT}/{push}"]
    process = subprocess.Popen([*here, "--push", push, kind, "--", "build", *words])
    try:
        while process.poll() is None:
            try:
                process.wait(COMMIT_SECONDS)
            except subprocess.TimeoutExpired:
                volume.commit()  # what is on the volume outlives this machine only from here on
    except BaseException:  # the machine is taken away, or the function's time is over
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    finally:
        volume.commit()
    if process.returncode:
        raise RuntimeError(f"reap2gguf ended with exit code {process.returncode}; see the log")


def needs_of(words: list[str]) -> dict[str, int]:
    """What the build needs, from its plan on this machine."""
    command = ["reap2gguf", "jobs", "needs", "--", "build", *words]
    found = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if found.returncode:
        raise SystemExit(found.returncode)  # it has said why
    return json.loads(found.stdout)


def machine_for(needs: dict, gpu: str = "") -> dict:
    """Options of the function for these needs; `gpu` overrides the choice."""
    wanted = needs["gpu_memory_bytes"]
    fitting = [one for one in GPUS if one[1] * 1e9 >= wanted and gpu in ("", one[0])]
    if not fitting:
        raise SystemExit(f"no GPU {gpu or 'of Modal'} has {wanted / 1e9:.0f} GB; pass --memory")
    if needs["disk_bytes"] > DISK_GIB * 2**30:
        gib = -(-needs["disk_bytes"] // 2**30)
        raise SystemExit(f"the build needs {gib} GiB of disk; set REAP2GGUF_DISK_GIB={gib}")
    name, _, model = fitting[0]
    return {
        "gpu": name,
        "memory": -(-needs["memory_bytes"] // 2**20),
        "timeout": needs["timeout_seconds"][model],
    }


@app.local_entrypoint()
def main(build: str, push: str, gpu: str = "", public: bool = False) -> None:
    words = shlex.split(build)
    for word in words:
        if Path(word).exists():
            raise SystemExit(f"{word}: a file or folder of this machine; name one on the Hub")
    options = machine_for(needs_of(words), gpu)
    print(
        f"{options['gpu']}, {options['memory']:,} MiB, at most {options['timeout']:,} s", flush=True
    )
    work.with_options(**options).remote(words, push, not public)
    print(f"pushed to {push} and {push}-GGUF")
