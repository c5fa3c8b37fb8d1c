"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), as llama.cpp's `deepseek2` has it.

Keys and values of all heads are made of one latent vector per token, of size R, by `kv_b_proj`
(heads * (nope + v), R). llama.cpp computes with the latents themselves: what makes keys of them is
applied to the queries, what makes values of them to each head's weighted sum. So `kv_b_proj` is two
GGUF tensors: `attn_k_b` (heads, R, nope), transposed, and `attn_v_b` (heads, v, R). To llama.cpp
this is an attention with one head of keys and values, which is what the header says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gguf import GGUFValueType, Keys

from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.models.description import (
    MAX_HEADS,
    MAX_WIDTH,
    GgufTensor,
    HeadMatrices,
    Slab,
    missing,
)
from reap2gguf.models.rope import NOTHING, Rope, read_rope
from reap2gguf.models.rules import TensorRule

if TYPE_CHECKING:
    from reap2gguf.checkpoint.config import ConfigReader
    from reap2gguf.checkpoint.safetensors_header import StoredTensor
    from reap2gguf.models.gguf_keys import GgufKeys

_ATTENTION = "self_attn"
_LATENTS = f"{_ATTENTION}.kv_a_proj_with_mqa"
# `attn_kv_b` is the name in old files; it is split here
KV_B = TensorRule(f"{_ATTENTION}.kv_b_proj.weight", "attn_kv_b.weight", "KVB R")
QUERIES = TensorRule(f"{_ATTENTION}.q_proj.weight", "attn_q.weight", "Q H", input_of=_LATENTS)
LOW_RANK_QUERIES = (
    TensorRule(f"{_ATTENTION}.q_a_proj.weight", "attn_q_a.weight", "QR H", input_of=_LATENTS),
    TensorRule(f"{_ATTENTION}.q_a_layernorm.weight", "attn_q_a_norm.weight", "QR"),
    TensorRule(f"{_ATTENTION}.q_b_proj.weight", "attn_q_b.weight", "Q QR"),
)
KEYS_AND_VALUES = (
    TensorRule(f"{_LATENTS}.weight", "attn_kv_a_mqa.weight", "KVA H"),
    TensorRule(f"{_ATTENTION}.kv_a_layernorm.weight", "attn_kv_a_norm.weight", "R"),
    KV_B,
    TensorRule(f"{_ATTENTION}.o_proj.weight", "attn_output.weight", "H O"),
)
# Of norms of latents, transformers has an epsilon in its code, llama.cpp the config's of all norms.
LATENT_EPSILON = 1e-6
MOST_EPSILON = 1e-5  # of published models, where the difference is not seen
ONE_HEAD = "latents are the only head of keys and values"
HEAD_KEYS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass(frozen=True)
class LatentHeads:
    """The sizes of a latent attention."""

    n_heads: int
    nope: int  # of a head's queries and keys, what is not rotated
    rotated: int  # the rest; of keys, all heads have the same
    value: int  # of a head's values
    rank: int  # R, of the latents
    query_rank: int | None  # None where queries are one product

    @property
    def query(self) -> int:
        """Size of a head's queries and keys."""
        return self.nope + self.rotated

    def config_values(self) -> dict[str, Any]:
        """The sizes under transformers' names of them."""
        return {
            "num_key_value_heads": self.n_heads,
            "head_dim": self.rotated,
            "q_lora_rank": self.query_rank,
            "kv_lora_rank": self.rank,
            "qk_nope_head_dim": self.nope,
            "qk_rope_head_dim": self.rotated,
            "v_head_dim": self.value,
        }

    @property
    def rules(self) -> tuple[TensorRule, ...]:
        """What the attention is made of."""
        queries = (QUERIES,) if self.query_rank is None else LOW_RANK_QUERIES
        return (*queries, *KEYS_AND_VALUES)

    def entries(self, query_rank: int | None) -> list[tuple[str, Any, GGUFValueType]]:
        """Keys of a header, in the order of llama.cpp's converter; `query_rank` as it is there."""
        attention = Keys.Attention
        values = {
            attention.Q_LORA_RANK: query_rank,
            attention.KV_LORA_RANK: self.rank,
            attention.KEY_LENGTH: self.rank + self.rotated,
            attention.VALUE_LENGTH: self.rank,
            attention.KEY_LENGTH_MLA: self.query,
            attention.VALUE_LENGTH_MLA: self.value,
            Keys.Rope.DIMENSION_COUNT: self.rotated,
        }
        return [(key, value, GGUFValueType.UINT32) for key, value in values.items()]

    def matrices(self, layer: int, prefix: str) -> HeadMatrices:
        """What multiplies something else in each head, of the attention of a layer's module."""
        return HeadMatrices(
            attention=f"{prefix}{_ATTENTION}",
            latents=f"{prefix}{_ATTENTION}.kv_a_layernorm",
            queries=f"blk.{layer}.attn_k_b.weight",
            sums=f"blk.{layer}.attn_v_b.weight",
            n_heads=self.n_heads,
            query_width=self.nope,
            sum_width=self.rank,
        )

    def sizes(self) -> dict[str, int]:
        """The sizes that the rules name."""
        return {
            "Q": self.n_heads * self.query,
            "QR": self.query_rank or 0,
            "R": self.rank,
            "KVA": self.rank + self.rotated,
            "KVB": self.n_heads * (self.nope + self.value),
            "O": self.n_heads * self.value,
        }

    def split(
        self, tensors: Mapping[str, StoredTensor], stored: str, prefix: str
    ) -> tuple[GgufTensor, GgufTensor]:
        """The GGUF tensors `attn_k_b` and `attn_v_b` of a stored `kv_b_proj`, a slab per head.

        Raises CheckpointError if it is not there, or has another shape.
        """
        sizes, each = self.sizes(), self.nope + self.value
        if stored not in tensors:
            raise missing(stored)
        if (found := tensors[stored].shape) != (expected := (sizes["KVB"], sizes["R"])):
            raise CheckpointError(
                f"tensor {stored!r}: shape {list(found)}, expected {list(expected)}"
            )
        starts = range(0, self.n_heads * each, each)
        keys = tuple(
            Slab(stored, transposed=True, columns=(start, start + self.nope)) for start in starts
        )
        values = tuple(Slab(stored, rows=(start + self.nope, start + each)) for start in starts)
        n_heads, rank = self.n_heads, self.rank
        return (
            GgufTensor(f"{prefix}attn_k_b.weight", (n_heads, rank, self.nope), keys),
            GgufTensor(f"{prefix}attn_v_b.weight", (n_heads, self.value, rank), values),
        )


