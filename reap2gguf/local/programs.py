"""Which program runs a model; llama.cpp's programs take the place of this process."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from reap2gguf.errors import DependencyError
from reap2gguf.local.running import INSTALL, AnswerOptions, EngineOptions, is_installed
from reap2gguf.resources import install_command
from reap2gguf.vendor import VARIABLE, LlamaCpp, find_llama_cpp, requested_folder

if TYPE_CHECKING:
    from reap2gguf.bundle.pick import ModelFile

# what to install to do without a llama.cpp program
INSTALL_INSTEAD_OF = {"llama-cli": INSTALL, "llama-server": install_command("serve")}
_LOG = logging.getLogger(__name__)


def choose_program(name: str, engine: str, prefers_python: bool) -> Path | None:
    """The llama.cpp program to run, or None for llama-cpp-python.

    `auto` is what --llama-cpp names, else what is preferred, else what is installed.
    Raises DependencyError, which says what to install, or that the requested program does not run.
    """
    if engine == "python" or (
        engine == "auto" and prefers_python and is_installed() and requested_folder() is None
    ):
        if not is_installed():
            raise DependencyError(
                f"llama-cpp-python is not installed; run `{INSTALL_INSTEAD_OF[name]}`"
            )
        return None
    found = find_llama_cpp()
    program = found.programs.get(name) if found is not None else None
    if program is not None and found is not None and not found.problem:
        _LOG.info("%s %s, found by %s: %s", name, found.version, found.where, program)
        return program
    is_broken = found is not None and found.problem and requested_folder() is not None
    if engine == "auto" and is_installed() and not is_broken:
        return None
    raise DependencyError(_nothing_to_run(name, found))


def _nothing_to_run(name: str, found: LlamaCpp | None) -> str:
    install = f"run `{INSTALL_INSTEAD_OF[name]}`"
    python = "use --engine python" if is_installed() else install
    if found is not None and found.problem:
        return f"{found.problem}; fix it, pass another --llama-cpp DIR, or {python}"
    place = f"in {found.folder}" if found is not None else f"on PATH, and {VARIABLE} is not set"
    first = "" if is_installed() else "llama-cpp-python is not installed, and "
    return (
        f"{first}no {name} was found {place}; {python}, or build llama.cpp and pass --llama-cpp DIR"
    )


def cli_arguments(
    model: ModelFile, running: EngineOptions, answer: AnswerOptions, prompt: str | None
) -> list[str]:
    """Arguments of llama-cli: for a conversation, or for one answer to `prompt`.

    There is no `--conversation`: llama-cli starts one if the model has a chat template, and its
    newer versions have no such flag.
    """
    flags = ["--model", str(model.path), "--jinja", *shared_arguments(running, running.context)]
    flags += ["--temp", f"{answer.temperature:g}"]
    optional = {
        "--system-prompt": answer.system,
        "--predict": answer.max_tokens,
        "--seed": answer.seed,
        "--prompt": prompt,
    }
    for flag, value in optional.items():
        if value is not None:
            flags += [flag, str(value)]
    return [*flags, "--single-turn", "--no-display-prompt"] if prompt is not None else flags


def shared_arguments(running: EngineOptions, context: int) -> list[str]:
    """Arguments that llama-cli and llama-server have in common."""
    layers = ["--gpu-layers", str(running.gpu_layers)] if running.gpu_layers >= 0 else []
    return ["--ctx-size", str(context), "--threads", str(running.threads), *layers]


def replace_process(
    program: Path, arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> NoReturn:
    """Run a program in place of this process, so that signals and the exit code are its own.

    Raises DependencyError if it cannot be run.
    """
    command = [str(program), *arguments]
    _LOG.info("running %s", shlex.join(command))
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(program, command, os.environ if environment is None else environment)
    except OSError as error:
        raise DependencyError(
            f"{program}: cannot be run ({error.strerror or error}); was it built for this machine?"
        ) from error
