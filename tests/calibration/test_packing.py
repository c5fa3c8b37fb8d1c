from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from reap2gguf.api.builds import estimate
from reap2gguf.artifacts.texts import Row
from reap2gguf.building.keys import BuildKeys
from reap2gguf.building.pipeline import build
from reap2gguf.building.plan import Plan, make_plan
from reap2gguf.calibration.drawing import Drawn, draw
from reap2gguf.calibration.rows import RowPacker, pack
from reap2gguf.calibration.sources import Cut, Passage, iterate_corpus, load_corpus
from reap2gguf.calibration.spec import decide
from reap2gguf.cli import cli
from reap2gguf.errors import CalibrationError
from reap2gguf.options import BuildOptions, CalibrationOptions, ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.tokenizer.tokenizer import Tokenizer
from tests.calibration.reading import reading
from tests.tiny import EXAMPLE


class Words:
    """A tokenizer of which each word is a token, and says which."""

    bos = None

    def encode(self, text: str) -> Row:
        return np.array([int(word) for word in text.split()], dtype=np.int64)

    def encode_all(self, texts: Iterable[str], at_least: int | None = None) -> Iterator[Row]:
        return map(self.encode, texts)

    def render_chat(self, messages: Any, tools: Any = None) -> str:
        return str(messages[0]["content"])

    def close(self) -> None:
        """Nothing runs."""


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def sample(number: int, length: int) -> Row:
    """Tokens that say which sample they are of, and where in it they stand."""
    return np.arange(length) + 1000 * number


def packer(length: int) -> RowPacker:
    return RowPacker(Words(), length, seed=1)  # type: ignore[arg-type]


def packed(lengths: list[int], length: int) -> list[tuple[list[int], int]]:
    samples = (sample(number, n) for number, n in enumerate(lengths, start=1))
    return [(one.tokens.tolist(), one.n_samples) for one in pack(samples, length)]


