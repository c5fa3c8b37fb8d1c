from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from reap2gguf.api.builds import estimate
from reap2gguf.artifacts.texts import Texts
from reap2gguf.building.pipeline import build
from reap2gguf.building.plan import Plan, make_plan
from reap2gguf.bundle.manifest import ComponentRecord
from reap2gguf.calibration import drawing
from reap2gguf.calibration.drawing import Drawn, draw, read_texts
from reap2gguf.calibration.sources import load_corpus
from reap2gguf.calibration.spec import decide
from reap2gguf.checkpoint.safetensors_header import read_metadata
from reap2gguf.errors import ArtifactError, CalibrationError, PeerError
from reap2gguf.observing import passes
from reap2gguf.observing.compute import ranks
from reap2gguf.observing.compute.ranks import Ranks
from reap2gguf.options import BuildOptions, CalibrationOptions, ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.tokenizer.tokenizer import Tokenizer
from tests.calibration.reading import reading
from tests.tiny import EXAMPLE


class Notes(Silent):
    """Keeps what a user would read."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(EXAMPLE)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Two files of samples, and a text."""
    for name in ("apples", "pears"):
        lines = (json.dumps({"text": f"{name} {n} " * 12}) for n in range(40))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "notes.txt").write_text("one two three four five six seven\n" * 60)
    return tmp_path / "apples.jsonl", tmp_path / "pears.jsonl"


def drawn(tokenizer: Tokenizer, spec: str, notes: Notes | None = None, **named: Any) -> Drawn:
    calibration = decide(CalibrationOptions(spec, max_length=32, **named))
    return draw(calibration, tokenizer, 32, notes or Notes())


def words(tokenizer: Tokenizer, rows: Any) -> list[str]:
    reference = AutoTokenizer.from_pretrained(EXAMPLE)
    return [reference.decode(row).split()[0] for row in rows]


def test_each_component_gives_what_was_asked(
    tokenizer: Tokenizer, files: tuple[Path, Path]
) -> None:
    notes = Notes()
    found = drawn(tokenizer, f"{files[0]}:30,{files[1]}:10", notes)
    names = words(tokenizer, found.rows)
    assert (names.count("apples"), names.count("pears")) == (30, 10)
    assert {"apples", "pears"} == set(names[:12]), "not one component after the other"
    tokens = [sum(len(r) for r, n in zip(found.rows, names, strict=True) if n == name)
              for name in ("apples", "pears")]  # fmt: skip
    assert found.components == (
        ComponentRecord("apples.jsonl", None, None, None, 30, tokens[0], 30),
        ComponentRecord("pears.jsonl", None, None, None, 10, tokens[1], 10),
    )
    assert notes.notes == [
        f"calibration: apples.jsonl: 30 rows, {tokens[0]:,} tokens",
        f"calibration: pears.jsonl: 10 rows, {tokens[1]:,} tokens",
    ]


def test_rows_in_all_are_of_all(tokenizer: Tokenizer, files: tuple[Path, Path]) -> None:
    found = drawn(tokenizer, f"{files[0]}:40,{files[1]}:40", samples=20)
    assert len(found.rows) == sum(one.rows for one in found.components) == 20
    assert min(one.rows for one in found.components) > 2


