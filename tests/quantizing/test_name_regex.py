"""Regular expressions on names, compared with Python's; with std::regex in test_imported.py."""

from __future__ import annotations

import random
import re

import pytest

from reap2gguf.quantizing.name_regex import MOST_LETTERS, NameRegex, RegexError

_ATOMS = (
    "a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", r"\D", "(a|b)", "(?:ab|b)", "^", "$", r"\b", "1",
    "[0-9]", "_", r"\w", r"\W", r"[\d_]", "[a-]", "(a|)",
)  # fmt: skip
_REPEATS = ("*", "+", "?", "{1,2}", "{2}", "{0,1}", "{1,}", "*?", "+?", "??")
_ASSERTIONS = ("^", "$", r"\b")


def drawn(random: random.Random) -> str:
    """A pattern of a few parts, groups within groups among them."""
    pattern = ""
    for _ in range(random.randint(1, 5)):
        atom = random.choice(_ATOMS)
        if random.random() < 0.15:
            atom, pattern = f"({pattern}|{atom})", ""
        if atom not in _ASSERTIONS and random.random() < 0.4:
            atom += random.choice(_REPEATS)
        pattern += atom
    return pattern


def test_patterns_find_what_pythons_do() -> None:
    draw = random.Random(1)
    outcomes = {True: 0, False: 0}
    for _ in range(8000):
        pattern = drawn(draw)
        name = "".join(draw.choice("ab1._") for _ in range(draw.randint(0, 7)))
        expected = re.search(pattern, name, re.ASCII) is not None
        assert NameRegex(pattern).found_in(name) is expected, (pattern, name)
        outcomes[expected] += 1
    assert min(outcomes.values()) > 1000


def test_one_automaton_is_used_again() -> None:
    pattern = r"^blk\.([0-9]|1[0-5])\.ffn_(up|gate)_exps\.weight$"
    regex, of_python = NameRegex(pattern), re.compile(pattern)
    for layer in range(30):
        for rest in ("ffn_up_exps.weight", "ffn_gate_exps.weight", "ffn_down_exps.weight"):
            name = f"blk.{layer}.{rest}"
            assert regex.found_in(name) is (of_python.search(name) is not None)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("[[:digit:]]+", "blk.12", True),
        ("blk.[[:alpha:]]", "blk.1", False),
        ("[[:alnum:]_]$", "a_", True),
        (r"\Bb", "ab", True),
        (r"\Bb", "b", False),
        ("a|", "x", True),
    ],
)
def test_what_python_says_in_another_way(pattern: str, name: str, expected: bool) -> None:
    assert NameRegex(pattern).found_in(name) is expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "expected letters"),
        ("a" * (MOST_LETTERS + 1), "1,501 letters, expected at most 1,500"),
        ("ä", "of ASCII"),
        ("attn_(v", r"expected '\)' \(letter 8\)"),
        ("attn_v)", r"'\)' without '\(' \(letter 7\)"),
        ("*attn", r"nothing to repeat \(letter 1\)"),
        ("^*", "nothing to repeat"),
        ("a**", r"a repeat of a repeat \(letter 3\)"),
        ("a*+", "a repeat of a repeat"),
        ("a{2", r"expected '}' \(letter 4\)"),
        ("a{,2}", "expected a number up to 100"),
        ("a{101}", "expected a number up to 100"),
        ("a{3,2}", r"\{3,2\} ends before it begins"),
        ("a}", "'}' without its beginning"),
        ("[", r"the end, expected '\]'"),
        ("[]", "an empty set"),
        ("[z-a]", "a range that ends before it begins"),
        ("[[:word:]]", "expected one of alnum"),
        (r"(a)\1", r"'\\1' is not supported"),
        ("(?=a)", r"a group that begins with '\(\?' is not supported"),
        ("a\\", "the end, expected a letter after"),
        ("(" * 60 + ")" * 60, "more than 50 groups"),
        ("((a{100}){100}){100}", "too many parts and repeats"),
    ],
)
def test_what_is_wrong_with_a_pattern(pattern: str, message: str) -> None:
    with pytest.raises(RegexError, match=message):
        NameRegex(pattern)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a*)*b", "(a|aa)+$", "(.*)(.*)(.*)(.*)(.*)b$"])
def test_patterns_that_take_others_hours(pattern: str) -> None:
    """They would try 2^60 ways."""
    assert not NameRegex(pattern).found_in("a" * 60 + "!")
