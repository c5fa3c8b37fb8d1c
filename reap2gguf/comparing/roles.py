"""Which part of a model a GGUF tensor is, by its name, whatever the architecture."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal, get_args

from reap2gguf.models.gguf_keys import block_of

Role = Literal[
    "embedding",
    "attention",
    "DeltaNet",
    "convolution",
    "router",
    "experts gate",
    "experts up",
    "experts down",
    "shared expert",
    "dense FFN",
    "norms",
    "MTP",
    "output",
    "vision",
    "other",
]
ROLES: tuple[Role, ...] = get_args(Role)
_OUTSIDE: dict[str, Role] = {"token_embd": "embedding", "output": "output"}
# the first that fits, of what follows `blk.N.`
_INSIDE: dict[str, Role] = {
    r"\w*norm(_\w+)?\.": "norms",
    r"ssm_|time_mix": "DeltaNet",
    r"shortconv\.": "convolution",
    r"ffn_\w+_(sh|ch)exps?\b": "shared expert",
    r"ffn_gate_inp|exp_probs_b": "router",
    r"ffn_gate_exps|ffn_gate_up_exps": "experts gate",
    r"ffn_up_exps": "experts up",
    r"ffn_down_exps": "experts down",
    r"ffn_": "dense FFN",
    r"attn_": "attention",
}


def linear_blocks(names: Collection[str]) -> frozenset[int]:
    """The blocks that have linear attention, whose projections are called as attention's are."""
    return frozenset(
        block for name in names if ".ssm_" in name and (block := block_of(name)) is not None
    )


def role_of(name: str, linear: Collection[int] = (), mtp: Collection[int] = ()) -> Role:
    """What a tensor is for; `linear` and `mtp` are the numbers of such blocks.

    >>> role_of("blk.3.ffn_down_exps.weight"), role_of("token_embd.weight")
    ('experts down', 'embedding')
    """
    block = block_of(name)
    if block is None:
        stem = name.split(".")[0]
        if stem.startswith("v") or stem in ("mm", "resampler"):
            return "vision"
        return "norms" if "norm" in stem else _OUTSIDE.get(stem, "other")
    if block in mtp:
        return "MTP"
    rest = name.split(".", 2)[2]
    role: Role = next(
        (role for pattern, role in _INSIDE.items() if re.match(pattern, rest)), "other"
    )
    return "DeltaNet" if role == "attention" and block in linear else role
