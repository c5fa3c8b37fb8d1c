"""Experts that stay whatever they score: those that the user names, and super experts.

Super experts (arXiv 2507.23279) are few, rarely used, and make outliers in the hidden states on
which attention sinks rest; without three of them Qwen3-30B-A3B writes nothing sensible. As in
CerebrasResearch/reap, an expert is one if the largest value of its outputs is above the 99.5th
percentile of all experts' largest values, and above a tenth of the largest one, and if its layer is
among the first three quarters of the layers with experts. The largest value is a magnitude here, as
in the paper; REAP's program takes the largest signed one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from reap2gguf.errors import ArtifactError, ParameterError, UsageError
from reap2gguf.messages import shown
from reap2gguf.pruning.methods import is_from_weights

if TYPE_CHECKING:
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.models.description import ModelFacts
    from reap2gguf.pruning.select import Kept, Target

_PERCENTILE = 99.5
_SHARE_OF_LARGEST = 0.1
_SHARE_OF_LAYERS = 0.75
_MOST_LETTERS = 100_000
_RANGE = r"(\*|\d{1,6})(?:-(\d{1,6}))?"
_ITEM = re.compile(rf"{_RANGE}:{_RANGE}", re.ASCII)
_EXAMPLE = "such as 3:17 for expert 17 of layer 3, 0-3:5 or '*:5-8'"


@dataclass(frozen=True)
class Pinned:
    """Experts that must stay, in some layers; both ends of a range belong to it."""

    text: str
    layers: tuple[int, int] | None  # None: every layer
    experts: tuple[int, int] | None  # None: every expert


@dataclass(frozen=True)
class Protection:
    """What is protected, as it was asked for."""

    pinned: tuple[Pinned, ...] = ()
    super_experts: bool = False


@dataclass(frozen=True)
class ProtectedExperts:
    """The experts that are protected in one model, ascending by layer; layers with none left out.

    An expert that was named and is a super expert is in both.
    """

    named: Kept = field(default_factory=dict)
    super_experts: Kept = field(default_factory=dict)

    @property
    def all(self) -> dict[int, tuple[int, ...]]:
        layers = sorted(self.named.keys() | self.super_experts.keys())
        return {
            layer: tuple(sorted({*self.named.get(layer, ()), *self.super_experts.get(layer, ())}))
            for layer in layers
        }


def read_pinned(text: object) -> tuple[Pinned, ...]:
    """What a text such as "3:17,0-3:5,*:9" names. Raises UsageError if it is malformed."""
    if not isinstance(text, str) or len(text) > _MOST_LETTERS:
        raise ParameterError(f"protect is {shown(text)}, expected a text {_EXAMPLE}", "protect")
    return tuple(_item(part.strip()) for part in text.split(",")) if text.strip() else ()


def _item(text: str) -> Pinned:
    match = _ITEM.fullmatch(text)
    if match is None:
        raise UsageError(f"--protect {shown(text)}: expected LAYER:EXPERT, {_EXAMPLE}")
    first_layer, last_layer, first, last = match.groups()
    return Pinned(text, _range(text, first_layer, last_layer), _range(text, first, last))


def _range(text: str, first: str, last: str | None) -> tuple[int, int] | None:
    if first == "*" and last is None:
        return None
    if first == "*" or int(last or first) < int(first):
        raise UsageError(f"--protect {shown(text)}: {first}-{last} is not an ascending range")
    return int(first), int(last or first)


def named_experts(
    pinned: Iterable[Pinned], moe_layers: tuple[int, ...], n_experts: int
) -> dict[int, tuple[int, ...]]:
    """The experts that were named, by layer. Raises UsageError for one that does not exist."""
    found: dict[int, set[int]] = {}
    for one in pinned:
        first, last = one.layers or (0, moe_layers[-1])
        layers = [layer for layer in moe_layers if first <= layer <= last]
        if not layers or last > moe_layers[-1]:
            raise UsageError(
                f"--protect {one.text}: the model has no experts in that layer; those with experts "
                f"are {_spans(moe_layers)}"
            )
        first, last = one.experts or (0, n_experts - 1)
        if last >= n_experts:
            raise UsageError(
                f"--protect {one.text}: the model has no expert {last}; each layer has 0 to "
                f"{n_experts - 1}"
            )
        for layer in layers:
            found.setdefault(layer, set()).update(range(first, last + 1))
    return {layer: tuple(sorted(ids)) for layer, ids in sorted(found.items())}


def _spans(numbers: tuple[int, ...]) -> str:
    """Ascending numbers, with runs shortened: 1-3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in runs)


