"""Reads what `--calibration` names: a text, samples in JSONL or Parquet, a folder, or a mix.

A passage is text with a rule of how it becomes rows. A text file is one stream, cut into rows of
exactly T tokens as llama-imatrix does; documents keep their last shorter row; a sample is one row,
or, packed, one of those in a row.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import random
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from reap2gguf.calibration.mixes import Calibration
from reap2gguf.calibration.samples import (
    RenderChat,
    count_records,
    open_parquet,
    read_records,
    read_samples,
    sample_text,
)
from reap2gguf.calibration.spec import DEFAULT_MIX, SAMPLE_SUFFIXES
from reap2gguf.errors import CalibrationError
from reap2gguf.files import plain_size
from reap2gguf.resources import shipped_folder

MANIFEST_NAME = "manifest.toml"
_MAX_TEXT_BYTES = 2**28
_BLOCK_BYTES = 2**20
MOST_TEXT = 2**30  # characters of the samples that are drawn


class Cut(Enum):
    """How a passage becomes rows of at most T tokens."""

    STREAM = "rows of exactly T, the rest dropped"
    DOCUMENT = "rows of T, the last one shorter"
    SAMPLE = "one row, cut at T; or packed with others"


@dataclass(frozen=True)
class Passage:
    """A piece of text and how it is cut."""

    text: str
    cut: Cut


@dataclass(frozen=True)
class Corpus:
    """All passages a spec names; `sha256` is of their texts, in order."""

    spec: str
    passages: tuple[Passage, ...]

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for passage in self.passages:
            digest.update(passage.text.encode("utf-8") + b"\0")
        return digest.hexdigest()

    def text(self) -> str:
        """Everything as one text, as the importance matrix reads it."""
        return "\n".join(passage.text for passage in self.passages)


def load_corpus(
    spec: str, render_chat: RenderChat, n_samples: int | None = None, seed: int = 0
) -> Corpus:
    """Read a file, a folder or the embedded mix; `render_chat` is the model's chat template.

    Of samples, `n_samples` are drawn by `seed`, and only they are rendered and held; streams and
    documents stay whole, and so do samples beside them.
    Raises CalibrationError if the spec names nothing, or a file cannot be read or has no samples.
    """
    if spec == DEFAULT_MIX:
        passages = list(_embedded(render_chat))
    else:
        path = Path(os.path.expanduser(spec))
        cut = Cut.DOCUMENT if path.is_dir() else Cut.STREAM
        files = _files(spec)
        if n_samples is None or any(file.suffix == ".txt" for file in files):
            passages = [p for file in files for p in _passages(file, cut, render_chat)]
        else:
            passages = _read_at(files, _order(files, seed)[:n_samples], render_chat)
    if not any(passage.text.strip() for passage in passages):
        raise CalibrationError(f"calibration {spec!r}: holds no text")
    return Corpus(spec, tuple(passages))


def iterate_corpus(
    spec: str, render_chat: RenderChat, n_first: int, seed: int
) -> Iterator[Passage]:
    """The passages of a corpus, its samples last, in the order in which `seed` draws them.

    Samples of files without texts beside them are read as they are asked for: `n_first`, then twice
    as many, and so on; the files are read once for each of these steps.
    Raises as `load_corpus` does, of which it takes the same samples in the same order.
    """
    files = [] if spec == DEFAULT_MIX else _files(spec)
    if not files or any(file.suffix == ".txt" for file in files):
        passages = list(load_corpus(spec, render_chat).passages)
        samples = [passage for passage in passages if passage.cut is Cut.SAMPLE]
        random.Random(seed).shuffle(samples)
        yield from (passage for passage in passages if passage.cut is not Cut.SAMPLE)
        yield from samples
        return
    order = _order(files, seed)
    done, end = 0, n_first
    while done < len(order):
        yield from _read_at(files, order[done:end], render_chat)
        done, end = end, 2 * end


def _order(files: list[Path], seed: int) -> list[int]:
    """All samples of the files, by number, as they are drawn."""
    order = list(range(sum(count_records(file) for file in files)))
    random.Random(seed).shuffle(order)
    return order


def _read_at(files: list[Path], wanted: list[int], render_chat: RenderChat) -> list[Passage]:
    """The samples of these numbers, in this order; one reading of the files."""
    places = {index: place for place, index in enumerate(wanted)}
    texts = [""] * len(places)
    index, n_letters = 0, 0
    for file in files:
        for number, record in enumerate(read_records(file), start=1):
            if (place := places.get(index)) is not None:
                texts[place] = sample_text(record, render_chat, f"{file}: sample {number}")
                n_letters += len(texts[place])
            if n_letters > MOST_TEXT:
                raise CalibrationError(
                    f"{file}: over {MOST_TEXT:,} characters of text in {len(places):,} samples; "
                    "ask for fewer"
                )
            index += 1
    return [Passage(text, Cut.SAMPLE) for text in texts]


def corpus_files(spec: str) -> list[Path]:
    """The files that a calibration spec reads. Raises CalibrationError if it names none."""
    if spec != DEFAULT_MIX:
        return _files(spec)
    folder = shipped_folder("calibration")
    names = (MANIFEST_NAME, *(entry["name"] for entry in _embedded_entries(folder)))
    return [folder / name for name in names]


def calibration_files(calibration: Calibration) -> list[Path]:
    """The files here that a calibration reads. Raises CalibrationError for a folder of none."""
    return [
        file
        for component in calibration.components
        if component.is_local
        for file in corpus_files(component.name)
    ]


def check_calibration(calibration: Calibration) -> None:
    """Refuse files here that cannot be read; what is on the Hub is not asked for."""
    for component in calibration.components:
        if component.is_local:
            check_corpus(component.name)


def check_corpus(spec: str) -> None:
    """Refuse a spec that `load_corpus` would, before a tokenizer is loaded for it.

    Holds one block or one sample of its files at a time. Raises CalibrationError.
    """
    if spec == DEFAULT_MIX:
        return
    files = _files(spec)
    for file in files:
        if file.suffix == ".txt":
            check_text(file)
        elif file.suffix == ".parquet":  # of which only a whole row group can be read
            open_parquet(file)
        else:
            for _ in read_samples(file, lambda messages, tools=None: ""):
                continue
    if not files:
        raise CalibrationError(f"calibration {spec!r}: holds no text")


def check_text(path: Path) -> None:
    """Refuse a file that `read_text` would, a block of it in memory at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    try:
        size = plain_size(path)
        if size > _MAX_TEXT_BYTES:
            raise CalibrationError(
                f"{path}: {size:,} bytes of text, expected at most {_MAX_TEXT_BYTES:,}; cut it to "
                "what is to be used"
            )
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                decoder.decode(block)
                done += len(block)
        decoder.decode(b"", final=True)
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: not UTF-8 text (about byte {done + error.start:,}); convert it with iconv"
        ) from error


