"""Options that say where and how to compute, and the value that they become."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from reap2gguf.machine import available_threads
from reap2gguf.options import DEVICES, DTYPES, SPOOLS, CheckQuants, ComputeOptions
from reap2gguf.terminal.help import COMPUTE, Number, option, together
from reap2gguf.terminal.option_types import FolderPath, SizeType

quantizing_device_option = option(
    "--device",
    section=COMPUTE,
    type=click.Choice(DEVICES),
    default="auto",
    help="Processor that quantizes: auto is a GPU if there is one and much to do.",
)

compute_options = together(
    option(
        "--device",
        section=COMPUTE,
        type=click.Choice(DEVICES),
        default="auto",
        help="Processor that computes and quantizes: auto is a GPU if there is one.",
    ),
    option(
        "--memory",
        section=COMPUTE,
        type=SizeType(),
        metavar="SIZE",
        help="Limit on GPU memory (RAM on a CPU) for a calibration pass, e.g. 12GiB.",
        default_text="what is free",
    ),
    option(
        "--spool",
        section=COMPUTE,
        type=click.Choice(SPOOLS),
        default="auto",
        help="Where to keep activations between layers: GPU (device), RAM (host) or disk.",
    ),
    option(
        "--dtype",
        section=COMPUTE,
        type=click.Choice(DTYPES),
        default="auto",
        help="Precision: auto is bfloat16 on a GPU, float32 on a CPU.",
    ),
)

threads_option = option(
    "--threads",
    section=COMPUTE,
    type=Number(1, 1024),
    default=available_threads,
    metavar="N",
    help="CPU threads.",
    default_text="all",
)


check_quants_option = option(
    "--check-quants",
    section=COMPUTE,
    type=click.Choice([one.value for one in CheckQuants]),
    default=CheckQuants.SAMPLE.value,
    help="How much of what compiled kernels quantize is compared with libggml's bytes: all, one "
    "super-block in a thousand (sample), or none.",
)


def _use_llama_cpp(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    # In the environment, and not an argument that is passed down: libggml is loaded once per
    # process, from wherever the first tensor is quantized, and threads and worker processes must
    # find the same one.
    from reap2gguf.vendor import VARIABLE

    if value is not None:
        earlier = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = str(value)
        ctx.call_on_close(lambda: _restore(VARIABLE, earlier))
    return value


def _restore(variable: str, earlier: str | None) -> None:
    if earlier is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = earlier


llama_cpp_option = option(
    "--llama-cpp",
    section=COMPUTE,
    type=FolderPath,
    metavar="DIR",
    callback=_use_llama_cpp,
    is_eager=True,
    expose_value=False,
    help="Use your own llama.cpp: its source tree, build folder or bin folder.",
    default_text="LLAMA_CPP_DIR, if set",
)


def collect_compute(arguments: dict[str, Any]) -> ComputeOptions:
    """Where and how to compute, as one value."""
    names = ("device", "dtype", "threads", "memory", "spool", "check_quants")
    # commands that quantize nothing do not have all of them
    return ComputeOptions(**{name: arguments[name] for name in names if name in arguments})
