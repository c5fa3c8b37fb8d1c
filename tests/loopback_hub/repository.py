"""What a Hub answers about its repositories: facts, trees, and files in whole or part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_LARGE = (".safetensors", ".gguf", ".bin", ".parquet", ".dat")


@dataclass(frozen=True)
class OnDisk:
    """A file of a repository that lies on disk; its hash may be made up where nobody checks it."""

    path: Path
    sha256: str = ""


Content = bytes | OnDisk
Headers = dict[str, str]


@dataclass
class Repository:
    """The one revision of a repository: its files by path, and its commit."""

    name: str
    files: dict[str, Content]
    kind: str = "model"  # or dataset
    commit: str = COMMIT
    gated: bool = False
    private: bool = False
    revisions: tuple[str, ...] = ("main",)  # names of its one commit

    @property
    def api(self) -> str:
        return f"/api/{self.kind}s/{self.name}"

    @property
    def home(self) -> str:
        return f"/{self.name}" if self.kind == "model" else f"/{self.kind}s/{self.name}"


@dataclass
class Answer:
    """Status, headers and body; `first` and `count` are the part of a file that is sent."""

    status: int
    headers: Headers = field(default_factory=dict)
    body: Content = b""
    first: int = 0
    count: int | None = None

    @property
    def length(self) -> int:
        return size_of(self.body) - self.first if self.count is None else self.count


@dataclass
class Request:
    """What a client asks; `path` is unquoted and without its query."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Headers
    body: bytes


def read(repository: Repository, request: Request) -> Answer:
    path = request.path
    resolve = f"{repository.home}/resolve/"
    if path.startswith(resolve):
        if repository.gated:
            return Answer(403, {"X-Error-Code": "GatedRepo"})
        name = _below_revision(repository, path.removeprefix(resolve))
        if name is None:
            return Answer(404, {"X-Error-Code": "RevisionNotFound"})
        return _file(repository, name)
    verb, _, rest = path.removeprefix(repository.api).strip("/").partition("/")
    folder = _below_revision(repository, rest) if verb else ""
    if folder is None:
        return Answer(404, {"X-Error-Code": "RevisionNotFound"})
    if verb in ("", "revision"):
        return json_answer(_info(repository))
    if verb == "tree":
        return json_answer(list(_tree(repository, folder, "recursive=true" in _query(request))))
    if verb == "paths-info":
        return json_answer(list(_paths(repository, _wanted_paths(request))))
    return Answer(404, {"X-Error-Code": "EntryNotFound"})


def _query(request: Request) -> str:
    return "&".join(f"{key}={value.lower()}" for key, (value, *_) in request.query.items())


def _wanted_paths(request: Request) -> list[str]:
    """The paths of a paths-info request, which come as JSON or as a form."""
    text = request.body.decode()
    if text.startswith("{"):
        return list(json.loads(text)["paths"])
    return parse_qs(text)["paths"]


def _below_revision(repository: Repository, path: str) -> str | None:
    """What follows a revision in a path; None if there is no such revision."""
    for revision in (*repository.revisions, repository.commit):
        if f"{path}/".startswith(f"{revision}/"):
            return path.removeprefix(revision).removeprefix("/")
    return None


def _info(repository: Repository) -> dict[str, Any]:
    return {
        "id": repository.name,
        "sha": repository.commit,
        "gated": "manual" if repository.gated else False,
        "private": repository.private,
        "siblings": [
            {"rfilename": name, **_sizes(name, content)}
            for name, content in repository.files.items()
        ],
    }  # fmt: skip


def _sizes(name: str, content: Content) -> dict[str, Any]:
    size = size_of(content)
    found: dict[str, Any] = {"size": size, "blobId": blob_id(content)}
    if is_large(name):
        found["lfs"] = {"sha256": sha256_of(content), "size": size, "pointerSize": 134}
    return found


def _tree(repository: Repository, folder: str, recursive: bool) -> Iterator[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    folders: set[str] = set()
    for name, content in repository.files.items():
        if not name.startswith(prefix):
            continue
        parts = name.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            folders.add(prefix + "/".join(parts[:depth]))
        if recursive or len(parts) == 1:
            yield _entry(name, content)
    yield from ({"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders))


def _paths(repository: Repository, paths: list[str]) -> Iterator[dict[str, Any]]:
    for path in paths:
        if path in repository.files:
            yield _entry(path, repository.files[path])
        elif any(name.startswith(f"{path}/") for name in repository.files):
            yield {"type": "directory", "path": path, "oid": "0" * 40}


def _entry(name: str, content: Content) -> dict[str, Any]:
    size = size_of(content)
    found = {"type": "file", "path": name, "size": size, "oid": blob_id(content)}
    if is_large(name):
        found["lfs"] = {"oid": sha256_of(content), "size": size, "pointerSize": 134}
    return found


def _file(repository: Repository, name: str) -> Answer:
    content = repository.files.get(name)
    if content is None:
        return Answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.commit})
    tag = sha256_of(content) if is_large(name) else blob_id(content)
    return Answer(200, {"X-Repo-Commit": repository.commit, "ETag": f'"{tag}"'}, content)


def is_large(name: str) -> bool:
    """Whether a file goes to the large-file storage, as the Hub's .gitattributes have it."""
    return name.endswith(_LARGE) or Path(name).name == "tokenizer.json"


def size_of(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.path.stat().st_size


def sha256_of(content: Content) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    return content.sha256 or _hash_on_disk(content.path)


def blob_id(content: Content) -> str:
    """Of git, for small files; a stand-in for what lies on disk."""
    if isinstance(content, OnDisk):
        return hashlib.sha1(
            f"{content.path} {content.path.stat().st_mtime_ns}".encode()
        ).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _hash_on_disk(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_answer(value: Any, status: int = 200) -> Answer:
    return Answer(status, {"Content-Type": "application/json"}, json.dumps(value).encode())
