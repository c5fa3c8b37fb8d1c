"""The rows of a calibration, component by component, and the text of the importance matrix.

A row is one sample, cut at T tokens, or T tokens of a text. REAP packs samples into rows of T, and
so does `--pack`; told not to, it skips those that are longer, where cutting keeps the beginning of
each, as many rows as were asked for, and none that the model would not see alone. A composite's
rows are shuffled by the seed, so that `--samples` takes of all components.

The importance matrix reads the same texts. Of a composite or a dataset it reads 32 MiB at most,
shuffled by the seed, each component with the share of its rows: no first chunks are all of one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from reap2gguf.bundle.manifest import ComponentRecord
from reap2gguf.calibration.corpus import (
    MOST_TEXT,
    Corpus,
    Cut,
    Passage,
    iterate_corpus,
    load_corpus,
)
from reap2gguf.calibration.hub_datasets import open_dataset
from reap2gguf.calibration.mixes import Calibration
from reap2gguf.calibration.rows import Counted, Row, Tokenizer, make_packed_rows, make_rows
from reap2gguf.calibration.samples import sample_text
from reap2gguf.calibration.spec import Component
from reap2gguf.errors import CalibrationError
from reap2gguf.progress import Progress

Records = Iterator[Mapping[str, Any]]
_Dataset = tuple[str, Records]  # its commit, and its rows

_MOST_SHARED_TEXT = 2**25  # characters, of all components


@dataclass(frozen=True)
class Drawn:
    """All rows, what each component gave of them, and the text they are from."""

    rows: Sequence[Row]
    components: tuple[ComponentRecord, ...]
    text: str
    sha256: str  # of the components' texts


@dataclass(frozen=True)
class _Part:
    """What one component gave."""

    component: Component
    revision: str | None
    rows: list[Counted]
    texts: list[str]
    sha256: str


def draw(
    calibration: Calibration, tokenizer: Tokenizer, max_length: int, progress: Progress
) -> Drawn:
    """Read every component; a note says what it gave. Raises CalibrationError."""
    # a dataset that is gated, or has no such subset, is known before hours of reading others
    opened = [
        None if one.is_local else open_dataset(one, calibration.seed, progress.note)
        for one in calibration.components
    ]
    try:
        parts = [
            _draw_one(calibration, component, dataset, tokenizer, max_length, progress)
            for component, dataset in zip(calibration.components, opened, strict=True)
        ]
    finally:
        tokenizer.close()
    order = [(part, row) for part in range(len(parts)) for row in parts[part].rows]
    if calibration.is_composite:
        random.Random(calibration.seed).shuffle(order)
    order = order[: calibration.samples]
    records = []
    for number, part in enumerate(parts):
        rows = [row for owner, row in order if owner == number]
        record = _record(part, rows)
        records.append(record)
        progress.note(_told(record, part, calibration))
    digest = hashlib.sha256("".join(part.sha256 for part in parts).encode())
    return Drawn(
        [one.row for _, one in order], tuple(records), _text(parts, calibration), digest.hexdigest()
    )


def _draw_one(
    calibration: Calibration,
    component: Component,
    dataset: _Dataset | None,
    tokenizer: Tokenizer,
    max_length: int,
    progress: Progress,
) -> _Part:
    count, seed = calibration.rows_of(component), calibration.seed
    revision, records = (None, None) if dataset is None else dataset
    if calibration.pack:
        passages = _passages(component, count, records, tokenizer, seed)
        corpus, rows = _packed(component, count, passages, tokenizer, max_length, seed, progress)
    else:
        if records is None:
            corpus = load_corpus(component.name, tokenizer.render_chat, count, seed)
        else:
            corpus = _from_hub(component, count, records, tokenizer, progress)
        rows = make_rows(corpus, tokenizer, max_length, count, seed)
    texts = [passage.text for passage in corpus.passages]
    if _is_shared(calibration):
        total = sum(calibration.rows_of(one) for one in calibration.components)
        texts = _begin_of(texts, _MOST_SHARED_TEXT * count // total)
    return _Part(component, revision, rows, texts, corpus.sha256)


def _from_hub(
    component: Component, count: int, records: Records, tokenizer: Tokenizer, progress: Progress
) -> Corpus:
    """The texts of the first `count` of a dataset's rows."""
    passages: list[Passage] = []
    with progress.task(_reading(component), count, "samples") as task:
        found = _hub_passages(component, islice(records, count), tokenizer)
        for passage in _bounded(component, found):
            passages.append(passage)
            task.advance()
    return Corpus(component.name, tuple(passages))