def test_the_seed_draws(tokenizer: Tokenizer, files: tuple[Path, Path]) -> None:
    spec = f"{files[0]}:5,{files[1]}:5"
    texts = [drawn(tokenizer, spec, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    digests = [drawn(tokenizer, spec, seed=seed).sha256 for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


def test_too_few_are_said(tokenizer: Tokenizer, files: tuple[Path, Path]) -> None:
    notes = Notes()
    drawn(tokenizer, f"{files[0]}:50", notes)
    (note,) = notes.notes
    assert note.endswith("; 50 rows were requested, but it has only 40")


def test_a_text_gives_its_first_chunks(tokenizer: Tokenizer, files: tuple[Path, Path]) -> None:
    path = files[0].with_name("notes.txt")
    reference = AutoTokenizer.from_pretrained(EXAMPLE, model_max_length=10**9)
    ids = reference(path.read_text(), add_special_tokens=False)["input_ids"]
    rows = [list(row) for row in drawn(tokenizer, f"{path}:3").rows]
    assert sorted(rows) == sorted(ids[i : i + 32] for i in (0, 32, 64))


def test_the_embedded_mix_among_others(tokenizer: Tokenizer, files: tuple[Path, Path]) -> None:
    found = drawn(tokenizer, f"default:7,{files[0].parent}:9")
    assert [(one.name, one.rows) for one in found.components] == [
        ("default", 7), (files[0].parent.name, 9),
    ]  # fmt: skip


def test_only_what_is_drawn_is_rendered(files: tuple[Path, Path]) -> None:
    chats = files[0].with_name("chats.jsonl")
    records = ({"messages": [{"role": "user", "content": str(n)}]} for n in range(50))
    chats.write_text("\n".join(map(json.dumps, records)))
    rendered: list[str] = []

    def render(messages: Any, tools: Any = None, /) -> str:
        rendered.append(messages[0]["content"])
        return str(messages[0]["content"])

    few = load_corpus(str(chats), reading(render), 4, 42).passages
    assert len(rendered) == 4
    everything = load_corpus(str(chats), reading(render)).passages
    assert [one.text for one in everything] == [str(n) for n in range(50)]
    more = load_corpus(str(chats), reading(render), 9, 42).passages
    assert more[:4] == few, "a larger draw begins with the smaller one"


def test_the_text_of_the_importance_matrix(
    tokenizer: Tokenizer, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounded, each component with its share, and no first part that is all of one."""
    spec = f"{files[0]}:30,{files[1]}:10"
    whole = drawn(tokenizer, spec).text
    assert len(whole.splitlines()) == 40
    for name in ("apples", "pears"):
        assert name in whole[: len(whole) // 3]
    monkeypatch.setattr(drawing, "_MAX_SHARED_TEXT", 1000)
    text = drawn(tokenizer, spec).text
    assert 900 < len(text.replace("\n", "")) <= 1000
    assert 200 < sum(len(line) for line in text.splitlines() if "pears" in line) <= 250


def test_chunks_are_no_more_than_rows(tokenizer: Tokenizer, files: tuple[Path, Path]) -> None:
    calibration = decide(CalibrationOptions(f"{files[0]}:6,{files[1]}:2", max_length=32))
    texts = read_texts(tokenizer, calibration, 32, None, 16, 4096)
    assert len(texts.chunks.chunks) == 8 * 32 // 16
    assert len(texts.rows.rows) == 8


def test_components_are_kept_with_their_texts(
    tokenizer: Tokenizer, files: tuple[Path, Path], tmp_path: Path
) -> None:
    calibration = decide(CalibrationOptions(f"{files[0]}:6,{files[1]}:2", max_length=32))
    path = tmp_path / "texts.safetensors"
    texts = read_texts(tokenizer, calibration, 32, None, 16, 4096)
    texts.save(path)
    assert Texts.load(path).rows.components == texts.rows.components
    for broken in ("[1]", "{}", '[{"name": "a"}]', "[", "[" * 10**5):
        metadata = read_metadata(path) | {"components": broken}
        save_file(load_file(path), tmp_path / "broken.safetensors", metadata)
        with pytest.raises(ArtifactError, match="damaged, not the tokenized text that was saved"):
            Texts.load(tmp_path / "broken.safetensors")


def plan_of(files: tuple[Path, Path], output: Path, **changes: Any) -> Plan:
    options = BuildOptions(
        ("q8_0",), str(EXAMPLE), output=output, chunk=32, compute=ComputeOptions("cpu"),
        calibration=CalibrationOptions(f"{files[0]}:9,{files[1]}:5", max_length=32),
    )  # fmt: skip
    return make_plan(replace(options, **changes))


def test_a_build_of_a_composite_is_resumed(files: tuple[Path, Path], tmp_path: Path) -> None:
    first = build(plan_of(files, tmp_path / "out"), Silent())
    assert first.manifest.pruning.n_rows == 14
    assert [one.rows for one in first.manifest.calibration.components] == [9, 5]
    assert first.manifest.calibration.spec == "apples.jsonl:9,pears.jsonl:5"
    other = build(plan_of(files, tmp_path / "out", compression=0.5), Silent())
    reused = {stage.name: stage.reused for stage in other.stages}
    assert reused["texts"]
    assert reused["observe"]
    files[1].write_text(files[1].read_text() + '\n{"text": "one more pear"}')
    again = build(plan_of(files, tmp_path / "out", compression=0.5), Silent())
    assert not next(stage for stage in again.stages if stage.name == "texts").reused


def test_an_estimate_knows_the_components(files: tuple[Path, Path], tmp_path: Path) -> None:
    """14 rows of at most 32 tokens wait between layers, in float32."""
    plan = plan_of(files, tmp_path)
    needs = estimate(plan)
    texts = needs.reused.texts
    assert texts is not None
    n_tokens = max(sum(map(len, texts.rows.rows)), sum(map(len, texts.chunks.chunks)))
    assert needs.amount.n_rows == 14
    assert needs.amount.n_tokens <= 14 * 32
    assert needs.disk.state == n_tokens * plan.model.facts.hidden_size * 4


def test_processes_that_read_different_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process's hash is another's, as where a dataset changes while they begin."""
    here = Ranks(1, 0, 2)
    monkeypatch.setattr(passes, "processes", lambda: here)
    monkeypatch.setattr(ranks, "join", lambda: here)
    monkeypatch.setattr(Ranks, "gather", lambda here, own: [("first", "node0"), own])
    passes._check_same_rows("first")
    with pytest.raises(PeerError, match=r"rows of process 2 of 2, on .*, is other, but .* node0"):
        passes._check_same_rows("other")


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"text": ', "line 1 is not JSON"), ('{"left": 1}', "has left, expected text")],
)
def test_a_broken_component_is_known_when_planned(
    content: str, message: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    files[1].write_text(content)
    with pytest.raises(CalibrationError, match=message):
        plan_of(files, tmp_path)