class LatentRope(Rope):
    """YaRN of an attention whose scores are scaled, and not its rotated values."""

    @property
    def all_dims(self) -> float:
        """What YaRN's scale of the scores is made of; 0 if they are not scaled."""
        return float(self.values.values.get("mscale_all_dim") or 0)

    @property
    def implied_factor(self) -> float:
        return 1.0 if self.all_dims else super().implied_factor

    def metadata(self) -> list[tuple[str, Any, GGUFValueType]]:
        found = super().metadata()
        if self.kind == "yarn" and self.all_dims:
            key = Keys.Rope.SCALING_YARN_LOG_MUL
            # a tenth, which llama.cpp's loader of this architecture undoes
            found.append((key, 0.1 * self.all_dims, GGUFValueType.FLOAT32))
        return found


def read_latent_rope(
    read: ConfigReader, arch: str, unread: Mapping[str, float] = NOTHING
) -> LatentRope:
    """The rotary embedding of a latent attention, which llama.cpp computes as `arch`.

    `unread`: as `read_rope` has it. Raises UnsupportedModelError for a scaling that llama.cpp
    computes otherwise: it scales whole heads where transformers scales what is rotated.
    """
    found = read_rope(read, unread=unread)
    values = found.values
    values.expect("partial_rotary_factor", 1, why=f"{arch} rotates all of qk_rope_head_dim")
    if found.kind == "linear":
        raise UnsupportedModelError(
            f"{read.where}: rope_type is linear, expected default or yarn: {arch} would scale the "
            "scores too"
        )
    if found.kind == "yarn":
        values.number("mscale_all_dim", low=0, high=2**10, default=0)
        if found.factor < 1 or found.attention_factor != 1:
            raise UnsupportedModelError(
                f"{read.where}: YaRN has factor {found.factor:g} and scales rotated values by "
                f"{found.attention_factor:g}, expected a factor of at least 1 and no such scale "
                f"(mscale equal to mscale_all_dim): {arch} scales whole heads"
            )
    return LatentRope(**vars(found))


