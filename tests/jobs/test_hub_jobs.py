"""Jobs on a Hub on the loopback interface, asked for by huggingface_hub's own client."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from click.testing import CliRunner, Result

from reap2gguf.cli import cli
from reap2gguf.hub import retry
from reap2gguf.jobs.flavors import TABLE_DATE
from tests.jobs.loopback_jobs import Jobs, machine
from tests.loopback_hub.model import layered_files
from tests.loopback_hub.server import Fault, Hub
from tests.loopback_hub.uploads import TOKEN

JOB = "000000000000000000000001"
BUILD = ("build", "owner/name", "--recipe", "q8_0", "--compression", "0.5")
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return layered_files(tmp_path_factory.mktemp("model"))


@pytest.fixture
def jobs() -> Jobs:
    return Jobs()


@pytest.fixture
def hub(
    files: dict[str, bytes], jobs: Jobs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Hub]:
    monkeypatch.setattr(retry, "_FIRST_WAIT", 0.0)
    monkeypatch.setattr("huggingface_hub.hf_api.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with Hub(dict(files)) as hub:
        hub.writes = jobs
        hub.serve(monkeypatch, tmp_path / "cache")
        yield hub
    huggingface_hub.close_session()


def run(*arguments: str) -> Result:
    found = CliRunner().invoke(cli, ("jobs", *arguments))
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    assert TOKEN not in found.output
    return found


def error(*arguments: str) -> str:
    """The one line of a command that fails."""
    found = run(*arguments)
    assert found.exit_code == 2
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("Error: ")]
    assert found.stderr.splitlines()[-1] == line
    return line.removeprefix("Error: ")


def test_a_job_is_what_was_asked_for(hub: Hub, jobs: Jobs) -> None:
    found = run("run", "--", *BUILD)
    assert found.exit_code == 0, found.output
    (spec,) = jobs.specs
    assert spec["flavor"] == "l4x1"  # the cheapest with bfloat16
    assert spec["timeoutSeconds"] == 1800
    assert spec["secrets"] == {"HF_TOKEN": TOKEN}
    assert TOKEN not in json.dumps({**spec, "secrets": {}})
    assert spec["volumes"] == [
        {"type": "bucket", "source": "me/reap2gguf-work", "mountPath": "/storage"}
    ]
    assert jobs.buckets == {"me/reap2gguf-work": True}
    assert spec["labels"]["name"] == "reap2gguf-name-REAP-0-50"
    assert spec["dockerImage"].startswith("ghcr.io/astral-sh/uv:")
    assert "attempts" not in spec
    shell, flag, script = spec["command"]
    assert (shell, flag) == ("bash", "-c")
    assert script.splitlines()[-1] == (
        "exec reap2gguf jobs here --output /work/build --storage /storage/name-REAP-0.50 "
        "--push me/name-REAP-0.50 --private -- build owner/name --recipe q8_0 --compression 0.5"
    )
    lines = found.stdout.splitlines()
    assert [line for line in lines if line in ("one", "two")] == ["one", "two"]
    assert f"started {JOB}  {hub.endpoint}/jobs/me/{JOB}" in lines
    assert lines[-2:] == [
        f"{hub.endpoint}/me/name-REAP-0.50",
        f"{hub.endpoint}/me/name-REAP-0.50-GGUF",
    ]
    assert "L4 with 22.35 GiB" in found.stdout
    assert "$0.70 per hour" in found.stdout


def test_options_of_a_job(hub: Hub, jobs: Jobs) -> None:
    found = run(
        "run", "--flavor", "h200", "--timeout", "2h", "--push", "me/thing", "--public",
        "--no-storage", "--ref", "main", "--attempts", "3", "--detach", *BUILD,
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    (spec,) = jobs.specs
    assert (spec["flavor"], spec["timeoutSeconds"], spec["attempts"]) == ("h200", 7200, 3)
    assert "volumes" not in spec
    assert not jobs.buckets
    assert "--push me/thing --public" in spec["command"][2]
    assert "--storage" not in spec["command"][2]
    assert "/archive/main.tar.gz'" in spec["command"][2]
    assert "one" not in found.stdout.splitlines()
    assert f"follow it with: reap2gguf jobs logs {JOB}" in found.stderr


def test_a_dry_run_asks_nobody_about_jobs(
    hub: Hub, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    found = run("run", "--dry-run", "--", *BUILD)
    assert found.exit_code == 0, found.output
    assert not hub.asked("/api/jobs")
    assert not hub.asked("whoami")
    assert not jobs.specs
    assert "secrets: HF_TOKEN (your token; its value is not shown)" in found.stdout
    assert "machine: l4x1" in found.stdout
    assert f"(price of {TABLE_DATE})" in found.stdout
    assert found.stdout.splitlines()[-1] == "nothing was sent"
    values = json.loads(run("run", "--dry-run", "--json", "--", *BUILD).stdout)
    assert values["request"]["secrets"] == ["HF_TOKEN"]
    assert values["push"] == ["OWNER/name-REAP-0.50", "OWNER/name-REAP-0.50-GGUF"]
    assert 0 < values["estimate"]["usd"] <= values["estimate"]["most_usd"]


def test_a_recipe_file_travels_with_the_command(hub: Hub, jobs: Jobs, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    assert run("run", "--detach", *BUILD, "--recipe", str(recipe)).exit_code == 2  # not there
    recipe.write_text('title = "Mine"\nlabel = "Mine"\nfile_type = "Q8_0"\n')
    found = run("run", "--detach", "--dry-run", *BUILD, f"--recipe={recipe}")
    assert found.exit_code == 0, found.output
    assert "base64 -d > /work/files/mine.toml" in found.stdout
    assert "--recipe=/work/files/mine.toml" in found.stdout
    assert str(tmp_path) not in found.stdout


def test_look_list_cancel(hub: Hub, jobs: Jobs) -> None:
    assert run("list").stdout == "no jobs of reap2gguf\n"
    run("run", "--detach", *BUILD)
    jobs.jobs["other"] = {**jobs.jobs[JOB], "id": "other", "labels": {}}
    assert JOB in run("list").stdout
    assert [job["id"] for job in json.loads(run("list", "--json").stdout)] == [JOB]
    assert f"{JOB}  running, 2 min, l4x1" in run("status", JOB).stdout
    assert json.loads(run("status", JOB, "--json").stdout)["stage"] == "RUNNING"
    assert run("logs", JOB, "--no-follow").stdout == "one\ntwo\n"
    assert run("cancel", JOB).stdout == f"{JOB}: canceled\n"
    assert "canceled" in run("status", JOB).stdout


def test_a_job_that_fails_is_an_error(hub: Hub, jobs: Jobs) -> None:
    jobs.ends_as, jobs.message = "ERROR", "Job timeout"
    assert error("run", *BUILD) == (
        f"{JOB}: error (Job timeout); run the same `jobs run` again to resume"
    )
    assert "error (Job timeout)" in error("logs", JOB)


def test_ctrl_c_stops_following_alone(
    hub: Hub, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **named: Any) -> Iterator[str]:
        yield "one"
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub.HfApi, "fetch_job_logs", interrupted)
    found = run("run", *BUILD)
    assert found.exit_code == 130
    assert found.stderr.splitlines()[-1] == (
        f"Stopped following; the job keeps running. Follow: reap2gguf jobs logs {JOB}; end it: "
        f"reap2gguf jobs cancel {JOB}"
    )
    assert not hub.asked("/cancel")


def test_a_log_cannot_print_control_characters(hub: Hub, jobs: Jobs) -> None:
    jobs.log = ["\x1b[2Jgone"]
    assert "\x1b" not in run("run", *BUILD).stdout


# -------------------------------------------------------------------------------------- errors


def test_no_token(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.utils._auth.constants.HF_TOKEN_PATH", str(tmp_path / "n"))
    assert error("run", *BUILD) == "not logged in to the Hub: run `hf auth login`"
    assert error("status", JOB) == "not logged in to the Hub: run `hf auth login`"


def test_a_wrong_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_the_wrong_one")
    assert "does not accept the token (HTTP 401" in error("run", *BUILD)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (402, "the account has no credits for it (HTTP 402, Pre-paid credit"),
        (403, "the token may not do this (HTTP 403, Pre-paid credit"),
        (400, "the Hub refuses it (HTTP 400, Pre-paid credit"),
    ],
)
def test_refused_jobs(hub: Hub, jobs: Jobs, status: int, words: str) -> None:
    headers = {"X-Error-Message": "Pre-paid credit balance is insufficient"}
    hub.faults.append(Fault(status, "/api/jobs/me", "POST", headers=headers))
    assert f"reap2gguf-name-REAP-0.50: {words} balance is insufficient)" in error("run", *BUILD)
    assert not jobs.specs


def test_an_answer_that_does_not_come_starts_no_second_job(hub: Hub, jobs: Jobs) -> None:
    hub.faults.append(Fault(503, "/api/jobs/me", "POST", times=9))
    assert error("run", *BUILD) == (
        "reap2gguf-name-REAP-0.50: the Hub did not answer (HTTP 503); the job may have started: "
        "see `reap2gguf jobs list` before you run it again"
    )
    assert len(hub.asked("POST /api/jobs/me")) == 1


def test_an_unreachable_hub(hub: Hub) -> None:
    hub.leave()
    try:
        assert "check the network" in error("status", JOB, "--namespace", "me")
    finally:
        hub.come()


def test_no_such_job(hub: Hub) -> None:
    assert f"{JOB}: not found on the Hub (HTTP 404" in error("status", JOB)
    assert f"{JOB}: not found on the Hub (HTTP 404" in error("cancel", JOB)
    assert f"{JOB}: not found on the Hub (HTTP 404" in error("logs", JOB)


def test_no_such_flavor_and_none_that_fits(hub: Hub, jobs: Jobs) -> None:
    assert error("run", "--flavor", "h1000", *BUILD) == (
        "--flavor 'h1000': no such machine, expected one of cpu-basic, t4-small, l4x1, h200"
    )
    jobs.hardware = [machine("t4-small", "T4", 16, 15, 50, 0.40)]
    assert "no machine of Hugging Face Jobs has a GPU with" in error("run", *BUILD)
    found = run("run", "--flavor", "t4-small", "--detach", *BUILD)
    assert "warning: the build needs a GPU with bfloat16" in found.stdout
    assert not hub.asked("/api/buckets") or len(jobs.specs) == 1


def test_a_list_of_machines_that_is_not_one(hub: Hub, jobs: Jobs) -> None:
    jobs.hardware = [{"name": "new"}]
    assert "the list of machines: the Hub's answer is not understood" in error("run", *BUILD)


def test_a_public_bucket_is_refused(hub: Hub, jobs: Jobs) -> None:
    jobs.buckets["me/open"] = False
    assert "me/open: a public bucket" in error("run", "--storage", "me/open", *BUILD)
    assert not jobs.specs


def test_files_of_this_machine_are_refused(hub: Hub, jobs: Jobs, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words\n")
    for more in (
        ("--calibration", str(text)),
        ("--imatrix-text", str(text)),
    ):
        assert f"{more[0]} {more[1]}: a file or folder of this machine" in error(
            "run", *BUILD, *more
        )
    there = error("run", *BUILD, "--llama-cpp", str(tmp_path))
    assert "--llama-cpp names a file or folder of this machine" in there
    local = ("build", str(tmp_path), "--recipe", "q8_0")
    assert f"MODEL {tmp_path}: a file or folder of this machine" in error("run", *local)
    assert "--output: the job chooses its own" in error("run", *BUILD, "--output", "x")
    assert "MODEL is missing" in error("run", "build", "--recipe", "q8_0")
    assert "expected a build after --" in error("run", "quantize")
    assert "there is no option" in error("run", *BUILD, "--recip", "x")
    assert not jobs.specs


@pytest.mark.parametrize("text", ["0", "1s", "8d", "soon", "", "-3h", "1e99h", "nan"])
def test_times_that_are_none(hub: Hub, text: str) -> None:
    assert "expected 1m to 7d" in error("run", "--timeout", text, *BUILD)


@pytest.mark.parametrize("storage", ["bucket", "a/b/c", "/x", "me/", "me/a\nb"])
def test_buckets_that_are_none(hub: Hub, storage: str) -> None:
    assert "expected a bucket" in error("run", "--storage", storage, *BUILD)


def test_refs_and_packages(hub: Hub) -> None:
    assert "expected a tag" in error("run", "--ref", "a'; rm -rf /", *BUILD)
    assert "expected a URL" in error("run", "--package", "dist/reap2gguf-1.whl", *BUILD)
    url = "https://example.org/reap2gguf-0.1.0-py3-none-any.whl"
    found = run("run", "--dry-run", "--package", url, *BUILD)
    assert f"'reap2gguf[gpu] @ {url}'" in found.stdout
