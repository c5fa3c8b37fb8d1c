"""Draws the rows of a calibration from all its components, and the text of the imatrix.

REAP packs samples into rows of T tokens, and so does `--pack`. Without packing, REAP skips samples
that are longer than T; here they are cut, so that there are as many rows as were asked for, and the
model reads each sample alone. The rows of a composite are shuffled by the seed, so that `--samples`
takes some of every component.

The importance matrix reads the same texts. Of a composite or a dataset it reads at most 32 MiB,
shuffled by the seed, of each component in proportion to its rows. Where it reads fewer chunks than
the text has, they are spread over the text, one from each of equal stretches: the head of a text
may be all of one kind. Of a text far longer than the chunks, only the parts that they hold are
tokenized (`stretches.py`).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.artifacts.made_with import TOKENIZING, versions
from reap2gguf.artifacts.texts import (
    NOT_COUNTED,
    ImatrixChunks,
    ObservationRows,
    Row,
    Texts,
    hash_rows,
)
from reap2gguf.bundle.manifest import ComponentRecord
from reap2gguf.calibration.hub_datasets import open_dataset
from reap2gguf.calibration.rows import DrawnRow, RowPacker, chunk_text, make_rows, spread
from reap2gguf.calibration.samples import SampleReader, usable
from reap2gguf.calibration.scanned_files import ScannedFiles
from reap2gguf.calibration.sources import (
    MAX_TEXT,
    Corpus,
    Cut,
    Passage,
    ignored_files,
    iterate_corpus,
    load_corpus,
)
from reap2gguf.calibration.stretches import is_far_longer, spread_rows
from reap2gguf.errors import CalibrationError
from reap2gguf.messages import one_line
from reap2gguf.progress import Progress, Silent

if TYPE_CHECKING:
    from reap2gguf.calibration.layouts import Record
    from reap2gguf.calibration.spec import Calibration, Component
    from reap2gguf.tokenizer.tokenizer import Tokenizer

_MAX_SHARED_TEXT = 2**25  # characters that the importance matrix reads, of all components
_SILENT = Silent()


@dataclass(frozen=True)
class Drawn:
    """All rows, what each component gave to them, and the text that they come from."""

    rows: Sequence[Row]
    components: tuple[ComponentRecord, ...]
    text: str
    sha256: str  # of the texts of all components


@dataclass(frozen=True)
class _Part:
    """What one component gives."""

    component: Component
    revision: str | None  # of a dataset on the Hub
    rows: list[DrawnRow]
    texts: list[str]
    sha256: str
    reader: SampleReader

    @property
    def n_skipped(self) -> int:
        return self.reader.skipped.n_bad + self.reader.skipped.n_empty


@dataclass(frozen=True)
class _Drawing:
    """Reads one component after another."""

    calibration: Calibration
    tokenizer: Tokenizer
    max_length: int
    progress: Progress
    files: ScannedFiles

    def draw(self, component: Component, revision: str | None, records: Iterator[Record]) -> _Part:
        """The rows and texts of one component; `records` are those of a dataset on the Hub."""
        count, seed = self.calibration.rows_of(component), self.calibration.seed
        reader = SampleReader(self.tokenizer)
        if self.calibration.pack:
            corpus, rows = self._packed(component, count, records, reader)
        else:
            if component.is_local:
                corpus = load_corpus(component.name, reader, count, seed, self.files)
            else:
                corpus = self._from_hub(component, count, records, reader)
            short = reader.skipped.add_empty
            rows = make_rows(corpus, self.tokenizer, self.max_length, count, seed, short)
        texts = [passage.text for passage in corpus.passages]
        if _is_shared(self.calibration):
            total = sum(self.calibration.rows_of(one) for one in self.calibration.components)
            texts = _first_characters(texts, _MAX_SHARED_TEXT * count // total)
        return _Part(component, revision, rows, texts, corpus.sha256, reader)

    def _from_hub(
        self, component: Component, count: int, records: Iterator[Record], reader: SampleReader
    ) -> Corpus:
        """The texts of the first `count` records of a dataset that can be used."""
        passages: list[Passage] = []
        with self.progress.task(_title(component), count, "samples") as task:
            found = islice(_hub_passages(component, records, reader), count)
            for passage in _bounded(component, found):
                passages.append(passage)
                task.advance()
        reader.skipped.check()
        if not passages:
            raise CalibrationError(f"calibration {component.name}: holds no text")
        return Corpus(component.name, tuple(passages))

    def _packed(
        self, component: Component, count: int, records: Iterator[Record], reader: SampleReader
    ) -> tuple[Corpus, list[DrawnRow]]:
        """`count` rows of packed samples, and the passages that were read for them, no more."""
        if component.is_local:
            seed = self.calibration.seed
            passages = iterate_corpus(component.name, reader, count, seed, self.files)
        else:
            passages = _hub_passages(component, records, reader)
        taken: list[Passage] = []
        packer = RowPacker(self.tokenizer, self.max_length, self.calibration.seed)
        with self.progress.task(_title(component), count, "rows") as task:
            bounded = _appended(_bounded(component, passages), taken)
            rows = packer.make(bounded, component.name, count, task.advance)
        reader.skipped.check()
        return Corpus(component.name, tuple(taken)), rows


def _hub_passages(
    component: Component, records: Iterator[Record], reader: SampleReader
) -> Iterator[Passage]:
    for text in usable(records, reader, f"calibration {component.name}"):
        yield Passage(text, Cut.SAMPLE)


def draw(
    calibration: Calibration,
    tokenizer: Tokenizer,
    max_length: int,
    progress: Progress,
    files: ScannedFiles | None = None,
) -> Drawn:
    """Read every component; one note per component reports its rows. Raises CalibrationError."""
    # a dataset that is gated, or has no such subset, is known before hours of reading others
    datasets: list[tuple[str | None, Iterator[Record]]] = [
        (None, iter(())) if one.is_local else open_dataset(one, calibration.seed, progress.note)
        for one in calibration.components
    ]
    drawing = _Drawing(calibration, tokenizer, max_length, progress, files or ScannedFiles())
    try:
        parts = [
            drawing.draw(component, revision, records)
            for component, (revision, records) in zip(calibration.components, datasets, strict=True)
        ]
    finally:
        tokenizer.close()
    order = [(part, row) for part in range(len(parts)) for row in parts[part].rows]
    if calibration.is_composite:
        random.Random(calibration.seed).shuffle(order)
    order = order[: calibration.samples]
    records = []
    for number, part in enumerate(parts):
        record = _component_record(part, [row for owner, row in order if owner == number])
        records.append(record)
        progress.note(_summary(record, part, calibration))
    digest = hashlib.sha256("".join(part.sha256 for part in parts).encode())
    rows = [row.tokens for _, row in order]
    return Drawn(rows, tuple(records), _joined_text(parts, calibration), digest.hexdigest())


def _bounded(component: Component, passages: Iterable[Passage]) -> Iterator[Passage]:
    """The passages; CalibrationError where their texts would need too much memory."""
    n_letters = 0
    for number, passage in enumerate(passages, start=1):
        n_letters += len(passage.text)
        if n_letters > MAX_TEXT:
            raise CalibrationError(
                f"calibration {component.name}: sample {number}: over {MAX_TEXT:,} characters of "
                "text so far; use fewer --samples"
            )
        yield passage


def _appended(passages: Iterable[Passage], taken: list[Passage]) -> Iterator[Passage]:
    """The passages; each is appended to `taken` when it is asked for."""
    for passage in passages:
        taken.append(passage)
        yield passage


def _title(component: Component) -> str:
    return f"Reading {component.name} {component.subset or ''}".rstrip()


def _is_shared(calibration: Calibration) -> bool:
    """Whether the text of the importance matrix is shared out among components."""
    return calibration.is_composite or not calibration.components[0].is_local


def _first_characters(texts: Sequence[str], n_characters: int) -> list[str]:
    """The first texts that have `n_characters` in total, the last one cut."""
    chosen: list[str] = []
    for text in texts:
        if n_characters <= 0:
            break
        chosen.append(text[:n_characters])
        n_characters -= len(text)
    return chosen


def _joined_text(parts: Sequence[_Part], calibration: Calibration) -> str:
    texts = [text for part in parts for text in part.texts]
    if calibration.is_composite:
        random.Random(calibration.seed).shuffle(texts)
    return "\n".join(texts)


def _component_record(part: _Part, rows: Sequence[DrawnRow]) -> ComponentRecord:
    component = part.component
    on_hub = part.revision is not None
    return ComponentRecord(
        name=component.public,
        subset=component.subset,
        split=component.split if on_hub else None,
        revision=part.revision,
        rows=len(rows),
        tokens=sum(len(row.tokens) for row in rows),
        samples=sum(row.n_samples for row in rows),
        skipped=part.n_skipped,
    )


def _summary(record: ComponentRecord, part: _Part, calibration: Calibration) -> str:
    """A component's note: its rows and tokens, and whether they are fewer than asked for."""
    count = part.component.count
    text = f"calibration: {record.title}: {record.rows:,} rows, {record.tokens:,} tokens"
    if calibration.pack:
        text += f" of {record.samples:,} samples"
    if count is not None and len(part.rows) < count:
        text += f"; {count:,} rows were requested, but it has only {len(part.rows):,}"
    if ignored := ignored_files(part.component.name) if part.component.is_local else []:
        more = f" and {len(ignored) - 4:,} more" if len(ignored) > 4 else ""
        text += f"; files that are not read: {one_line(', '.join(ignored[:4]))}{more}"
    return "; ".join(filter(None, (text, part.reader.note())))


