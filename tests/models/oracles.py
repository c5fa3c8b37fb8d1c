"""transformers and llama.cpp as oracles: the same model's logits from its folder and its GGUF."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForImageTextToText

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.models.contract import MoeModel
from reap2gguf.models.loading import load_whole
from reap2gguf.models.table import describe
from reap2gguf.models.transformers_config import check_with_transformers
from reap2gguf.observing.decoder import StreamedDecoder
from reap2gguf.progress import Silent
from reap2gguf.pruning.view import PrunedView
from reap2gguf.pruning.write import write_pruned
from reap2gguf.tokenizer.check import check_tokenizer
from tests.exporting.files import export_files, plain
from tests.tiny import ONE_THREAD

N_TOKENS = 48
SMALL_VOCAB = 291  # of `write_small_tokenizer`


def planned(folder: Path) -> MoeModel:
    """The model as `plan` reads it; raises what `plan` raises."""
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        check_with_transformers(model)
        check_tokenizer(folder, model.facts.vocab_size, model.tokenizers)
        model.side_files(folder, checkpoint.tensors)
        return model


def pruned(folder: Path, target: Path, n_kept: int | None = None) -> Path:
    """Write the model with its first experts kept, all of them by default; `target`."""
    target.mkdir()
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        ids = tuple(range(n_kept or model.facts.n_experts))
        view = PrunedView(checkpoint, model, dict.fromkeys(model.facts.moe_layers, ids))
        write_pruned(view, target, Silent())
    return target


def tokens(vocab: int) -> list[int]:
    found: list[int] = np.random.default_rng(3).integers(0, vocab, N_TOKENS).tolist()
    return found


def loaded(folder: Path) -> Any:
    """transformers' model of a folder, in float32, of the class that loads it for text."""
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    return load_whole(folder, dtype=torch.float32)


def of_transformers(folder: Path, vocab: int, with_tower: bool = False) -> torch.Tensor:
    """Logits (T, V) in float32."""
    model = loaded(folder)
    if with_tower and isinstance(model, tuple(MODEL_FOR_CAUSAL_LM_MAPPING.values())):
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens(vocab)])).logits[0]
    return logits


def of_llama_cpp(folder: Path, target: Path, vocab: int) -> torch.Tensor:
    """Logits (T, V) of the F32 file that is written for a folder."""
    path = export_files(folder, target, [plain("F32")])["F32"]
    logits = of_file(path, vocab)
    path.unlink()
    return logits


def of_file(path: Path, vocab: int) -> torch.Tensor:
    """Logits (T, V) of a GGUF file, by llama.cpp."""
    llama = llama_cpp.Llama(
        str(path), n_ctx=64, n_batch=64, logits_all=True, verbose=False, **ONE_THREAD
    )
    llama.eval(tokens(vocab))
    logits = torch.tensor(np.array(llama.scores[:N_TOKENS]))
    llama.close()
    return logits


def mean_kl(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    expected, found = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def mtp_of_llama_cpp(
    path: Path, hidden: torch.Tensor, row: list[int], n_axes: int = 1
) -> torch.Tensor:
    """Logits (T - 1, V) of the MTP block, from the trunk's hidden states (T, H) after its norm.

    `n_axes`: the numbers of a position: 1, or 4 where images have axes too.
    """
    count = len(row) - 1
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 256
    params.n_outputs_max = params.n_outputs_max_per_seq = 256
    params.n_threads = params.n_threads_batch = 2
    params.ctx_type = llama_cpp.LLAMA_CONTEXT_TYPE_MTP
    states = hidden[:count].contiguous().numpy()
    one = (ctypes.c_int32 * 1)(0)
    sequences = (ctypes.POINTER(ctypes.c_int32) * (count + 1))()
    for i in range(count):
        sequences[i] = one
    positions = [*range(count)] * min(n_axes, 3) + [0] * count * (n_axes - 3)
    batch = llama_cpp.llama_batch()
    batch.n_tokens = count
    batch.token = (ctypes.c_int32 * count)(*row[1:])
    batch.embd = states.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    batch.pos = (ctypes.c_int32 * (n_axes * count))(*positions)
    batch.n_seq_id = (ctypes.c_int32 * count)(*[1] * count)
    batch.seq_id = sequences
    batch.logits = (ctypes.c_int8 * count)(*[1] * count)
    with llama_model(path) as model:
        context = llama_cpp.llama_init_from_model(model, params)
        assert context
        assert llama_cpp.llama_decode(context, batch) == 0
        logits = llama_cpp.llama_get_logits(context)
        vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        found = np.ctypeslib.as_array(logits, (count, vocab)).copy()
        llama_cpp.llama_free(context)
    return torch.from_numpy(found)


@contextmanager
def llama_model(path: Path) -> Iterator[Any]:
    """llama.cpp's model, MTP block included."""
    params = llama_cpp.llama_model_default_params()
    params.load_mtp = True
    model = llama_cpp.llama_model_load_from_file(bytes(path), params)
    assert model
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


def through_layers(decoder: StreamedDecoder, n_layers: int, rows: torch.Tensor) -> torch.Tensor:
    """What the layers make of rows of tokens (B, T): (B, T, H), before the last norm."""
    decoder.load_embedding()
    hidden = decoder.embed(rows)
    for layer in range(n_layers):
        decoder.load_layer(layer)
        hidden = decoder.run_layer(layer, hidden)
    return hidden


def mtp_of_both(folder: Path, target: Path, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (T - 1, V) of the MTP block: llama.cpp's of the F32 file, and those computed here."""
    row = torch.tensor([tokens(vocab)])
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        decoder = StreamedDecoder(checkpoint, model, torch.float32, torch.device("cpu"))
        hidden = through_layers(decoder, model.facts.n_layers, row)
        decoder.load_ends()
        decoder.load_layer(model.facts.n_layers)
        ours = decoder.mtp_logits(decoder.run_mtp(hidden, row))[0, :-1]
        normed = decoder.final_norm(hidden[0])
        decoder.close()
    path = export_files(folder, target, [plain("F32")])["F32"]
    return mtp_of_llama_cpp(path, normed, row[0].tolist()), ours
