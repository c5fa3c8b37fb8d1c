"""`reap2gguf choose`: which method of pruning costs least on this model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import reap2gguf
from reap2gguf.choosing.lines import choice_lines
from reap2gguf.messages import duration
from reap2gguf.options import CalibrationOptions
from reap2gguf.pruning.methods import GROUP_SIZE
from reap2gguf.terminal.click_options import (
    calibration_options,
    follow_links_option,
    json_option,
    model_argument,
    output_options,
    overwrite_option,
)
from reap2gguf.terminal.compute_options import collect_compute, compute_options, threads_option
from reap2gguf.terminal.console import say, say_all, say_json, terminal_progress
from reap2gguf.terminal.help import CALIBRATION, PRUNE, WRITE, Number, command, option
from reap2gguf.terminal.option_types import FilePath
from reap2gguf.terminal.pruning_options import (
    candidates_option,
    choose_text_option,
    count_options,
    mtp_option,
    protect_options,
)


@command()
@model_argument()
@count_options
@candidates_option
@option(
    "--group-size",
    section=PRUNE,
    type=Number(2),
    metavar="N",
    help="With the candidate ream, how many experts may become one.",
    default_text=str(GROUP_SIZE),
)
@choose_text_option
@protect_options
@mtp_option
@calibration_options
@option(
    "--observations",
    section=CALIBRATION,
    type=FilePath,
    metavar="FILE",
    help="Keep the observations in FILE, or use those that an earlier `choose` kept there.",
)
@compute_options
@threads_option
@option("-o", "--output", section=WRITE, type=FilePath, metavar="FILE", help="JSON file to write.")
@overwrite_option
@follow_links_option
@json_option
@output_options
def choose(
    model: str,
    spec: str,
    samples: int | None,
    max_length: int | None,
    seed: int,
    pack: bool | None,
    output: Path | None,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Measure which pruning method costs least.

    Observes MODEL once, on all calibration rows but one in eight. Then the pruned models of all
    candidates go through the layers together, on the rows that were held out and on a text of
    another domain. Taken is the method with the lowest KL divergence from MODEL on the held-out
    rows, among those that are not worse on the other text than the best one there, by more than two
    standard errors. Nothing is pruned: `reap2gguf build --method auto` does that too.

    `ream` and `hc_smoe` among the --candidates merge experts in place of removing them. Each is
    made in a pass of its own, in which every expert computes every token, and measured with the
    rest.

    \b
    Example:
      reap2gguf choose ./Qwen3-30B-A3B --compression 0.5 --calibration text.txt
      reap2gguf choose ./Qwen3-30B-A3B --compression 0.25 --candidates reap,weighted_ean_sum \\
          --observations observations.safetensors -o choice.json
      reap2gguf choose ./Qwen3-30B-A3B --compression 0.25 --samples 64 \\
          --candidates reap,weighted_ean_sum,ream,hc_smoe,best+repair
    """
    taken = (
        *("keep_experts", "compression", "candidates", "observations", "mtp", "follow_links"),
        *("protect", "protect_super_experts", "group_size", "overwrite"),
    )
    found = reap2gguf.choose(
        model,
        **{name: arguments.pop(name) for name in taken},
        text=arguments.pop("choose_text"),
        calibration=CalibrationOptions(spec, samples, max_length, seed, pack),
        compute=collect_compute(arguments),
        output=output,
        progress=terminal_progress(),
    )
    if as_json:
        say_json(found.as_json())
        return
    say_all(choice_lines(found.record, found.seconds))
    observing, measuring = (duration(found.seconds[one]) for one in ("observing", "measuring"))
    say(f"cost: {observing} to observe, {measuring} to make and measure candidates", "result")
