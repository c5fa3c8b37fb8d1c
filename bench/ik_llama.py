"""Perplexity and a greedy text of GGUF files in ik_llama.cpp, as its own library computes them.

python bench/ik_llama.py TEXT FILE.gguf ... [--chunks N]: needs ik-llama-cpp-python, and a process
that has loaded no other libggml. Text is cut into chunks of 512 tokens, of which the second half is
scored, as by llama-perplexity.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from ik_llama_cpp import IkLlama
from ik_llama_cpp import _ctypes_api as api

CHUNK = 512


def logits(model: IkLlama, tokens: list[int], n_vocab: int) -> np.ndarray:
    """What follows each token of the second half but the last: (CHUNK / 2 - 1, V)."""
    model._context.kv_cache_clear()
    batch = api.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
        batch.logits[i] = int(i >= CHUNK // 2)
    assert model._context.decode(batch) == 0
    rows = [
        np.ctypeslib.as_array(api.llama_get_logits_ith(model.ctx, i), (n_vocab,)).copy()
        for i in range(CHUNK // 2, CHUNK - 1)
    ]
    api.llama_batch_free(batch)
    return np.stack(rows).astype(np.float64)


def perplexity(model: IkLlama, tokens: list[int], n_chunks: int) -> tuple[float, float]:
    """With its standard error."""
    n_vocab = model._model.n_vocab
    losses: list[float] = []
    for first in range(0, n_chunks * CHUNK, CHUNK):
        chunk = tokens[first : first + CHUNK]
        found = logits(model, chunk, n_vocab)
        top = found.max(axis=1, keepdims=True)
        total = np.log(np.exp(found - top).sum(axis=1)) + top[:, 0]
        right = found[np.arange(len(found)), chunk[CHUNK // 2 + 1 :]]
        losses += (total - right).tolist()
    mean, error = float(np.mean(losses)), float(np.std(losses) / np.sqrt(len(losses)))
    return float(np.exp(mean)), float(np.exp(mean)) * error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--chunks", type=int, default=60)
    asked = parser.parse_args()
    for file in asked.files:
        model = IkLlama(str(file), n_ctx=CHUNK, n_threads=2, verbose=False)
        tokens = model.tokenize(asked.text.read_text(), add_bos=False)
        found, error = perplexity(model, tokens, asked.chunks)
        prompt = model.tokenize("The function returns", add_bos=False)
        said = model.detokenize(model.generate(prompt, max_tokens=24))
        print(f"{file.name}: perplexity {found:.4f} ± {error:.4f}; says {said!r}", flush=True)
        model.close()


if __name__ == "__main__":
    main()
