"""Turns what the user typed for MODEL into a local folder."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from reap2gguf.errors import SourceError
from reap2gguf.resources import example_checkpoint

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# What a build reads; pickled weights and remote code are never fetched.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "README.md", "LICENSE*"]


@dataclass(frozen=True)
class Source:
    """A model as named by the user and where it lies."""

    label: str  # what to call it in cards: "owner/name" or the folder's name
    folder: Path
    revision: str | None = None  # the Hub commit, where it came from the Hub

    @property
    def short_name(self) -> str:
        return self.label.rsplit("/", 1)[-1]


def resolve_source(model: str | None) -> Source:
    """MODEL as a folder: given, bundled, or fetched from the Hub into its cache.

    Raises SourceError if there is nothing of that name or the Hub cannot be reached.
    """
    if model is None:
        folder = example_checkpoint()
        return Source(folder.name, folder)
    # os.path answers False where Path raises: names too long, users unknown
    folder = Path(os.path.expanduser(model))
    if model and os.path.isdir(folder):
        return Source(folder.resolve().name, folder)
    if model and os.path.exists(folder):
        raise SourceError(f"{model}: is a file; pass the folder that holds config.json")
    if not _HUB_NAME.fullmatch(model) or model.startswith((".", "/", "~")):
        raise SourceError(
            f"{model}: no such folder, and not a Hub name (owner/name or owner/name@revision)"
        )
    return _fetch(model)


def _fetch(model: str) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = model.partition("@")
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=_HUB_FILES))
    except HFValidationError as error:
        raise SourceError(f"{name}: no such folder, and not a Hub name ({error})") from error
    except GatedRepoError as error:
        raise SourceError(
            f"{name}: gated on the Hub; accept its terms there and run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"{name}: no such folder here and no such repository on the Hub (or it is private: "
            "run `hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{name}: no revision {revision!r} on the Hub") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise SourceError(
            f"{name}: no such folder here, and the Hub cannot be reached; check the name, or "
            "download it where there is a network (`hf download`) and pass the folder"
        ) from error
    return Source(name, folder, revision=folder.name)
