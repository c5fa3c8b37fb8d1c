"""Every line of the doctor on machines where things are missing."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as real_version
from pathlib import Path

import pytest
from click.testing import CliRunner

from reap2gguf import machine as host
from reap2gguf import vendor
from reap2gguf.cli import cli
from reap2gguf.doctor import machine, software
from reap2gguf.doctor.finding import Finding, State
from tests.test_vendor import VERSION, script


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without llama.cpp: no variable, an empty PATH, an installed wheel."""
    monkeypatch.delenv(vendor.VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(vendor, "_PACKAGE", tmp_path / "site-packages" / "reap2gguf")


def without(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    def version(name: str) -> str:
        found = versions.get(name.replace("-", "_"), real_version(name))
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(software, "version", version)


def named(findings: object, what: str) -> Finding:
    assert hasattr(findings, "__iter__")
    (found,) = [finding for finding in findings if finding.what == what]
    return found


def test_a_missing_package_is_a_problem_with_its_requirement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        software, "requires", lambda _: ["rich>=13.9", 'pytest>=8; extra == "test"']
    )
    without(monkeypatch, rich=None)
    found = list(software.required_packages())
    assert [finding.what for finding in found] == ["rich"]
    assert (found[0].state, found[0].advice) == (State.PROBLEM, "pip install 'rich>=13.9'")
    result = CliRunner().invoke(cli, ["doctor", "--json"])
    assert result.exit_code == 2
    values = json.loads(result.stdout)
    assert values["ok"] is False
    assert [f["what"] for f in values["findings"] if f["state"] == "problem"] == ["rich"]
    result = CliRunner().invoke(cli, ["doctor"])
    assert result.exit_code == 2
    assert "  x rich                     missing\n" in result.output
    assert result.output.endswith("\nNeeded and missing: rich\n")


@pytest.mark.parametrize(
    ("found", "state"),
    [("2.9.1", State.PROBLEM), ("2.10.0+cpu", State.OK), ("2.13.0", State.OK),
     ("2.14.0", State.PROBLEM), ("2.12.0.dev20260101", State.OK), ("garbage", State.OK)],
)  # fmt: skip
def test_a_version_is_held_against_the_requirement(
    found: str, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(software, "requires", lambda _: ["torch<2.14,>=2.10"])
    without(monkeypatch, torch=found)
    finding = named(software.required_packages(), "torch")
    assert finding.state is state
    if state is State.PROBLEM:
        assert finding.found == f"{found}, expected <2.14,>=2.10"


def test_without_packaging_only_the_version_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "requires", lambda _: ["torch<2.14,>=2.10"])
    without(monkeypatch, torch="1.0")
    monkeypatch.setattr(software.importlib.util, "find_spec", lambda name: None)
    assert named(software.required_packages(), "torch") == Finding("torch", "1.0")


def test_llama_cpp_python_is_for_chat_and_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "missing_for_server", list)
    assert software.llama_cpp_python().found.endswith("for `chat`, `serve` and `evaluate`")
    monkeypatch.setattr(software, "missing_for_server", lambda: ["uvicorn"])
    assert "pip install 'llama-cpp-python[server]>=0.3.30'" in software.llama_cpp_python().advice
    without(monkeypatch, llama_cpp_python=None)
    finding = software.llama_cpp_python()
    assert finding.state is State.ABSENT
    assert "pip install 'llama-cpp-python[server]>=0.3.30'" in finding.advice


def test_programs_that_are_not_there_are_not_needed() -> None:
    found = list(software.llama_programs())
    assert [finding.what for finding in found] == list(vendor.PROGRAMS)
    assert all(finding.state is State.ABSENT for finding in found)
    assert all(finding.advice.startswith("not needed") for finding in found)


def test_programs_on_path_have_a_version(tmp_path: Path) -> None:
    path = script(tmp_path / "path" / "llama-server", VERSION)
    found = named(software.llama_programs(), "llama-server")
    assert found == Finding("llama-server", f"b6123 (79c1160b) at {path} (PATH)")


