"""Chat and serving by llama.cpp's own programs, which take this process's place."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from reap2gguf.bundle.pick import ModelFile
from reap2gguf.errors import DependencyError
from reap2gguf.local.engine import INSTALL, is_installed
from reap2gguf.vendor import VARIABLE, LlamaCpp, asked_folder, find_llama_cpp


@dataclass(frozen=True)
class RunOptions:
    """What both programs are told."""

    context: int
    threads: int
    gpu_layers: int


def choose_program(name: str, engine: str, prefers_python: bool) -> Path | None:
    """The llama.cpp program to run, or None for llama-cpp-python in this process.

    `auto` takes what was asked for by --llama-cpp, else what is preferred, else what there is.
    Raises DependencyError that says what to install, or that what was asked for does not run.
    """
    if engine == "python" or (
        engine == "auto" and prefers_python and is_installed() and asked_folder() is None
    ):
        if not is_installed():
            raise DependencyError(f"llama-cpp-python is not installed; run `{INSTALL}`")
        return None
    found = find_llama_cpp()
    program = found.programs.get(name) if found is not None else None
    if program is not None and found is not None and not found.problem:
        return program
    is_broken = found is not None and found.problem and asked_folder() is not None
    if engine == "auto" and is_installed() and not is_broken:
        return None
    raise DependencyError(_nothing(name, found))


def _nothing(name: str, found: LlamaCpp | None) -> str:
    python = "use --engine python" if is_installed() else f"run `{INSTALL}`"
    if found is not None and found.problem:
        return f"{found.problem}; mend it, pass another --llama-cpp DIR, or {python}"
    place = f"in {found.folder}" if found is not None else f"on PATH, and {VARIABLE} is not set"
    first = "" if is_installed() else "llama-cpp-python is not installed, and "
    return (
        f"{first}no {name} was found {place}; {python}, or build llama.cpp and pass --llama-cpp DIR"
    )


def server_arguments(
    model: ModelFile, options: RunOptions, host: str, port: int, parallel: int
) -> list[str]:
    """What llama-server is told. It shares its context out among the requests at a time."""
    vision = ["--mmproj", str(model.mmproj)] if model.mmproj is not None else []
    return [
        "--model", str(model.path), *vision, "--alias", model.name, "--host", host,
        "--port", str(port), "--jinja", "--parallel", str(parallel),
        *_shared(options, options.context * parallel),
    ]  # fmt: skip


def cli_arguments(
    model: ModelFile, options: RunOptions, prompt: str | None, system: str | None,
    tokens: int | None, temperature: float, seed: int | None,
) -> list[str]:  # fmt: skip
    """What llama-cli is told: a conversation, or one answer to `prompt`.

    There is no `--conversation`: it is what llama-cli does with a model that has a chat template,
    and its newer versions have no such flag.
    """
    flags = ["--model", str(model.path), "--jinja", *_shared(options, options.context)]
    flags += ["--temp", f"{temperature:g}"]
    asked: Iterator[tuple[str, str | int | None]] = iter(
        (("--system-prompt", system), ("--predict", tokens), ("--seed", seed), ("--prompt", prompt))
    )
    for flag, value in asked:
        if value is not None:
            flags += [flag, str(value)]
    return [*flags, "--single-turn", "--no-display-prompt"] if prompt is not None else flags


def _shared(options: RunOptions, context: int) -> list[str]:
    layers = ["--gpu-layers", str(options.gpu_layers)] if options.gpu_layers >= 0 else []
    return ["--ctx-size", str(context), "--threads", str(options.threads), *layers]


def become(program: Path, arguments: Sequence[str]) -> NoReturn:
    """Let a program take this process's place: signals and the exit code are its own."""
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execv(program, [str(program), *arguments])
    except OSError as error:
        raise DependencyError(
            f"{program}: cannot be run ({error.strerror or error}); is it of this machine?"
        ) from error
