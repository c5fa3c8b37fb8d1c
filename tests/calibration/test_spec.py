from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap2gguf.calibration.spec import Component, decide, parse, parse_plain, write
from reap2gguf.errors import CalibrationError
from reap2gguf.options import CalibrationOptions

# what REAP's parser gives for each: its examples, and the edges of its expression
TAKEN = [
    ("theblackcat102/evol-codealpaca-v1:4096",
     [("theblackcat102/evol-codealpaca-v1", 4096, None, "train")]),
    ("open-r1/Mixture-of-Thoughts[code]:4096",
     [("open-r1/Mixture-of-Thoughts", 4096, "code", "train")]),
    ("SWE-bench/SWE-smith-trajectories(tool):4096",
     [("SWE-bench/SWE-smith-trajectories", 4096, None, "tool")]),
    ("dataset[subset](split):4096", [("dataset", 4096, "subset", "split")]),
    (" a:1 ,\tb [x]:2", [("a", 1, None, "train"), ("b", 2, "x", "train")]),
    ("a[b:(c]:3", [("a", 3, "b:(c", "train")]),
    ("a(b:[c]):3", [("a", 3, None, "b:[c]")]),
    ("a b:007", [("a b", 7, None, "train")]),
    ("a@b:1", [("a@b", 1, None, "train")]),
    ("a[ x ]:1", [("a", 1, " x ", "train")]),
    ("a:\u0663", [("a", 3, None, "train")]),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "expected"), TAKEN)
def test_what_reap_takes(spec: str, expected: list[tuple[str, int, str | None, str]]) -> None:
    assert parse(spec) == tuple(Component(*values) for values in expected)


@pytest.mark.parametrize(
    "spec",
    ["owner/name", "a:b", "a", "", ":5", "a:", "a:-1", "a:1.5", "a(s)[t]:1", "a[]:1", "a()x:1"],
)
def test_what_reap_takes_for_a_plain_name(spec: str) -> None:
    assert parse(spec) is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("a:1,b", r"component 2 of 2: 'b', expected name\[subset\]\(split\):n"),
        ("a:1,", "component 2 of 2: ''"),
        ("a:1,b[x,y]:2", r"component 2 of 3: 'b\[x'"),
        ("a:1,(s):2", r"component 2 of 2: '\(s\):2'"),
        ("a:1,b:0", "component 2: '0' rows of 'b', expected from 1 to 2,147,483,647"),
        ("a:2147483648", "component 1: '2147483648' rows"),
        ("a:" + "9" * 5000, "component 1"),
        (",".join(["a:1"] * 257), "257 components, expected at most 256"),
    ],
)
def test_what_is_refused(spec: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        parse(spec)


NAMES = st.text(st.characters(exclude_characters="[]():,"), min_size=1).map(str.strip)
COMPONENTS = st.builds(
    Component,
    NAMES.filter(bool),
    st.integers(1, 2**31 - 1),
    st.none() | st.text(st.characters(exclude_characters="],"), min_size=1),
    st.text(st.characters(exclude_characters="),"), min_size=1),
)


@given(st.lists(COMPONENTS, min_size=1, max_size=5))
def test_what_is_written_is_read(components: list[Component]) -> None:
    assert parse(write(components)) == tuple(components)


@given(st.text() | st.text("a/[]():,0123 @.", max_size=30))
def test_any_text_is_decided_or_refused(spec: str) -> None:
    try:
        decide(CalibrationOptions(spec))
    except CalibrationError as error:
        assert spec.strip() == "" or str(error)


def test_a_plain_name_is_a_dataset_on_the_hub() -> None:
    assert parse_plain("owner/name") == Component("owner/name")
    assert parse_plain("owner/name@v1[code](test)") == Component(
        "owner/name@v1", None, "code", "test"
    )
    assert Component("owner/name@v1").dataset == "owner/name"
    assert Component("owner/name@v1").revision == "v1"
    for text in ("name", "texts/a.txt", "./owner/name", "~/name", "/owner/name", "owner/na me"):
        assert parse_plain(text) is None, text


def asked(spec: str, samples: int | None = None, length: int | None = None) -> tuple[int, int]:
    found = decide(CalibrationOptions(spec, samples, length))
    return found.samples, found.max_length


def test_rows_and_lengths_that_nobody_gave() -> None:
    assert asked("default") == (1024, 2048)
    assert asked("owner/name") == (1024, 2048)
    assert asked("owner/name", 7, 9) == (7, 9)
    assert asked("owner/name:3000,owner/other:2000") == (5000, 2048)
    assert asked("owner/name:3000,owner/other:2000", 100, 64) == (100, 64)


def test_a_file_that_is_here_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").mkdir()
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "seed-000").write_text("x")
    (tmp_path / "b:5").mkdir()
    composite = decide(CalibrationOptions("owner/name:5,other/name:6,a.txt:7,default:8"))
    assert [one.is_local for one in composite.components] == [True, False, True, True]
    assert composite.label == "name:5,other/name:6,a.txt:7,default:8", "no folder is told"
    assert decide(CalibrationOptions("seed-000")).components == (Component("seed-000"),)
    assert decide(CalibrationOptions("b:5")).components == (Component("b:5"),)
    assert not decide(CalibrationOptions("a.txt")).is_composite


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gone.txt", r"gone.txt: no such file; pass a .txt"),
        ("gone.txt:5", "component 1 of 1: gone.txt: no such file or folder"),
        ("owner/name:1,../gone:5", "component 2 of 2: ../gone: no such file or folder"),
        ("default[x]:5", "component 1 of 1: default is not on the Hub, so it has no"),
        ("owner/name:1,default(test):5", "component 2 of 2: default is not on the Hub"),
        ("a:b", "a:b: no such file"),
        ("seed-001", "no such file.*seed-000, seed-002, reap-agentic"),
    ],
)
def test_what_is_nowhere(spec: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        decide(CalibrationOptions(spec))
