"""A build under `jobs here`: saved while it runs and when it ends, however it ends.

The program that it runs is a stand-in here; tests/jobs/test_deploy.py has whole builds.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from reap2gguf.cli import cli
from reap2gguf.errors import JobError, OutputError
from reap2gguf.jobs import here, storage
from reap2gguf.jobs.here import HereOptions, work_here
from reap2gguf.jobs.storage import Storage
from tests.tiny import child_environment

# a build that counts up in a file, which it rewrites in two steps, until it is allowed to end
PROGRAM = """
import json, pathlib, sys, time
command, words = sys.argv[1], sys.argv[2:]
out = pathlib.Path(words[words.index("--output") + 1]) if "--output" in words else None
log = pathlib.Path(__file__).with_name("log")
with log.open("a") as file:
    print(*sys.argv[1:], file=file)
if command == "jobs":
    print(json.dumps({"name": "thing"}) if "--bad" not in words else "no JSON")
    sys.exit(2 if "--refused" in words else 0)
if command == "push":
    sys.exit(0)
work = out / ".work" / "thing"
work.mkdir(parents=True, exist_ok=True)
(out / ".work" / "observations").mkdir(exist_ok=True)
(out / ".work" / "observations" / "a").write_text("o")
number = 0
deadline = time.monotonic() + 240
while "--wait" in words and time.monotonic() < deadline:
    number += 1
    (work / "one").write_text(str(number))
    (work / "two").write_text(str(number))
    if log.with_name("end").exists():
        break
