"""The Dockerfiles, read as Docker reads them; a build needs a Docker engine, so CI does that."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tiny import REPOSITORY

FILES = sorted((REPOSITORY / "deploy" / "docker").glob("Dockerfile*"))
KNOWN = {
    "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "USER", "VOLUME", "WORKDIR",
}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    name: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def instructions(path: Path) -> list[Instruction]:
    kept = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(kept))
    pairs = (line.split(maxsplit=1) for line in joined.splitlines() if line.strip())
    return [Instruction(name, " ".join(text.split())) for name, text in pairs]


def named(path: Path, name: str) -> list[Instruction]:
    return [one for one in instructions(path) if one.name == name]


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets a path of the checkout into an image."""
    sent = True
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line.strip() and not line.startswith("#"):
            parts = [path, *map(str, Path(path).parents)]
            if any(fnmatch.fnmatch(part, pattern) for part in parts if part != "."):
                sent = line.startswith("!")
    return sent


def test_there_are_two() -> None:
    assert [path.name for path in FILES] == ["Dockerfile", "Dockerfile.cuda"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_instruction_is_known(path: Path) -> None:
    assert {one.name for one in instructions(path)} <= KNOWN
    assert instructions(path)[0].name == "FROM"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_bases_are_pinned_and_one(path: Path) -> None:
    bases = {one.words[0] for one in named(path, "FROM")}
    assert len(named(path, "FROM")) == 2
    (base,) = bases  # a virtual environment is copied: its interpreter must be in both
    assert re.fullmatch(r"python:3\.1[123]\.\d+-slim-\w+", base)
    for run in named(path, "RUN"):
        for package in re.findall(r"\buv\S*==\S+|pip install --no-cache-dir (\S+)", run.text):
            assert "==" in package


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_copied_exists(path: Path) -> None:
    stages = {one.words[2] for one in named(path, "FROM") if one.words[1:2] == ["AS"]}
    for copy in named(path, "COPY"):
        first, *rest = copy.words
        if first.startswith("--from="):
            assert first.removeprefix("--from=") in stages
            made = next(one for one in named(path, "RUN") if "-m venv" in one.text)
            assert rest[0] in made.words
            continue
        assert copy.words[-1].startswith("./")
        for source in copy.words[:-1]:
            assert (REPOSITORY / source).exists(), source
            assert is_sent(source), source


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_all_that_the_wheel_holds_is_copied(path: Path) -> None:
    settings = (REPOSITORY / "pyproject.toml").read_text()
    included = re.findall(r'^"([\w/.-]+)" = "reap2gguf/data/', settings, re.MULTILINE)
    copied = {source for copy in named(path, "COPY") for source in copy.words[:-1]}
    assert {"reap2gguf", "pyproject.toml", *(name.split("/")[0] for name in included)} <= copied
    for extra in (".git", "tests", "build", "vendor", "docs", "reap2gguf/__pycache__"):
        assert not is_sent(extra)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_program_runs_without_root_and_keeps_its_cache(path: Path) -> None:
    *_, user = named(path, "USER")
    assert user.text != "root"
    assert any(f"useradd --uid 1000 --no-create-home {user.text}" in one.text
               for one in named(path, "RUN"))  # fmt: skip
    last = {one.name: one.text for one in instructions(path)}
    assert json.loads(last["ENTRYPOINT"]) == ["reap2gguf"]
    assert json.loads(last["VOLUME"]) == ["/cache"]
    environment = dict(word.split("=", 1) for one in named(path, "ENV") for word in one.words)
    assert environment["HF_HOME"].startswith("/cache/")
    assert environment["PATH"].startswith("/opt/reap2gguf/bin:")
    assert instructions(path).index(user) < [one.name for one in instructions(path)].index("VOLUME")


def test_ci_builds_an_image() -> None:
    workflow = (REPOSITORY / ".github" / "workflows" / "ci.yml").read_text()
    assert "docker build -f deploy/docker/Dockerfile " in workflow