def _packed(
    component: Component, count: int, passages: Iterator[Passage], tokenizer: Tokenizer,
    max_length: int, seed: int, progress: Progress,
) -> tuple[Corpus, list[Counted]]:  # fmt: skip
    """`count` rows of packed samples, and the texts that were read for them, no more."""
    read: list[Passage] = []
    taken = _kept(_bounded(component, passages), read)
    with progress.task(_reading(component), count, "rows") as task:
        rows = make_packed_rows(
            taken, component.name, tokenizer, max_length, count, seed, task.advance
        )
    return Corpus(component.name, tuple(read)), rows


def _passages(
    component: Component, count: int, records: Records | None, tokenizer: Tokenizer, seed: int
) -> Iterator[Passage]:
    """A component's passages, one after another for as long as they are asked for."""
    if records is None:
        return iterate_corpus(component.name, tokenizer.render_chat, count, seed)
    return _hub_passages(component, records, tokenizer)


def _hub_passages(
    component: Component, records: Records, tokenizer: Tokenizer
) -> Iterator[Passage]:
    for number, record in enumerate(records, start=1):
        where = f"calibration {component.name}: sample {number}"
        yield Passage(sample_text(record, tokenizer.render_chat, where), Cut.SAMPLE)


def _bounded(component: Component, passages: Iterable[Passage]) -> Iterator[Passage]:
    """The passages, as long as their texts can be held."""
    n_letters = 0
    for number, passage in enumerate(passages, start=1):
        n_letters += len(passage.text)
        if n_letters > MOST_TEXT:
            raise CalibrationError(
                f"calibration {component.name}: sample {number}: over {MOST_TEXT:,} characters of "
                "text so far; ask for fewer rows"
            )
        yield passage


def _kept(passages: Iterable[Passage], read: list[Passage]) -> Iterator[Passage]:
    """The passages, each put into `read` as it is asked for."""
    for passage in passages:
        read.append(passage)
        yield passage


def _reading(component: Component) -> str:
    return f"Reading {component.name} {component.subset or ''}".rstrip()


def _is_shared(calibration: Calibration) -> bool:
    return calibration.is_composite or not calibration.components[0].is_local


def _begin_of(texts: Sequence[str], most: int) -> list[str]:
    """The first texts that have `most` characters in all, the last one cut."""
    found: list[str] = []
    for text in texts:
        if most <= 0:
            break
        found.append(text[:most])
        most -= len(text)
    return found


def _text(parts: Sequence[_Part], calibration: Calibration) -> str:
    texts = [text for part in parts for text in part.texts]
    if calibration.is_composite:
        random.Random(calibration.seed).shuffle(texts)
    return "\n".join(texts)


def _record(part: _Part, rows: Sequence[Counted]) -> ComponentRecord:
    component = part.component
    on_hub = part.revision is not None
    return ComponentRecord(
        name=component.public,
        subset=component.subset,
        split=component.split if on_hub else None,
        revision=part.revision,
        rows=len(rows),
        tokens=sum(len(one.row) for one in rows),
        samples=sum(one.n_samples for one in rows),
    )


def _told(record: ComponentRecord, part: _Part, calibration: Calibration) -> str:
    """A component's note: its rows and tokens, and whether it has fewer than were asked of it."""
    count = part.component.count
    told = f"calibration: {record.title}: {record.rows:,} rows, {record.tokens:,} tokens"
    if calibration.pack:
        told += f" of {record.samples:,} samples"
    if count is not None and len(part.rows) < count:
        told += f"; {count:,} rows were asked for, and it has no more than {len(part.rows):,}"
    return told
