"""A model that was opened: its source, its tensors, and what its config and headers say of it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from reap2gguf.gguf_source.checkpoint import GgufCheckpoint
from reap2gguf.gguf_source.file import GgufFile, find_gguf
from reap2gguf.hub.retry import Note, ignore_note
from reap2gguf.hub.source import Source, resolve_source
from reap2gguf.models.table import BY_GGUF, describe
from reap2gguf.models.transformers_config import check_with_transformers

if TYPE_CHECKING:
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.progress import Progress


@dataclass(frozen=True)
class GgufSource(Source):
    """A GGUF file as the user named it; `folder` holds its config and, once made, its tokenizer."""

    file: GgufFile = field(kw_only=True, repr=False)

    @property
    def short_name(self) -> str:
        return self.file.short_name

    @property
    def gguf_name(self) -> str:
        return self.file.name

    def open(self, note: Note = ignore_note) -> GgufCheckpoint:
        """Its weights. Raises ArtifactError if the file does not hold what it describes."""
        return GgufCheckpoint(self.file)

    def make_tokenizer(self) -> None:
        self.file.made.make_tokenizer()


@dataclass(frozen=True)
class OpenModel(AbstractContextManager["OpenModel"]):
    """A model and what it is, from its headers; closes its files."""

    source: Source
    checkpoint: Checkpoint
    model: MoeModel

    def check_tokenizer(self) -> None:
        """Refuse a tokenizer that could not be written later; that of a GGUF file stays."""
        from reap2gguf.tokenizer.check import check_tokenizer

        self.source.make_tokenizer()
        if self.checkpoint.gguf is not None:
            return
        check_tokenizer(self.source.folder, self.model.facts.vocab_size, self.model.tokenizers)

    def __exit__(self, *error: object) -> None:
        self.checkpoint.close()


def resolve_model(name: str | None, note: Note = ignore_note, follow_links: bool = False) -> Source:
    """MODEL as a source: a GGUF file, here or on the Hub, or else what `resolve_source` gives.

    Raises what `find_gguf` and `resolve_source` raise.
    """
    file = find_gguf(name, BY_GGUF, note)
    if file is None:
        return resolve_source(name, note, follow_links)
    return GgufSource(file.label, file.made.path, file.commit, file=file)


def open_model(
    name: str, progress: Progress, keep_mtp: bool = True, follow_links: bool = False
) -> OpenModel:
    """Open a folder, a GGUF file, or a model on the Hub after its small files are downloaded.

    Raises SourceError, CheckpointError or UnsupportedModelError; ArtifactError for a broken GGUF
    file.
    """
    source = resolve_model(name, progress.note, follow_links)
    source.complete(progress.note)
    checkpoint = source.open(progress.note)
    try:
        checkpoint.report_to(progress)
        model = describe(checkpoint, keep_mtp)
        check_with_transformers(model)
        return OpenModel(source, checkpoint, model)
    except BaseException:
        checkpoint.close()
        raise
