"""Rules say the types that they are made of, and layers are matched by few globs."""

from __future__ import annotations

import fnmatch

from gguf import GGMLQuantizationType as Type
from hypothesis import given
from hypothesis import strategies as st

from reap2gguf.fitting.rules import layer_globs, rules_of
from reap2gguf.models.roles import spots
from reap2gguf.quantizing.recipe import Rule

NAMES = ("attn_q.weight", "ffn_down_exps.weight", "ffn_down_shexp.weight")
SOME = st.sampled_from([Type.Q4_K, Type.Q6_K, Type.IQ3_S])


@given(st.dictionaries(st.tuples(st.integers(0, 140), st.sampled_from(NAMES)), SOME, min_size=1))
def test_the_first_rule_that_fits_gives_the_type(layers: dict[tuple[int, str], Type]) -> None:
    types = {f"blk.{layer}.{name}": one for (layer, name), one in layers.items()}
    types["output.weight"] = Type.Q6_K
    rules, places = [Rule(*one) for one in rules_of(types)], spots(types)
    for name, tensor_type in types.items():
        assert (
            next(rule.tensor_type for rule in rules if rule.selector.fits(places[name]))
            is tensor_type
        )
    for rule in rules:  # none is idle
        assert any(
            next(one for one in rules if one.selector.fits(places[name])) is rule for name in types
        )


@given(st.sets(st.integers(0, 250), min_size=1))
def test_globs_match_these_layers_and_no_others(layers: set[int]) -> None:
    globs = list(layer_globs(sorted(layers)))
    matched = {n for n in range(1000) if any(fnmatch.fnmatchcase(str(n), one) for one in globs)}
    assert matched == layers
    assert len(globs) == len({layer // 10 for layer in layers})


def test_equal_layers_are_one_rule() -> None:
    types = {f"blk.{layer}.attn_q.weight": Type.Q6_K for layer in range(48)}
    assert [match for match, _ in rules_of(types)] == ["blk.*.attn_q.weight"]
    types["blk.7.attn_q.weight"] = Type.Q8_0
    assert [match for match, _ in rules_of(types)] == [
        "blk.7.attn_q.weight", "blk.*.attn_q.weight",
    ]  # fmt: skip