@pytest.mark.parametrize(
    ("body", "message"), [("sleep 60", "printed nothing in"), ("exit 3", "failed with 3")]
)
def test_programs_that_do_not_run_are_reported(
    body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vendor, "_VERSION_SECONDS", 0.3)
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
    script(tmp_path / "path" / "llama-server", body)
    finding = named(software.llama_programs(), "llama.cpp")
    assert finding.state is State.ADVICE
    assert message in finding.advice


def test_a_folder_that_holds_none_is_a_problem(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["doctor", "--llama-cpp", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert "  x llama.cpp                not in the given folder\n" in result.output
    assert "  x libggml                  does not load\n" in result.output
    assert "no such folder" in result.output


def test_the_submodule_is_followed_from_nothing_to_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(software.vendored()) == [], "there is none in a wheel"
    root = tmp_path / "repository"
    folder = root / "vendor" / "llama.cpp"
    folder.mkdir(parents=True)
    (root / "pyproject.toml").write_text("")
    monkeypatch.setattr(vendor, "_PACKAGE", root / "reap2gguf")
    states = []
    for step in (folder, folder / "CMakeLists.txt", folder / "build" / "bin"):
        if step.suffix == ".txt":
            step.write_text("")
        else:
            step.mkdir(parents=True, exist_ok=True)
        states += [finding.found for finding in software.vendored()]
    assert states == [
        "not checked out",
        "checked out, not built",
        "built, without a shared libggml",
    ]


class Cuda:
    """What torch reports about GPUs."""

    def __init__(self, n_gpus: int) -> None:
        self.n_gpus = n_gpus

    def is_available(self) -> bool:
        return self.n_gpus > 0

    def device_count(self) -> int:
        return self.n_gpus

    def mem_get_info(self, index: int) -> tuple[int, int]:
        if index == 1:
            raise RuntimeError("CUDA error: device lost\nmore")
        return 3 * 2**30, 12 * 2**30

    def get_device_name(self, index: int) -> str:
        return f"GPU {index}"


@pytest.mark.parametrize(
    ("n_gpus", "driver", "cuda", "expected"),
    [
        (0, False, None, ["none; calibration passes run on the CPU"]),
        (0, True, None, ["there is an NVIDIA driver, but torch is built for CPUs only"]),
        (0, True, "12.8", ["there is an NVIDIA driver, but torch (CUDA 12.8) finds no GPU"]),
        (2, True, "12.8", ["12.8", "GPU 0, 3.00 GiB of 12.00 GiB free",
                           "does not respond (CUDA error: device lost)"]),
    ],
)  # fmt: skip
def test_gpus(
    n_gpus: int, driver: bool, cuda: str | None, expected: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import torch

    monkeypatch.setattr(machine, "_DRIVER", tmp_path if driver else tmp_path / "none")
    monkeypatch.setattr(torch, "cuda", Cuda(n_gpus))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    found = list(machine.gpus())
    assert len(found) == len(expected)
    for finding, text in zip(found, expected, strict=True):
        assert finding.found.endswith(text)
    assert not any(finding.is_problem for finding in found)
    if driver and not n_gpus:
        assert found[0].state is State.ADVICE


def test_memory_is_what_a_container_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(host, "_CGROUP", tmp_path)
    assert "container" not in machine.memory().found
    limit.write_text("max\n")
    assert "container" not in machine.memory().found
    limit.write_text(f"{2**30}\n")
    assert machine.memory().found.endswith("of 1.00 GiB free, the limit of this container")


def test_the_hub_token_is_not_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    assert machine.hub_endpoint().state is State.ADVICE
    assert machine.hub_endpoint().found == "https://hub.example, not used: HF_HUB_OFFLINE is set"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert machine.hub_endpoint() == Finding(
        "hub", "https://hub.example, not contacted now; HF_HUB_OFFLINE is not set"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_" + "secret" * 4)
    result = CliRunner().invoke(cli, ["doctor"])
    assert "a token was found" in result.output
    assert "secret" not in result.output


def test_a_full_and_an_absent_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: _Usage(2**31, 2**20))
    cache = named(machine.disks(), "disk of Hub cache")
    assert cache.found == f"1.00 MiB of 2.00 GiB free, {tmp_path / 'not' / 'yet'}"
    assert cache.state is State.ADVICE


class _Usage:
    def __init__(self, total: int, free: int) -> None:
        self.total, self.free = total, free
