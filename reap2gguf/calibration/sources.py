"""What a local component of a calibration holds: passages of a text, of samples, or of a folder."""

from __future__ import annotations

import hashlib
import os
import random
import tomllib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from pathlib import Path

from reap2gguf.calibration.samples import SampleReader, usable
from reap2gguf.calibration.scanned_files import SampleFile, ScannedFiles, TextFile
from reap2gguf.calibration.spec import DEFAULT_MIX, SAMPLE_SUFFIXES, Calibration
from reap2gguf.errors import CalibrationError
from reap2gguf.resources import shipped_folder

MANIFEST_NAME = "manifest.toml"
MAX_TEXT = 2**30  # characters of the samples that are drawn


class Cut(Enum):
    """How a passage becomes rows of at most T tokens."""

    STREAM = "rows of exactly T tokens; the rest is dropped"
    DOCUMENT = "rows of T tokens; the last one may be shorter"
    SAMPLE = "one row, cut at T tokens; or packed with others"


@dataclass(frozen=True)
class Passage:
    """A text, and how it is cut into rows."""

    text: str
    cut: Cut


@dataclass(frozen=True)
class Corpus:
    """All passages of one component; `sha256` is the hash of their texts, in order."""

    spec: str
    passages: tuple[Passage, ...]

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for passage in self.passages:
            digest.update(passage.text.encode("utf-8") + b"\0")
        return digest.hexdigest()

    def text(self) -> str:
        """All passages as one text, as the importance matrix reads it."""
        return "\n".join(passage.text for passage in self.passages)


def check_calibration(calibration: Calibration, files: ScannedFiles) -> None:
    """Raise CalibrationError for local files that cannot be used; the Hub is not asked.

    Scans JSON and texts; of Parquet, only the footer is read.
    """
    for component in calibration.components:
        if component.is_local and component.name != DEFAULT_MIX:
            paths = _files(component.name)
            for path in paths:
                files.file(path)
            if not paths:
                raise CalibrationError(f"calibration {component.name!r}: holds no text")


def local_hashes(calibration: Calibration, files: ScannedFiles) -> list[tuple[str, str]]:
    """Names and SHA-256 of all local files that a calibration reads. Raises CalibrationError."""
    names = [component.name for component in calibration.components if component.is_local]
    paths = [path for name in names for path in component_files(name)]
    return [(path.name, files.file(path).sha256) for path in paths]


def load_corpus(
    spec: str,
    reader: SampleReader,
    n_samples: int | None = None,
    seed: int = 0,
    files: ScannedFiles | None = None,
) -> Corpus:
    """Read a file, a folder or the embedded mix.

    `n_samples` samples are drawn by `seed`, and only those are rendered and held; others take the
    places of those that are skipped. Streams and documents are read whole, and so are samples
    beside them. Raises CalibrationError if the spec names nothing, a file cannot be read or has no
    samples, or too many samples cannot be used.
    """
    scanned = files or ScannedFiles()
    if n_samples is None or (samples := _sample_files(spec, scanned)) is None:
        passages = list(_all_passages(spec, reader, scanned))
    else:
        drawn = _drawn(samples, seed, reader, n_samples, is_growing=False)
        passages = list(islice(drawn, n_samples))
        reader.skipped.check()
    if not any(passage.text.strip() for passage in passages):
        raise CalibrationError(f"calibration {spec!r}: holds no text")
    return Corpus(spec, tuple(passages))


def iterate_corpus(
    spec: str,
    reader: SampleReader,
    n_first: int,
    seed: int,
    files: ScannedFiles | None = None,
) -> Iterator[Passage]:
    """The passages of a corpus, samples last, in the order in which `seed` draws them.

    Where there are only samples, they are read in steps as they are asked for: `n_first`, then
    twice as many, and so on. Raises as `load_corpus` does, and takes the same samples in the same
    order.
    """
    scanned = files or ScannedFiles()
    sample_files = _sample_files(spec, scanned)
    if not sample_files:
        passages = list(load_corpus(spec, reader, files=scanned).passages)
        samples = [passage for passage in passages if passage.cut is Cut.SAMPLE]
        random.Random(seed).shuffle(samples)
        yield from (passage for passage in passages if passage.cut is not Cut.SAMPLE)
        yield from samples
        return
    yield from _drawn(sample_files, seed, reader, n_first, is_growing=True)


