"""How good models are that are compared: perplexity, and KL divergence from one of them.

All that fit together go through the layers side by side (`evaluating/engine.py`). Where none of
them is a checkpoint, the tokenizer is made from the header of the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from gguf import GGUFWriter

from reap2gguf.comparing.compared import ModelComparison, compared
from reap2gguf.disk.temporary import temporary_folder
from reap2gguf.errors import ArtifactError, CheckpointError, Reap2ggufError, UsageError
from reap2gguf.evaluating.measure import evaluation_of_scores
from reap2gguf.evaluating.scoring import Scorer
from reap2gguf.evaluating.texts import EvaluationText, cut_text, fitting_chunk, read_text
from reap2gguf.evaluating.variants import Variant
from reap2gguf.gguf_source.weights import GgufWeights
from reap2gguf.hub.gguf_file import HubGgufHeader
from reap2gguf.messages import shown
from reap2gguf.tokenizer.from_gguf import header_tokens, write_tokenizer
from reap2gguf.tokenizer.gguf_keys import add_tokenizer
from reap2gguf.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from reap2gguf.comparing.opening import Opened
    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.options import ComputeOptions
    from reap2gguf.progress import Progress

_ALIKE = ("n_layers", "hidden_size", "vocab_size")


@dataclass(frozen=True)
class Question:
    """What is measured, and how."""

    text: str  # held-out, wikitext2, or a file
    n_chunks: int | None  # None: all
    chunk_size: int
    compute: ComputeOptions
    state: Path | None = None  # what the names of saved progress begin with


def measure(
    models: Sequence[Opened], reference: Opened, question: Question, progress: Progress
) -> ModelComparison:
    """Perplexity of all models that fit the reference, and their KL divergence from it.

    Raises UsageError if the reference itself cannot be computed, CalibrationError for a text that
    cannot be used, and what `evaluate_variants` raises.
    """
    if reference.model is None:
        raise UsageError(
            f"{reference.label}: cannot be the reference: {reference.problem}; name another with "
            "--reference, or compare sizes alone with --no-quality"
        )
    problems: dict[str, str] = {}
    variants: list[Variant] = []
    for one in models:
        try:
            problem = _misfit(one, reference)
            if not problem:
                variants.append(_variant(one))
        except (ArtifactError, CheckpointError) as error:
            problem = str(error)
        if problem:
            problems[one.label] = problem
    fitting = [one for one in models if one.label not in problems]
    text = _rows(fitting, reference, question, progress)
    used = np.unique(np.concatenate([row.tokens for row in text.rows]))
    expected = _tokens(reference)
    for one in fitting:
        if problem := _other_tokens(one, expected, used.tolist(), reference.label):
            problems[one.label] = problem
    variants = [variant for variant in variants if variant.name not in problems]
    if len(variants) < 2 and len(models) > 1:
        return compared(models, problems=problems)
    pairs = [(reference.label, one.name) for one in variants if one.name != reference.label]
    score = Scorer(variants, "streamed", question.compute, question.state, progress, pairs)
    scores = score(text.rows)
    found = evaluation_of_scores(variants, text, scores, question.compute)
    return compared(models, reference.label, found, problems)


def _misfit(one: Opened, reference: Opened) -> str:
    """Why a model cannot be computed beside the reference; empty if it can."""
    if one.model is None:
        return one.problem
    assert reference.model is not None
    for name in _ALIKE:
        found, expected = (getattr(model.facts, name) for model in (one.model, reference.model))
        if found != expected:
            return f"{name} is {found:,}, but {reference.label} has {expected:,}"
    return ""


def _variant(one: Opened) -> Variant:
    assert one.model is not None
    bits, n_bytes = one.contents.bits_per_weight, one.contents.n_file_bytes
    if one.checkpoint is not None:
        identity = f"{one.checkpoint.fingerprint()} {one.checkpoint.stamps()}"
        return Variant(one.label, "source", one.checkpoint, one.model, n_bytes, bits, identity)
    assert one.header is not None
    assert one.in_gguf is not None
    weights = GgufWeights(one.header, one.in_gguf.model, one.in_gguf.template)
    identity = str([_identity(header) for header in one.header.headers])
    return Variant(one.label, "gguf", weights, weights.model, n_bytes, bits, identity)


def _identity(header: GgufHeader) -> object:
    """What changes when a file changes, also one on the Hub."""
    if isinstance(header, HubGgufHeader) and header.blocks is not None:
        return header.blocks.file
    found = header.path.stat()
    return str(header.path.resolve()), found.st_size, found.st_mtime_ns


def _rows(
    models: Sequence[Opened], reference: Opened, question: Question, progress: Progress
) -> EvaluationText:
    """The text's tokens, by the tokenizer of the reference, or of another checkpoint beside it."""
    assert reference.model is not None
    label, text = read_text(question.text, progress.note)
    vocabulary = reference.model.facts.vocab_size
    ordered = [reference, *(one for one in models if one is not reference)]
    folders = [one.checkpoint.folder for one in ordered if one.checkpoint is not None]
    with temporary_folder() as made:
        folder = folders[0] if folders else made
        if not folders:
            assert reference.header is not None
            write_tokenizer(reference.header, folder)
        tokenizer = Tokenizer(folder)
        context = reference.model.facts.context_length
        size = fitting_chunk(question.chunk_size, context, progress.note)
        return cut_text(label, text, tokenizer, vocabulary, size, question.n_chunks)


def _tokens(one: Opened) -> list[str]:
    """The text of every token of a model."""
    if one.header is not None:
        return header_tokens(one.header)
    assert one.checkpoint is not None
    assert one.model is not None
    folder, model = one.checkpoint.folder, one.model
    vocab_size, writer = model.facts.vocab_size, GGUFWriter(None, model.gguf_arch)
    _, vocabulary = add_tokenizer(writer, folder, vocab_size, model.tokenizers)
    return vocabulary.tokens


def _other_tokens(one: Opened, expected: list[str], used: list[int], reference: str) -> str:
    """Why the tokens of the text mean something else to a model; empty if they do not.

    Tokens that the text does not have may differ: publishers rename unused ones.
    """
    try:
        found = _tokens(one)
    except Reap2ggufError as error:
        return str(error)
    for index in used:
        if index >= len(found) or found[index] != expected[index]:
            other = shown(found[index]) if index < len(found) else "missing"
            return f"token {index} is {other}, but {shown(expected[index])} in {reference}"
    return ""