def test_rows_are_those_of_reap() -> None:
    """Samples of 3, 4, 5, 8, 10, 1 and 2 tokens in rows of 8, by hand from REAP's `data.py`.

    It writes a sample at `seq_idx`; where `end_seq` is beyond the row, only what fits. It then goes
    on behind it, and with a new row once the row's end is reached; a sample is never taken twice.
    Its one masked place between samples is set aside, as `pack` says.

    row 1: sample 1 at 0-2, sample 2 at 3-6, sample 3 at 7: its last 4 tokens go nowhere
    row 2: sample 4 at 0-7, which it fills
    row 3: sample 5 at 0-7: its last 2 tokens go nowhere
    row 4: sample 6 at 0, sample 7 at 1-2, and no sample is left: the row is kept as it is
    """
    assert packed([3, 4, 5, 8, 10, 1, 2], 8) == [
        ([1000, 1001, 1002, 2000, 2001, 2002, 2003, 3000], 3),
        ([4000, 4001, 4002, 4003, 4004, 4005, 4006, 4007], 1),
        ([5000, 5001, 5002, 5003, 5004, 5005, 5006, 5007], 1),
        ([6000, 7000, 7001], 2),
    ]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], []),
        ([0, 0], []),
        ([4], [([1000, 1001, 1002, 1003], 1)]),
        ([0, 4, 0], [([2000, 2001, 2002, 2003], 1)]),
        ([4, 1], [([1000, 1001, 1002, 1003], 1)]),  # one token predicts nothing
        ([4, 2], [([1000, 1001, 1002, 1003], 1), ([2000, 2001], 1)]),
        ([1, 1], [([1000, 2000], 2)]),
    ],
)
def test_ends(lengths: list[int], expected: list[Any]) -> None:
    assert packed(lengths, 4) == expected


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_the_samples_one_after_another(seed: int) -> None:
    """Whatever their lengths: whole but for the last of a row, none left out and none twice."""
    chance = random.Random(seed)
    length = chance.randint(2, 60)
    lengths = [chance.choice([0, 1, chance.randint(1, 90)]) for _ in range(chance.randint(1, 80))]
    rows = packed(lengths, length)
    assert all(len(row) == length for row, _ in rows[:-1])
    assert len(rows[-1][0]) <= length if rows else True
    seen: list[int] = []
    for row, n_samples in rows:
        owners = sorted({token // 1000 for token in row})
        assert len(owners) == n_samples
        assert row == [token for n in owners for token in sample(n, lengths[n - 1])][: len(row)]
        assert len(row) == min(length, sum(lengths[n - 1] for n in owners))
        seen += owners
    there = [number for number, n in enumerate(lengths, start=1) if n]
    assert seen == there[: len(seen)]
    assert sum(lengths[n - 1] for n in there[len(seen) :]) <= 1


def test_no_sample_is_asked_for_in_vain() -> None:
    """Four rows of 8 take two samples of 6 tokens each: the rest of the second is in none."""
    asked: list[int] = []

    def samples() -> Iterator[Passage]:
        for number in range(100):
            asked.append(number)
            yield Passage("5 " * 6, Cut.SAMPLE)

    done: list[None] = []
    rows = packer(8).make(samples(), "s", 4, on_row=lambda: done.append(None))
    assert len(rows) == len(done) == 4
    assert len(asked) == sum(one.n_samples for one in rows) == 8


@pytest.mark.parametrize("cut", [Cut.STREAM, Cut.DOCUMENT])
def test_texts_are_cut_as_ever(cut: Cut) -> None:
    words = " ".join(map(str, range(100)))
    rows = packer(40).make([Passage(words, cut)], "s", 9, on_row=lambda: None)
    lengths = [40, 40] if cut is Cut.STREAM else [20, 40, 40]
    assert sorted(len(one.tokens) for one in rows) == lengths
    assert all(one.n_samples == 0 for one in rows)


def test_too_little_is_said() -> None:
    for text, count in (("7", 1), ("", 0)):
        with pytest.raises(CalibrationError, match=f"'s': {count} tokens do not fill one row of 8"):
            packer(8).make([Passage(text, Cut.SAMPLE)], "s", 2, lambda: None)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """100 samples of 6 tokens, and 20 of 12: each token says which sample it is of."""
    for name, first, count, n in (("short", 1000, 100, 6), ("long", 2000, 20, 12)):
        texts = (f"{first + number} " * n for number in range(count))
        records = "\n".join(json.dumps({"text": text}) for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(records)
    return tmp_path / "short.jsonl", tmp_path / "long.jsonl"


def drawn(spec: str, notes: Notes | None = None, **named: Any) -> Drawn:
    options = CalibrationOptions(spec, max_length=24, **{"pack": True, **named})
    return draw(decide(options), Words(), 24, notes or Notes())  # type: ignore[arg-type]


def test_a_files_samples_are_drawn_as_far_as_needed(files: tuple[Path, Path]) -> None:
    """Rows of 24 are 4 samples of 6: 5 rows draw 20, in the order in which 20 are drawn apart."""
    notes = Notes()
    found = drawn(f"{files[0]}:5", notes)
    apart = load_corpus(str(files[0]), reading(Words().render_chat), 20, 42)
    expected = [token for one in apart.passages for token in Words().encode(one.text)]
    rows = sorted(tuple(row) for row in found.rows)
    assert rows == sorted(tuple(expected[i : i + 24]) for i in range(0, 120, 24))
    assert sorted(found.text.splitlines()) == sorted(one.text for one in apart.passages)
    assert notes.notes == ["calibration: short.jsonl: 5 rows, 120 tokens of 20 samples"]


def test_files_are_read_in_steps(files: tuple[Path, Path]) -> None:
    """3 samples, then as many as before: 3, 6, 12 and so on, and never one twice."""
    rendered: list[str] = []
    chats = files[0].with_name("chats.jsonl")
    records = ({"messages": [{"role": "user", "content": str(n)}]} for n in range(50))
    chats.write_text("\n".join(map(json.dumps, records)))

    def render(messages: Any, tools: Any = None, /) -> str:
        rendered.append(messages[0]["content"])
        return rendered[-1]

    stream = iterate_corpus(str(chats), reading(render), 3, 42)
    sizes = []
    for _ in range(7):
        next(stream)
        sizes.append(len(rendered))
    assert sizes == [3, 3, 3, 6, 6, 6, 12]
    everything = [one.text for one in iterate_corpus(str(chats), reading(render), 3, 42)]
    apart = load_corpus(str(chats), reading(render), 50, 42)
    assert everything == [one.text for one in apart.passages]


def test_a_composite_is_packed(files: tuple[Path, Path]) -> None:
    """Rows of 24: of 4 short ones, of 2 long ones, each row of one file."""
    notes = Notes()
    found = drawn(f"{files[0]}:9,{files[1]}:30", notes)
    assert [(one.rows, one.tokens, one.samples) for one in found.components] == [
        (9, 216, 36), (10, 240, 20),
    ]  # fmt: skip
    assert {len(row) for row in found.rows} == {24}
    assert all(len({token // 1000 for token in row}) == 1 for row in found.rows)
    assert notes.notes[1].endswith("20 samples; 30 rows were requested, but it has only 10")
    few = drawn(f"{files[0]}:9,{files[1]}:9", samples=6).components
    assert sum(one.rows for one in few) == 6
    assert [one.samples for one in few] == [4 * few[0].rows, 2 * few[1].rows]


def test_texts_beside_samples(files: tuple[Path, Path]) -> None:
    """A folder: the rows of its text as they are apart, and all its samples in other rows."""
    (files[0].parent / "notes.txt").write_text("7 " * 44)
    found = drawn(str(files[0].parent), samples=100)
    (component,) = found.components
    assert component.samples == 120
    rows = [set(row.tolist()) for row in found.rows]
    lengths = [len(row) for row, tokens in zip(found.rows, rows, strict=True) if 7 in tokens]
    assert sorted(lengths) == [20, 24]
    assert all(tokens == {7} for tokens in rows if 7 in tokens)
    assert 7 not in rows[0] | rows[1], "shuffled"


def plan_of(files: tuple[Path, Path], output: Path, pack: bool | None) -> Plan:
    calibration = CalibrationOptions(f"{files[0]}:9,{files[1]}:5", max_length=32, pack=pack)
    return make_plan(
        BuildOptions(
            ("q8_0",), str(EXAMPLE), output=output, chunk=32, compute=ComputeOptions("cpu"),
            calibration=calibration,
        )
    )  # fmt: skip


def test_the_key_of_the_texts(files: tuple[Path, Path], tmp_path: Path) -> None:
    keys = [BuildKeys(plan_of(files, tmp_path, pack)).texts for pack in (None, False, True)]
    assert keys[0] == keys[1] != keys[2]


def test_a_bundle_says_that_it_was_packed(files: tuple[Path, Path], tmp_path: Path) -> None:
    plan = plan_of(files, tmp_path / "out", pack=True)
    result = build(plan, Silent())
    found = result.manifest.calibration
    assert found.packed
    assert [one.rows for one in found.components] == [9, 5]
    assert (
        result.manifest.pruning.n_tokens == 14 * 32 == sum(one.tokens for one in found.components)
    )
    needs = estimate(plan)
    assert (needs.amount.n_rows, needs.amount.n_tokens) == (14, 14 * 32)
    samples = [one.samples for one in found.components]
    tokenizer = Tokenizer(EXAMPLE)
    assert samples[0] >= 9 * 32 / max(len(tokenizer.encode("1000 " * 6)), 24)
    for card in tmp_path.glob("out/*/README.md"):
        text = card.read_text()
        assert "14 rows of at most 32 tokens, samples packed, 448 tokens in total" in text
        assert f"| `short.jsonl` | 9 | 288 | {samples[0]} |" in text
        assert "as in REAP's default" in text
    apart = build(replace(plan_of(files, tmp_path / "out", pack=False)), Silent())
    assert not apart.manifest.calibration.packed
    assert not next(stage for stage in apart.stages if stage.name == "texts").reused


def test_observing_packed_samples(files: tuple[Path, Path], tmp_path: Path) -> None:
    asked = ["observe", str(EXAMPLE), "--calibration", f"{files[0]}:3", "--max-length", "32"]
    output = ["--device", "cpu", "-o", str(tmp_path / "seen.safetensors")]
    done = CliRunner().invoke(cli, [*asked, "--pack", *output])
    assert ": 3 rows, 96 tokens, " in done.stdout, done.stderr
    done = CliRunner().invoke(cli, [*asked, *output])
    assert ": 3 rows, 96 tokens, " not in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("spec", "flags", "is_packed"),
    [
        ("seed-000", [], True),
        ("seed-000", ["--no-pack"], False),
        ("default", [], False),
        ("default", ["--pack"], True),
    ],
)
def test_a_plan_says_so(spec: str, flags: list[str], is_packed: bool) -> None:
    asked = ["plan", str(EXAMPLE), "--recipe", "q8_0", "--calibration", spec, *flags]
    found = CliRunner().invoke(cli, [*asked, "--json"])
    assert json.loads(found.stdout)["calibration"]["pack"] is is_packed
    (line,) = (
        line for line in CliRunner().invoke(cli, asked).stdout.splitlines() if "calibration" in line
    )
    assert (" tokens, samples packed" in line) is is_packed
