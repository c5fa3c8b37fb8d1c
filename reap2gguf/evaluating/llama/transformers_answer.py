"""The greedy answer of a checkpoint's folder under transformers, in a process of its own.

What transformers needs is given back when the process ends, and a system that ends it for its
memory does not end this program.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import reap2gguf
from reap2gguf.errors import CheckpointError
from reap2gguf.messages import shown
from reap2gguf.models.loading import load_whole

_BOOT = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from reap2gguf.evaluating.llama.transformers_answer import main; main()"
)


def transformers_answer(folder: Path, prompt: Sequence[int], most: int, threads: int) -> list[int]:
    """The likeliest tokens after a prompt, at most `most`, until one ends the answer.

    Computed in float32 on the CPU: four bytes of memory per parameter. Raises CheckpointError if
    transformers fails.
    """
    package = Path(str(reap2gguf.__file__)).absolute().parents[1]
    request = {"folder": str(folder), "prompt": list(prompt), "most": most, "threads": threads}
    done = subprocess.run(
        [sys.executable, "-P", "-c", _BOOT, str(package)],
        input=json.dumps(request).encode(),
        capture_output=True,
        start_new_session=True,  # Ctrl-C reaches only this process, which ends the other
        check=False,
    )
    if done.returncode:
        code = done.returncode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        reason = f": {shown(said[-1])[1:-1]}" if said else ""
        raise CheckpointError(
            f"{folder}: transformers cannot run it ({how}{reason}); check the folder with "
            "`reap2gguf verify`, or leave out the smoke test"
        )
    return [int(token) for token in json.loads(done.stdout)]


def main() -> None:
    """Answer the request on standard input."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    request = json.load(sys.stdin)
    found = _greedy(request["folder"], request["prompt"], request["most"], request["threads"])
    os.write(answers, json.dumps(found).encode())


def _greedy(folder: str, prompt: list[int], most: int, threads: int) -> list[int]:
    import torch

    from reap2gguf.observing.compute.by_device import follow_devices

    torch.set_num_threads(threads)
    model = load_whole(Path(folder), dtype=torch.float32, use_safetensors=True)
    follow_devices(model.modules())
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    found: list[int] = []
    with torch.inference_mode():
        while len(found) < most and not ends & set(found[-1:]):
            # without a cache, whose use differs between versions: these answers are short
            logits = model(input_ids=torch.tensor([prompt + found]), use_cache=False).logits
            found.append(int(logits[0, -1].argmax()))
    return found
