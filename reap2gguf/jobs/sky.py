"""A SkyPilot task for one build: the task of a template, with machine, time limit and build."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from reap2gguf.errors import JobError, UsageError
from reap2gguf.files import read_entry
from reap2gguf.messages import size

if TYPE_CHECKING:
    from reap2gguf.jobs.needs import Needs

_MOST_BYTES = 2**20
# SkyPilot's names, gigabytes, and the models of `needs.GPU_SPEEDS`; it takes the cheapest it finds
_GPUS = (
    ("A10G", 24, "A10G"),
    ("L4", 24, "L4"),
    ("L40S", 48, "L40S"),
    ("A100-80GB", 80, "A100"),
    ("H100", 80, "H100"),
    ("H200", 141, "H200"),
)


def sky_task(template: Path, needs: Needs, words: Sequence[str], push: str | None) -> str:
    """The YAML of a task for `build` with these words.

    Raises UsageError if the template is not a task, and JobError if no GPU is large enough.
    """
    task = _read(template)
    fitting = [one for one in _GPUS if one[1] * 10**9 >= needs.gpu_memory_bytes]
    if not fitting:
        raise JobError(
            f"no GPU has {size(needs.gpu_memory_bytes)}; pass --memory, fewer --samples or a "
            "smaller --max-length"
        )
    resources, envs = task["resources"], task["envs"]
    resources.pop("accelerators", None)
    if needs.needs_gpu:
        resources["accelerators"] = {name: 1 for name, _, _ in fitting}
    resources["memory"] = f"{ceil(needs.memory_bytes / 1e9)}+"
    resources["disk_size"] = ceil(needs.disk_bytes / 1e9)
    envs["TIMEOUT"] = max(needs.timeout(model) for _, _, model in fitting)
    envs["BUILD"] = shlex.join(words)
    if push is not None:
        envs["PUSH"] = push
    return str(yaml.dump(task, Dumper=_Dumper, sort_keys=False, width=100))


def _read(template: Path) -> dict[str, Any]:
    try:
        task = yaml.safe_load(read_entry(template, _MOST_BYTES))
    except (OSError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{template}: cannot be read as YAML ({reason})") from error
    if not isinstance(task, dict) or any(
        not isinstance(task.get(key), dict) for key in ("resources", "envs")
    ):
        raise UsageError(
            f"{template}: not a task for this, expected `resources` and `envs` as in "
            "deploy/skypilot.yaml"
        )
    return task


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Scripts as blocks, which people read."""


def _text(dumper: Any, text: str) -> Any:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
