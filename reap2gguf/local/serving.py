"""Start a server for OpenAI-style clients: llama-server, or llama-cpp-python's own."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import reap2gguf
from reap2gguf.errors import DependencyError, UsageError
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.local.header_check import check_header, usable_context
from reap2gguf.local.programs import INSTALL_INSTEAD_OF, replace_process, shared_arguments
from reap2gguf.local.prompts import Prompts
from reap2gguf.local.python_server import is_loopback
from reap2gguf.messages import shown

if TYPE_CHECKING:
    from reap2gguf.bundle.pick import ModelFile
    from reap2gguf.local.running import EngineOptions

PYTHON_SERVER = "llama_cpp.server"
_BOOT = (
    "import sys; sys.path.append(sys.argv.pop(1)); "
    "from reap2gguf.local.python_server import main; main()"
)
# llama-server reads it: a page of another site may not read its answers. Older ones ignore it.
_CORS = "LLAMA_ARG_CORS_ORIGINS"
# what it imports; llama-cpp-python alone installs none of them
_REQUIRED = (
    "uvicorn",
    "fastapi",
    "pydantic_settings",
    "sse_starlette",
    "starlette_context",
    "yaml",
)


@dataclass(frozen=True)
class ServeOptions:
    """Where a server listens, and how many requests it answers at a time."""

    host: str
    port: int
    parallel: int = 1

    @property
    def address(self) -> str:
        """The base URL for OpenAI clients."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}/v1"


def free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0, if a server can listen there.

    A server would report a port in use in its own words, after it has loaded the model. Between
    this check and its start another process may take the port; then the server reports it.
    Raises UsageError if nothing can listen there.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, number) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen()
            return int(listening.getsockname()[1])
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"{shown(host)[1:-1]}:{port}: cannot listen there ({reason}); pass another --port or "
            "--host"
        ) from error


def missing_for_server() -> list[str]:
    """The packages of llama-cpp-python's server that are not installed."""
    return [name for name in _REQUIRED if importlib.util.find_spec(name) is None]


def check_python_server(model: Path, options: ServeOptions) -> None:
    """Refuse what llama-cpp-python's server cannot do.

    Raises DependencyError if it is not installed, UsageError for several requests at a time or a
    broken chat template, and ArtifactError for a file on which llama.cpp would abort.
    """
    if missing := missing_for_server():
        raise DependencyError(
            f"llama-cpp-python's server needs {', '.join(missing)}; run "
            f"`{INSTALL_INSTEAD_OF['llama-server']}`, or build llama.cpp and pass --llama-cpp DIR"
        )
    if options.parallel > 1:
        raise UsageError(
            f"--parallel {options.parallel}: llama-cpp-python's server answers one request at a "
            "time; build llama.cpp and pass --llama-cpp DIR, or leave --parallel out"
        )
    header = read_gguf_header(model)
    check_header(model, header)
    Prompts(model, header).close()


def run_llama_server(
    program: Path, model: ModelFile, running: EngineOptions, options: ServeOptions
) -> NoReturn:
    """Run llama-server in place of this process; it divides its context among the requests."""
    vision = ["--mmproj", str(model.mmproj)] if model.mmproj is not None else []
    arguments = ["--model", str(model.path), *vision, "--alias", model.name]
    arguments += ["--host", options.host, "--port", str(options.port)]
    arguments += ["--jinja", "--parallel", str(options.parallel)]
    context = running.context * options.parallel
    environment = {_CORS: "localhost", **os.environ} if is_loopback(options.host) else None
    replace_process(program, [*arguments, *shared_arguments(running, context)], environment)


def run_python_server(
    model: ModelFile, running: EngineOptions, options: ServeOptions, is_verbose: bool
) -> NoReturn:
    """Run llama-cpp-python's server in place of this process, behind the guard of `python_server`.

    Call `check_python_server` before.
    """
    header = read_gguf_header(model.path)
    settings = {
        "model": model.path,
        "model_alias": model.name,
        "host": options.host,
        "port": options.port,
        "n_ctx": usable_context(header, running.context),
        "n_threads": running.threads,
        "n_threads_batch": running.threads,
        "n_gpu_layers": running.gpu_layers,
        "verbose": is_verbose,
    }
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    # the server prefers these variables to its arguments
    environment = {key: value for key, value in os.environ.items() if key != "CONFIG_FILE"}
    environment |= {"HOST": options.host, "PORT": str(options.port)}
    folder = str(Path(str(reap2gguf.__file__)).absolute().parents[1])
    # -P: modules are not looked for in the current folder
    replace_process(Path(sys.executable), ["-P", "-c", _BOOT, folder, *arguments], environment)
