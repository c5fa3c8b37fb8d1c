"""Kimi-K2: a DeepSeek-V3 with a model type of its own, and a setting that llama.cpp does not read.

The type is for programs that make a difference in how they run it; transformers has no class for
it, and computes the text part of Kimi-K2.5 by that of `deepseek_v3`. So does this program, and what
it writes says so, as the Python files that come with the model are not copied.

Its YaRN has `beta_fast` 1. llama.cpp's converter writes it, but llama.cpp reads no such key in this
architecture: it computes with 32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gguf import Keys

from reap2gguf.models.rope import NOTHING, Rope

if TYPE_CHECKING:
    from reap2gguf.models.gguf_keys import GgufKeys

MODEL_TYPE = "kimi_k2"
UNREAD: Mapping[str, float] = {"beta_fast": 1.0}  # settings of YaRN


def unread_in_gguf(keys: GgufKeys) -> Mapping[str, float]:
    """The settings that a GGUF file has, though llama.cpp does not read them."""
    key = Keys.Rope.SCALING_YARN_BETA_FAST
    is_there = keys.has(key) and keys.number(key, 0, 2**20) == UNREAD["beta_fast"]
    return UNREAD if is_there else NOTHING


def kimi_k2_caveats(config: Mapping[str, Any], rope: Rope) -> list[str]:
    """What its user must know; nothing of another model."""
    found = []
    if config.get("model_type") == MODEL_TYPE:
        found.append(
            f"the pruned config.json has the model_type deepseek_v3, as transformers knows no "
            f"{MODEL_TYPE} without the Python files of its source; programs that take the format "
            "of its tool calls from the type need to be told it"
        )
    if rope.kind == "yarn" and rope.values.values.get("beta_fast") == UNREAD["beta_fast"]:
        found.append(
            "the config's YaRN has beta_fast 1: so the model is measured here, and the GGUF files "
            "say so, like those of llama.cpp's converter; but llama.cpp does not read the key and "
            "computes every GGUF file of this model with 32"
        )
    return found
