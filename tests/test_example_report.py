"""docs/example-report.html is what the program makes of the example, but for last digits."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

import reap2gguf
from reap2gguf.building.plan import make_plan
from reap2gguf.options import BuildOptions, ComputeOptions
from tests.tiny import EXAMPLE, REPOSITORY

PAGE = (REPOSITORY / "docs" / "example-report.html").read_text(encoding="utf-8")
_NUMBER = re.compile(r"\d+(?:[,.]\d+)*")
_AGAIN = "make it again with the commands in docs/reports.md"
_FAR = 0.02  # of all figures: extremes and tails differ between processors


def options(output: Path) -> BuildOptions:
    """Those of the commands in docs/reports.md."""
    return BuildOptions(
        ("q8_0", "q4km", "unsloth-iq4km"), str(EXAMPLE), keep_experts=12, output=output,
        evaluate="always", compute=ComputeOptions("cpu"),
    )  # fmt: skip


def parts(page: str, tag: str) -> list[str]:
    return re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", page, re.DOTALL)


def shown(page: str) -> str:
    """The text before how it was made, which names versions and hashes; without charts."""
    for tag in ("svg", "style", "script"):
        page = re.sub(rf"<{tag}\b.*?</{tag}>", "", page, flags=re.DOTALL)
    text = html.unescape(re.sub(r"(<[^>]*>)+", "|", page))
    return text.rpartition("|How it was made|")[0]


def test_its_sizes_and_types_are_those_of_the_plan(tmp_path: Path) -> None:
    plan = make_plan(options(tmp_path))
    text = shown(PAGE)
    assert f"|{plan.n_parameters:,} of {plan.checkpoint.n_parameters:,}|" in text, _AGAIN
    for recipe in plan.recipes:
        file = re.escape(plan.gguf_name(recipe))
        found = re.search(rf"\|{file}\|[^|]+\|([\d.]+) MiB\|([\d.]+)\|", text)
        assert found is not None, f"{recipe.label}: {_AGAIN}"
        # a file has a header too, with the tokenizer
        assert recipe.n_bytes / 2**20 < float(found[1]) < recipe.n_bytes / 2**20 + 0.5
        assert float(found[2]) == pytest.approx(recipe.bits_per_weight, abs=0.006), _AGAIN
        types = re.search(rf"\|Types in {file}\|(.*?)(?:\|Types in|$)", text, re.DOTALL)
        assert types is not None
        for tensor_type in {kind.name for kind in recipe.tensor_types().values()}:
            assert re.search(rf"\b{tensor_type}\b", types[1]), _AGAIN


@pytest.mark.slow
def test_its_figures_are_those_of_a_build_of_today(tmp_path: Path) -> None:
    made = reap2gguf.build(options(tmp_path / "build"))
    page = reap2gguf.report(made.gguf_folder, tmp_path / "report.html")
    ours, theirs = shown(page.read_text(encoding="utf-8")), shown(PAGE)
    text = page.read_text(encoding="utf-8")
    for tag in ("style", "script"):
        assert parts(text, tag) == parts(PAGE, tag) != [], f"{tag}: {_AGAIN}"
    assert _NUMBER.split(ours) == _NUMBER.split(theirs), _AGAIN
    pairs = list(zip(_NUMBER.findall(ours), _NUMBER.findall(theirs), strict=True))
    far = [(one, other) for one, other in pairs if _value(one) != near(_value(other))]
    assert len(far) <= _FAR * len(pairs), f"{far}: {_AGAIN}"


def _value(figure: str) -> float:
    return float(figure.replace(",", ""))


def near(value: float) -> object:
    return pytest.approx(value, rel=0.02, abs=0.02)
