from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap2gguf.errors import RecipeError
from reap2gguf.quantizing.toml_text import (
    MAX_TOML_BYTES,
    parse_toml,
    read_toml_file,
    toml_string,
)


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    assert tomllib.loads(f"a = {toml_string(text)}") == {"a": text}


@pytest.mark.parametrize("text", ["a = ", "a.b.c.d.e.f.g.h.i.j.k.l.m.n.o.p.q.r = 1", "[" * 9000])
def test_what_is_not_toml_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"^here(, line 1)?: not valid TOML"):
        parse_toml(text, "here", RecipeError)


def test_a_file_has_a_bound(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("#" * (MAX_TOML_BYTES + 1))
    with pytest.raises(RecipeError, match="too large for a config file"):
        read_toml_file(path, "config file", RecipeError)
    path.write_text("a = 1")
    assert read_toml_file(path, "config file", RecipeError) == "a = 1"
    with pytest.raises(RecipeError, match="cannot be read"):
        read_toml_file(tmp_path, "config file", RecipeError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 1\nb = ?\n", r"^here, line 2: not valid TOML \(Invalid value at column 5\)$"),
        (
            "a = 1\na = 2\n",
            r"^here, line 2: not .* column \d+\); it stands there for the sec",
        ),
        (
            "[a]\n[a]\n",
            r"^here, line 2: not .*; it stands there for the second time, so",
        ),
        ("a = ", r"^here: not valid TOML \(Invalid value \(at end of document\)\)$"),
        ("a.b.c.d.e.f.g.h.i.j.k.l.m.n.o.p.q = 1", r"^here: .* \(a key of over 16 parts\)$"),
    ],
)
def test_a_mistake_is_named_by_its_line(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_toml(text, "here", RecipeError)
