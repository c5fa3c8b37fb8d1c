"""`reap2gguf evaluate`: what pruning cost and what quantizing cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import reap2gguf
from reap2gguf.evaluating.options import FOLDER_ENGINES, EvaluateOptions
from reap2gguf.terminal.click_options import (
    follow_links_option,
    json_option,
    output_options,
    overwrite_option,
)
from reap2gguf.terminal.compute_options import collect_compute, compute_options, threads_option
from reap2gguf.terminal.console import say_all, say_json, terminal_progress
from reap2gguf.terminal.evaluate_views import evaluation_lines
from reap2gguf.terminal.help import (
    MEASURE,
    MODEL,
    PROGRAMS,
    WRITE,
    Number,
    command,
    option,
    together,
)
from reap2gguf.terminal.option_types import FilePath, FolderPath

_text_options = together(
    option(
        "--text",
        section=MEASURE,
        default="held-out",
        metavar="NAME|FILE",
        help="Text to score: held-out (shipped), wikitext2 (its raw test set), or a file.",
    ),
    option("--no-text", section=MEASURE, is_flag=True, help="Score no text."),
    option(
        "--chunk",
        section=MEASURE,
        type=Number(8),
        default=512,
        metavar="TOKENS",
        help="Tokens per chunk, of which the second half is scored.",
    ),
    option(
        "--chunks",
        section=MEASURE,
        type=Number(2),
        metavar="N",
        help="Score the first N chunks of the text.",
        default_text="all",
    ),
    option(
        "--engine",
        section=MEASURE,
        type=click.Choice(["streamed", "llama.cpp"]),
        default="streamed",
        help="What computes GGUF files: layer by layer here, or llama.cpp with the whole file in "
        "memory.",
    ),
)

_task_options = together(
    option(
        "--tasks",
        section=MEASURE,
        metavar="NAME,...",
        help="Tasks of lm-eval that choose between answers or measure perplexity: names, groups "
        "such as mmlu, or patterns.",
    ),
    option(
        "--limit",
        section=MEASURE,
        type=Number(2),
        metavar="N",
        help="Ask the first N questions of each task, or problems of each set.",
        default_text="all",
    ),
    option(
        "--num-fewshot",
        section=MEASURE,
        type=Number(0),
        metavar="N",
        help="Examples before each question.",
        default_text="what each task says",
    ),
    option(
        "--task-folder",
        section=MEASURE,
        type=FolderPath,
        metavar="DIR",
        help="Folder of your own task files (*.yaml).",
    ),
    option(
        "--allow-task-code",
        section=MEASURE,
        is_flag=True,
        help="Let files of that folder run Python code.",
    ),
    option(
        "--speed",
        section=MEASURE,
        is_flag=True,
        help="Measure the speed of each GGUF file in llama.cpp, as llama-bench does.",
    ),
    option(
        "--smoke-test",
        section=MEASURE,
        is_flag=True,
        help="Compare a chat answer of each GGUF file in llama.cpp with that of its folder in "
        "transformers.",
    ),
)

_program_options = together(
    option("--humaneval", section=PROGRAMS, is_flag=True, help="Solve HumanEval's problems."),
    option(
        "--evalplus",
        section=PROGRAMS,
        is_flag=True,
        help="Solve the problems of HumanEval+ and MBPP+ (needs the package evalplus).",
    ),
    option(
        "--run-code",
        section=PROGRAMS,
        is_flag=True,
        help="Run these programs and judge them, each in a process of its own with limits of time, "
        "memory, files and network. Without it they are only written.",
    ),
    option(
        "--allow-unsandboxed",
        section=PROGRAMS,
        is_flag=True,
        help="Run them also where this machine cannot isolate them.",
    ),
    option(
        "--generate-with",
        section=PROGRAMS,
        type=click.Choice(FOLDER_ENGINES),
        default="transformers",
        help="What runs the folders; none leaves them out. llama.cpp runs GGUF files.",
    ),
)


# options that have the names of their values
_SAME = (
    "chunk",
    "chunks",
    "engine",
    "limit",
    "num_fewshot",
    "task_folder",
    "allow_task_code",
    "speed",
    "smoke_test",
    "run_code",
    "allow_unsandboxed",
    "generate_with",
)


@command()
@click.argument("model")
@click.argument("variants", nargs=-1, type=click.Path(path_type=Path))
@option(
    "--source",
    section=MODEL,
    metavar="MODEL",
    help="The model that a bundle was pruned from.",
    default_text="as the bundle names it, if that is on the Hub",
)
@_text_options
@_task_options
@_program_options
@compute_options
@threads_option
@option("-o", "--output", section=WRITE, type=FilePath, metavar="FILE", help="JSON file to write.")
@overwrite_option
@option(
    "--update",
    section=WRITE,
    is_flag=True,
    help="Write the figures into the bundle's manifest and cards.",
)
@follow_links_option
@json_option
@output_options
def evaluate(
    model: str,
    variants: tuple[Path, ...],
    source: str | None,
    output: Path | None,
    overwrite: bool,
    update: bool,
    follow_links: bool,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Measure what pruning and quantizing cost.

    MODEL is a bundle, or the model that VARIANTS were made from: pruned folders and GGUF files.
    All of them go through the layers together, one layer in memory at a time: no logits file, and
    no whole model. Text is cut and scored as by llama-perplexity, and tasks are lm-eval's. To
    resume an interrupted run, run the same command with the same --output again.

    \b
    Example:
      reap2gguf evaluate build/Qwen3-30B-A3B-REAP-0.25 --text wikitext2
      reap2gguf evaluate Qwen/Qwen3-30B-A3B pruned/ pruned-Q4_K_M.gguf -o evaluation.json
      reap2gguf evaluate build/Qwen3-30B-A3B-REAP-0.25 --tasks mmlu,arc_easy --limit 250
    """
    found = reap2gguf.evaluate(
        model,
        *variants,
        source=source,
        options=_options(arguments),
        output=output,
        overwrite=overwrite,
        update=update,
        compute=collect_compute(arguments),
        follow_links=follow_links,
        progress=terminal_progress(),
    )
    if as_json:
        say_json(found.as_json())
    else:
        say_all(evaluation_lines(found))


def _options(arguments: dict[str, Any]) -> EvaluateOptions:
    """What is measured, as one value."""
    programs = ("humaneval",) if arguments["humaneval"] else ()
    if arguments["evalplus"]:
        programs = (*programs, "humaneval+", "mbpp+")
    return EvaluateOptions(
        text=None if arguments["no_text"] else arguments["text"],
        tasks=arguments["tasks"] or (),
        programs=programs,
        **{name: arguments[name] for name in _SAME},
    )
