"""Times llm-compressor's REAPPruningModifier on a random model of Qwen3-30B-A3B's layer shape.

    python bench/peer_llm_compressor.py [--layers 2] [--rows 32] [--max-length 2048]

Needs llmcompressor. The whole model of so few layers lies on the GPU; tokens go one row at a time,
as the modifier wants them, and only the experts that a token is routed to are computed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from typing import Any

import torch
from shapes.qwen import QWEN3_30B
from synthetic import VOCABULARY, shortened
from torch.utils.data import DataLoader, Dataset


class RandomRows(Dataset):
    """Rows of random tokens."""

    def __init__(self, n_rows: int, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(0, VOCABULARY, (n_rows, length), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        return {"input_ids": row, "attention_mask": torch.ones_like(row)}


def random_model(layers: int, folder: str) -> Any:
    """A model with random weights on the GPU, known to the peer as if loaded from `folder`."""
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(**shortened(QWEN3_30B, layers))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3MoeForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    linearize_moe(model)
    model.to(torch.bfloat16)
    config.save_pretrained(folder)
    model.config._name_or_path = model.name_or_path = folder
    return model


def any_tokenizer() -> Any:
    """The peer asks for one and, with rows of tokens, does not use it."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(BPE(vocab={"a": 0, "b": 1}, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="a", eos_token="b")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=2048)
    arguments = parser.parse_args()
    if importlib.util.find_spec("llmcompressor") is None:
        parser.error("llm-compressor is not installed: pip install llmcompressor")
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning.reap import REAPPruningModifier

    with tempfile.TemporaryDirectory() as folder:
        model = random_model(arguments.layers, folder)
        rows = RandomRows(arguments.rows, arguments.max_length)
        begun = time.monotonic()
        oneshot(
            model=model, processor=any_tokenizer(), dataset=DataLoader(rows, batch_size=1),
            recipe=[REAPPruningModifier(sparsity=0.5)], num_calibration_samples=arguments.rows,
            max_seq_length=arguments.max_length, batch_size=1, moe_calibrate_all_experts=False,
        )  # fmt: skip
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.monotonic() - begun
    n_tokens = arguments.rows * arguments.max_length
    figures = {
        "peer": "llm-compressor",
        "tokens": n_tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second_and_layer": round(n_tokens * arguments.layers / seconds),
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
