"""Checks deploy/ with the libraries that read it, in an environment that has one of them.

    python bench/rented.py sky [TASK]  # needs skypilot; parses the task
    python bench/rented.py modal       # needs modal; registers the functions and runs their bodies

No account is needed, and nothing is rented: volumes, the remote call and the program itself are
stand-ins.
"""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
NEEDS = {
    "gpu_memory_bytes": 30 * 10**9,
    "memory_bytes": 40 * 10**9,
    "disk_bytes": 200 * 10**9,
    "timeout_seconds": {"L4": 9000, "L40S": 5400, "A100": 5400, "H100": 3600, "H200": 3600},
}


def check(what: str, found: Any, expected: Any) -> None:
    """Print one result, and end where it is not the expected one."""
    print(f"{what}: {found}")
    if found != expected:
        sys.exit(f"{what} is {found!r}, expected {expected!r}")


def with_sky() -> None:
    import sky

    words = "Qwen/Qwen3-30B-A3B --recipe q4km"
    for path in sys.argv[2:]:
        made = sky.Task.from_yaml(path)
        made.update_secrets({"HF_TOKEN": "hf_stand_in"})
        print(path, made.envs, [str(one) for one in made.resources])
    task = sky.Task.from_yaml(str(DEPLOY / "skypilot.yaml"))
    task.update_envs({"BUILD": words, "PUSH": "owner/name", "TIMEOUT": "5400"})
    task.update_secrets({"HF_TOKEN": "hf_stand_in"})
    check("skypilot", sky.__version__, sky.__version__)
    check(
        "envs",
        {name: task.envs[name] for name in ("BUILD", "PUSH")},
        {"BUILD": words, "PUSH": "owner/name"},
    )
    check("the token is a secret alone", "HF_TOKEN" in task.secrets, True)
    check(
        "token in an env", any("hf_stand_in" in str(value) for value in task.envs.values()), False
    )
    resources = list(task.resources)
    check("spot", {one.use_spot for one in resources}, {True})
    check("disk", {one.disk_size for one in resources}, {512})
    accelerators = sorted(name for one in resources for name in one.accelerators or {})
    check("accelerators", accelerators, ["A100-80GB", "H100", "H200", "L40S"])
    (mount,) = task.storage_mounts.items()
    check("storage", (mount[0], mount[1].mode.value), ("/storage", "MOUNT"))
    text = task.to_yaml_config()
    check("run is kept", "reap2gguf jobs here" in text["run"], True)


def with_modal() -> None:
    import modal

    spec = importlib.util.spec_from_file_location("modal_app", DEPLOY / "modal_app.py")
    assert spec is not None
    assert spec.loader is not None
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    check("modal", modal.__version__, modal.__version__)
    check("functions", sorted(app.app.registered_functions), ["work"])
    check("entrypoints", sorted(app.app.registered_entrypoints), ["main"])
    check("machine", app.machine_for(NEEDS), {"gpu": "L40S", "memory": 38147, "timeout": 5400})
    check("machine by name", app.machine_for(NEEDS, "H200")["gpu"], "H200")
    app.work.with_options(**app.machine_for(NEEDS))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        program = Path(folder) / "reap2gguf"
        program.write_text(
            f'#!/bin/sh\necho "$@" >> {log}\n'
            f"case $2 in needs) echo '{json.dumps(NEEDS)}';; esac\nexit ${{CODE:-0}}\n"
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
        commits: list[int] = []
        app.volume = type("Volume", (), {"commit": lambda self: commits.append(1)})()
        app.work.local(["owner/model", "--recipe", "q4km"], "owner/name", True)
        check(
            "command",
            log.read_text().strip(),
            (
                "jobs here --output /root/reap2gguf/build --storage /storage/owner/name "
                "--push owner/name --private -- build owner/model --recipe q4km"
            ),
        )
        check("commits", len(commits), 1)
        check("needs", app.needs_of(["owner/model"]), NEEDS)
        os.environ["CODE"] = "2"
        try:
            app.work.local(["owner/model"], "owner/name", False)
        except RuntimeError as error:
            print(f"a failed build: {error}")
        else:
            sys.exit("a failed build was no error")


if __name__ == "__main__":
    {"sky": with_sky, "modal": with_modal}[sys.argv[1]]()
    print("as expected")
