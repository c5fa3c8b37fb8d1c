"""What each head of a latent attention multiplies, against llama.cpp's own multiplications."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.models.table import describe
from reap2gguf.observing.importance import ImportanceObserver
from reap2gguf.observing.latents import LatentWatch
from reap2gguf.observing.passes import announced_entries
from reap2gguf.observing.saliency import SaliencyObserver
from tests.exporting.files import export_files, plain
from tests.families.deepseek import V2_LITE, V3
from tests.families.mla import FLASH
from tests.observing.llama_collector import collect
from tests.observing.sweeps import rows_of, run_sweep
from tests.tiny import TinyQwen3Moe

# latents narrower than keys, wider by a part of their width, and twice as wide
TINIES = {
    "narrow": FLASH,
    "whole queries": replace(FLASH, query_rank=None),
    "wide": replace(FLASH, rank=96, mtp=False),
    "twice": replace(FLASH, rank=80, mtp=False),
    "softmax": V2_LITE,
    "groups": V3,
    "no latents": TinyQwen3Moe(),
}


@pytest.mark.parametrize("name", TINIES)
def test_entries_are_those_that_llama_imatrix_collects(name: str, tmp_path: Path) -> None:
    """The MTP block apart, which llama.cpp computes only when it drafts."""
    tiny = TINIES[name]
    folder = tiny.write(tmp_path / "model")
    rows = rows_of(40, 32, 19)
    theirs = collect(export_files(folder, tmp_path, [plain("F32")])["F32"], rows)
    observer, _ = run_sweep(ImportanceObserver, folder, rows)
    in_block = f"blk.{tiny.n_layers}."
    assert {n for n in observer.entries if not n.startswith(in_block)} == set(theirs.sums)
    for name, sums in theirs.sums.items():
        ours = observer.entries[name]
        np.testing.assert_array_equal(ours.counts, theirs.counts[name], err_msg=name)
        # llama-imatrix has as many rows as counts
        expected = sums.reshape(len(theirs.counts[name]), -1)
        assert ours.sums.shape == expected.shape
        np.testing.assert_allclose(
            ours.sums, expected, rtol=1e-3, atol=1e-4 * expected.max(), err_msg=name
        )


def test_the_mtp_block_has_the_same_entries(tmp_path: Path) -> None:
    folder = FLASH.write(tmp_path / "model")
    observer, _ = run_sweep(ImportanceObserver, folder, rows_of(40, 19))
    last, block = (
        {n.removeprefix(f"blk.{layer}."): e.sums.shape for n, e in observer.entries.items()
         if n.startswith(f"blk.{layer}.")}
        for layer in (FLASH.n_layers - 1, FLASH.n_layers)
    )  # fmt: skip
    assert block == last | {"nextn.eh_proj.weight": (1, 2 * FLASH.hidden)}
    assert last["attn_k_b.weight"] == (1, FLASH.n_heads * FLASH.nope)
    assert last["attn_v_b.weight"] == (1, FLASH.n_heads * FLASH.rank)
    with Checkpoint.open(folder) as checkpoint:
        announced = announced_entries(checkpoint, describe(checkpoint))
    assert {n: announced.shape(n) for n in announced} == {
        n: e.sums.shape for n, e in observer.entries.items()
    }


def test_an_attention_is_left_as_it_was(tmp_path: Path) -> None:
    """The config of all layers is one, and only the watched layer gets another."""
    from transformers import AutoModelForCausalLM

    folder = FLASH.write(tmp_path / "model")
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    with Checkpoint.open(folder) as checkpoint:
        heads = describe(checkpoint).head_matrices(1)
    assert heads is not None
    tokens = torch.from_numpy(rows_of(24)[0])[None]
    seen: list[Any] = []
    with torch.inference_mode():
        before = theirs(tokens).logits
        watch = LatentWatch(
            theirs.model.layers[1], heads, lambda v: seen.append(v.shape), lambda *v: seen.append(v)
        )
        assert torch.equal(theirs(tokens).logits, before)
        assert seen[0] == (1, 24, FLASH.n_heads, FLASH.nope)
        (sums, columns), *others = seen[1:]
        assert not others
        assert (sums.shape, columns) == ((1, 24, FLASH.n_heads, FLASH.rank), slice(0, FLASH.rank))
        watch.close()
        seen.clear()
        assert torch.equal(theirs(tokens).logits, before)
    assert not seen
    assert theirs.model.layers[1].self_attn.config is theirs.model.layers[0].self_attn.config
    # the first position attends to itself alone: the sum is its own latent
    latents = sums[0, 0]
    assert torch.equal(latents, latents[:1].expand_as(latents))


def test_a_block_that_no_file_has_gets_no_entries(tmp_path: Path) -> None:
    """It runs all the same: its predictions are counted before and after pruning."""
    folder = V3.write(tmp_path / "model")
    rows = rows_of(40, 19)
    observer, report = run_sweep(ImportanceObserver, folder, rows)
    assert not any(name.startswith(f"blk.{V3.n_layers}.") for name in observer.entries)
    assert report.n_tokens == 59
    saliency, _ = run_sweep(SaliencyObserver, folder, rows)
    assert max(saliency.layers) == V3.n_layers
    assert saliency.layers[V3.n_layers].count.sum() == V3.top_k * (59 - len(rows))
