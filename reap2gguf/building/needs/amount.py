"""How much text the calibration passes read, as far as that is known cheaply.

Exactly, where the texts of an earlier build lie in the output, or where all files are so small that
they are tokenized at once. Otherwise about, from the size of the files and a piece of their text;
and of datasets on the Hub, nothing is known but what was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.calibration.scanned_files import TextFile
from reap2gguf.calibration.sources import component_files
from reap2gguf.calibration.spec import DEFAULT_MIX
from reap2gguf.observing.probe import PROBE_TOKENS, mtp_probe

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import Texts
    from reap2gguf.building.plan import Plan
    from reap2gguf.calibration.spec import Component

_SMALL_TEXT = 2**19  # bytes, which are tokenized in half a second
_BYTES_PER_TOKEN = 4.0  # of text, if nothing is known of it
_IMATRIX_CHARACTERS = 2**25  # that it reads of a mix


@dataclass(frozen=True)
class Amount:
    """Rows and tokens of both calibration passes.

    `known`: "exactly"; "about", by the size of files; or "at most", which is what was asked for.
    """

    n_rows: int
    n_tokens: int  # of the observation
    n_chunk_tokens: int  # of the importance matrix
    probe_tokens: int  # more positions of both passes, for an MTP block
    longest_row: int
    text_bytes: int
    known: str

    @property
    def mean_row(self) -> int:
        """Tokens of a row, on average."""
        return max(1, self.n_tokens // max(1, self.n_rows))

    def scaled(self, n_rows: int) -> Amount:
        """The same with fewer rows."""
        share = min(1.0, n_rows / max(1, self.n_rows))
        tokens, chunks = int(self.n_tokens * share), int(self.n_chunk_tokens * share)
        return replace(
            self, n_rows=min(n_rows, self.n_rows), n_tokens=tokens, n_chunk_tokens=chunks
        )


_NOTHING = Amount(0, 0, 0, 0, 1, 0, "exactly")


def amount_of(plan: Plan, texts: Texts | None = None) -> Amount:
    """Rows and tokens of a plan; `texts` are its texts, where they are known."""
    return _guessed(plan) if texts is None else _counted(plan, texts)


def most_of(plan: Plan, n_tokens: int) -> Amount:
    """Bounds for a plan that reads at most this many tokens."""
    text, size = plan.options.imatrix_text, chunk_size(plan)
    text_bytes = _text_bytes(plan)
    n_chunk_tokens = (n_tokens if text is None else text_bytes // 2) + size
    return Amount(
        plan.calibration.samples,
        n_tokens,
        n_chunk_tokens,
        PROBE_TOKENS if plan.model.facts.has_mtp else 0,
        max(plan.max_length, size),
        text_bytes,
        "at most",
    )


def _text_bytes(plan: Plan) -> int:
    """Bytes of the text that the importance matrix reads, at most, files of Parquet aside."""
    if (text := plan.options.imatrix_text) is not None:
        return plan.files.text(text).path.stat().st_size
    components = plan.calibration.components
    paths = [path for one in components if one.is_local for path in component_files(one.name)]
    on_hub = 0 if all(one.is_local for one in components) else _IMATRIX_CHARACTERS
    return sum(path.stat().st_size for path in paths) + on_hub


def chunk_size(plan: Plan) -> int:
    """Tokens per chunk of the importance matrix."""
    return min(plan.options.chunk, plan.model.facts.context_length)


def _counted(plan: Plan, texts: Texts) -> Amount:
    rows = [] if texts.rows is None else texts.rows.rows
    chunks = [] if texts.chunks is None else texts.chunks.chunks
    probe = () if texts.rows is None else mtp_probe(plan.model, texts.rows)
    return Amount(
        len(rows),
        sum(map(len, rows)),
        sum(map(len, chunks)),
        sum(map(len, probe)),
        max(map(len, [*rows, *chunks]), default=1),
        0 if texts.chunks is None else len(texts.chunks.text.encode()),
        "exactly",
    )


def is_small(plan: Plan) -> bool:
    """Whether there are texts, all on this machine, and quickly tokenized."""
    components, text = plan.calibration.components, plan.options.imatrix_text
    if not plan.reads_texts:
        return False
    if not all(one.is_local for one in components):
        return False
    paths = [path for one in components for path in component_files(one.name)]
    if any(path.suffix.lower() == ".parquet" for path in paths):  # compressed
        return False
    n_bytes = sum(path.stat().st_size for path in paths)
    n_bytes += plan.files.text(text).path.stat().st_size if text is not None else 0
    return n_bytes <= _SMALL_TEXT


def _guessed(plan: Plan) -> Amount:
    """By the size of the files, or by what was asked for."""
    if not plan.reads_texts:
        return _NOTHING
    calibration, length = plan.calibration, plan.max_length
    parts = [_part(plan, one) for one in calibration.components]
    n_rows = sum(rows for rows, _, _ in parts)
    n_tokens = sum(tokens for _, tokens, _ in parts)
    if n_rows > calibration.samples:
        n_tokens = n_tokens * calibration.samples // n_rows
        n_rows = calibration.samples
    size = chunk_size(plan)
    text = plan.options.imatrix_text
    asked = -(-calibration.samples * length // size) * size
    if plan.options.imatrix_chunks is not None:
        asked = plan.options.imatrix_chunks * size
    if not plan.computes_imatrix:
        n_chunk_tokens = 0
    elif text is not None:
        in_text = int(plan.files.text(text).path.stat().st_size / _BYTES_PER_TOKEN)
        n_chunk_tokens = in_text if plan.options.imatrix_chunks is None else min(asked, in_text)
    else:
        whole = sum(text_tokens for _, _, text_tokens in parts)
        n_chunk_tokens = min(asked, whole, int(_IMATRIX_CHARACTERS / _BYTES_PER_TOKEN))
    return Amount(
        max(1, n_rows) if plan.reads_rows else 0,
        max(1, n_tokens) if plan.reads_rows else 0,
        max(size, n_chunk_tokens) if plan.computes_imatrix else 0,
        min(PROBE_TOKENS, n_tokens) if plan.model.facts.has_mtp else 0,
        max(length, size),
        _text_bytes(plan),
        "about" if all(one.is_local for one in calibration.components) else "at most",
    )


def _part(plan: Plan, component: Component) -> tuple[int, int, int]:
    """Rows and tokens of one component, and the tokens of all its text."""
    wanted, length = plan.calibration.rows_of(component), plan.max_length
    if not component.is_local:
        return wanted, wanted * length, wanted * length
    scanned = [plan.files.file(path) for path in _paths(component.name)]
    texts = [one for one in scanned if isinstance(one, TextFile)]
    samples = [one for one in scanned if not isinstance(one, TextFile)]
    n_records = sum(one.n_records for one in samples)
    in_text = int(sum(one.path.stat().st_size for one in texts) / _BYTES_PER_TOKEN)
    in_samples = int(sum(one.path.stat().st_size for one in samples) / _BYTES_PER_TOKEN)
    mean = in_samples // max(1, n_records)
    if plan.calibration.pack:
        rows = min(wanted, -(-(in_text + in_samples) // length))
        return rows, min(rows * length, in_text + in_samples), in_text + in_samples
    rows = min(wanted, in_text // length + n_records)
    tokens = min(in_text, rows * length) + min(n_records, rows) * min(mean, length)
    return rows, min(tokens, rows * length), in_text + min(n_records, wanted) * mean


def _paths(name: str) -> Sequence[Path]:
    return [path for path in component_files(name) if name != DEFAULT_MIX or path.suffix != ".toml"]
