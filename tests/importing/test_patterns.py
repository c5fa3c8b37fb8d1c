"""Patterns as globs and layers: they find what the pattern finds."""

from __future__ import annotations

import re

import pytest

from reap2gguf.importing.patterns import selector_of
from reap2gguf.models.roles import spots
from reap2gguf.quantizing.selector import Selector

NAMES = ["token_embd.weight", "output.weight", "output_norm.weight"]
NAMES += [
    f"blk.{layer}.{rest}.weight"
    for layer in range(64)
    for rest in ("attn_v", "attn_v_norm", "ffn_up_exps", "ffn_up_shexp")
]


@pytest.mark.parametrize(
    ("pattern", "match", "layers"),
    [
        (r"^token_embd\.weight$", "token_embd.weight", ""),
        (r"^blk\.3\.attn_v\.weight$", "blk.3.attn_v.weight", ""),
        (r"^blk\.(3)\.attn_v\.weight$", "blk.*.attn_v.weight", "3"),
        (r"^blk\.([0-9]|[1-3][0-9]|4[0-6])\.attn_v\.weight$", "blk.*.attn_v.weight", "0-46"),
        (r"^blk\.(2|9|1[6-8])\.ffn_up_exps\.weight$", "blk.*.ffn_up_exps.weight", "2,9,16-18"),
        (r"^blk\.\d+\.attn_v\.weight$", "blk.*.attn_v.weight", ""),
        (r"^blk\.[0-9]+\.attn_v\.weight$", "blk.*.attn_v.weight", ""),
    ],
)
def test_whole_names(pattern: str, match: str, layers: str) -> None:
    assert selector_of(pattern) == (match, layers, False)


@pytest.mark.parametrize(
    "pattern",
    [
        "attn_v",
        r"blk\.3\.attn_v",
        r"^blk\..*\.attn_v\.weight$",
        r"^blk\.3.attn_v\.weight$",  # any letter after the 3
        r"^blk\.[1-9][0-9]*\.attn_v\.weight$",  # all but the first has no end
        r"^blk\.(3)\.ffn_(up|gate)_exps\.weight$",
        r"^blk\.(3\.attn_v\.weight$",
        "^a|b$",
    ],
)
def test_what_remains_a_regular_expression(pattern: str) -> None:
    assert selector_of(pattern) == (pattern, "", True)


@pytest.mark.parametrize(
    "pattern",
    [
        r"^blk\.(1|[3-4]|[7-8]|13|17|19|2[3-4]|28|30|34|38|4[1-5])\.ffn_up_shexp\.weight$",
        r"^blk\.([5-6]|[1-2][0-2]|15|[2-3][5-7]|29|3[1-3]|39|40|46)\.ffn_up_exps\.weight$",
        r"^blk\.(?:0|63)\.attn_v\.weight$",
        r"^blk\.\d\.attn_v\.weight$",
        r"^blk\.[0-9]+\.attn_v\.weight$",
        r"^output\.weight$",
    ],
)
def test_the_same_tensors_are_found(pattern: str) -> None:
    match, layers, is_regex = selector_of(pattern)
    assert not is_regex
    selector = Selector(match, layers)
    found = [name for name, spot in spots(NAMES).items() if selector.fits(spot)]
    assert found == [name for name in NAMES if re.search(pattern, name)]
    assert found
