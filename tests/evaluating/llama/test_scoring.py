"""What llama.cpp gives rows of tokens, against its logits of each row alone and transformers'."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from reap2gguf.errors import ArtifactError, DependencyError, Reap2ggufError, UsageError
from reap2gguf.evaluating.head_sums import HeadSums
from reap2gguf.evaluating.llama import model as model_module
from reap2gguf.evaluating.llama.batches import likelihoods
from reap2gguf.evaluating.llama.model import LlamaModel, LlamaOptions
from reap2gguf.evaluating.llama.scoring import llama_logits, llama_scores
from reap2gguf.evaluating.scores import ScoredRow, VariantScores
from reap2gguf.progress import CallbackProgress, ProgressEvent, Silent
from tests.evaluating.llama.files import ONE_THREAD, export, random_rows, text_rows
from tests.local.altered import altered
from tests.tiny import ONE_THREAD as DIRECTLY
from tests.tiny import REPOSITORY, TinyQwen3Moe, TinyQwen35Moe
from tests.tokens import FULL_VOCAB

# lengths and first scored tokens: with one token to score, with all, and with none
SHAPES = ((40, 21), (9, 8), (64, 1), (30, 30), (33, 20))


@pytest.fixture(scope="module")
def trained(example: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(example, tmp_path_factory.mktemp("trained"), "F32")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    return export(TinyQwen3Moe().write(folder / "model"), folder, "F32")


def expected(logits: Any, rows: list[ScoredRow]) -> VariantScores:
    """The definition, in float64, of the logits (T, V) of each row."""
    nll, top = [], []
    for values, row in zip(logits, rows, strict=True):
        before = np.asarray(values, dtype=np.float64)[row.first - 1 : len(row.tokens) - 1]
        before = before - before.max(axis=1, keepdims=True)
        right = before[np.arange(len(before)), row.tokens[row.first :]]
        nll.append(np.log(np.exp(before).sum(axis=1)) - right)
        top.append(before.argmax(axis=1))
    return VariantScores(np.concatenate(nll), np.concatenate(top))


def of_each_row(path: Path, rows: list[ScoredRow]) -> VariantScores:
    """By llama_cpp's own class, row by row."""
    logits = []
    with closing(
        llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, **DIRECTLY)
    ) as llama:
        for row in rows:
            llama.reset()
            llama.eval(row.tokens.tolist())
            logits.append(np.array(llama.scores[: len(row.tokens)]))
    return expected(logits, rows)


def of_transformers(folder: Path, rows: list[ScoredRow]) -> VariantScores:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = [model(torch.from_numpy(row.tokens)[None]).logits[0].numpy() for row in rows]
    return expected(logits, rows)


def difference(one: VariantScores, other: VariantScores) -> float:
    """The largest one of two likelihoods; more than 1 if the likeliest tokens differ."""
    if (one.top != other.top).mean() > 0.01:  # two tokens may be as likely but for rounding
        return 9.0
    return float(np.abs(one.nll - other.nll).max())


def test_scores_of_a_text_are_llama_cpps_and_transformers(example: Path, trained: Path) -> None:
    rows = text_rows(example, 6, 64)
    events: list[ProgressEvent] = []
    found = llama_scores(trained, rows, ONE_THREAD, CallbackProgress(events.append))
    assert len(found.nll) == len(found.top) == 6 * 31
    # llama.cpp keeps keys and values in float16
    assert difference(found, of_each_row(trained, rows)) < 0.01
    assert difference(found, of_transformers(example, rows)) < 0.02
    assert abs(found.nll.mean() / of_transformers(example, rows).nll.mean() - 1) < 1e-3
    assert (events[-1].done, events[-1].unit) == (6 * 64, "tokens")


