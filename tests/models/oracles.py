"""transformers and llama.cpp as oracles: the same model's logits from its folder and its GGUF."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForImageTextToText

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.config import read_json
from reap2gguf.models.contract import MoeModel
from reap2gguf.models.loading import whole_class
from reap2gguf.models.table import describe
from reap2gguf.models.transformers_config import check_with_transformers
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
    return whole_class(read_json(folder / "config.json")).from_pretrained(
        folder, dtype=torch.float32
    )


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
    llama = llama_cpp.Llama(
        str(path), n_ctx=64, n_batch=64, logits_all=True, verbose=False, **ONE_THREAD
    )
    llama.eval(tokens(vocab))
    logits = torch.tensor(np.array(llama.scores[:N_TOKENS]))
    llama.close()
    path.unlink()
    return logits


def mean_kl(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    expected, found = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())
