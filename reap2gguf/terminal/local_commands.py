"""`reap2gguf chat` and `reap2gguf serve`: try a bundle on the machine that built it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reap2gguf.errors import UsageError
from reap2gguf.progress import working
from reap2gguf.terminal.click_options import (
    model_argument,
    output_options,
)
from reap2gguf.terminal.compute_options import (
    llama_cpp_option,
    threads_option,
)
from reap2gguf.terminal.console import is_verbose, say, say_piece, screen_progress
from reap2gguf.terminal.help import ANSWER, COMPUTE, MODEL, SERVER, F, Number, command, option
from reap2gguf.terminal.interrupts import interrupts
from reap2gguf.terminal.option_types import FolderPath

if TYPE_CHECKING:
    from reap2gguf.bundle.pick import ModelFile
    from reap2gguf.local.chat import Conversation

_MAX_PROMPT_BYTES = 8 * 2**20

_file_option = option(
    "--file",
    "wanted",
    section=MODEL,
    metavar="LABEL|NAME",
    help="Which file of the bundle: its label, recipe or name.",
    default_text="the first",
)
_gpu_layers_option = option(
    "--gpu-layers",
    section=COMPUTE,
    type=Number(-1, 10_000),
    metavar="N",
    default=-1,
    help="Layers on the GPU, if llama.cpp was built for one.",
    default_text="all",
)
_engine_option = option(
    "--engine",
    section=COMPUTE,
    type=click.Choice(("auto", "python", "llama.cpp")),
    default="auto",
    help="Run the model with llama-cpp-python or with llama.cpp's own program.",
)


def _context_option(default: int) -> Callable[[F], F]:
    return option(
        "--context",
        section=COMPUTE,
        type=Number(8),
        default=default,
        metavar="T",
        help="Tokens of context per request, at most the model's own.",
    )


@command()
@model_argument("bundle", type=FolderPath)
@_file_option
@option(
    "--prompt",
    section=ANSWER,
    metavar="TEXT",
    help="Answer this and exit.",
    default_text="stdin, unless it is a terminal",
)
@option("--system", section=ANSWER, metavar="TEXT", help="System prompt.")
@option(
    "--tokens",
    section=ANSWER,
    type=Number(),
    metavar="N",
    help="Maximum tokens of an answer.",
    default_text="until the context is full",
)
@option(
    "--temperature",
    section=ANSWER,
    type=Number(0.0, 10.0),
    default=0.8,
    metavar="X",
    help="Randomness of the answer; 0 always takes the most likely token.",
)
@option(
    "--seed",
    section=ANSWER,
    type=Number(0),
    metavar="S",
    help="Random seed; the same seed gives the same answer.",
)
@_context_option(4096)
@threads_option
@_gpu_layers_option
@_engine_option
@llama_cpp_option
@output_options
def chat(bundle: Path, wanted: str | None, prompt: str | None, engine: str, **options: Any) -> None:
    """Talk to a model of a bundle.

    BUNDLE is a folder that `build` wrote, or a .gguf file. Ctrl-C stops an answer, three quotes
    begin and end a text of several lines, /clear starts a new conversation, Ctrl-D or /exit quits.

    \b
    Example:
      reap2gguf chat build/Qwen3-30B-A3B-REAP-0.25-GGUF
      reap2gguf chat build/Qwen3-30B-A3B-REAP-0.25-GGUF --prompt "Why is the sky blue?"
    """
    from reap2gguf.local.engine import Engine
    from reap2gguf.local.programs import choose_program, cli_arguments, replace_process
    from reap2gguf.local.running import AnswerOptions, EngineOptions

    interrupts.release()  # Ctrl-C stops an answer

    model = _pick(bundle, wanted)
    program = choose_program("llama-cli", engine, prefers_python=True)
    _report_fallback(program, engine, "llama-cli")
    if prompt is None and not sys.stdin.isatty():
        prompt = _read_stdin()
    running = EngineOptions(options["context"], options["threads"], options["gpu_layers"])
    answer = AnswerOptions(
        options["temperature"], options["tokens"], options["seed"], options["system"]
    )
    if program is not None:
        _say_what_loads(model.path, program)
        say(f"running {model.path.name} with {program}")
        replace_process(program, cli_arguments(model, running, answer, prompt))
    from reap2gguf.local.chat import Conversation

    with working(screen_progress(), f"Loading {model.path.name}"):
        engine_process = Engine(model.path, running)
    with closing(engine_process) as loaded:
        if not loaded.has_template:
            say(f"{model.path.name} has no chat template: the model continues the text as it is")
        _converse(Conversation(loaded, answer), prompt)


def _converse(conversation: Conversation, prompt: str | None) -> None:
    from reap2gguf.local.chat import HELP, converse

    if prompt is None:
        if importlib.util.find_spec("readline"):
            importlib.import_module("readline")  # gives input() a history and editing keys
        say(HELP)
        converse(conversation, input, say_piece, say)
        return
    answer = conversation.ask(prompt, say_piece)
    say_piece("\n")
    say(f"({answer.figures()})")
    if answer.was_stopped:
        raise KeyboardInterrupt


@command()
@model_argument("bundle", type=FolderPath)
@_file_option
@option(
    "--host",
    section=SERVER,
    default="127.0.0.1",
    help="Address to listen on; 0.0.0.0 accepts requests from other machines.",
)
@option(
    "--port",
    section=SERVER,
    type=Number(0, 65535),
    default=8080,
    metavar="N",
    help="Port to listen on; 0 takes a free one.",
)
@option(
    "--parallel",
    section=SERVER,
    type=Number(1, 256),
    default=1,
    metavar="N",
    help="Requests at a time; more than one needs llama-server.",
)
@_context_option(8192)
@threads_option
@_gpu_layers_option
@_engine_option
@llama_cpp_option
@output_options
def serve(bundle: Path, wanted: str | None, engine: str, **options: Any) -> None:
    """Serve a model to OpenAI-style clients.

    BUNDLE is a folder that `build` wrote, or a .gguf file. Runs llama.cpp's llama-server if it is
    found, else llama-cpp-python's server.

    \b
    Example:
      reap2gguf serve build/Qwen3-30B-A3B-REAP-0.25-GGUF --port 8080
      curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
          -d '{"messages": [{"role": "user", "content": "Hello"}]}'
    """
    from reap2gguf.local import serving
    from reap2gguf.local.programs import choose_program
    from reap2gguf.local.running import EngineOptions

    interrupts.release()  # Ctrl-C is the way to stop a server
    model = _pick(bundle, wanted)
    program = choose_program("llama-server", engine, prefers_python=False)
    _report_fallback(program, engine, "llama-server")
    running = EngineOptions(options["context"], options["threads"], options["gpu_layers"])
    listening = serving.ServeOptions(options["host"], options["port"], options["parallel"])
    if program is None:
        serving.check_python_server(model.path, listening)
    port = serving.free_port(listening.host, listening.port)
    listening = replace(listening, port=port)
    by = program or serving.PYTHON_SERVER
    if program is None and model.mmproj is not None:
        say(f"{model.mmproj.name} is not used: images need llama-server")
    say(f"{listening.address}  {model.name} ({by})", "result")
    if program is not None:
        _say_what_loads(model.path, program)
        serving.run_llama_server(program, model, running, listening)
    serving.run_python_server(model, running, listening, is_verbose())


def _pick(bundle: Path, wanted: str | None) -> ModelFile:
    from reap2gguf.bundle.pick import pick

    model = pick(bundle, wanted)
    if model.others:
        say(f"{model.path.name}; --file chooses another: {', '.join(model.others)}")
    return model


def _say_what_loads(path: Path, program: Path) -> None:
    """Say so where only a program of ik_llama.cpp loads a file: this one may be llama.cpp's.

    Raises ArtifactError if it is not a GGUF file.
    """
    from reap2gguf.gguf_files.reader import read_gguf_header
    from reap2gguf.local.header_check import ik_types

    if types := ik_types(read_gguf_header(path)):
        say(
            f"{path.name} has tensors of {', '.join(types)}, which only ik_llama.cpp loads: "
            f"{program} must be its program"
        )


def _report_fallback(program: Path | None, engine: str, name: str) -> None:
    """Report that the requested llama.cpp does not have the program."""
    from reap2gguf.vendor import requested_folder

    if program is None and engine == "auto" and (folder := requested_folder()) is not None:
        say(f"{folder} has no {name}; llama-cpp-python runs the model instead")


def _read_stdin() -> str:
    data = sys.stdin.buffer.read(_MAX_PROMPT_BYTES + 1)
    if len(data) > _MAX_PROMPT_BYTES:
        raise UsageError(f"stdin: a prompt has at most {_MAX_PROMPT_BYTES:,} bytes")
    text = data.decode("utf-8", errors="replace").strip()
    if not text:
        raise UsageError("stdin is not a terminal and is empty; pass --prompt TEXT")
    return text