def without_whole(matrices: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The matrices that inputs multiply, without the one that no file has whole."""
    return {
        module: names
        for module, names in matrices.items()
        if not any(name.endswith(f".{KV_B.gguf}") for name in names)
    }


def read_heads(read: ConfigReader) -> LatentHeads:
    """The sizes of the attention; refuses a `head_dim` that is not that of rotated values."""
    rank, nope, rotated, value = (read.integer(key, low=1, high=MAX_WIDTH) for key in HEAD_KEYS)
    # transformers rotates so much of a head
    read.expect("head_dim", rotated, why="it is qk_rope_head_dim in this architecture")
    read.expect("qk_head_dim", nope + rotated, why="it is qk_nope_head_dim + qk_rope_head_dim")
    query_rank = read.values.get("q_lora_rank")
    if query_rank is not None:
        query_rank = read.integer("q_lora_rank", low=1, high=MAX_WIDTH)
    n_heads = read.integer("num_attention_heads", low=1, high=MAX_HEADS)
    why = "as num_attention_heads: every head has its own keys and values, made of latents"
    read.expect("num_key_value_heads", n_heads, why=why)
    return LatentHeads(n_heads, nope, rotated, value, rank, query_rank)


def heads_from_gguf(keys: GgufKeys) -> dict[str, Any]:
    """The sizes of the attention in a header, where all layers have it."""
    attention = Keys.Attention
    found = sizes_from_gguf(keys)
    keys.expect(attention.HEAD_COUNT_KV, 1, why=ONE_HEAD)
    keys.expect(attention.VALUE_LENGTH, found["kv_lora_rank"], why=ONE_HEAD)
    query_rank = keys.integer(attention.Q_LORA_RANK, 0, MAX_WIDTH, default=0) or None
    return {"q_lora_rank": query_rank, **found}


def sizes_from_gguf(keys: GgufKeys) -> dict[str, Any]:
    """The sizes of keys, values and latents in a header."""
    attention = Keys.Attention
    rank = keys.integer(attention.KV_LORA_RANK, 1, MAX_WIDTH)
    rotated = keys.integer(Keys.Rope.DIMENSION_COUNT, 1, MAX_WIDTH)
    query = keys.integer(attention.KEY_LENGTH_MLA, rotated + 1, MAX_WIDTH)
    keys.expect(attention.KEY_LENGTH, rank + rotated, why=ONE_HEAD)
    for key in ("temperature_scale", "temperature_length"):
        keys.expect(f"{{arch}}.attention.{key}", why="attention has no temperature here")
    return {
        "kv_lora_rank": rank,
        "qk_nope_head_dim": query - rotated,
        "qk_rope_head_dim": rotated,
        "v_head_dim": keys.integer(attention.VALUE_LENGTH_MLA, 1, MAX_WIDTH),
    }


def rope_from_gguf(keys: GgufKeys, found: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` whose scale of the scores is that of a header."""
    if found["rope_type"] != "yarn":
        return found
    # the shortest decimal, as of every number in a header
    tenth = keys.number(Keys.Rope.SCALING_YARN_LOG_MUL, 0, 2**10, default=0.0)
    all_dims = float(f"{10 * tenth:.7g}")
    if not all_dims:
        factor = found["attention_factor"]
        return {
            **found,
            "attention_factor": 1.0 if math.isclose(factor, 1, rel_tol=1e-6) else factor,
        }
    factor = keys.number(Keys.Rope.SCALING_ATTN_FACTOR, 0, 2**20, default=1.0)
    return {**found, "attention_factor": factor, "mscale": all_dims, "mscale_all_dim": all_dims}
