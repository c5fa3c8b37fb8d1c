"""Few rules that give tensors their types: by the words of roles, by name, and by layer.

Sets of tensors are the bits of integers, so that hundreds of choices are tried in little time.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from reap2gguf.models.roles import ROLE_WORDS
from reap2gguf.quantizing.selector import MAX_PARTS, Selector

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType as Type

    from reap2gguf.models.roles import Spot

_PER_RANGE = 0.15  # what a range of layers costs, where a rule costs one
_ANY = "*"
_FOR_ANY = 0.5  # and what a rule costs more that says nothing about its tensors


@dataclass(frozen=True)
class CoverRule:
    """A rule for the tensors that it is the first to match."""

    selector: Selector
    tensor_type: Type
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Choice:
    """A rule, and all tensors that it matches as bits."""

    selector: Selector
    tensor_type: Type
    bits: int
    inside: int = -1  # all tensors in the layers of the selector

    @property
    def cost(self) -> float:
        n_ranges = self.selector.layers.count(",") + 1 if self.selector.layers else 0
        return 1 + _PER_RANGE * n_ranges + (_FOR_ANY if self.selector.match == _ANY else 0)


def cover(
    places: Mapping[str, Spot], types: Mapping[str, Type], needed: Collection[str]
) -> list[CoverRule]:
    """Rules, of which the first that matches counts, for the tensors that are `needed`.

    `types` has the type of every tensor that rules decide about; a rule may match others of them
    too if it gives them their types. Tensors of `places` without a type may be matched by any rule.
    """
    return _Cover(places, types, needed).rules()


class _Cover:
    def __init__(
        self, places: Mapping[str, Spot], types: Mapping[str, Type], needed: Collection[str]
    ) -> None:
        self._names = list(types)
        self._places = [places[name] for name in self._names]
        self._types = types
        self._needed = self._bits(name in needed for name in self._names)
        self._of_type: dict[Type, int] = {
            one: self._bits(types[name] is one for name in self._names)
            for one in dict.fromkeys(types.values())
        }
        blocks = {place.block for place in self._places if place.block is not None}
        self._layers = {
            block: self._bits(place.block == block for place in self._places)
            for block in sorted(blocks)
        }
        self._matches = {
            match: self._fitting(Selector(match)) for match in self._selectors(list(places))
        }

    @staticmethod
    def _bits(found: Iterator[bool]) -> int:
        return sum(1 << position for position, one in enumerate(found) if one)

    def _fitting(self, selector: Selector) -> int:
        return self._bits(selector.fits(place) for place in self._places)

    def _selectors(self, names: Sequence[str]) -> list[str]:
        """What rules may be for: roles, then names in any layer, then names."""
        globs = [re.sub(r"^blk\.\d+\.", "blk.*.", name) for name in names]
        return list(dict.fromkeys([*ROLE_WORDS, *globs, _ANY]))

    def rules(self) -> list[CoverRule]:
        chosen: list[_Choice] = []
        taken = 0
        while waiting := self._needed & ~taken:
            best = max(self._blocks(taken, waiting), key=lambda block: _worth(block, waiting))
            for one in best:
                taken |= one.bits
            chosen += best
        return [
            CoverRule(one.selector, one.tensor_type, tuple(self._named(bits)))
            for one, bits in self._first_matches(self._shortened(chosen))
        ]

    def _named(self, bits: int) -> list[str]:
        return [name for position, name in enumerate(self._names) if bits >> position & 1]

    def _first_matches(self, choices: Sequence[_Choice]) -> Iterator[tuple[_Choice, int]]:
        taken = 0
        for one in choices:
            yield one, one.bits & ~taken
            taken |= one.bits

    def _is_right(self, choices: Sequence[_Choice]) -> bool:
        """Whether all needed tensors get their types, and no other one a wrong type."""
        taken = 0
        for one, bits in self._first_matches(choices):
            if bits & ~self._of_type[one.tensor_type]:
                return False
            taken |= bits
        return not self._needed & ~taken

    def _blocks(self, taken: int, waiting: int) -> Iterator[list[_Choice]]:
        """For each selector, rules that settle tensors that wait: all of them, or those it can."""
        for match, bits in self._matches.items():
            free = bits & ~taken
            if not free & waiting:
                continue
            kinds = [one for one, of_type in self._of_type.items() if free & of_type]
            if len(kinds) == 1:
                yield [_Choice(Selector(match), kinds[0], bits)]
                continue
            by_layer = {layer: free & of_layer for layer, of_layer in self._layers.items()}
            if all_layers := self._whole(match, bits, free, by_layer):
                yield all_layers
            if some := self._some(match, bits, waiting, by_layer):
                yield some

    def _whole(
        self, match: str, bits: int, free: int, by_layer: Mapping[int, int]
    ) -> list[_Choice]:
        """Rules for every tensor of a selector: the last one has no layers."""
        layers: dict[Type, list[int]] = {}
        for layer, here in by_layer.items():
            if here:
                kind = self._only_type(here)
                if kind is None:
                    return []
                layers.setdefault(kind, []).append(layer)
            free &= ~here
        if free:
            return []  # some are in no layer
        empty = [layer for layer, here in by_layer.items() if not here]
        texts = {kind: layer_ranges(found, empty) for kind, found in layers.items()}
        last = max(texts, key=lambda kind: (len(texts[kind]), len(layers[kind])))
        found = [
            one
            for kind in texts
            if kind is not last
            for one in self._in_layers(match, bits, kind, layers[kind], empty)
        ]
        return [*found, _Choice(Selector(match), last, bits)]

    def _some(
        self, match: str, bits: int, waiting: int, by_layer: Mapping[int, int]
    ) -> list[_Choice]:
        """Rules for the layers that wait and in which the selector's tensors have one type."""
        must: dict[Type, list[int]] = {}
        may: dict[Type | None, list[int]] = {}
        for layer, here in by_layer.items():
            kind = self._only_type(here)
            if here & waiting and kind is not None:
                must.setdefault(kind, []).append(layer)
            elif kind is not None or not here:
                may.setdefault(kind, []).append(layer)
        return [
            one
            for kind, layers in must.items()
            for one in self._in_layers(
                match, bits, kind, layers, [*may.get(kind, []), *may.get(None, [])]
            )
        ]

    def _only_type(self, bits: int) -> Type | None:
        """The one type that these tensors have; None if there are several, or no tensors."""
        return next(
            (kind for kind, of_type in self._of_type.items() if bits and not bits & ~of_type), None
        )

    def _in_layers(
        self, match: str, bits: int, kind: Type, layers: list[int], may: list[int]
    ) -> Iterator[_Choice]:
        ranges = layer_ranges(layers, may)
        for start in range(0, len(ranges), MAX_PARTS):
            some = ranges[start : start + MAX_PARTS]
            text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in some)
            inside = sum(
                of_layer
                for layer, of_layer in self._layers.items()
                if any(a <= layer <= b for a, b in some)
            )
            yield _Choice(Selector(match, text), kind, bits & inside, inside)

    def _shortened(self, choices: list[_Choice]) -> list[_Choice]:
        """Fewer rules to the same effect: none that is needless, and wide ones at the end."""
        choices = self._narrowed(self._without_needless(choices))
        for match, bits in self._matches.items():
            for kind in self._of_type:
                wide = _Choice(Selector(match), kind, bits)
                shorter = self._without_needless([*choices, wide])
                if _cost(shorter) < _cost(choices):
                    choices = shorter
        return self._narrowed(choices)

    def _narrowed(self, choices: list[_Choice]) -> list[_Choice]:
        """The same rules for as few tensors as they are needed for: words that say more."""
        for place, (one, bits) in enumerate([*self._first_matches(choices)]):
            wanted = bits & self._needed
            found = min(
                (
                    replace(one, selector=replace(one.selector, match=match), bits=matched)
                    for match, matching in self._matches.items()
                    if not wanted & ~(matched := matching & one.inside)
                ),
                key=lambda other: other.bits.bit_count(),
            )
            narrower = [*choices[:place], found, *choices[place + 1 :]]
            if found.bits.bit_count() < one.bits.bit_count() and self._is_right(narrower):
                choices = narrower
        return choices

    def _without_needless(self, choices: list[_Choice]) -> list[_Choice]:
        if not self._is_right(choices):
            return choices
        for one in sorted(choices, key=lambda one: -one.cost):
            fewer = [other for other in choices if other is not one]
            if self._is_right(fewer):
                choices = fewer
        return [one for one, bits in self._first_matches(choices) if bits]


def _cost(choices: Sequence[_Choice]) -> float:
    return sum(one.cost for one in choices)


def _worth(block: Sequence[_Choice], waiting: int) -> float:
    """How many of the tensors that wait these rules settle, for each rule."""
    settled = 0
    for one in block:
        settled |= one.bits
    return (settled & waiting).bit_count() / _cost(block)


def layer_ranges(layers: Sequence[int], may: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges with all of `layers`, and those of `may` without which there would be more ranges.

    >>> layer_ranges([0, 1, 4, 8], [2, 3, 6])
    [(0, 4), (8, 8)]
    """
    inside = {*layers, *may}
    ranges: list[tuple[int, int]] = []
    for layer in sorted(layers):
        if ranges and inside.issuperset(range(ranges[-1][1], layer)):
            ranges[-1] = (ranges[-1][0], layer)
        else:
            ranges.append((layer, layer))
    return ranges