def super_experts(seen: Observations, facts: ModelFacts) -> dict[int, tuple[int, ...]]:
    """The super experts of the decoder's layers; a multi-token-prediction block has none.

    Raises ArtifactError if the observations are of a format without the largest values.
    """
    import numpy as np

    layers = [layer for layer in facts.moe_layers if layer != facts.mtp_layer]
    peaks = [seen.layers[layer].output_max for layer in layers if layer in seen.layers]
    if len(peaks) < len(layers) or any(one is None for one in peaks):
        raise ArtifactError(
            "observations: have no output_max for each layer, by which --protect-super-experts "
            "finds them, as an earlier version made them; run `reap2gguf observe` again"
        )
    every = np.concatenate([one for one in peaks if one is not None])
    limit = max(float(np.percentile(every, _PERCENTILE)), float(every.max()) * _SHARE_OF_LARGEST)
    found = {}
    for layer, one in list(zip(layers, peaks, strict=True))[: int(len(layers) * _SHARE_OF_LAYERS)]:
        ids = tuple(int(expert) for expert in np.flatnonzero(one > limit))  # type: ignore[operator]
        if ids:
            found[layer] = ids
    return found


def protected_experts(
    protection: Protection, seen: Observations | None, target: Target, facts: ModelFacts
) -> ProtectedExperts:
    """The protected experts of a model that keeps a number of them in each layer.

    Raises UsageError for experts that do not exist or do not all fit, and if super experts are to
    be found and nothing was observed; ArtifactError as `super_experts` does.
    """
    if protection.super_experts and seen is None:
        raise UsageError(
            "--protect-super-experts finds them by observations, and this way of choosing experts "
            "reads none; choose a --method that does, or name experts with --protect"
        )
    outliers = super_experts(seen, facts) if protection.super_experts and seen is not None else {}
    named = named_experts(protection.pinned, facts.moe_layers, facts.n_experts)
    found = ProtectedExperts(named, outliers)
    room, size = target.n_kept // facts.n_groups, facts.n_experts // facts.n_groups
    for layer, ids in found.all.items():
        for group in range(facts.n_groups):
            inside = [one for one in ids if one // size == group]
            if len(inside) > room:
                where = f"layer {layer}" + (f", group {group}" if facts.n_groups > 1 else "")
                raise UsageError(
                    f"{where}: {len(inside)} experts are protected and {room} stay; protect fewer, "
                    "or keep more with --keep-experts or --compression"
                )
    return found


def check_protection(
    protection: Protection,
    seen: Observations | None,
    method: str,
    target: Target,
    facts: ModelFacts,
) -> None:
    """Refuse protected experts that do not exist or fit, as far as that is known before a pass.

    Raises what `protected_experts` raises.
    """
    if seen is None and not is_from_weights(method):
        protection = replace(protection, super_experts=False)  # found when it has been observed
    protected_experts(protection, seen, target, facts)


def protection_notes(found: ProtectedExperts, protection: Protection) -> list[str]:
    """What to tell of protected experts, one line each."""
    lines = []
    if found.named:
        lines.append(f"protected: {_count(found.named)} that --protect names")
    if protection.super_experts:
        where = "; ".join(f"layer {layer}: {_spans(ids)}" for layer, ids in _few(found))
        named = f" ({where})" if where else ""
        lines.append(f"super experts: {_count(found.super_experts)} found and protected{named}")
    return lines


_SHOWN_LAYERS = 8


def _few(found: ProtectedExperts) -> list[tuple[int, tuple[int, ...]]]:
    return sorted(found.super_experts.items())[:_SHOWN_LAYERS]


def _count(experts: Kept) -> str:
    total = sum(map(len, experts.values()))
    return f"{total:,} expert{'' if total == 1 else 's'}"
