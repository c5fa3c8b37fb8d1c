"""GGUF files to run, and rows of a text to run them on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from reap2gguf.evaluating.llama.model import LlamaOptions
from reap2gguf.evaluating.scores import ScoredRow
from reap2gguf.tokenizer.tokenizer import Tokenizer
from tests.conftest import CALIBRATION
from tests.exporting.files import export_files, plain

ONE_THREAD = LlamaOptions(threads=1, gpu_layers=0)


def export(folder: Path, target: Path, file_type: str) -> Path:
    return export_files(folder, target, [plain(file_type)], n_threads=1)[file_type]


def text_rows(folder: Path, n_rows: int, length: int) -> list[ScoredRow]:
    """Chunks of the bundled text, whose second halves are scored as in llama-perplexity."""
    tokenizer = Tokenizer(folder)
    tokens = tokenizer.encode((CALIBRATION / "prose.txt").read_text(encoding="utf-8"))
    tokenizer.close()
    chunks = tokens[: n_rows * length].reshape(n_rows, length)
    return [ScoredRow(chunk, length // 2 + 1) for chunk in chunks]


def random_rows(vocab: int, *shapes: tuple[int, int]) -> list[ScoredRow]:
    """Rows of these lengths and first scored tokens."""
    draw = np.random.default_rng(5)
    return [ScoredRow(draw.integers(0, vocab, length), first) for length, first in shapes]
