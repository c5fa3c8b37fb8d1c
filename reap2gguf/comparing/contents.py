"""What one model is made of: weights, bytes and types, by role and by layer.

Of a checkpoint, tensors count as the GGUF tensors that they become, so that both kinds of files
have the same rows. Memory: a few numbers per layer and role.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gguf import Keys

from reap2gguf.gguf_files.tensor_types import file_type_of_number
from reap2gguf.models.description import Carried, Dropped, experts_of
from reap2gguf.models.gguf_keys import block_of
from reap2gguf.models.roles import ROLES, Role, recurrent_blocks, role_of

if TYPE_CHECKING:
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.models.contract import MoeModel


@dataclass(frozen=True)
class Portion:
    """Some tensors of a model together."""

    n_weights: int
    n_bytes: int
    types: Mapping[str, int]  # type -> weights of it, the most first

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / self.n_weights

    def as_json(self) -> dict[str, Any]:
        return {
            "weights": self.n_weights,
            "bytes": self.n_bytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "types": dict(self.types),
        }


@dataclass(frozen=True)
class Contents:
    """One model as it is stored."""

    architecture: str  # general.architecture, or the class in config.json
    file_type: str  # llama.cpp's name of the mixture, such as Q4_K_M, or the checkpoint's type
    n_file_bytes: int  # of all its files
    n_blocks: int  # with the block for multi-token prediction
    experts: tuple[int, ...]  # the numbers of experts that layers have, each once, ascending
    experts_per_token: int | None
    vocab_size: int | None
    total: Portion
    roles: Mapping[Role, Portion]
    layers: Mapping[int, Mapping[Role, Portion]] = field(repr=False)

    @property
    def bits_per_weight(self) -> float:
        return self.total.bits_per_weight

    def layer(self, number: int) -> Portion | None:
        """All of a layer together; None if the model does not have it."""
        if number not in self.layers:
            return None
        return _together(self.layers[number].values())

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "architecture": self.architecture,
            "file_type": self.file_type,
            "file_bytes": self.n_file_bytes,
            "blocks": self.n_blocks,
            "experts": list(self.experts),
            "experts_per_token": self.experts_per_token,
            "vocabulary": self.vocab_size,
            **self.total.as_json(),
            "roles": {role: portion.as_json() for role, portion in self.roles.items()},
            "layers": [
                {
                    "layer": number,
                    **_together(roles.values()).as_json(),
                    "roles": {role: portion.as_json() for role, portion in roles.items()},
                }
                for number, roles in self.layers.items()
            ],
        }


@dataclass(frozen=True)
class _Counted:
    """One tensor, or what of a checkpoint becomes one."""

    name: str  # of the GGUF tensor
    role: Role
    shape: tuple[int, ...]
    tensor_type: str
    n_bytes: int


def contents_of_gguf(header: GgufHeader) -> Contents:
    """What a GGUF file holds, of any architecture; its own header's numbers are only shown."""
    metadata, names = header.metadata, header.tensors.keys()
    arch = str(metadata.get(Keys.General.ARCHITECTURE, "unknown"))
    n_mtp = _count(metadata, Keys.LLM.NEXTN_PREDICT_LAYERS, arch) or 0
    blocks = {block for name in names if (block := block_of(name)) is not None}
    n_blocks = max(blocks, default=-1) + 1
    recurrent = recurrent_blocks(names)
    mtp = {block for block in blocks if block >= n_blocks - n_mtp}
    counted = [
        _Counted(
            name, role_of(name, recurrent, mtp), info.shape, info.tensor_type.name, info.n_bytes
        )
        for name, info in header.tensors.items()
    ]
    embedding = header.tensors.get("token_embd.weight")
    return _contents(
        counted,
        architecture=arch,
        file_type=_file_type(metadata.get(Keys.General.FILE_TYPE)),
        n_file_bytes=header.n_bytes,
        experts_per_token=_count(metadata, Keys.LLM.EXPERT_USED_COUNT, arch),
        vocab_size=None if embedding is None else embedding.shape[0],
    )


