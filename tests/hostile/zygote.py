"""Runs our command line in children that are forked from a process which has imported its parts.

    python -m tests.hostile.zygote

reads one JSON object a line: {"arguments": [...], "folder": "..."}, and
writes one JSON object a line: {"code", "cpu_seconds", "peak_bytes"}

The children's output lies in `folder` as `stdout` and `stderr`. A fork costs milliseconds where an
interpreter with numpy costs half a second, and transformers' configs with torch another two.
Nothing that starts threads is imported here.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.child import end_in_time, lines_for_forks


def main() -> None:
    import encodings.utf_8_sig  # noqa: F401

    import reap2gguf.api.builds
    import reap2gguf.api.pruning
    import reap2gguf.api.quantizing
    import reap2gguf.api.stages
    import reap2gguf.building.needs.room
    import reap2gguf.building.plan
    import reap2gguf.building.stages
    import reap2gguf.calibration.drawing
    import reap2gguf.cli
    import reap2gguf.hub.opened
    import reap2gguf.models.reference
    import reap2gguf.pruning.coverage
    import reap2gguf.terminal.lines
    import reap2gguf.terminal.meter
    import reap2gguf.terminal.recipe_views
    import reap2gguf.terminal.report_views
    import reap2gguf.verifying.bundle  # noqa: F401

    if "torch" in sys.modules:
        sys.exit("the light parts of the program have imported torch")
    _load_configs()
    if len(os.listdir("/proc/self/task")) != 1:
        sys.exit("a thread was started, which forks would not have")
    for line in lines_for_forks():
        request = json.loads(line)
        print(json.dumps(_run(request["arguments"], Path(request["folder"]))), flush=True)


def _load_configs() -> None:
    """What a plan imports to compare its reading of a config with that of transformers."""
    from transformers import CONFIG_MAPPING, AutoTokenizer  # noqa: F401

    for model_type in ("qwen3_moe", "qwen3_5_moe", "qwen3_5_moe_text"):
        CONFIG_MAPPING[model_type]


def _run(arguments: list[str], folder: Path) -> dict[str, float]:
    child = os.fork()
    if child == 0:
        end_in_time()
        _be_the_program(arguments, folder)
    _, status, usage = os.wait4(child, 0)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def _be_the_program(arguments: list[str], folder: Path) -> None:
    """Never returns. What ends a program with a traceback ends it with 70 here."""
    from reap2gguf.cli import main

    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(folder)
    sys.argv = ["reap2gguf", *arguments]
    code = 70
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
