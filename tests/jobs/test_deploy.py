"""The files in deploy/: read as their programs read them, and the scripts run on this machine.

bench/rented.py checks the same files with SkyPilot's and Modal's own libraries.
"""

from __future__ import annotations

import ast
import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from reap2gguf import __version__
from reap2gguf.cli import cli
from reap2gguf.jobs.needs import GPU_SPEEDS
from reap2gguf.jobs.request import HOME, MOUNT, WORK, here_words, package_at, script
from tests.jobs.loopback_jobs import Jobs
from tests.loopback_hub.model import layered_files, shard_of
from tests.loopback_hub.server import Fault, Hub
from tests.loopback_hub.uploads import TOKEN
from tests.tiny import REPOSITORY, child_environment

SKY = REPOSITORY / "deploy" / "skypilot.yaml"
MODAL = REPOSITORY / "deploy" / "modal_app.py"
BUILD = (
    "owner/name", "--recipe", "q8_0", "--compression", "0.5", "--samples", "4", "--max-length",
    "64", "--threads", "1", "--device", "cpu",
)  # fmt: skip
NAME = "name-REAP-0.50"

# in place of uv: an environment whose reap2gguf is this checkout, and nothing is downloaded
UV = f"""#!/bin/sh
echo "$@" >> "$UV_LOG"
[ "$1" = venv ] || exit 0
for last in "$@"; do :; done
mkdir -p "$last/bin"
echo "export PATH=$(cd "$last" && pwd)/bin:\\$PATH" > "$last/bin/activate"
printf '#!/bin/sh\\nexec {sys.executable} -m reap2gguf "$@"\\n' > "$last/bin/reap2gguf"
chmod +x "$last/bin/reap2gguf"
"""


def task() -> dict[str, Any]:
    values = yaml.safe_load(SKY.read_text())
    assert isinstance(values, dict)
    return values


def test_the_package_is_that_of_this_version() -> None:
    assert package_at(None, None).startswith(f"reap2gguf[gpu] @ {HOME}/archive/")
    tagged = f"reap2gguf[gpu] @ {HOME}/archive/v{__version__}.tar.gz"
    assert task()["envs"]["PACKAGE"] == tagged
    assert f'"v{__version__}"' in MODAL.read_text()
    assert f'HOME = "{HOME}"' in MODAL.read_text()
    assert f'"{HOME}"' in (REPOSITORY / "pyproject.toml").read_text()


