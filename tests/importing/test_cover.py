"""Rules that cover given types: right for any types, and few where few are enough."""

from __future__ import annotations

import random

import pytest
from gguf import GGMLQuantizationType as Type

from reap2gguf.importing.cover import cover, layer_ranges
from reap2gguf.models.roles import Spot, spots

N_LAYERS = 12
_RESTS = ("attn_q", "attn_k", "attn_v", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
NAMES = ["token_embd.weight", "output.weight"]
NAMES += [f"blk.{layer}.{rest}.weight" for layer in range(N_LAYERS) for rest in _RESTS]
PLACES = spots(NAMES)


def applied(
    types: dict[str, Type], needed: set[str], places: dict[str, Spot] = PLACES
) -> list[tuple[str, str, str]]:
    """The rules, after they are seen to give each tensor its type or none."""
    rules = cover(places, types, needed)
    found = {}
    for name, spot in places.items():
        first = next((rule for rule in rules if rule.selector.fits(spot)), None)
        if first is not None:
            found[name] = first.tensor_type
            assert (name in first.names) is (name in types)
    assert needed <= found.keys()
    assert {name: kind for name, kind in found.items() if name in types}.items() <= types.items()
    return [(rule.selector.match, rule.selector.layers, rule.tensor_type.name) for rule in rules]


def of(function: object) -> dict[str, Type]:
    return {name: function(name, PLACES[name].block) for name in NAMES}  # type: ignore[operator]


def test_nothing_is_needed() -> None:
    assert applied(dict.fromkeys(NAMES, Type.Q4_K), set()) == []


def test_a_role() -> None:
    types = of(lambda name, layer: Type.Q8_0 if "attn" in name else Type.Q4_K)
    needed = {name for name in NAMES if "attn" in name}
    assert applied(types, needed) == [("attention", "", "Q8_0")]


def test_all_roles_of_a_word_but_one() -> None:
    types = of(lambda name, layer: Type.Q6_K if "down" in name else Type.Q4_K)
    needed = {name for name in NAMES if "_exps" in name}
    assert applied(types, needed) == [("experts.down", "", "Q6_K"), ("experts", "", "Q4_K")]


def test_layers_of_a_role_with_the_longest_list_left_out() -> None:
    more = (0, 1, 2, 11)

    def kind(name: str, layer: int) -> Type:
        return Type.Q6_K if "down" in name and layer in more else Type.Q5_K

    needed = {name for name in NAMES if "down" in name}
    assert applied(of(kind), needed) == [
        ("experts.down", "3-10", "Q5_K"), ("experts.down", "", "Q6_K"),
    ]  # fmt: skip
    some = {name for name in needed if PLACES[name].block in more}
    assert applied(of(kind), some) == [("experts.down", "0-2,11", "Q6_K")]


def test_layers_that_may_be_matched_too() -> None:
    types = of(lambda name, layer: Type.Q8_0 if "attn_v" in name and layer < 6 else Type.Q4_K)
    needed = {f"blk.{layer}.attn_v.weight" for layer in (0, 2, 5)}
    assert applied(types, needed) == [("blk.*.attn_v.weight", "0-5", "Q8_0")]


def test_tensors_without_a_type_may_be_matched_by_any_rule() -> None:
    types = of(lambda name, layer: Type.Q8_0)
    for name in [name for name in NAMES if "attn_k" in name]:
        del types[name]
    assert applied(types, {name for name in types if "attn" in name}) == [("attention", "", "Q8_0")]


@pytest.mark.parametrize("seed", range(40))
def test_any_types(seed: int) -> None:
    draw = random.Random(seed)
    kinds = draw.sample(
        [Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.Q8_0, Type.IQ4_XS], draw.randint(1, 5)
    )
    usual = {rest: draw.choice(kinds) for rest in _RESTS}
    share = draw.choice((0.02, 0.2, 1))

    def kind(name: str, layer: int | None) -> Type:
        rest = name.split(".")[-2]
        return draw.choice(kinds) if draw.random() < share else usual.get(rest, kinds[0])

    types = of(kind)
    needed = {name for name in NAMES if draw.random() < draw.choice((0.1, 0.9))}
    applied(types, needed)


@pytest.mark.parametrize(
    ("layers", "may", "expected"),
    [
        ([], [], []),
        ([3], [], [(3, 3)]),
        ([0, 1, 2], [], [(0, 2)]),
        ([0, 2], [1], [(0, 2)]),
        ([0, 3], [1], [(0, 0), (3, 3)]),
        ([2, 4], [0, 1, 3, 5], [(2, 4)]),
    ],
)
def test_ranges(layers: list[int], may: list[int], expected: list[tuple[int, int]]) -> None:
    assert layer_ranges(layers, may) == expected


def test_more_ranges_than_a_rule_may_have() -> None:
    names = [f"blk.{layer}.attn_v.weight" for layer in range(900)]
    types = {name: (Type.Q4_K, Type.Q5_K, Type.Q6_K)[n % 3] for n, name in enumerate(names)}
    rules = applied(types, set(names), spots(names))
    assert len(rules) == 5
    assert all(layers.count(",") < 200 for _, layers, _ in rules)
