"""A process that has loaded the program and forks one that runs it, for each line on its input.

Loading torch and transformers takes seconds; forking takes milliseconds. The zygote itself computes
nothing, so that no thread of it is lost in the fork. Run as a module; `Zygote` speaks to it.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.child import MOST_FORK_SECONDS, Child, end_in_time, lines_for_forks
from tests.tiny import child_environment


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code, or minus the signal."""

    code: int
    output: str
    errors: str
    seconds: float
    log: list[str]  # the operations that the fault layer counted; none if it was killed

    @property
    def error_lines(self) -> list[str]:
        return [
            line for line in self.errors.splitlines() if line.startswith(("Error:", "Interrupted."))
        ]


class Zygote:
    """Runs the command line again and again."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        environment = child_environment({"OMP_NUM_THREADS": "1"})
        self._child = Child("tests.faults.fault_zygote", environment=environment)

    def run(
        self, *arguments: object, fault: dict[str, Any] | None = None, after: float | None = None
    ) -> Outcome:
        """Run the command line; killed `after` seconds if that is given."""
        out, err, log = (self._scratch / name for name in ("stdout", "stderr", "log"))
        log.unlink(missing_ok=True)
        request = {
            "arguments": [str(argument) for argument in arguments],
            "fault": fault,
            "after": after,
            "files": [str(out), str(err), str(log)],
        }
        begun = time.monotonic()
        self._child.send(request)
        code = int(self._child.receive())
        operations = log.read_text().splitlines() if log.is_file() else []
        seconds = time.monotonic() - begun
        return Outcome(code, out.read_text(), err.read_text(), seconds, operations)

    def __enter__(self) -> Zygote:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._child.close()


def _load() -> None:
    """Everything a build imports."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.qwen3_moe import modeling_qwen3_moe  # noqa: F401

    import reap2gguf.building.pipeline
    import reap2gguf.observing.importance
    import reap2gguf.observing.saliency
    import reap2gguf.observing.sweep
    import reap2gguf.terminal.console
    import reap2gguf.terminal.views  # noqa: F401
    from tests import plain_pictures

    plain_pictures.use()


def _child(request: dict[str, Any]) -> None:
    """Run the command line in this process, which ends with it."""
    import signal

    import torch

    from reap2gguf import cli
    from reap2gguf.exporting import journal
    from reap2gguf.observing import state
    from tests.faults.fault_layer import Fault

    out, err, log = request["files"]
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    # a shell's background job, and all that it starts, would not hear of SIGINT
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # everything that can be gone on with is kept at once
    state.MOST_OF_TIME = 1e9
    journal.SAVE_SECONDS = 0
    journal.MAX_TIME_SHARE = 1e9
    torch.set_num_threads(1)
    end_in_time(MOST_FORK_SECONDS if request["after"] is None else request["after"])
    sys.argv = ["reap2gguf", *request["arguments"]]
    fault = Fault(**(request["fault"] or {"folder": "\0"}))
    try:
        with fault.installed():
            cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001, whatever escapes the program is the finding
        traceback.print_exc()
        code = 70
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    Path(log).write_text("\n".join(fault.log))
    os._exit(code)


def _serve() -> None:
    _load()
    for line in lines_for_forks():
        child = os.fork()
        if not child:
            _child(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
