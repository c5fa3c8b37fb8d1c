"""The program for a shell, in forks of a process that has loaded it: seconds less for each command.

    python -m tests.forked_program SOCKET

listens there and prints a line. What `client` returns is the `reap2gguf` of a shell's PATH: it
hands over its arguments, folder, environment and standard files, and ends with the same code.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.child import end_in_time

_CLIENT = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
socket.send_fds(server, [b"0"], [0, 1, 2])
asked = {{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
server.sendall(json.dumps(asked).encode())
server.shutdown(socket.SHUT_WR)
sys.exit(int(server.recv(9) or b"70"))
"""
# of long calibration texts a little is enough
_SHORT = {"--samples": "8", "--max-length": "64"}


def client(path: Path) -> str:
    """The text of an executable file that runs the program behind the socket `path`."""
    return _CLIENT.format(python=sys.executable, path=str(path))


def shortened(arguments: list[str]) -> list[str]:
    """What is typed, with little calibration where it does not say how much."""
    if arguments[:1] not in (["build"], ["plan"], ["observe"]):
        return arguments
    more = [(option, value) for option, value in _SHORT.items() if option not in arguments]
    return [*arguments, *(word for pair in more for word in pair)]


def main() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.qwen3_moe import modeling_qwen3_moe  # noqa: F401

    import reap2gguf.building.pipeline
    import reap2gguf.cli
    import reap2gguf.observing.sweep  # noqa: F401
    from tests import plain_pictures

    plain_pictures.use()

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1])
        listener.listen()
        print("ready", flush=True)
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                _answer(connection)
            connection.close()


def _answer(connection: socket.socket) -> None:
    """Never returns. What ends a program with a traceback ends it with 70 here."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    end_in_time()
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    for number, descriptor in enumerate(files):
        os.dup2(descriptor, number)
        os.close(descriptor)
    with connection.makefile("rb") as request:
        code = _run(json.loads(request.read()))
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(str(code).encode())
    os._exit(code)


def _run(asked: dict[str, Any]) -> int:
    from reap2gguf import cli

    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = ["reap2gguf", *shortened(asked["arguments"])]
    try:
        cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001, whatever escapes the program is the finding
        traceback.print_exc()
        return 70
    return 0


if __name__ == "__main__":
    main()