def ignored_files(spec: str) -> list[str]:
    """The names of the files in a folder that are not read."""
    path = Path(os.path.expanduser(spec))
    if spec == DEFAULT_MIX or not path.is_dir():
        return []
    names = (file.name for file in path.iterdir() if file.suffix.lower() not in SAMPLE_SUFFIXES)
    return sorted(name for name in names if not name.startswith("."))


def _sample_files(spec: str, scanned: ScannedFiles) -> list[SampleFile] | None:
    """The files of a spec that names files of samples alone; None where there are texts."""
    files = [] if spec == DEFAULT_MIX else [scanned.file(path) for path in _files(spec)]
    samples = [file for file in files if not isinstance(file, TextFile)]
    return samples if spec != DEFAULT_MIX and len(samples) == len(files) else None


def _order(files: Sequence[SampleFile], seed: int) -> list[int]:
    """The numbers of all samples of the files, in the order in which they are drawn."""
    order = list(range(sum(file.n_records for file in files)))
    random.Random(seed).shuffle(order)
    return order


def _drawn(
    files: Sequence[SampleFile], seed: int, reader: SampleReader, n_wanted: int, *, is_growing: bool
) -> Iterator[Passage]:
    """The samples that can be used, in the order in which `seed` draws them.

    `n_wanted` are read at first. Afterwards as many as are still missing are read; or, if the
    number that is needed is not known (`is_growing`), each time twice as many.
    """
    order = _order(files, seed)
    reader.skipped.n_samples = len(order)
    done, step = 0, n_wanted
    while done < len(order) and step > 0:
        passages = _read_at(files, order[done : done + step], reader)
        yield from passages
        done, step = done + step, done + step if is_growing else step - len(passages)
    reader.skipped.check()


def _read_at(
    files: Sequence[SampleFile], wanted: Sequence[int], reader: SampleReader
) -> list[Passage]:
    """The usable ones of these samples, in this order; each file is read in its own order."""
    places = {index: place for place, index in enumerate(wanted)}
    ascending = sorted(places)
    texts: list[str | None] = [None] * len(places)
    first, n_letters = 0, 0
    for file in files:
        end = first + file.n_records
        inside = ascending[bisect_left(ascending, first) : bisect_left(ascending, end)]
        numbers = [index - first for index in inside]
        records = file.records_at(numbers) if numbers else iter(())
        for index, record in zip(inside, records, strict=True):
            text = reader.text(record, f"{file.path}: sample {index - first + 1}")
            texts[places[index]] = text
            n_letters += len(text or "")
            if n_letters > MAX_TEXT:
                raise CalibrationError(
                    f"{file.path}: over {MAX_TEXT:,} characters of text in {len(places):,} "
                    "samples; use fewer --samples"
                )
        first = end
    return [Passage(text, Cut.SAMPLE) for text in texts if text is not None]


def _all_passages(spec: str, reader: SampleReader, scanned: ScannedFiles) -> Iterator[Passage]:
    """Every passage of a spec; a text alone is one stream, in a folder it is a document."""
    is_folder = spec == DEFAULT_MIX or Path(os.path.expanduser(spec)).is_dir()
    cut = Cut.DOCUMENT if is_folder else Cut.STREAM
    for path in _embedded_files() if spec == DEFAULT_MIX else _files(spec):
        file = scanned.file(path)
        if isinstance(file, TextFile):
            yield Passage(file.text(), cut)
            continue
        for text in usable(file.records(), reader, str(path)):
            yield Passage(text, Cut.SAMPLE)


def component_files(spec: str) -> list[Path]:
    """All files that decide what a local component holds. Raises CalibrationError."""
    if spec != DEFAULT_MIX:
        return _files(spec)
    return [shipped_folder("calibration") / MANIFEST_NAME, *_embedded_files()]


def _files(spec: str) -> list[Path]:
    """The files that a spec names. Raises CalibrationError for a file of another kind."""
    path = Path(os.path.expanduser(spec))
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix.lower() in SAMPLE_SUFFIXES)
    if path.suffix.lower() not in SAMPLE_SUFFIXES:
        raise CalibrationError(
            f"calibration {spec!r}: expected a .txt, .jsonl, .json or .parquet file, a folder of "
            f"them, or the embedded mix {DEFAULT_MIX!r}; decompress other files, or save their "
            "records as JSONL"
        )
    return [path]


def _embedded_files() -> list[Path]:
    """The files of the embedded mix, in the order of its manifest."""
    folder = shipped_folder("calibration")
    manifest = tomllib.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    return [folder / entry["name"] for entry in manifest["files"]]
