"""Which part of a model a GGUF tensor is, by its name, whatever the architecture."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from reap2gguf.models.gguf_keys import block_of

Role = Literal[
    "embedding",
    "attention",
    "DeltaNet",
    "Mamba",
    "convolution",
    "router",
    "experts gate",
    "experts up",
    "experts down",
    "shared expert",
    "latent",
    "dense FFN",
    "norms",
    "MTP",
    "output",
    "vision",
    "other",
]
ROLES: tuple[Role, ...] = get_args(Role)
_NONE: Mapping[int, Role] = {}
_OUTSIDE: dict[str, Role] = {
    "token_embd": "embedding",
    "output": "output",
    "rope_freqs": "attention",
}
# the first that fits, of what follows `blk.N.`
_INSIDE: dict[str, Role] = {
    r"\w*norm(_\w+)?\.|layer_output_scale": "norms",
    r"ssm_|time_mix": "DeltaNet",
    r"shortconv\.": "convolution",
    r"ffn_\w+_(sh|ch)exps?\b": "shared expert",
    r"ffn_gate_inp|exp_probs_b": "router",
    r"ffn_gate_exps|ffn_gate_up_exps": "experts gate",
    r"ffn_up_exps": "experts up",
    r"ffn_down_exps": "experts down",
    r"ffn_latent_": "latent",
    r"ffn_": "dense FFN",
    r"attn_": "attention",
}


def recurrent_blocks(names: Collection[str]) -> dict[int, Role]:
    """The blocks that have a recurrence, and which.

    DeltaNet's projections are called as attention's are, Mamba has one called `ssm_in`.
    """
    found: dict[int, Role] = {}
    for name in names:
        if ".ssm_" in name and (block := block_of(name)) is not None:
            is_mamba = ".ssm_in." in name or found.get(block) == "Mamba"
            found[block] = "Mamba" if is_mamba else "DeltaNet"
    return found


def role_of(name: str, recurrent: Mapping[int, Role] = _NONE, mtp: Collection[int] = ()) -> Role:
    """What a tensor is for, of a model with such `recurrent_blocks` and MTP blocks.

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
    return recurrent.get(block, role) if role in ("attention", "DeltaNet") else role


# What recipes call the roles. MTP blocks have tensors of the other roles too: `mtp` finds all of
# them, and the other words find those of MTP blocks as well.
ROLE_WORDS: dict[str, frozenset[Role]] = {
    "attention": frozenset({"attention"}),
    "deltanet": frozenset({"DeltaNet"}),
    "mamba": frozenset({"Mamba"}),
    "convolution": frozenset({"convolution"}),
    "experts": frozenset({"experts gate", "experts up", "experts down"}),
    "experts.gate": frozenset({"experts gate"}),
    "experts.up": frozenset({"experts up"}),
    "experts.down": frozenset({"experts down"}),
    "shared_expert": frozenset({"shared expert"}),
    "latent": frozenset({"latent"}),
    "dense_ffn": frozenset({"dense FFN"}),
    "router": frozenset({"router"}),
    "embedding": frozenset({"embedding"}),
    "output": frozenset({"output"}),
    "mtp": frozenset({"MTP"}),
}


@dataclass(frozen=True)
class Spot:
    """Where in its model a GGUF tensor stands: what the rules of recipes ask of it."""

    name: str
    block: int | None  # the N of blk.N
    roles: frozenset[Role]
    n_layers: int  # of the model, without MTP blocks, which follow

    @property
    def role(self) -> Role:
        """The one role by which tensors are counted: MTP for all of an MTP block."""
        return "MTP" if "MTP" in self.roles else next(iter(self.roles))


def spots(names: Collection[str]) -> dict[str, Spot]:
    """The spot of every tensor of one model, by name. MTP blocks have tensors called `nextn`."""
    blocks = {name: block_of(name) for name in names}
    recurrent = recurrent_blocks(names)
    numbers = [block for block in blocks.values() if block is not None]
    mtp = {block for name, block in blocks.items() if block is not None and ".nextn." in name}
    n_layers = min(mtp, default=max(numbers, default=-1) + 1)
    found = {}
    for name, block in blocks.items():
        roles: set[Role] = {role_of(name, recurrent)}
        if block in mtp:
            roles.add("MTP")
        found[name] = Spot(name, block, frozenset(roles), n_layers)
    return found
