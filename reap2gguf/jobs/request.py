"""What a job on a rented machine runs, word for word."""

from __future__ import annotations

import base64
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from reap2gguf import __version__
from reap2gguf.errors import UsageError
from reap2gguf.files import read_entry
from reap2gguf.messages import shown

HOME = "https://github.com/reap2gguf/reap2gguf"
# Debian with Python 3.12, uv, git and a C compiler (which triton needs). It has no CUDA: torch's
# own packages bring it, for the machine's driver, and the image is small.
IMAGE = "ghcr.io/astral-sh/uv:python3.12-bookworm"
TOKEN = "HF_TOKEN"  # the name of the secret; its value is in no command, variable or log
WORK = "/work"  # on the machine's own disk
MOUNT = "/storage"  # where the bucket is mounted
_MOST_FILE_BYTES = 2**16  # of all recipe files; they travel within the command
_REF = re.compile(r"[\w.][\w./-]{0,200}")
_LABEL = re.compile(r"[^\w-]", re.ASCII)


@dataclass(frozen=True)
class JobRequest:
    """Everything that is sent to start a job, but the token."""

    name: str
    flavor: str
    timeout_seconds: int
    script: str
    namespace: str | None
    storage: str | None  # a bucket, owner/name
    image: str = IMAGE
    attempts: int = 1
    environment: Mapping[str, str] = field(
        default_factory=lambda: {"PYTHONUNBUFFERED": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    )

    @property
    def command(self) -> list[str]:
        return ["bash", "-c", self.script]

    @property
    def labels(self) -> dict[str, str]:
        """How `jobs list` finds it."""
        return {"name": _LABEL.sub("-", self.name), "reap2gguf": _LABEL.sub("-", __version__)}

    def as_json(self) -> dict[str, Any]:
        """What is sent, with secrets by name alone."""
        return {
            "name": self.name,
            "image": self.image,
            "flavor": self.flavor,
            "timeout_seconds": self.timeout_seconds,
            "attempts": self.attempts,
            "command": self.command,
            "environment": dict(self.environment),
            "secrets": [TOKEN],
            "namespace": self.namespace,
            "storage": self.storage,
        }


def package_at(ref: str | None, package: str | None) -> str:
    """What to install: this package with its GPU extra at a tag, branch or commit.

    Without a ref, it is the commit that this installation was made of, if that is known, else the
    tag of its version. `package` replaces it all: a wheel's URL, or any other requirement. Raises
    UsageError for values that a command line cannot take.
    """
    if package is not None:
        if not package.strip() or package.startswith("-") or not package.isprintable():
            raise UsageError(f"--package {shown(package)}: expected a wheel's URL or a requirement")
        if package.endswith(".whl") and "://" not in package:
            raise UsageError(
                f"--package {shown(package)}: a file of this machine, expected a URL; upload the "
                "wheel, for example to a repository on the Hub"
            )
        return f"reap2gguf[gpu] @ {package}" if "://" in package and "@" not in package else package
    chosen = ref or _installed_commit() or f"v{__version__}"
    if not _REF.fullmatch(chosen) or ".." in chosen:
        raise UsageError(f"--ref {shown(chosen)}: expected a tag, a branch or a commit")
    # an archive needs no git, and leaves out the submodule, which only the tests use
    return f"reap2gguf[gpu] @ {HOME}/archive/{chosen}.tar.gz"


def _installed_commit() -> str | None:
    """The commit of an installation from git; None for any other."""
    try:
        text = distribution("reap2gguf").read_text("direct_url.json")
        commit = json.loads(text)["vcs_info"]["commit_id"] if text else None
    except (PackageNotFoundError, ValueError, KeyError, TypeError):
        return None
    return commit if isinstance(commit, str) else None


def script(package: str, here: Sequence[str], files: Mapping[str, bytes]) -> str:
    """The shell script of a job: install, write small files, then `reap2gguf jobs here`."""
    lines = [
        "set -eu",
        f"mkdir -p {WORK}/files",
        f"cd {WORK}",
        "uv venv --quiet --python 3.12 venv",
        ". venv/bin/activate",
        f"uv pip install --quiet --torch-backend auto {shlex.quote(package)}",
    ]
    for name, data in files.items():
        text = base64.b64encode(data).decode("ascii")
        lines.append(f"echo {text} | base64 -d > {shlex.quote(f'{WORK}/files/{name}')}")
    lines.append(f"exec {shlex.join(['reap2gguf', 'jobs', 'here', *here])}")
    return "\n".join(lines) + "\n"


def here_words(
    words: Sequence[str], name: str | None, push: str | None, private: bool, stored: bool
) -> list[str]:
    """The arguments of `jobs here` on the machine."""
    found = ["--output", f"{WORK}/build"]
    if stored:
        found += ["--storage", f"{MOUNT}/{name or 'build'}"]
    if push is not None:
        found += ["--push", push, "--private" if private else "--public"]
    return [*found, "--", "build", *words]


def with_files(words: Sequence[str], recipes: Sequence[str]) -> tuple[list[str], dict[str, bytes]]:
    """Words that name recipe files of this machine, with their places on the other; the files.

    Raises UsageError for a file that cannot be sent.
    """
    files: dict[str, bytes] = {}
    places: dict[str, str] = {}
    for recipe in recipes:
        path = Path(recipe)
        if path.suffix != ".toml" or not path.is_file():
            continue
        if path.name in files and recipe not in places:
            raise UsageError(f"two recipe files have the name {path.name}; rename one of them")
        try:
            files[path.name] = read_entry(path, _MOST_FILE_BYTES)
        except OSError as error:
            raise UsageError(f"{path}: cannot be sent to the machine ({error})") from error
        places[recipe] = f"{WORK}/files/{path.name}"
    if sum(map(len, files.values())) > _MOST_FILE_BYTES:
        raise UsageError(f"the recipe files have more than {_MOST_FILE_BYTES:,} bytes in all")
    return [_moved(word, places) for word in words], files


def _moved(word: str, places: Mapping[str, str]) -> str:
    """A word of a command with a file's new place, alone or after `--option=`."""
    option, equals, value = word.partition("=")
    if equals and option.startswith("--") and value in places:
        return f"{option}={places[value]}"
    return places.get(word, word)
