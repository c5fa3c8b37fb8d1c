"""The keys `general.*` that say where a model comes from and how to sample from it.

They are those that llama.cpp's converter writes from a checkpoint's card, its
`generation_config.json` and its name (`gguf-py/gguf/metadata.py`); names are taken apart by gguf-py
itself. Four things differ on purpose:

- `general.name` is the name as it is, not a title made of it.
- A size in the name counts only if the file has that size, within a tenth: a pruned model keeps the
  name of the larger one. Otherwise the label is computed from the tensors.
- `-REAP-0.25`, `-REAM-0.25` or `-HC-SMoE-0.25` at the end of a pruned model's name is no version.
- `_name_or_path` in config.json is not read: it names what a model was loaded from once.

The base model of a pruned model is the checkpoint that was pruned. Cards are untrusted: see
`bundle/source_card.py` for the bounds of their values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, Metadata

from reap2gguf.bundle.front_matter import PrunedFrom, pruned_values
from reap2gguf.bundle.layout import CARD_FILE
from reap2gguf.bundle.sampling import read_sampling
from reap2gguf.bundle.source_card import SourceCard, read_card
from reap2gguf.messages import one_line
from reap2gguf.models.description import HeaderValue

_ENDING = re.compile(r"(.+)-((?:REAP|REAM|HC-SMoE)-\d+(?:\.\d+)?)")
_TOTAL = re.compile(r"(\d+(?:\.\d+)?)([KMBT])", re.ASCII)
_SCALES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_HUB_URL = re.compile(r"https?://huggingface\.co/([^/]+/[^/]+)")
# of cards: the key after `general.`, for models that were not pruned here
_PERSONAL = {
    "author": "author",
    "organization": "organization",
    "description": "description",
    "url": "source.url",
    "doi": "source.doi",
    "uuid": "source.uuid",
    "repo_url": "source.repo_url",
}
_WHOLE = ("top_k", "penalty_last_n", "mirostat")  # of the sampling: int32; the others are float32


@dataclass(frozen=True)
class General:
    """The keys, and what in the card or the generation config was ignored."""

    values: tuple[HeaderValue, ...]
    problems: tuple[str, ...]


def general_values(
    folder: Path, name: str, n_parameters: int, pruned: PrunedFrom | None
) -> General:
    """`general.*` of a model's GGUF files, but for the type, the file type and computed sizes.

    `folder` holds the card and the generation config: of the model to quantize, or of the
    checkpoint that was pruned; the pruned checkpoint gives the same. `n_parameters` counts those of
    the model's own file. `pruned` is None for a model that was not pruned here.
    """
    card, sampling = read_card(folder / CARD_FILE), read_sampling(folder)
    values: list[HeaderValue] = []
    if sampling.sequence is not None:
        values.append(_text("general.sampling.sequence", sampling.sequence))
    for key, number in sampling.numbers.items():
        kind = GGUFValueType.INT32 if key in _WHOLE else GGUFValueType.FLOAT32
        values.append(HeaderValue(f"general.sampling.{key}", number, kind))
    if pruned is None:
        values += _as_it_is(card, name, n_parameters)
    else:
        values += _of_pruned(card, name, n_parameters, pruned)
    return General(tuple(values), (*card.problems, *sampling.problems))


def _as_it_is(card: SourceCard, name: str, n_parameters: int) -> Iterator[HeaderValue]:
    """What a card says of its own model."""
    yield _text("general.name", card.texts.get("name", name))
    for key, place in _PERSONAL.items():
        if key in card.texts:
            yield _text(f"general.{place}", card.texts[key])
    parts = _taken_apart(name, n_parameters)
    for key in ("version", "finetune", "basename", "size_label"):
        if value := card.texts.get(key) or parts.get(key):
            yield _text(f"general.{key}", value)
    yield from _licence(card.list("license"), card.texts)
    yield from _relatives("base_model", card.list("base_model"), n_parameters)
    yield from _relatives("dataset", card.list("datasets"), n_parameters)
    pipeline = card.texts.get("pipeline_tag")
    yield from _array("general.tags", [*card.list("tags"), *([pipeline] if pipeline else [])])
    yield from _array("general.languages", card.list("language"))


def _of_pruned(
    card: SourceCard, name: str, n_parameters: int, pruned: PrunedFrom
) -> Iterator[HeaderValue]:
    """What the card of the pruned model will say."""
    front = pruned_values(card, pruned)
    yield _text("general.name", name)
    match = _ENDING.fullmatch(name)
    parts = _taken_apart(match[1] if match else name, n_parameters)
    if match:
        parts["finetune"] = "-".join(filter(None, (parts.get("finetune"), match[2])))
        parts.setdefault("basename", match[1])
    for key in ("version", "finetune", "basename", "size_label"):
        if key in parts:
            yield _text(f"general.{key}", parts[key])
    yield from _licence(card.list("license"), front)
    yield from _relatives("base_model", [pruned.source], n_parameters)
    yield from _relatives("dataset", front.get("datasets", []), n_parameters)
    yield from _array("general.tags", [*front["tags"], front["pipeline_tag"]])
    yield from _array("general.languages", front.get("language", []))


def _taken_apart(name: str, n_parameters: int) -> dict[str, str]:
    """Basename, finetune, version and size label that a name holds, each only if it is there."""
    found = Metadata.get_model_id_components(name, n_parameters)
    parts = dict(zip(("basename", "finetune", "version", "size_label"), found[2:], strict=True))
    if not _is_true(parts["size_label"] or "", n_parameters):
        del parts["size_label"]
    return {key: value for key, value in parts.items() if value}


def _is_true(label: str, n_parameters: int) -> bool:
    """Whether a size label such as 30B-A3B gives the number of parameters, within a tenth."""
    totals = [_TOTAL.fullmatch(part) for part in label.split("-")]
    sizes = [float(total[1]) * _SCALES[total[2]] for total in totals if total]
    return bool(sizes) and all(abs(size - n_parameters) <= n_parameters / 10 for size in sizes)


def _licence(licences: list[str], texts: Mapping[str, Any]) -> Iterator[HeaderValue]:
    if licences:
        yield _text("general.license", ",".join(licences))
    for key, place in (("license_name", "name"), ("license_link", "link")):
        if key in texts:
            yield _text(f"general.license.{place}", texts[key])


def _relatives(kind: str, names: list[str], n_parameters: int) -> Iterator[HeaderValue]:
    """Base models or datasets, each by its parts; names are `owner/name`, URLs, or other names."""
    if not names:
        return
    yield HeaderValue(f"general.{kind}.count", len(names), GGUFValueType.UINT32)
    for index, given in enumerate(names):
        found = _relative(given, n_parameters)
        for key in ("name", "version", "organization", "repo_url"):
            if value := found.get(key):
                yield _text(f"general.{kind}.{index}.{key}", value)


def _relative(given: str, n_parameters: int) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    name = given
    if given.startswith(("http://", "https://", "ssh://")):
        found["repo_url"] = given
        match = _HUB_URL.fullmatch(given)
        if match is None:
            return found
        name = match[1]
    model, owner, _, _, version, _ = Metadata.get_model_id_components(name, n_parameters)
    found["name"] = model and Metadata.id_to_title(model)
    found["organization"] = owner and Metadata.id_to_title(owner)
    found["version"] = version
    if owner and model:
        found.setdefault("repo_url", f"https://huggingface.co/{owner}/{model}")
    return found


def _array(key: str, entries: list[str]) -> Iterator[HeaderValue]:
    if entries:
        yield HeaderValue(key, entries, GGUFValueType.ARRAY)


def _text(key: str, value: str) -> HeaderValue:
    # the name of a folder may hold bytes that are not UTF-8
    return HeaderValue(key, one_line(value), GGUFValueType.STRING)
