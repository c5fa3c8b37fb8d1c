"""One question, answered greedily by a GGUF file in llama.cpp and by its folder in transformers.

Both read what their own chat template and tokenizer make of the question. A file whose answer
begins otherwise may be damaged by rounding only; one that agrees in no token is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from reap2gguf.bundle.evaluation import Answer, SmokeTest
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import UsageError
from reap2gguf.evaluating.llama.model import LlamaModel, LlamaOptions
from reap2gguf.evaluating.llama.transformers_answer import transformers_answer
from reap2gguf.local.prompts import Prompts
from reap2gguf.machine import available_bytes
from reap2gguf.messages import size
from reap2gguf.tokenizer.template_worker import TODAY
from reap2gguf.tokenizer.tokenizer import Tokenizer

QUESTION = "Write a Python function that returns the sum of a list of numbers."
N_TOKENS = 32
_BYTES_PER_PARAMETER = 4  # float32
_NO_FOLDER = "the folder that it was made from is not whole on this machine"


def smoke_test(
    gguf: Path,
    folder: Path,
    options: LlamaOptions,
    question: str = QUESTION,
    n_tokens: int = N_TOKENS,
) -> SmokeTest:
    """As `smoke_tests`, for one file."""
    return smoke_tests([gguf], folder, options, question, n_tokens)[0]


def smoke_tests(
    ggufs: Sequence[Path],
    folder: Path | None,
    options: LlamaOptions,
    question: str = QUESTION,
    n_tokens: int = N_TOKENS,
) -> list[SmokeTest]:
    """Ask each file in llama.cpp, and their folder once in transformers; compare the answers.

    The folder is that of the pruned model, and transformers computes in float32 on the CPU. If the
    weights in float32 do not fit the free memory, or there is no folder, only llama.cpp is asked,
    and the tests say so.
    Raises ArtifactError or CheckpointError if one of them cannot be run, UsageError if a file's
    chat template fails or the answer does not fit the context, CalibrationError if the folder's
    template fails, and DependencyError if llama-cpp-python does not load.
    """
    messages: list[Mapping[str, Any]] = [{"role": "user", "content": question}]
    asked = []
    for gguf in ggufs:  # first: a question that is too long is refused at once
        with LlamaModel(gguf, options) as model:
            with closing(Prompts(gguf, model.header, TODAY)) as prompts:
                prompt = prompts.render(messages)
            asked.append((gguf, prompts.has_template, _llama_answer(model, prompt, n_tokens)))
    theirs, note = None, _NO_FOLDER if folder is None else _too_large(folder)
    if folder is not None and not note:
        theirs = _transformers_answer(folder, messages, n_tokens, options.threads)
    found = [
        SmokeTest(gguf.name, question, has_template, ours, theirs, note)
        for gguf, has_template, ours in asked
    ]
    return found


def _too_large(folder: Path) -> str:
    """Why a folder does not fit the memory; empty if it does."""
    with Checkpoint.open(folder) as checkpoint:
        n_parameters = sum(tensor.n_elements for tensor in checkpoint.tensors.values())
    needed, free = _BYTES_PER_PARAMETER * n_parameters, available_bytes()
    if needed <= free:
        return ""
    return (
        f"the weights of {folder.name} in float32 take {size(needed)}, more than the {size(free)} "
        "of memory that are free"
    )


def _llama_answer(model: LlamaModel, prompt: str, n_tokens: int) -> Answer:
    # a token has at least one byte: no prompt is longer than this
    most = len(prompt.encode("utf-8", "surrogatepass")) + n_tokens
    if n_tokens < 1 or most > model.context_length:
        raise UsageError(
            f"a question of {len(prompt):,} letters and an answer of {n_tokens:,} tokens may not "
            f"fit the context of {model.path}, {model.context_length:,} tokens; ask a shorter one"
        )
    (answer,) = model.answers({"do": "greedy", "prompt": prompt, "most": n_tokens})
    read, written = tuple(answer["prompt_tokens"]), tuple(answer["tokens"])
    return Answer(prompt, read, written, answer["text"])


def _transformers_answer(
    folder: Path, messages: list[Mapping[str, Any]], n_tokens: int, threads: int
) -> Answer:
    with closing(Tokenizer(folder)) as tokenizer:
        prompt = tokenizer.render_chat(messages, add_generation_prompt=True)
        tokens = tokenizer.encode(prompt).tolist()
        found = transformers_answer(folder, tokens, n_tokens, threads)
        return Answer(prompt, tuple(tokens), tuple(found), tokenizer.decode(found))
