"""The program as a process: closed and full streams, and a signal while it is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_FULL = "/dev/full"  # every write fails; Linux alone has it


def typed(command: str) -> subprocess.CompletedProcess[str]:
    """What a shell makes of `reap2gguf COMMAND`, redirections included."""
    return subprocess.run(
        ["sh", "-c", f'exec "$0" -m reap2gguf {command}', sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("command", ["--version", "build --help", "recipes list"])
@pytest.mark.parametrize("where", ["&-", _FULL])
def test_results_that_are_lost_are_one_line_and_an_exit_code(command: str, where: str) -> None:
    if where == _FULL and not os.path.exists(_FULL):
        pytest.skip(f"no {_FULL} here")
    done = typed(f"{command} >{where}")
    assert done.returncode == 2
    assert done.stderr.startswith("Error: output: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["build --samples 0", "verify /nowhere", ""])
@pytest.mark.parametrize("where", ["&-", _FULL])
def test_lost_errors_leave_the_exit_code(command: str, where: str) -> None:
    if where == _FULL and not os.path.exists(_FULL):
        pytest.skip(f"no {_FULL} here")
    assert typed(f"{command} 2>{where}").returncode == 2


def test_all_streams_may_be_closed() -> None:
    done = typed("verify /nowhere <&- >&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
    assert typed("--version <&- 2>&-").stdout.startswith("reap2gguf, version ")


def test_a_signal_while_it_is_imported_is_one_line() -> None:
    code = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "reap2gguf.terminal.add_command":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
from reap2gguf.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")
