"""A choice as it is printed."""

from __future__ import annotations

from reap2gguf.choosing.lines import choice_lines
from tests.choosing.records import candidate, choice


def test_candidates_are_ranked_and_the_chosen_one_is_marked() -> None:
    found = choice(
        candidate("reap", 0.3, (0.0, 0.0)),
        candidate("frequency", 0.1, (0.5, 0.01)),
        candidate("ean_sum", 0.3, (0.0, 0.0), same_as="reap"),
    )
    lines = list(choice_lines(found, {"reap": 12.345}))
    assert lines[0] == (
        "rows of a text: 2 rows, 64 tokens scored; perplexity of the source 9.500 ± 0.200"
    )
    heads, first, second, third = lines[2:6]
    assert heads.split() == [
        "candidate", "KL", "held-out", "perplexity", "KL", "other", "perplexity", "cost",
    ]  # fmt: skip
    assert first.split()[:4] == ["frequency", "0.1000", "±", "0.0100"]
    assert "1.5000 ± 0.0100 !" in first  # significantly worse on the other text
    assert first.endswith(" -")
    assert second.split()[:2] == ["*", "reap"]
    assert second.endswith(" 12.3 s")
    assert third.split()[:3] == ["ean_sum", "(as", "reap)"]
    assert len({len(line) for line in (heads, first, second)}) == 1
    assert lines[6] == "chosen: reap"
    assert lines[7].startswith(
        "rule: the lowest mean KL divergence from the source on the held-out"
    )


def test_without_another_text_there_are_no_columns_of_it() -> None:
    lines = list(choice_lines(choice(candidate("reap", 0.3, None))))
    assert len(lines) == 5
    assert "other" not in "".join(lines)