@pytest.mark.parametrize("options", [{}, {"batch": 70}, {"batch": 7}, {"batch": 64, "ubatch": 16}])
@pytest.mark.parametrize("shape", [TinyQwen3Moe(), TinyQwen35Moe(vocab=FULL_VOCAB, mtp=False)])
def test_rows_of_any_length_in_calls_of_any_size(
    shape: TinyQwen3Moe | TinyQwen35Moe, options: dict[str, int], tmp_path: Path
) -> None:
    """A row in parts continues from the memory of the part before."""
    path = export(shape.write(tmp_path / "model"), tmp_path, "F32")
    rows = random_rows(512, *SHAPES)
    found = llama_scores(path, rows, replace(ONE_THREAD, **options), Silent())
    assert len(found.nll) == sum(length - first for length, first in SHAPES)
    scored = [row for row in rows if row.n_scored]
    assert difference(found, of_each_row(path, scored)) < 2e-3


@pytest.mark.parametrize("counts", [(1,), (7, 30), (500,)])
def test_logits_are_a_stream_of_the_scored_tokens(counts: tuple[int, ...], small: Path) -> None:
    rows = random_rows(512, *SHAPES)
    options = replace(ONE_THREAD, batch=64)
    scores = llama_scores(small, rows, options, Silent())
    with llama_logits(small, rows, options) as logits:
        chunks = list(logits)
        assert logits.read(3).shape == (0, 512)
    whole = np.concatenate(chunks)
    assert len(chunks) > 2
    assert (whole.dtype, whole.shape) == (np.float32, (len(scores.nll), 512))
    targets = np.concatenate([row.tokens[row.first :] for row in rows])
    nll, top = likelihoods(whole, targets)
    assert nll.tobytes() == scores.nll.tobytes()
    assert top.tobytes() == scores.top.tobytes()
    with llama_logits(small, rows, options) as logits:
        read, number = [], 0
        while len(part := logits.read(counts[number % len(counts)])):
            read.append(part)
            number += 1
    assert np.concatenate(read).tobytes() == whole.tobytes()
    assert all(part.flags.owndata and part.flags.writeable for part in read)


def test_a_file_in_llama_cpp_is_compared_with_a_model_elsewhere(
    example: Path, tmp_path: Path
) -> None:
    """The stream in the place of a variant: sums of the head against the definition in float64."""
    path = export(example, tmp_path, "Q4_0")
    rows = text_rows(example, 3, 64)
    model: Any = AutoModelForCausalLM.from_pretrained(example, dtype=torch.float32)
    with torch.inference_mode():
        logits = [model(torch.from_numpy(row.tokens)[None]).logits[0] for row in rows]
    source = torch.cat([own[row.first - 1 : -1] for own, row in zip(logits, rows, strict=True)])
    right = torch.from_numpy(np.concatenate([row.tokens[row.first :] for row in rows]))
    pair = ("source", path.name)
    sums = HeadSums(pair, [pair], len(right), torch.device("cpu"))
    with llama_logits(path, rows, ONE_THREAD) as stream:
        for first in range(0, len(right), 20):
            span = slice(first, first + 20)
            other = torch.from_numpy(stream.read(20))
            sums.add(span, 0, {"source": source[span], path.name: other}, right[span])
    with llama_logits(path, rows, ONE_THREAD) as stream:
        whole = torch.from_numpy(np.concatenate(list(stream))).double().log_softmax(-1)
    wanted = source.double().log_softmax(-1)
    divergence = (wanted.exp() * (wanted - whole)).sum(-1)
    assert divergence.mean() > 1e-3
    assert (sums.divergence(pair) - divergence).abs().max() < 1e-5
    scores = llama_scores(path, rows, ONE_THREAD, Silent())
    assert np.abs(sums.nll(path.name).numpy() - scores.nll).max() < 1e-5
    assert sums.top(path.name).tolist() == scores.top.tolist()


def test_a_stream_that_is_closed_early_leaves_no_process(small: Path) -> None:
    with llama_logits(small, random_rows(512, *[(64, 1)] * 40), ONE_THREAD) as logits:
        logits.read(5)
        pid = logits._model._process._process.pid
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there are no tokens to score"),
        (random_rows(512, (9, 9)), "there are no tokens to score"),
        (random_rows(512, (9, 3), (9, 0)), "row 1 has 9 tokens, scored from 0 on"),
        (random_rows(512, (9, 10)), "row 0 has 9 tokens, scored from 10 on"),
        (random_rows(512, (513, 9)), r"a row has 513 tokens, but the context of .* is 512"),
        ([ScoredRow(np.array([1, 512]), 1)], "has 512 tokens, but the text has token 512;"),
        ([ScoredRow(np.array([-1, 1]), 1)], "has 512 tokens, but the text has token -1;"),
    ],
)
def test_rows_that_cannot_be_scored(rows: list[ScoredRow], message: str, small: Path) -> None:
    with pytest.raises(Reap2ggufError, match=message):
        llama_scores(small, rows, ONE_THREAD, Silent())
    with pytest.raises(Reap2ggufError, match=message):
        llama_logits(small, rows, ONE_THREAD)


