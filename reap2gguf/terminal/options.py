"""Options that several commands share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from reap2gguf.machine import available_threads
from reap2gguf.messages import shown
from reap2gguf.options import (
    BuildOptions,
    CalibrationOptions,
    ComputeOptions,
)

F = TypeVar("F", bound=Callable[..., Any])
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_MOST_BYTES = 2**60
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B?", re.IGNORECASE)


def read_size(text: str) -> int:
    """Bytes of "12GiB", "12G" or, in thousands, "12GB"; ValueError if it is none."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{shown(text)} is no size, such as 12GiB")
    letter = match[2].upper()
    decimal = bool(letter) and not match[3] and text.strip().upper().endswith("B")
    unit = 1000 ** "KMGT".index(letter) * 1000 if decimal else _UNITS[letter]
    amount = float(match[1]) * unit
    if amount > _MOST_BYTES:
        raise ValueError(f"{shown(text)} is more memory than any machine has")
    return int(amount)


class SizeType(click.ParamType):  # type: ignore[type-arg]
    """An amount of memory."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return read_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


FilePath = click.Path(path_type=Path, dir_okay=False)
FolderPath = click.Path(path_type=Path)
# prune.select holds the criteria; naming them here keeps numpy out of `--help`
METHODS = ("reap", "frequency", "ean_sum", "ean_mean", "weighted_ean_sum", "weighted_frequency")
_MOST = 2**31 - 1  # of what is counted: rows, tokens
_DEFAULTS = CalibrationOptions()


def _all(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


pruning_options = _all(
    click.option("--keep-experts", type=int, metavar="N", help="Experts that each layer keeps."),
    click.option(
        "--compression", type=float, metavar="R",
        help="Share of experts to drop, floor(E*R) a layer; 0.25 if neither is given.",
    ),
    click.option(
        "--method", type=click.Choice(METHODS), default="reap", show_default=True,
        help="Criterion that ranks the experts.",
    ),
    click.option(
        "--mtp", type=click.Choice(("prune", "drop")), default="prune", show_default=True,
        help="A multi-token-prediction block: prune it with the layers, or leave it out.",
    ),
)  # fmt: skip

calibration_options = _all(
    click.option(
        "--calibration", "spec", default=_DEFAULTS.spec, show_default=True, metavar="SPEC",
        help="Text the experts are observed on: a .txt, .jsonl or .parquet file, a folder of "
        "them, the embedded mix `default`, a published mix (seed-000, seed-002, reap-agentic), a "
        "dataset on the Hub (owner/name), or several of all these with rows of each: "
        "name[subset](split):n,name:n.",
    ),
    click.option(
        "--samples", type=click.IntRange(1, _MOST), metavar="N",
        help="Rows at most, in all; 1024, or as many as the parts of SPEC have.",
    ),
    click.option(
        "--max-length", type=click.IntRange(2, _MOST), metavar="T",
        help="Tokens a row, at most; 2048, or as many as a published mix has.",
    ),
    click.option("--seed", type=click.IntRange(-_MOST, _MOST), default=_DEFAULTS.seed,
                 show_default=True, metavar="S", help="Orders the samples."),
    click.option(
        "--pack/--no-pack", default=None,
        help="Whether samples follow one another until a row of T tokens is full, as REAP has it, "
        "or each is a row; each is one, but for the published mixes.",
    ),
)  # fmt: skip

compute_options = _all(
    click.option(
        "--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True,
        help="Where to compute.",
    ),
    click.option(
        "--memory", type=SizeType(), metavar="SIZE",
        help="Memory a sweep may take of the GPU, or of the host without one, such as 12GiB; "
        "what is free by default.",
    ),
    click.option(
        "--spool", type=click.Choice(("auto", "device", "host", "disk")), default="auto",
        show_default=True, help="Where hidden states wait between two layers.",
    ),
    click.option(
        "--dtype", type=click.Choice(("auto", "float32", "bfloat16")), default="auto",
        show_default=True, help="Precision: auto is bfloat16 on a GPU, float32 on a CPU.",
    ),
)  # fmt: skip

threads_option = click.option(
    "--threads", type=click.IntRange(1, 1024), default=available_threads, metavar="N",
    help="Processor threads; all by default.",
)  # fmt: skip


def _ask_for_llama_cpp(
    ctx: click.Context, param: click.Parameter, value: Path | None
) -> Path | None:
    """Let LLAMA_CPP_DIR name the folder while the command runs: one process has one libggml."""
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


llama_cpp_option = click.option(
    "--llama-cpp",
    type=FolderPath,
    metavar="DIR",
    callback=_ask_for_llama_cpp,
    is_eager=True,
    expose_value=False,
    help="A llama.cpp of yours (source tree, build or bin folder) to use; or set LLAMA_CPP_DIR.",
)

build_options = _all(
    click.argument("model", required=False),
    click.option(
        "--recipe", "recipes", multiple=True, required=True, metavar="NAME|FILE",
        help="Tensor-precision recipe; repeat for several files.",
    ),
    pruning_options,
    click.option("--output", type=FolderPath, default=Path("build"), show_default=True,
                 metavar="DIR", help="Folder for the bundle."),
    click.option("--name", metavar="NAME", help="Name of the result; <source>-REAP-<ratio>."),
    calibration_options,
    click.option("--imatrix-text", type=FilePath, metavar="FILE",
                 help="Text for the importance matrix; the calibration text by default."),
    click.option("--chunk", type=click.IntRange(8, _MOST), default=512, show_default=True,
                 metavar="T", help="Tokens a chunk of the importance matrix."),
    compute_options,
    threads_option,
    llama_cpp_option,
)  # fmt: skip


def collect_compute(arguments: dict[str, Any], scratch: Path = Path()) -> ComputeOptions:
    """Where and how to compute, as one value; hidden states on disk go to `scratch`."""
    names = ("device", "dtype", "threads", "memory", "spool")
    return ComputeOptions(**{name: arguments[name] for name in names}, scratch=scratch)


def collect(
    arguments: dict[str, Any], fresh: bool = False, check_space: bool = True
) -> BuildOptions:
    """The arguments of `build` and `plan` as one value."""
    return BuildOptions(
        recipes=arguments["recipes"],
        model=arguments["model"],
        keep_experts=arguments["keep_experts"],
        compression=arguments["compression"],
        output=arguments["output"],
        name=arguments["name"],
        method=arguments["method"],
        mtp=arguments["mtp"],
        calibration=CalibrationOptions(
            arguments["spec"],
            arguments["samples"],
            arguments["max_length"],
            arguments["seed"],
            arguments["pack"],
        ),
        imatrix_text=arguments["imatrix_text"],
        chunk=arguments["chunk"],
        compute=collect_compute(arguments),
        fresh=fresh,
        check_space=check_space,
    )
