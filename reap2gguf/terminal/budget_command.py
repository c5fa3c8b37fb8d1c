"""`reap2gguf recipes budget`: experts and bits for one size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reap2gguf.fitting.lines import budget_lines
from reap2gguf.terminal.click_options import (
    follow_links_option,
    json_option,
    model_argument,
    output_options,
)
from reap2gguf.terminal.compute_options import (
    collect_compute,
    compute_options,
    llama_cpp_option,
    threads_option,
)
from reap2gguf.terminal.console import say_all, say_json, terminal_progress
from reap2gguf.terminal.help import MEASURE, PRUNE, WRITE, Number, command, option
from reap2gguf.terminal.option_types import FilePath, FolderPath
from reap2gguf.terminal.pruning_options import criterion_option
from reap2gguf.terminal.target_options import target_options, weighed_sensitivity_option

if TYPE_CHECKING:
    from reap2gguf.api.budgeting import BudgetResult


class _Counts(click.ParamType):  # type: ignore[type-arg]
    """Whole numbers with commas between them."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            return [int(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 128,112,96", param, ctx)


@command("budget")
@model_argument()
@option(
    "--observations",
    section=PRUNE,
    type=FilePath,
    required=True,
    metavar="FILE",
    help="Observations of MODEL, which `observe` wrote.",
)
@option(
    "--imatrix",
    section=WRITE,
    type=FilePath,
    required=True,
    metavar="FILE",
    help="Importance matrix of MODEL with all experts, .gguf or .dat.",
)
@option(
    "--keep-experts",
    section=PRUNE,
    type=_Counts(),
    metavar="N,...",
    help="Numbers of experts to weigh.",
    default_text="all, 15/16, 7/8, 13/16, 3/4, 5/8 and half of them",
)
@criterion_option
@target_options
@option(
    "--text",
    section=MEASURE,
    default="held-out",
    metavar="NAME|FILE",
    help="Text on which pruning is measured: held-out, wikitext2, or a file.",
)
@option(
    "--chunks",
    section=MEASURE,
    type=Number(2),
    default=16,
    metavar="N",
    help="Read the first N chunks of 512 tokens.",
)
@weighed_sensitivity_option
@option(
    "--cache",
    section=MEASURE,
    type=FolderPath,
    metavar="FOLDER",
    help="Keep in FOLDER how much errors in tensors count, and take it from there; `recipes fit -o "
    "FOLDER/NAME.toml` does the same.",
)
@compute_options
@threads_option
@llama_cpp_option
@follow_links_option
@json_option
@output_options
def recipes_budget(
    model: str,
    observations: Path,
    imatrix: Path,
    keep_experts: list[int] | None,
    method: str,
    target_size: int | None,
    target_bpw: float | None,
    fit: int | None,
    fit_context: int | None,
    text: str,
    chunks: int,
    sensitivity: str,
    cache: Path | None,
    follow_links: bool,
    as_json: bool,
    **compute: Any,
) -> None:
    """Weigh fewer experts against fewer bits.

    For each number of experts, measures what pruning costs (the KL divergence from MODEL, all
    numbers in one sweep) and predicts what quantizing to the target costs. Prints the table and
    the number with the least sum. Writes nothing, but what --cache keeps.

    \b
    Example:
      reap2gguf recipes budget ./Qwen3-30B-A3B --observations obs.safetensors \\
          --imatrix imatrix.gguf --keep-experts 128,112,96,80 --target-size 10GiB
    """
    import reap2gguf

    if [target_size, target_bpw, fit].count(None) != 2:
        raise click.UsageError("pass one of --target-size, --target-bpw and --fit")
    found = reap2gguf.weigh_budget(
        model,
        observations=observations,
        imatrix=imatrix,
        keep_experts=keep_experts,
        method=method,
        target_size=target_size,
        target_bpw=target_bpw,
        fit=fit,
        fit_context=fit_context,
        text=text,
        chunks=chunks,
        sensitivity=sensitivity,
        cache=cache,
        compute=collect_compute(compute),
        follow_links=follow_links,
        progress=terminal_progress(),
    )
    if as_json:
        say_json(budget_as_json(found))
    else:
        say_all(_lines(found))


def _lines(found: BudgetResult) -> Iterator[str]:
    """The table for people, and the best number of experts."""
    yield from budget_lines(found.candidates, found.n_scored)
    yield f"least: --keep-experts {found.best.n_experts}"


def budget_as_json(found: BudgetResult) -> dict[str, Any]:
    """The same for programs."""
    return {
        "best": found.best.n_experts,
        "n_scored": found.n_scored,
        "candidates": [
            {**asdict(one), "damage": None if one.quantizing is None else one.damage}
            for one in found.candidates
        ],
    }