def contents_of_checkpoint(checkpoint: Checkpoint, model: MoeModel) -> Contents:
    """What a checkpoint holds, each tensor under the role of the GGUF tensor that it becomes."""
    stored, facts = checkpoint.tensors, model.facts
    tensors = model.gguf_tensors(stored)
    recurrent = recurrent_blocks([tensor.name for tensor in tensors])
    mtp = () if facts.mtp_layer is None else (facts.mtp_layer,)
    counted: list[_Counted] = []
    for tensor in tensors:
        if tensor.made is not None:
            continue  # it follows from the config, and nothing of it is stored
        first = stored[tensor.slabs[0].stored]
        # of a tensor that several are made of, the share of each
        n_bytes = math.prod(tensor.shape) * checkpoint.stored_bytes(first.name) // first.n_elements
        role = role_of(tensor.name, recurrent, mtp)
        kind = checkpoint.kind(first.name)
        counted.append(_Counted(tensor.name, role, tensor.shape, kind, n_bytes))
    for name, found in stored.items():
        if isinstance(model.role(name), Carried | Dropped):
            is_head = name.endswith("lm_head.weight")
            role = "output" if is_head else "vision"
            n_bytes = checkpoint.stored_bytes(name)
            counted.append(_Counted(name, role, found.shape, checkpoint.kind(name), n_bytes))
    most = Counter({one.tensor_type: 0 for one in counted})
    for one in counted:
        most[one.tensor_type] += one.n_bytes
    return _contents(
        counted,
        architecture=facts.gguf_arch,
        file_type=most.most_common(1)[0][0],
        n_file_bytes=checkpoint.n_file_bytes,
        experts_per_token=facts.experts_per_token,
        vocab_size=facts.vocab_size,
    )


def _contents(counted: list[_Counted], **more: Any) -> Contents:
    by_role: dict[Role, list[_Counted]] = {}
    by_layer: dict[int, dict[Role, list[_Counted]]] = {}
    experts: set[int] = set()
    for one in counted:
        by_role.setdefault(one.role, []).append(one)
        layer = block_of(one.name)
        if layer is not None:
            by_layer.setdefault(layer, {}).setdefault(one.role, []).append(one)
        count = experts_of(one.name, one.shape)
        if count is not None and "_exps." in one.name:
            experts.add(count)
    return Contents(
        n_blocks=max(by_layer, default=-1) + 1,
        experts=tuple(sorted(experts)),
        total=_portion(counted),
        roles=_in_order(by_role),
        layers={number: _in_order(by_layer[number]) for number in sorted(by_layer)},
        **more,
    )


def _in_order(groups: Mapping[Role, list[_Counted]]) -> dict[Role, Portion]:
    return {role: _portion(groups[role]) for role in ROLES if role in groups}


def _portion(counted: Iterable[_Counted]) -> Portion:
    n_weights = n_bytes = 0
    types: Counter[str] = Counter()
    for one in counted:
        count = math.prod(one.shape)
        n_weights, n_bytes = n_weights + count, n_bytes + one.n_bytes
        types[one.tensor_type] += count
    return Portion(n_weights, n_bytes, dict(types.most_common()))


def _together(portions: Iterable[Portion]) -> Portion:
    found = list(portions)
    types: Counter[str] = Counter()
    for portion in found:
        types.update(portion.types)
    return Portion(
        sum(one.n_weights for one in found),
        sum(one.n_bytes for one in found),
        dict(types.most_common()),
    )


def _count(metadata: Mapping[str, Any], key: str, arch: str) -> int | None:
    """A count of a header, if it is one; it is shown, and nothing is allocated by it."""
    value = metadata.get(key.format(arch=arch))
    return value if type(value) is int and 0 <= value < 2**31 else None


def _file_type(value: Any) -> str:
    try:
        name: str = file_type_of_number(value).name
    except ValueError:
        return "unknown"
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")