(out / "thing").mkdir(exist_ok=True)
(out / "thing" / "weights").write_text("w")
sys.exit(3 if "--fail" in words else 0)
"""


@pytest.fixture(autouse=True)
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    monkeypatch.setattr(here, "_PROGRAM", (sys.executable, str(path)))
    monkeypatch.setattr(here, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(storage, "QUIET_SECONDS", 0.05)
    return path


def options(tmp_path: Path, *words: str, **more: object) -> HereOptions:
    values = {"storage": tmp_path / "storage", "save_seconds": 0.05, **more}
    return HereOptions(words, tmp_path / "out", **values)  # type: ignore[arg-type]


def log(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text().splitlines()


def saved(tmp_path: Path, name: str) -> dict[str, str]:
    """What another machine would resume from."""
    output = tmp_path / name
    Storage(tmp_path / "storage", output).restore()
    return {
        path.relative_to(output).as_posix(): path.read_text()
        for path in output.rglob("*")
        if path.is_file() and path.name != ".storage.json"
    }


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240  # only guards against hanging
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def n_saved(tmp_path: Path) -> int:
    """The number of the newest saved state."""
    names = sorted(path.name for path in (tmp_path / "storage" / "index").glob("*.json"))
    return int(names[-1][:8]) if names else 0


def test_build_save_push(tmp_path: Path) -> None:
    notes: list[str] = []
    assert work_here(options(tmp_path, "model", push="me/thing"), notes.append) == 0
    out = tmp_path / "out"
    assert log(tmp_path) == [
        "jobs needs -- build model",
        f"build model --output {out}",
        f"push {out / 'thing'} me/thing --private",
    ]
    # published: only what other builds can use is still kept
    assert saved(tmp_path, "second") == {".work/observations/a": "o"}
    assert notes == [f"{tmp_path / 'storage'}: keeps the observations and texts for other builds"]


def test_without_push_and_storage(tmp_path: Path) -> None:
    assert work_here(options(tmp_path, "model", storage=None), print) == 0
    assert len(log(tmp_path)) == 1
    assert not (tmp_path / "storage").exists()


def test_public_repositories(tmp_path: Path) -> None:
    more = {"push": "me/thing", "private": False, "storage": None}
    assert work_here(options(tmp_path, "model", **more), print) == 0
    assert log(tmp_path)[-1].endswith("me/thing")


def test_a_refused_plan_costs_nothing(tmp_path: Path) -> None:
    assert work_here(options(tmp_path, "--refused", push="me/thing"), print) == 2
    assert len(log(tmp_path)) == 1
    with pytest.raises(JobError, match="did not print the bundle's name"):
        work_here(options(tmp_path, "--bad", push="me/thing"), print)


def test_a_failed_build_is_saved_and_not_pushed(tmp_path: Path) -> None:
    assert work_here(options(tmp_path, "--fail", push="me/thing"), print) == 3
    assert not any(line.startswith("push") for line in log(tmp_path))
    assert saved(tmp_path, "second")["thing/weights"] == "w"


def test_states_that_are_saved_while_it_runs_are_those_of_one_moment(tmp_path: Path) -> None:
    codes = []
    thread = threading.Thread(
        target=lambda: codes.append(work_here(options(tmp_path, "--wait"), print))
    )
    thread.start()
    checked = set()

    def check() -> bool:
        for index in (tmp_path / "storage" / "index").glob("*.json"):
            try:
                body = json.loads(index.read_text().splitlines()[0])
                objects = {one["name"]: one["object"] for one in body["files"]}
                one, two = (
                    (tmp_path / "storage" / "objects" / objects[f".work/thing/{name}"]).read_text()
                    for name in ("one", "two")
                )
            except (FileNotFoundError, KeyError, IndexError, ValueError):
                continue  # dropped meanwhile, or not yet whole
            # `one` is written first; while it is written it is empty
            assert not one or not two or int(two) in (int(one), int(one) - 1)
            checked.add(index.name)
        return len(checked) >= 4

    until(check)
    (tmp_path / "end").touch()
    thread.join(240)
    assert codes == [0]
    assert saved(tmp_path, "second")["thing/weights"] == "w"


def test_a_machine_whose_storage_was_taken_over_stops(tmp_path: Path) -> None:
    errors = []

    def run() -> None:
        try:
            work_here(options(tmp_path, "--wait"), print)
        except OutputError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: n_saved(tmp_path) >= 2)
    Storage(tmp_path / "storage", tmp_path / "second").restore()
    thread.join(240)
    assert "another machine resumed from it" in errors[0]


def test_a_storage_that_is_gone_for_a_while_does_not_end_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Storage, *arguments: object, **named: object) -> bool:
        raise OutputError("storage: cannot be written")

    monkeypatch.setattr(Storage, "save", refuse)
    notes: list[str] = []
    assert work_here(options(tmp_path, "model"), notes.append) == 0
    # as often as it is tried, on a slow machine more than once
    assert set(notes) == {"the work is not saved this time (storage: cannot be written)"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_machine_that_is_taken_away(tmp_path: Path, program: Path, number: int) -> None:
    """With a warning: the build ends, and its last work is saved."""
    code = (
        "import sys; from reap2gguf.jobs import here, storage; from reap2gguf.cli import main; "
        f"here._PROGRAM = (sys.executable, {str(program)!r}); storage.QUIET_SECONDS = 0.05; "
        f"sys.argv = ['reap2gguf', 'jobs', 'here', '--output', {str(tmp_path / 'out')!r}, "
        f"'--storage', {str(tmp_path / 'storage')!r}, '--', 'build', '--recipe', 'q8_0']; main()"
    )
    program.write_text(PROGRAM.replace('"--wait" in words', "True"))
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=child_environment({}), stderr=subprocess.PIPE, text=True
    )
    until((tmp_path / "out" / ".work" / "thing" / "two").exists)
    process.send_signal(number)
    _, words = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "interrupted; the build ends and its work is saved" in words
    assert "Resume with: reap2gguf jobs here" in words
    assert ".work/thing/one" in saved(tmp_path, "second")


def test_a_build_dies_with_the_process_that_watches_it(tmp_path: Path, program: Path) -> None:
    program.write_text(PROGRAM.replace('"--wait" in words', "True"))
    code = (
        "import sys, pathlib; from reap2gguf.jobs import here; "
        f"here._PROGRAM = (sys.executable, {str(program)!r}); "
        f"here.work_here(here.HereOptions((), pathlib.Path({str(tmp_path / 'out')!r})), print)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=child_environment({}))
    counted = tmp_path / "out" / ".work" / "thing" / "two"
    until(counted.exists)
    process.kill()
    process.wait()
    until(lambda: not _grows(counted))


def _grows(path: Path) -> bool:
    before = path.stat().st_mtime_ns
    time.sleep(0.3)
    return path.stat().st_mtime_ns != before


def test_the_command_checks_its_arguments_first(tmp_path: Path) -> None:
    def error(*words: str) -> str:
        found = CliRunner().invoke(cli, ("jobs", "here", *words))
        assert found.exit_code == 2
        return found.stderr

    assert "expected a build after --" in error("--", "push")
    assert "there is no option" in error("--", "build", "--recip", "x")
    assert "--fresh: a job that resumes would start over" in error(
        "--", "build", "--recipe", "q8_0", "--fresh"
    )
    assert "--output: the job chooses its own" in error(
        "--", "build", "--recipe", "q8_0", "--output", "x"
    )
    assert "expected owner/name" in error("--push", "name", "--", "build", "--recipe", "q8_0")
    assert not (tmp_path / "log").exists()