def read_text(path: Path) -> str:
    """The UTF-8 text of a file; CalibrationError if it cannot be read as such."""
    check_text(path)
    return path.read_bytes().decode("utf-8")


def _files(spec: str) -> list[Path]:
    """The files that a spec names."""
    path = Path(os.path.expanduser(spec))
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix in SAMPLE_SUFFIXES)
    if path.suffix not in SAMPLE_SUFFIXES:
        raise CalibrationError(
            f"calibration {spec!r}: expected a .txt, .jsonl or .parquet file, a folder of them, or "
            f"the embedded mix {DEFAULT_MIX!r}"
        )
    return [path]


def _embedded(render_chat: RenderChat) -> Iterator[Passage]:
    """The corpus that ships with the program."""
    folder = shipped_folder("calibration")
    for entry in _embedded_entries(folder):
        path = folder / entry["name"]
        yield from _passages(path, Cut.DOCUMENT, render_chat)


def _passages(path: Path, cut: Cut, render_chat: RenderChat) -> Iterator[Passage]:
    """The passages of one file; `cut` is that of a text file."""
    if path.suffix == ".txt":
        yield Passage(read_text(path), cut)
    else:
        for text in read_samples(path, render_chat):
            yield Passage(text, Cut.SAMPLE)


def _embedded_entries(folder: Path) -> list[dict[str, Any]]:
    """The files of the shipped corpus, as its manifest lists them."""
    manifest = tomllib.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    entries: list[dict[str, Any]] = manifest["files"]
    return entries
