"""A model that was opened: its source, its tensors, and what its config and headers say of it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reap2gguf.hub.source import Source, resolve_source
from reap2gguf.models.table import describe
from reap2gguf.models.transformers_config import check_with_transformers

if TYPE_CHECKING:
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.progress import Progress


@dataclass(frozen=True)
class OpenModel(AbstractContextManager["OpenModel"]):
    """A model and what it is, from its headers; closes its files."""

    source: Source
    checkpoint: Checkpoint
    model: MoeModel

    def check_tokenizer(self) -> None:
        """Refuse a tokenizer that could not be written later."""
        from reap2gguf.tokenizer.check import check_tokenizer

        check_tokenizer(self.source.folder, self.model.facts.vocab_size, self.model.tokenizers)

    def __exit__(self, *error: object) -> None:
        self.checkpoint.close()


def open_model(
    name: str, progress: Progress, keep_mtp: bool = True, follow_links: bool = False
) -> OpenModel:
    """Open a folder, or a model on the Hub after its small files are downloaded.

    Raises SourceError, CheckpointError or UnsupportedModelError.
    """
    source = resolve_source(name, progress.note, follow_links)
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
