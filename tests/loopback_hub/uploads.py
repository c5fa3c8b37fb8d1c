"""The write half of the loopback Hub: accounts, new repositories, large-file storage, commits.

Given to `Hub.writes`. It answers as the Hub does to huggingface_hub without Xet: `preupload` says
which files are large, the batch API of git-lfs where they go (in parts above `part_bytes`, and
nowhere if they are stored already), and a commit comes as lines of JSON.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.loopback_hub.repository import (
    Answer,
    Content,
    Repository,
    Request,
    is_large,
    json_answer,
    sha256_of,
    size_of,
)
from tests.loopback_hub.server import Hub

TOKEN = "hf_the_right_one"
_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass
class Commit:
    """One commit of a repository: what it added and what it removed."""

    message: str
    added: dict[str, str] = field(default_factory=dict)  # path -> SHA-256
    removed: list[str] = field(default_factory=list)


@dataclass
class Uploads:
    """What was written. `stored` counts how often the bytes of an object were taken."""

    owner: str = "me"
    orgs: tuple[str, ...] = ("team",)
    role: str = "write"
    part_bytes: int = 2**22
    objects: dict[str, bytes] = field(default_factory=dict)
    stored: Counter[str] = field(default_factory=Counter)
    history: dict[str, list[Commit]] = field(default_factory=dict)
    batch_error: tuple[int, str] | None = None  # of the large-file storage
    # done at the n-th request, before it takes effect or after
    strike: Callable[[], None] = lambda: None
    strike_at: int = -1
    strike_after: bool = False
    n_asked: int = 0
    spoil: Callable[[str, bytes], bytes] | None = None  # what a path's bytes turn into on the way
    _parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock)

    def __call__(self, hub: Hub, request: Request) -> Answer | None:
        """The answer to a request that writes, or asks who one is; None to any other."""
        with self._lock:
            self.n_asked += 1
            strikes = self.n_asked - 1 == self.strike_at
            if strikes and not self.strike_after:
                self.strike()
                return Answer(503)
            answer = self._answer(hub, request)
            if strikes:
                self.strike()
            return answer

    def _answer(self, hub: Hub, request: Request) -> Answer | None:
        path, method = request.path, request.method
        if method == "PUT" and path.startswith("/storage/"):
            return self._put(path.removeprefix("/storage/"), request)  # its address is the right
        if method == "GET" and path != "/api/whoami-v2":
            return None
        if path.startswith("/storage/complete/"):
            return self._complete(request)
        if path == "/api/validate-yaml":
            return json_answer({"errors": [], "warnings": []})
        headers = {name.lower(): value for name, value in request.headers.items()}
        if headers.get("authorization") != f"Bearer {TOKEN}":
            words = "Invalid credentials in Authorization header"
            return Answer(401, {"X-Error-Message": words})
        if path == "/api/whoami-v2":
            return self._whoami()
        if path == "/api/repos/create":
            return self._create(hub, json.loads(request.body))
        if path == "/storage/verify":
            found = json.loads(request.body)
            size = len(self.objects.get(found["oid"], b""))
            return Answer(200 if size == found["size"] else 404)
        repository = hub.find(path)
        return None if repository is None else self._write(hub, repository, request)

    def _whoami(self) -> Answer:
        orgs = [{"name": name, "roleInOrg": "admin"} for name in self.orgs]
        token = {"displayName": "test", "role": self.role}
        auth = {"type": "access_token", "accessToken": token}
        return json_answer({"type": "user", "name": self.owner, "orgs": orgs, "auth": auth})

    def _create(self, hub: Hub, wanted: dict[str, Any]) -> Answer:
        owner = wanted["organization"] or self.owner
        name = f"{owner}/{wanted['name']}"
        if owner not in (self.owner, *self.orgs):
            words = f"You don't have the rights to create a model under the namespace {owner!r}"
            return Answer(403, {"X-Error-Message": words})
        url = {"url": f"{hub.endpoint}/{name}"}
        if any(found.name == name for found in hub.repositories):
            return json_answer({**url, "error": "You already created this model repo"}, 409)
        private = wanted.get("visibility") == "private"
        repository = Repository(name, {".gitattributes": _ATTRIBUTES}, private=private)
        hub.repositories.append(repository)
        self.history[name] = [Commit("initial commit", {".gitattributes": ""})]
        _give_id(repository, self.history[name])
        return json_answer(url)

    def _write(self, hub: Hub, repository: Repository, request: Request) -> Answer | None:
        if repository.name.partition("/")[0] not in (self.owner, *self.orgs):
            return Answer(403, {"X-Error-Message": "you cannot write there"})
        if request.path == f"{repository.home}.git/info/lfs/objects/batch":
            return self._batch(hub, json.loads(request.body))
        verb = request.path.removeprefix(f"{repository.api}/").partition("/")[0]
        if verb == "preupload":
            return self._preupload(repository, json.loads(request.body))
        if verb == "commit":
            lines = [json.loads(line) for line in request.body.splitlines()]
            return self._commit(hub, repository, lines)
        return None

    def _preupload(self, repository: Repository, wanted: dict[str, Any]) -> Answer:
        files = []
        for file in wanted["files"]:
            large = is_large(file["path"])
            there = repository.files.get(file["path"])
            known = {} if there is None else {"oid": sha256_of(there) if large else _git(there)}
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **known})
        return json_answer({"files": files})

    def _batch(self, hub: Hub, wanted: dict[str, Any]) -> Answer:
        assert wanted["operation"] == "upload"
        found = [self._place(hub, entry["oid"], entry["size"]) for entry in wanted["objects"]]
        return json_answer({"transfer": "multipart", "objects": found})

    def _place(self, hub: Hub, oid: str, size: int) -> dict[str, Any]:
        if self.batch_error is not None:
            code, message = self.batch_error
            return {"oid": oid, "size": size, "error": {"code": code, "message": message}}
        if oid in self.objects:
            return {"oid": oid, "size": size}
        root = f"{hub.endpoint}/storage"
        upload: dict[str, Any] = {"href": f"{root}/{oid}"}
        if size > self.part_bytes:
            count = math.ceil(size / self.part_bytes)
            parts = {f"{n:05d}": f"{root}/{oid}?partNumber={n}" for n in range(1, count + 1)}
            header = {"chunk_size": str(self.part_bytes), **parts}
            upload = {"href": f"{root}/complete/{oid}", "header": header}
        actions = {"upload": upload, "verify": {"href": f"{root}/verify"}}
        return {"oid": oid, "size": size, "actions": actions}

    def _put(self, oid: str, request: Request) -> Answer:
        data = request.body
        if "partNumber" not in request.query:
            self._store(oid, data)
            return Answer(200)
        number = int(request.query["partNumber"][0])
        self._parts[oid, number] = data
        return Answer(200, {"ETag": f'"{hashlib.md5(data).hexdigest()}"'})

    def _complete(self, request: Request) -> Answer:
        wanted = json.loads(request.body)
        oid = wanted["oid"]
        pieces = []
        for part in wanted["parts"]:
            data = self._parts.pop((oid, part["partNumber"]))
            assert part["etag"] == f'"{hashlib.md5(data).hexdigest()}"'
            pieces.append(data)
        self._store(oid, b"".join(pieces))
        return Answer(200)

    def _store(self, oid: str, data: bytes) -> None:
        self.objects[oid] = data
        self.stored[oid] += 1

    def _commit(self, hub: Hub, repository: Repository, lines: list[dict[str, Any]]) -> Answer:
        head = lines[0]["value"]
        if head.get("parentCommit", repository.commit) != repository.commit:
            return Answer(412, {"X-Error-Message": "A commit has happened since."})
        commit = Commit(head["summary"])
        files: dict[str, Content] = dict(repository.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del files[value["path"]]
                commit.removed.append(value["path"])
                continue
            if line["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    return Answer(400, {"X-Error-Message": "LFS pointer pointed to no file"})
                data = self.objects[value["oid"]]
            else:
                data = base64.b64decode(value["content"])
            if self.spoil is not None:
                data = self.spoil(value["path"], data)
            files[value["path"]] = data
            commit.added[value["path"]] = hashlib.sha256(data).hexdigest()
        repository.files.clear()
        repository.files.update(files)
        self.history[repository.name].append(commit)
        _give_id(repository, self.history[repository.name])
        url = f"{hub.endpoint}{repository.home}/commit/{repository.commit}"
        return json_answer({"success": True, "commitOid": repository.commit, "commitUrl": url})

    def put_twice(self) -> list[str]:
        """Objects whose bytes were taken more than once."""
        return [oid for oid, count in self.stored.items() if count > 1]

    def added_twice(self, name: str) -> list[str]:
        """Files that were committed more than once with the same bytes."""
        commits = self.history[name]
        added = Counter((path, oid) for commit in commits for path, oid in commit.added.items())
        return [path for (path, _), count in added.items() if count > 1]


def _give_id(repository: Repository, history: list[Commit]) -> None:
    text = f"{repository.name} {history}"
    repository.commit = hashlib.sha1(text.encode()).hexdigest()


def _git(content: Content) -> str:
    assert isinstance(content, bytes)
    return hashlib.sha1(b"blob %d\0" % size_of(content) + content).hexdigest()