@pytest.mark.parametrize("name", ["threads", "gpu_layers", "batch", "ubatch"])
def test_options_that_llama_cpp_does_not_take(name: str, small: Path) -> None:
    with pytest.raises(UsageError, match=f"{name} for llama.cpp is -2, expected"):
        LlamaModel(small, LlamaOptions(**{name: -2}))


def test_a_file_that_llama_cpp_refuses_or_ends_at_is_an_error(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header is checked before; here it is not."""
    monkeypatch.setattr(model_module, "check_header", lambda path, header: None)
    rows = random_rows(512, (9, 3))
    for values, reason in (
        ({"tokenizer__ggml__pre": "nobody's"}, r"cannot run it \(it does not load: .*nobody's"),
        ({"arch__expert_used_count": 99}, r"ended while it ran this file \(SIGABRT: .*GGML_ASSERT"),
        (
            {"arch__attention__layer_norm_rms_epsilon": -1.0},
            r"ended while it ran this file \(SIGABRT: .*GGML_ASSERT",
        ),
    ):
        path = altered(small, tmp_path / "x.gguf", **values)
        with pytest.raises(ArtifactError, match=f"x.gguf: llama.cpp {reason}"):
            llama_scores(path, rows, ONE_THREAD, Silent())


def test_a_process_that_is_killed_is_an_error(small: Path) -> None:
    with llama_logits(small, random_rows(512, *[(64, 1)] * 40), ONE_THREAD) as logits:
        logits.read(1)
        os.kill(logits._model._process._process.pid, signal.SIGKILL)
        with pytest.raises(ArtifactError, match=r"llama\.cpp ended .* \(SIGKILL\)"):
            list(logits)


def test_logits_that_are_not_finite_are_an_error(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(small.read_bytes())
    norm = next(t for t in GGUFReader(path).tensors if t.name == "output_norm.weight")
    with path.open("r+b") as file:
        file.seek(norm.data_offset)
        file.write(np.float32(np.nan).tobytes())
    rows = random_rows(512, (9, 3))
    with pytest.raises(ArtifactError, match=r"x\.gguf: llama\.cpp computes logits that are not"):
        llama_scores(path, rows, ONE_THREAD, Silent())
    with (
        llama_logits(path, rows, ONE_THREAD) as logits,
        pytest.raises(ArtifactError, match="not finite"),
    ):
        logits.read(1)


def test_zeros_that_llama_cpp_makes_of_nan_are_an_error(example: Path, tmp_path: Path) -> None:
    path = export(example, tmp_path, "Q4_K_M").rename(tmp_path / "x.gguf")
    down = next(t for t in GGUFReader(path).tensors if t.name == "blk.3.ffn_down_exps.weight")
    with path.open("r+b") as file:
        file.seek(down.data_offset)
        file.write(b"\xff" * int(down.n_bytes))
    rows = text_rows(example, 1, 64)
    with pytest.raises(ArtifactError, match=r"x\.gguf: llama\.cpp computes .* the same for all"):
        llama_scores(path, rows, ONE_THREAD, Silent())
    with (
        llama_logits(path, rows, ONE_THREAD) as logits,
        pytest.raises(ArtifactError, match="the same for all tokens"),
    ):
        logits.read(9)


def test_without_llama_cpp_python_the_error_names_the_command(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{REPOSITORY}")
    with pytest.raises(DependencyError, match=r"not here.*; run `.*llama-cpp-python"):
        llama_scores(small, random_rows(512, (9, 3)), ONE_THREAD, Silent())