def test_the_token_is_a_secret_everywhere() -> None:
    values = task()
    assert values["secrets"] == {"HF_TOKEN": None}
    assert "HF_TOKEN" not in values["envs"]
    assert "TOKEN" not in values["setup"] + values["run"]
    assert values["envs"]["KIND"] == "--private"
    assert values["file_mounts"][MOUNT]["mode"] == "MOUNT"
    strings = [
        node.value for node in ast.walk(ast.parse(MODAL.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]  # fmt: skip
    assert sum("HF_TOKEN" in text for text in strings) == 2  # what it is called, and how to make it
    assert not any("hf_" in text for text in strings)


def test_the_modal_app_is_python() -> None:
    tree = ast.parse(MODAL.read_text())
    compile(tree, str(MODAL), "exec")
    functions = {
        node.name: [ast.unparse(one).partition("(")[0] for one in node.decorator_list]
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }
    assert functions["work"] == ["app.function"]
    assert functions["main"] == ["app.local_entrypoint"]
    imported = {
        alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names
    }
    assert not {"reap2gguf", "torch"} & imported  # it runs where only modal is installed
    (gpus,) = (
        ast.literal_eval(node.value) for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "GPUS"
    )  # fmt: skip
    assert {model for _, _, model in gpus} <= set(GPU_SPEEDS)


def test_a_task_is_made_for_a_build(tmp_path: Path) -> None:
    def made(*words: str) -> Any:
        arguments = ("jobs", "needs", "--sky", str(SKY), "--push", "me/x", "--", "build", *words)
        found = CliRunner().invoke(cli, arguments)
        assert found.exit_code == 0, found.output
        return yaml.safe_load(found.stdout)

    found = made("--recipe", "q8_0", "--seed", "7")
    assert shlex.split(found["envs"]["BUILD"]) == ["--recipe", "q8_0", "--seed", "7"]
    assert found["envs"]["PUSH"] == "me/x"
    assert found["envs"]["TIMEOUT"] == 1800
    assert found["resources"]["disk_size"] == 22
    assert set(found["resources"]["accelerators"]) >= {"L4", "H100"}
    for key in ("setup", "run", "file_mounts", "secrets"):
        assert found[key] == task()[key]
    assert "accelerators" not in made("--recipe", "q8_0", "--device", "cpu")["resources"]


@pytest.mark.parametrize("text", ["a: [", "- 1", "resources: 1\nenvs: {}", "a: &a [*a]"])
def test_templates_that_are_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "task.yaml"
    path.write_text(text)
    arguments = ("jobs", "needs", "--sky", str(path), "--", "build", "--recipe", "q8_0")
    found = CliRunner().invoke(cli, arguments)
    assert found.exit_code == 2
    assert str(path) in found.stderr.splitlines()[-1]


def test_needs_as_json() -> None:
    found = CliRunner().invoke(cli, ("jobs", "needs", "--", "build", "--recipe", "q8_0"))
    values = json.loads(found.stdout)
    assert values["timeout_seconds"]["H100"] == 1800
    assert values["disk_bytes"] > 20 * 2**30
    assert values["gpu_memory_bytes"] > 2**30


# ------------------------------------------------------------------- scripts, run on this machine


class Rented:
    """Machines, one after the other, with one bucket and one Hub."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.folder = folder
        self.hub = hub
        self.bucket = folder / "bucket"
        self.bucket.mkdir()
        (folder / "bin").mkdir()
        uv = folder / "bin" / "uv"
        uv.write_text(UV)
        uv.chmod(uv.stat().st_mode | stat.S_IXUSR)
        self.count = 0

    def start(self, text: str, **envs: str) -> subprocess.Popen[str]:
        """Run a script on a new machine: only the bucket is as it was."""
        self.count += 1
        home = self.folder / f"machine-{self.count}"
        home.mkdir()
        environment = {
            **child_environment(self.hub.environment(home / "hf")),
            **envs,
            "HOME": str(home),
            "HF_TOKEN": TOKEN,
            "UV_LOG": str(self.folder / "uv.log"),
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
        }
        places = {f"{MOUNT}/": f"{self.bucket}/", WORK: str(home / "work")}
        for place, real in places.items():
            text = text.replace(place, real)
        # saved states at once, and not after a minute
        text = text.replace("jobs here", "jobs here --save-seconds 1")
        return subprocess.Popen(
            ["bash", "-c", text], env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def saved(self, ends: str) -> bool:
        """Whether a saved state has a file whose name ends so."""
        for index in self.bucket.rglob("index/*.json"):
            try:
                files = json.loads(index.read_text().splitlines()[0])["files"]
            except (FileNotFoundError, IndexError, ValueError):
                continue  # dropped meanwhile, or not yet whole
            if any(ends in one["name"] for one in files):
                return True
        return False


def kill_when(process: subprocess.Popen[str], condition: Callable[[], bool]) -> str:
    """Take the machine away without a warning once something is so; what it has printed."""
    guard = threading.Timer(280, process.kill)
    guard.start()
    while not condition():
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.05)
    guard.cancel()
    os.killpg(process.pid, signal.SIGKILL)  # and `jobs here` takes its build along
    words, _ = process.communicate(timeout=280)
    return words


def finish(process: subprocess.Popen[str]) -> str:
    words, _ = process.communicate(timeout=280)
    assert process.returncode == 0, words
    assert TOKEN not in words
    return words


def sky_script() -> str:
    values = task()
    return f"({values['setup']}) && {{ {values['run']} }}"


def sky_envs(push: str) -> dict[str, str]:
    more = {"BUILD": shlex.join(BUILD), "PUSH": push}
    return {**{name: str(value) for name, value in task()["envs"].items()}, **more}


@pytest.mark.slow
def test_a_task_resumes_on_other_machines(tmp_path: Path) -> None:
    """Killed in the calibration pass, killed in the push, and finished: the same bundle."""
    files = layered_files(tmp_path / "model")
    with Hub(dict(files)) as hub:
        jobs = Jobs()
        hub.writes = jobs
        rented = Rented(tmp_path, hub)
        release = threading.Event()
        try:
            held = Fault(where=shard_of(3), held=release, range_end="-", after=0)
            hub.faults = [held]
            words = kill_when(
                rented.start(sky_script(), **sky_envs("me/thing")),
                lambda: held.reached.is_set() and rented.saved(".work/texts/"),
            )
            assert "observe" not in words or "up to date" not in words
            held = Fault(method="POST", where="/api/repos/create", held=release, after=0)
            hub.faults = [held]
            words = kill_when(
                rented.start(sky_script(), **sky_envs("me/thing")),
                lambda: held.reached.is_set() and rented.saved(f"{NAME}-GGUF/reap2gguf.json"),
            )
            assert "restored" in words
            assert "texts: up to date, reused" in words
            hub.faults = []
            words = finish(rented.start(sky_script(), **sky_envs("me/thing")))
            assert "up to date" in words or "nothing to do" in words
            assert "keeps the observations and texts for other builds" in words
        finally:
            release.set()
        # in one go, on a machine of its own
        finish(rented.start(sky_script(), **sky_envs("me/other")))
        found = {repository.name: repository for repository in hub.repositories}
        for name in ("thing", "thing-GGUF"):
            assert found[f"me/{name}"].private
        one, other = found["me/thing-GGUF"].files, found["me/other-GGUF"].files
        gguf = f"{NAME}-Q8_0.gguf"
        assert one[gguf] == other[gguf]
        assert "reap2gguf[gpu]" in (tmp_path / "uv.log").read_text()
        assert TOKEN not in (tmp_path / "uv.log").read_text()
        assert not any(
            TOKEN.encode() in path.read_bytes()
            for path in rented.bucket.rglob("*")
            if path.is_file()
        )


@pytest.mark.slow
def test_the_script_of_a_job_builds_and_pushes(tmp_path: Path) -> None:
    """What `jobs run` sends to Hugging Face Jobs, run here."""
    recipe = 'title = "Mine"\nlabel = "Mine"\nfile_type = "Q8_0"\n'
    words = ["owner/name", "--recipe", f"{WORK}/files/mine.toml", *BUILD[3:]]
    text = script(
        package_at("main", None),
        here_words(words, NAME, "me/thing", False, True),
        {"mine.toml": recipe.encode()},
    )
    with Hub(dict(layered_files(tmp_path / "model"))) as hub:
        hub.writes = Jobs()
        rented = Rented(tmp_path, hub)
        finish(rented.start(text))
        found = {repository.name: repository for repository in hub.repositories}
        assert f"{NAME}-Mine.gguf" in found["me/thing-GGUF"].files
        assert not found["me/thing"].private
        assert (rented.bucket / NAME / "index").is_dir()
