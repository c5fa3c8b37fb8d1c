"""Turns what the user typed for MODEL into a local folder."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import SourceError
from reap2gguf.hub.retry import Note, ignore_note
from reap2gguf.hub.shards import HubShards
from reap2gguf.hub.snapshot import Snapshot, find
from reap2gguf.messages import without_password
from reap2gguf.resources import example_checkpoint

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_CACHED_NAME = re.compile(r"models--(?:([\w.-]+?)--)?([\w.-]+)", re.ASCII)
_PAGE = re.compile(r"([a-z][a-z0-9+.-]*)://([^/?#]+)(/[^?#]*)?([?#].*)?", re.IGNORECASE)
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_OTHER_PAGES = ("datasets", "spaces", "collections", "papers", "docs", "blog", "api")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Source:
    """A model as the user named it, and its folder."""

    label: str  # what to call it in cards: "owner/name" or the folder's name
    folder: Path
    revision: str | None = None  # the commit, for a model from the Hub
    snapshot: Snapshot | None = None  # that commit's files, for a model from the Hub
    follow_links: bool = False  # whether its weights may be links to any place

    @property
    def short_name(self) -> str:
        return self.label.rsplit("/", 1)[-1]

    @property
    def gguf_name(self) -> str:
        """What it is called if it is a GGUF file: FILE.gguf, or owner/name:FILE.gguf; else ""."""
        return ""

    def open(self, note: Note = ignore_note) -> Checkpoint:
        """Its checkpoint; weights on the Hub are fetched when they are read.

        `note` also gets what the user should know of the folder. Raises CheckpointError, or
        SourceError if the Hub cannot be reached.
        """
        hub = HubShards(self.snapshot, note) if self.snapshot and self.snapshot.weights else None
        checkpoint = Checkpoint.open(self.folder, hub, self.follow_links)
        for line in checkpoint.notes:
            note(line)
        return checkpoint

    def complete(self, note: Note = ignore_note) -> None:
        """Fetch the small files that a plan does not read, such as licences.

        Raises SourceError or OutputError, as `resolve_source` does.
        """
        if self.snapshot is not None:
            self.snapshot.complete(note)

    def make_tokenizer(self) -> None:
        """Put the tokenizer into the folder, where that was not done before.

        Raises UnsupportedModelError or ArtifactError if there is none that can be read.
        """

    @property
    def later_bytes(self) -> int:
        """Bytes of small files that `complete` will fetch."""
        later = self.snapshot.later_files() if self.snapshot else []
        return sum(file.n_bytes for file in later)


def resolve_source(
    model: str | None, note: Note = ignore_note, follow_links: bool = False
) -> Source:
    """MODEL as a folder: given, bundled, or in the Hub's cache with the files that a plan reads.

    `note` gets each failed try. Raises SourceError if there is nothing of that name or the Hub
    cannot be reached, OutputError if the cache cannot be written.
    """
    if model is None:
        folder = example_checkpoint()
        return Source(folder.name, folder)
    # os.path answers False where Path raises: names too long, users unknown
    folder = Path(os.path.expanduser(model))
    if model and os.path.isdir(folder):
        label, revision = _name_of(folder.resolve())
        return Source(label, folder, revision, follow_links=follow_links)
    if model and os.path.exists(folder):
        advice = "pass the folder that holds config.json, or a GGUF file"
        raise SourceError(f"{model}: is a file; {advice}")
    model = hub_name(model)
    if not _HUB_NAME.fullmatch(model) or model.startswith((".", "/", "~")):
        raise SourceError(
            f"{without_password(model)}: no such folder, and not a Hub name (owner/name or "
            "owner/name@revision)"
        )
    name, _, revision = model.partition("@")
    snapshot = find(name, revision or None, note)
    return Source(name, snapshot.folder, snapshot.commit, snapshot)


def hub_name(model: str) -> str:
    """The name of a model on the Hub, for the address of its page; other text as it is.

    That is owner/name@REVISION for `https://huggingface.co/owner/name/tree/REVISION`. HF_ENDPOINT
    is a host too. Raises SourceError for an address that is not one of a model on the Hub.
    """
    page = _PAGE.fullmatch(model)
    if page is None:
        return model
    scheme, place, path, rest_of_it = page.groups()
    where, host = without_password(model), place.rpartition("@")[2].lower()
    own = _PAGE.fullmatch(os.environ.get("HF_ENDPOINT", ""))
    hosts = _HOSTS if own is None else (*_HOSTS, own[2].rpartition("@")[2].lower())
    expected = "expected https://huggingface.co/owner/name or owner/name"
    if scheme.lower() not in ("http", "https") or host not in hosts:
        known = f"a page of {', '.join(dict.fromkeys((hosts[0], *hosts[len(_HOSTS) :])))}"
        raise SourceError(f"{where}: is not {known}; {expected}, or download it to a folder")
    if "@" in place or "token" in (rest_of_it or ""):
        raise SourceError(
            f"{where}: holds a password or a token; log in with `hf auth login` and pass owner/name"
        )
    parts = [part for part in (path or "").split("/") if part]
    if own is not None and host == hosts[-1]:  # an endpoint may have a path of its own
        prefix = [part for part in (own[3] or "").split("/") if part]
        parts = parts[len(prefix) :] if parts[: len(prefix)] == prefix else parts
    if len(parts) < 2 or parts[0] in _OTHER_PAGES:
        raise SourceError(f"{where}: is not the page of a model; {expected}")
    name, rest = "/".join(parts[:2]), parts[2:]
    if rest and rest[0] in ("blob", "resolve", "raw"):
        raise SourceError(f"{where}: is the page of one file; pass the model, {name}")
    if rest and rest[0] == "tree" and len(rest) > 1:
        return f"{name}@{unquote('/'.join(rest[1:]))}"
    return name


def _name_of(folder: Path) -> tuple[str, str | None]:
    """What to call a model in a folder, and its commit if the folder is one of the Hub's cache.

    That is `models--owner--name/snapshots/COMMIT`.
    """
    repository = _CACHED_NAME.fullmatch(folder.parents[1].name) if len(folder.parents) > 1 else None
    is_snapshot = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)
    if repository is None or not is_snapshot:
        return folder.name, None
    owner, name = repository.groups()
    return f"{owner}/{name}" if owner else name, folder.name
