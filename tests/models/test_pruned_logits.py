"""A pruned folder in transformers and in llama.cpp, for every architecture.

The pruned model must compute what the whole one does where its router is barred from the dropped
experts: their logits, and their correction biases, are minus infinity.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.models.contract import MoeModel
from reap2gguf.models.description import Router
from reap2gguf.models.loading import load_whole
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from reap2gguf.pruning.view import PrunedView
from reap2gguf.pruning.write import write_pruned
from tests.exporting.files import export_files, plain
from tests.models.layouts import FIRST, Case
from tests.models.oracles import mean_kl
from tests.tiny import ONE_THREAD

Kept = dict[int, tuple[int, ...]]
N_TOKENS = 40


def half_of(model: MoeModel) -> Kept:
    """Half of the experts of each layer, and of each group, drawn at random."""
    facts = model.facts
    size = facts.n_experts // facts.n_groups
    generator = np.random.default_rng(5)
    return {
        layer: tuple(
            int(first + one)
            for first in range(0, facts.n_experts, size)
            for one in sorted(generator.permutation(size)[: size // 2])
        )
        for layer in facts.moe_layers
    }


def loaded_without_complaints(folder: Path, mtp_prefix: str | None) -> Any:
    """transformers' model; of an MTP block, which it has not, it may say that it expects none."""
    model, said = load_whole(folder, dtype=torch.float32, output_loading_info=True)
    if mtp_prefix is not None:
        said["unexpected_keys"] = {
            name for name in said["unexpected_keys"] if not name.startswith(mtp_prefix)
        }
    assert {what: names for what, names in said.items() if names} == {}
    return model


def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(tokens[None]).logits[0]
    return found


@contextmanager
def barred(whole: Any, model: MoeModel, kept: Kept) -> Iterator[None]:
    """Let routers not choose the experts that are dropped."""
    dropped: dict[int, torch.Tensor] = {}
    for name in model.names:
        role = model.role(name)
        if not isinstance(role, Router) or role.layer == model.facts.mtp_layer:
            continue
        rest = name.removeprefix(model.block_prefix(role.layer))
        layer = whole.get_decoder().layers[role.layer]
        tensor = dict([*layer.named_parameters(), *layer.named_buffers()])[
            model.parameter(role.layer, rest)
        ]
        is_dropped = torch.ones(model.facts.n_experts, dtype=torch.bool)
        is_dropped[list(kept[role.layer])] = False
        if rest.endswith("bias"):
            with torch.no_grad():
                tensor[..., is_dropped] = -torch.inf
        elif tensor.ndim == 2:  # else it scales what chosen experts give
            dropped[id(tensor)] = is_dropped
    linear = torch.nn.functional.linear

    def without(values: Any, weight: Any, bias: Any = None) -> Any:
        found = linear(values, weight, bias)
        if id(weight) in dropped:
            seen.add(id(weight))
            found[..., dropped[id(weight)]] = -torch.inf
        return found

    seen: set[int] = set()
    torch.nn.functional.linear = without
    try:
        yield
    finally:
        torch.nn.functional.linear = linear
    assert seen == dropped.keys(), "every router was computed"


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_half_of_the_experts(case: Case, tmp_path: Path) -> None:
    folder, target = case.tiny.write(tmp_path / "model"), tmp_path / "pruned"
    target.mkdir()
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        kept = half_of(model)
        mtp = model.facts.mtp_layer
        prefix = None if mtp is None else model.block_prefix(mtp)
        write_pruned(PrunedView(checkpoint, model, kept), target, Silent())
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 500, N_TOKENS))
    whole = loaded_without_complaints(folder, prefix)
    before = logits_of(whole, tokens)
    found = logits_of(loaded_without_complaints(target, prefix), tokens)
    with barred(whole, model, kept):
        expected = logits_of(whole, tokens)
    assert mean_kl(expected, before) > 1e-5, "the dropped experts were needed"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    expect_llama_cpp(target, tmp_path, tokens, found)


def expect_llama_cpp(
    folder: Path, scratch: Path, tokens: torch.Tensor, expected: torch.Tensor
) -> None:
    """llama.cpp computes the same of the F32 file of a folder, its cache in float32 too."""
    path = export_files(folder, scratch, [plain("F32")])["F32"]
    llama = llama_cpp.Llama(
        str(path), n_ctx=64, n_batch=64, logits_all=True, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, **ONE_THREAD,
    )  # fmt: skip
    try:
        llama.eval(tokens.tolist())
        found = torch.tensor(np.array(llama.scores[:N_TOKENS]))
    finally:
        llama.close()
    assert mean_kl(expected, found) < 1e-6
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
