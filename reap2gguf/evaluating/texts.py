"""The text that is scored, cut and counted as llama-perplexity does it.

The text is tokenized as a whole and cut into chunks of equal length; what does not fill one is left
out. In each chunk the first half is context, and every token after it but the first is scored: 255
of 512. A model whose tokenizer puts a token before every text has it at the start of each chunk
(https://github.com/ggml-org/llama.cpp/tree/master/tools/perplexity). So perplexities compare with
published ones of the same text and chunk size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.bundle.evaluation import TextRecord
from reap2gguf.calibration.hub_datasets import Wording, open_dataset
from reap2gguf.calibration.rows import chunk_text
from reap2gguf.calibration.scanned_files import ScannedFiles
from reap2gguf.calibration.spec import Component
from reap2gguf.errors import CalibrationError
from reap2gguf.evaluating.scores import ScoredRow
from reap2gguf.resources import shipped_folder

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import Row
    from reap2gguf.hub.retry import Note
    from reap2gguf.tokenizer.tokenizer import Tokenizer

HELD_OUT = "held-out"  # a text of this project, which no mix of it holds
WIKITEXT2 = "wikitext2"  # the raw test set, by which most perplexities are published
_HELD_OUT_FILE = "held-out.txt"
_WIKITEXT = Component("Salesforce/wikitext", subset="wikitext-2-raw-v1", split="test")
_WORDING = Wording(
    f"text {WIKITEXT2} ({_WIKITEXT.dataset} on the Hub)",
    f"score another text: {HELD_OUT}, which is shipped, or a file of your own",
    "no such dataset on the Hub; check HF_ENDPOINT",
)
_LEAST_CHUNKS = 2  # as in llama-perplexity: an error needs more than one


@dataclass(frozen=True)
class EvaluationText:
    """The rows of a text, and what is recorded of it."""

    record: TextRecord
    rows: Sequence[ScoredRow]

    @property
    def tokens_sha256(self) -> str:
        """The hash of all tokens: it depends on the tokenizer and on the chunks."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(row.first.to_bytes(8, "little") + row.tokens.tobytes())
        return digest.hexdigest()


def read_text(name: str, note: Note) -> tuple[str, str]:
    """A label and a text: `held-out`, `wikitext2`, or a file.

    Raises CalibrationError if it cannot be read or fetched, OutputError if the Hub's cache cannot
    be written.
    """
    if name == WIKITEXT2:
        return WIKITEXT2, _wikitext(note)
    path = shipped_folder("calibration") / _HELD_OUT_FILE if name == HELD_OUT else Path(name)
    label = HELD_OUT if name == HELD_OUT else path.name
    return label, ScannedFiles().text(path.expanduser()).text()


def _wikitext(note: Note) -> str:
    """The lines of the raw test set as its file has them, which the dataset strips where empty."""
    _, records = open_dataset(_WIKITEXT, None, note, wording=_WORDING)
    return "".join(str(record["text"]) or " \n" for record in records)


def fitting_chunk(size: int, context: int, note: Note) -> int:
    """Tokens of a chunk that a model's context takes; what does not fit is said."""
    if size > context:
        note(f"chunks have {context:,} tokens, since the context of the model is no longer")
    return min(size, context)


def cut_text(
    label: str,
    text: str,
    tokenizer: Tokenizer,
    vocabulary: int,
    chunk_size: int,
    n_chunks: int | None = None,
) -> EvaluationText:
    """The first `n_chunks` chunks of a text, or all of them.

    Raises CalibrationError if the text has fewer than two, or tokens that the model does not have.
    """
    chunks: list[Row] = chunk_text(text, tokenizer, chunk_size, label)[:n_chunks]
    if len(chunks) < _LEAST_CHUNKS:
        raise CalibrationError(
            f"{label}: {len(chunks)} chunk of {chunk_size:,} tokens, expected at least "
            f"{_LEAST_CHUNKS}; give more text, or a smaller --chunk"
        )
    highest = max(int(chunk.max()) for chunk in chunks)
    if highest >= vocabulary:
        raise CalibrationError(
            f"{label}: the tokenizer gives id {highest}, but the model's vocab_size is "
            f"{vocabulary}; use the tokenizer of this model"
        )
    rows = [ScoredRow(chunk, chunk_size // 2 + 1) for chunk in chunks]
    record = TextRecord(
        label=label,
        sha256=hashlib.sha256(text.encode("utf-8")).hexdigest(),
        n_tokens=sum(len(chunk) for chunk in chunks),
        n_chunks=len(chunks),
        chunk_size=chunk_size,
        n_scored=sum(row.n_scored for row in rows),
        has_bos=tokenizer.bos is not None,
    )
    return EvaluationText(record, rows)