def read_texts(
    tokenizer: Tokenizer,
    calibration: Calibration,
    max_length: int,
    imatrix_text: Path | None,
    chunk_size: int,
    vocab_size: int,
    progress: Progress = _SILENT,
    files: ScannedFiles | None = None,
    n_chunks: int | None = None,
    *,
    has_rows: bool = True,
    has_chunks: bool = True,
) -> Texts:
    """Rows for the observation and `n_chunks` chunks for the importance matrix, or one of them.

    With `n_chunks` None, the importance matrix reads all of `imatrix_text`; without such a text it
    reads the calibration texts, and no more tokens than the maximum of the observation. Chunks that
    are fewer than those of the text are spread over it by the seed. The calibration is not read
    where neither needs it. Raises CalibrationError.
    """
    files = files or ScannedFiles()
    chunks = None
    if has_chunks and imatrix_text is not None:
        seed = calibration.seed
        chunks = imatrix_chunks(tokenizer, imatrix_text, chunk_size, files, n_chunks, seed)
        if not has_rows:
            return Texts(None, chunks, versions(TOKENIZING))
    drawn = draw(calibration, tokenizer, max_length, progress, files)
    rows = _observation_rows(drawn, calibration, vocab_size)
    if chunks is None and has_chunks:
        if n_chunks is None:
            n_chunks = -(-calibration.samples * max_length // chunk_size)
        chunks = _some_chunks(
            drawn.text, rows.label, tokenizer, chunk_size, n_chunks, calibration.seed
        )
    return Texts(rows, chunks, versions(TOKENIZING))


def observation_rows(
    tokenizer: Tokenizer,
    calibration: Calibration,
    max_length: int,
    vocab_size: int,
    progress: Progress = _SILENT,
    files: ScannedFiles | None = None,
) -> ObservationRows:
    """The rows of a calibration. Raises CalibrationError."""
    drawn = draw(calibration, tokenizer, max_length, progress, files)
    return _observation_rows(drawn, calibration, vocab_size)


def imatrix_chunks(
    tokenizer: Tokenizer,
    text_file: Path,
    chunk_size: int,
    files: ScannedFiles | None = None,
    n_chunks: int | None = None,
    seed: int = 0,
) -> ImatrixChunks:
    """Chunks of a text file, cut as llama-imatrix does. Raises CalibrationError.

    All of them, or `n_chunks` of them, spread over the text by `seed`.
    """
    text = (files or ScannedFiles()).text(text_file).text()
    return _some_chunks(text, text_file.name, tokenizer, chunk_size, n_chunks, seed)


def _some_chunks(
    text: str, label: str, tokenizer: Tokenizer, chunk_size: int, n_chunks: int | None, seed: int
) -> ImatrixChunks:
    if n_chunks is not None and is_far_longer(len(text), n_chunks * chunk_size):
        lengths = chunk_size, chunk_size
        parts = spread_rows(text, tokenizer, n_chunks, lengths, random.Random(seed))
        if parts is not None:
            return ImatrixChunks(label, text, chunk_size, parts, NOT_COUNTED)
    found = chunk_text(text, tokenizer, chunk_size, label)
    n_chunks = len(found) if n_chunks is None else n_chunks
    chosen = [found[number] for number in spread(len(found), n_chunks, seed)]
    return ImatrixChunks(label, text, chunk_size, chosen, len(found))


def _observation_rows(drawn: Drawn, calibration: Calibration, vocab_size: int) -> ObservationRows:
    highest = max(int(row.max()) for row in drawn.rows)
    if highest >= vocab_size:
        raise CalibrationError(
            f"calibration {calibration.label!r}: the tokenizer gives id {highest}, but the model's "
            f"vocab_size is {vocab_size}; use the tokenizer of this model"
        )
    digest = hashlib.sha256(drawn.sha256.encode())
    hash_rows(digest, drawn.rows)  # another tokenizer, or length, makes other rows of a text
    return ObservationRows(calibration.label, digest.hexdigest(), drawn.rows, drawn.components)
