"""`reap2gguf chat` and `reap2gguf serve`: a bundle tried where it was made."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from reap2gguf.errors import UsageError
from reap2gguf.messages import one_line
from reap2gguf.terminal.options import F, FolderPath, llama_cpp_option, threads_option

if TYPE_CHECKING:
    from reap2gguf.bundle.pick import ModelFile
    from reap2gguf.local.chat import Conversation

_MOST = 2**31 - 1
_MAX_PROMPT_BYTES = 8 * 2**20

_file_option = click.option(
    "--file", "wanted", metavar="LABEL|NAME",
    help="Which of a bundle's files: its label, recipe or name; the first by default.",
)  # fmt: skip
_gpu_layers_option = click.option(
    "--gpu-layers", type=click.IntRange(-1, 10_000), default=-1, metavar="N",
    help="Layers on the GPU, where llama.cpp was built for one; all by default.",
)  # fmt: skip
_engine_option = click.option(
    "--engine", type=click.Choice(("auto", "python", "llama.cpp")), default="auto",
    show_default=True, help="llama-cpp-python in this process, or llama.cpp's own program.",
)  # fmt: skip


def _context_option(default: int) -> Callable[[F], F]:
    return click.option(
        "--context", type=click.IntRange(8, _MOST), default=default, show_default=True,
        metavar="T", help="Tokens of context for each request, at most the model's own.",
    )  # fmt: skip


@click.command()
@click.argument("bundle", type=FolderPath)
@_file_option
@click.option("--prompt", metavar="TEXT", help="Answer this and end; stdin if it is no terminal.")
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option(
    "--tokens",
    type=click.IntRange(1, _MOST),
    metavar="N",
    help="Tokens an answer has at most; what the context holds by default.",
)
@_context_option(4096)
@click.option(
    "--temperature",
    type=click.FloatRange(0, 10),
    default=0.8,
    show_default=True,
    metavar="X",
    help="0 always takes the likeliest token.",
)
@click.option("--seed", type=click.IntRange(0, _MOST), metavar="S", help="Draws the same again.")
@threads_option
@_gpu_layers_option
@_engine_option
@llama_cpp_option
def chat(
    bundle: Path, wanted: str | None, prompt: str | None, system: str | None, tokens: int | None,
    temperature: float, seed: int | None, engine: str, **running: int,
) -> None:  # fmt: skip
    """Talk to a model of BUNDLE (a folder that `build` made, or a .gguf file).

    Ctrl-C stops an answer, /clear forgets the conversation, Ctrl-D or /exit ends.

    \b
    Example:
      reap2gguf chat build/Qwen3-30B-A3B-REAP-0.25-GGUF
      reap2gguf chat build/Qwen3-30B-A3B-REAP-0.25-GGUF --prompt "Why is the sky blue?"
    """
    from reap2gguf.local.programs import RunOptions, become, choose_program, cli_arguments

    model = _pick(bundle, wanted)
    program = choose_program("llama-cli", engine, prefers_python=True)
    _tell_fallback(program, engine, "llama-cli")
    if prompt is None and not sys.stdin.isatty():
        prompt = _piped()
    options = RunOptions(running["context"], running["threads"], running["gpu_layers"])
    if program is not None:
        _say(f"{model.path.name} by {program}")
        become(
            program, cli_arguments(model, options, prompt, system, tokens, temperature, seed)
        )  # fmt: skip
    settings = {"temperature": temperature, "max_tokens": tokens, "seed": seed}
    from reap2gguf.local.chat import Conversation
    from reap2gguf.local.engine import Engine, EngineOptions

    loaded = EngineOptions(options.context, options.threads, options.gpu_layers)
    with closing(Engine(model.path, loaded)) as running_engine:
        if not running_engine.has_template:
            _say(f"{model.path.name} has no chat template: it goes on with the text as it is")
        _converse(Conversation(running_engine, settings, system), prompt)


def _converse(conversation: Conversation, prompt: str | None) -> None:
    from reap2gguf.local.chat import HELP, converse

    if prompt is None:
        if importlib.util.find_spec("readline"):
            importlib.import_module("readline")  # gives input() a history and keys
        _say(HELP)
        converse(conversation, lambda: input("> "), _write, _say)
        return
    answer = conversation.ask(prompt, _write)
    _write("\n")
    _say(f"({answer.figures()})")
    if answer.was_stopped:
        raise KeyboardInterrupt


@click.command()
@click.argument("bundle", type=FolderPath)
@_file_option
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; 0.0.0.0 lets in whoever reaches this machine.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    metavar="N",
    help="Port to listen on; 0 takes a free one.",
)
@_context_option(8192)
@click.option(
    "--parallel",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    metavar="N",
    help="Requests at a time; more than one needs llama-server.",
)
@threads_option
@_gpu_layers_option
@_engine_option
@llama_cpp_option
def serve(
    bundle: Path, wanted: str | None, host: str, port: int, parallel: int, engine: str,
    **running: int,
) -> None:  # fmt: skip
    """Serve a model of BUNDLE to OpenAI-style clients, by llama-server where it is found.

    \b
    Example:
      reap2gguf serve build/Qwen3-30B-A3B-REAP-0.25-GGUF --port 8080
      curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
          -d '{"messages": [{"role": "user", "content": "Hello"}]}'
    """
    from reap2gguf.local.address import address_of, free_port
    from reap2gguf.local.programs import RunOptions, become, choose_program, server_arguments

    model = _pick(bundle, wanted)
    program = choose_program("llama-server", engine, prefers_python=False)
    _tell_fallback(program, engine, "llama-server")
    options = RunOptions(running["context"], running["threads"], running["gpu_layers"])
    if program is not None:
        port = free_port(host, port)
        click.echo(one_line(f"{address_of(host, port)}  {model.name}, by {program}"))
        become(program, server_arguments(model, options, host, port, parallel))
    if parallel > 1:
        raise UsageError(
            f"--parallel {parallel}: in this process one request is answered at a time; install "
            "llama.cpp and pass --llama-cpp DIR, or leave it out"
        )
    if model.mmproj is not None:
        _say(f"{model.mmproj.name} is not used: images need llama-server")
    from reap2gguf.local.engine import Engine, EngineOptions
    from reap2gguf.local.server import ModelServer

    with ModelServer(host, port, model.name, _say) as server:
        loaded = EngineOptions(options.context, options.threads, options.gpu_layers)
        ready = Engine(model.path, loaded)
        click.echo(one_line(f"{server.address}  {model.name}"))
        sys.stdout.flush()
        server.serve(ready)


def _pick(bundle: Path, wanted: str | None) -> ModelFile:
    from reap2gguf.bundle.pick import pick

    model = pick(bundle, wanted)
    if model.others:
        _say(f"{model.path.name}; --file chooses another: {', '.join(model.others)}")
    return model


def _tell_fallback(program: Path | None, engine: str, name: str) -> None:
    """Say that a llama.cpp was asked for and has no such program."""
    from reap2gguf.vendor import asked_folder

    if program is None and engine == "auto" and (asked := asked_folder()) is not None:
        _say(f"{asked} has no {name}; llama-cpp-python runs the model in its place")


def _piped() -> str:
    data = sys.stdin.buffer.read(_MAX_PROMPT_BYTES + 1)
    if len(data) > _MAX_PROMPT_BYTES:
        raise UsageError(f"stdin: a prompt has at most {_MAX_PROMPT_BYTES:,} bytes")
    text = data.decode("utf-8", errors="replace").strip()
    if not text:
        raise UsageError("stdin is no terminal and holds no prompt; pass --prompt TEXT")
    return text


def _write(text: str) -> None:
    click.echo(text, nl=False)
    if os.isatty(1):
        sys.stdout.flush()


def _say(text: str) -> None:
    click.echo(one_line(text), err=True)
