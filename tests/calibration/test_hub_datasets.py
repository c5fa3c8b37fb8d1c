"""Datasets streamed by the real client from a Hub on the loopback interface."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from reap2gguf.building.pipeline import build
from reap2gguf.building.plan import make_plan
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.errors import CalibrationError
from reap2gguf.options import BuildOptions, CalibrationOptions, ComputeOptions
from reap2gguf.progress import Silent
from tests.loopback_hub.repository import COMMIT, Repository
from tests.loopback_hub.server import Fault, Hub
from tests.tiny import EXAMPLE, REPOSITORY

ROOT = REPOSITORY
MOT, EVOL = "open-r1/Mixture-of-Thoughts", "theblackcat102/evol-codealpaca-v1"
CONFIGS = """---
configs:
- config_name: code
  data_files: [{split: train, path: code/train-*}]
- config_name: math
  data_files: [{split: train, path: math/train-*}, {split: test, path: math/test-*}]
---
"""


def chat(what: str, number: int) -> dict[str, Any]:
    asked = {"role": "user", "content": f"{what} question {number}"}
    answer = {"role": "assistant", "content": f"{what} answer {number}"}
    return {"messages": [asked, answer], "num_tokens": 9, "source": "a test"}


def parquet(records: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    return file.getvalue()


def lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def repositories() -> list[Repository]:
    shards = {
        f"code/train-{part}.parquet": parquet([chat("code", part * 20 + n) for n in range(20)])
        for part in range(3)
    }
    math = {
        "math/train-0.parquet": parquet([chat("math", n) for n in range(10)]),
        "math/test-0.parquet": parquet([chat("test", n) for n in range(3)]),
    }
    evol = [{"instruction": f"Do {n}.", "output": f"Done {n}."} for n in range(30)]
    found = {
        MOT: {"README.md": CONFIGS.encode(), **shards, **math},
        EVOL: {"README.md": b"---\nlicense: mit\n---\n", "train.jsonl": lines(evol)},
        "a/script": {"script.py": b"raise SystemExit(9)"},
        "a/picture": {"README.md": b"---\nlicense: mit\n---\n"},
        "a/broken": {"data.parquet": b"no Parquet"},
        "a/odd": {"data.jsonl": lines([{"left": "a", "right": "b"}])},
        "a/gated": {"data.jsonl": lines(evol)},
    }
    return [
        Repository(name, dict(files), kind="dataset", gated=name == "a/gated")
        for name, files in found.items()
    ]


DRAWN = """
import json, sys
from pathlib import Path
import datasets
from click.testing import CliRunner
from reap2gguf.hub import retry
from reap2gguf.calibration.spec import decide
from reap2gguf.tokenizer.tokenizer import Tokenizer
from reap2gguf.calibration.drawing import observation_rows
from reap2gguf.cli import cli
from reap2gguf.errors import Reap2ggufError
from reap2gguf.options import CalibrationOptions
from reap2gguf.progress import Silent

retry._FIRST_WAIT = 0.01
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # seconds after each Parquet file

class Notes(Silent):
    def __init__(self): self.notes = []
    def note(self, text): self.notes.append(text)

tokenizer = Tokenizer(Path(sys.argv[1]))

def rows(spec, seed, pack):
    told = Notes()
    try:
        calibration = decide(CalibrationOptions(spec, max_length=64, seed=seed, pack=pack))
        found = observation_rows(tokenizer, calibration, 64, 4096, told)
        return [row.tolist() for row in found.rows], found.label, told.notes
    except Reap2ggufError as error:
        return type(error).__name__, str(error), told.notes

def command(*words):
    done = CliRunner().invoke(cli, words)
    return done.exit_code, done.stdout, done.stderr

for line in sys.stdin:
    what, arguments = json.loads(line)
    print(json.dumps({"rows": rows, "command": command}[what](*arguments)), flush=True)
"""


def online(hub: Hub, home: Path) -> dict[str, str]:
    """The environment of a process that may talk to `hub`, and to nobody else."""
    return {**hub.environment(home), "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}


@dataclass
class Client:
    """A process with the real client, that draws rows and runs commands when it is asked to."""

    process: subprocess.Popen[str]
    hub: Hub

    def ask(self, spec: str, seed: int = 42, pack: bool | None = None) -> list[Any]:
        return self._ask("rows", spec, seed, pack)

    def run(self, *words: object) -> tuple[int, str]:
        """The exit code of a command, and what it told on stderr."""
        code, _, told = self._ask("command", *map(str, words))
        return code, told

    def _ask(self, what: str, *arguments: object) -> list[Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([what, arguments]) + "\n")
        self.process.stdin.flush()
        return list(json.loads(self.process.stdout.readline()))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with Hub(repositories=repositories()) as hub:
        environment = online(hub, tmp_path_factory.mktemp("home"))
        process = subprocess.Popen(
            [sys.executable, "-c", DRAWN, str(EXAMPLE)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**environment, "PYTHONPATH": str(ROOT)}, cwd=tmp_path_factory.mktemp("empty"),
        )  # fmt: skip
        with process:
            yield Client(process, hub)


def by_hand(messages: list[dict[str, str]]) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.slow
def test_a_whole_subset_is_its_rows(client: Client) -> None:
    rows, label, notes = client.ask(f"{MOT}[math]:50")
    assert sorted(rows) == sorted(by_hand(chat("math", n)["messages"]) for n in range(10))
    assert label == f"{MOT}[math]:50"
    count = f"10 rows, {sum(map(len, rows)):,} tokens"
    assert notes[0].startswith(f"calibration: {MOT}[math]: {count}; 50 rows were requested")


def test_a_split_of_a_subset(client: Client) -> None:
    rows, _, _ = client.ask(f"{MOT}[math](test):3")
    assert sorted(rows) == sorted(by_hand(chat("test", n)["messages"]) for n in range(3))


def test_rows_are_drawn_by_the_seed(client: Client) -> None:
    known = [by_hand(chat("code", n)["messages"]) for n in range(60)]
    first, again, other = (client.ask(f"{MOT}[code]:12", seed)[0] for seed in (1, 1, -2))
    assert first == again
    assert first != other
    numbers = sorted(known.index(row) for row in first)
    assert len(set(numbers)) == 12
    assert numbers != list(range(12)), "not the first of the first shard"


def test_a_composite_is_mixed(client: Client) -> None:
    rows, _, notes = client.ask(f"{MOT}[code]:10,{EVOL}:10")
    evol = [
        by_hand([{"role": "user", "content": f"Do {n}."},
                 {"role": "assistant", "content": f"Done {n}."}]) for n in range(30)
    ]  # fmt: skip
    owners = [row in evol for row in rows]
    assert owners.count(True) == owners.count(False) == 10
    assert len(set(owners[:8])) == 2, "the first rows are not all of one component"
    assert [note.rpartition(", ")[0] for note in notes] == [
        f"calibration: {MOT}[code]: 10 rows", f"calibration: {EVOL}: 10 rows",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (f"{MOT}:5", f"{MOT}: needs a subset (there are 'code', 'math'); write {MOT}[subset]"),
        (f"{MOT}[physics]:5", f"{MOT}: no subset 'physics' (there are 'code', 'math')"),
        (f"{MOT}[math](valid):5", f"{MOT}: no split 'valid' (there are 'train', 'test')"),
        (f"{EVOL}@v9:5", f"{EVOL}@v9: no revision 'v9' on the Hub"),
        ("a/gated:5", "a/gated: gated on the Hub; accept its terms there and run `hf auth login`"),
        ("a/gone:5", "a/gone: no such file or folder here and no such dataset on the Hub"),
        ("a/script:5", "a/script: needs a script, and scripts are not run"),
        ("a/picture", "a/picture: holds no files that can be read as records"),
        ("a/broken:5", "a/broken: cannot be read as records ("),
        ("a/odd:5", "a/odd: sample 1: has left, right, expected text, messages"),
    ],
)
def test_what_is_refused_says_so_in_one_line(client: Client, spec: str, message: str) -> None:
    kind, told, notes = client.ask(spec)
    assert kind == "CalibrationError"
    (line,) = told.splitlines()
    assert line.startswith(f"calibration {message}")
    assert notes == [], "none of these is tried again"


@pytest.mark.parametrize(
    "fault",
    [
        Fault(503, where="/api/datasets/", times=2),
        Fault(429, where="train-1.parquet", times=1),
        Fault(where="train-1.parquet", after=40, reset=True, times=1),
    ],
)
def test_a_network_that_fails_now_and_then(client: Client, fault: Fault) -> None:
    whole = client.ask(f"{MOT}[code]:60")[0]
    client.hub.faults.append(fault)
    assert client.ask(f"{MOT}[code]:60")[0] == whole
    assert fault.times == 0


def test_a_hub_that_stays_away(client: Client) -> None:
    client.hub.faults.append(Fault(503, where="/api/datasets/", times=99))
    kind, told, notes = client.ask(f"{MOT}[code]:5")
    client.hub.faults.clear()
    assert "the Hub cannot be reached in 5 tries" in told, kind
    assert [note.partition("; ")[2][:10] for note in notes] == [
        f"try {number} of 5" for number in range(2, 6)
    ]


def test_a_text_to_score_is_not_called_a_calibration(client: Client) -> None:
    command = ("evaluate", EXAMPLE, "--text", "wikitext2", "--device", "cpu")
    subject = "text wikitext2 (Salesforce/wikitext on the Hub): "
    code, told = client.run(*command)
    assert (code, told) == (2, f"Error: {subject}no such dataset on the Hub; check HF_ENDPOINT\n")
    client.hub.faults.append(Fault(503, where="/api/datasets/", times=99))
    code, told = client.run(*command)
    client.hub.faults.clear()
    *notes, last = told.splitlines()
    assert (code, sum(subject in note for note in notes)) == (2, 4), told
    assert "calibration" not in told
    assert last.startswith(f"Error: {subject}the Hub cannot be reached in 5 tries (")
    assert last.endswith("check the network, or score another text: held-out, which is shipped, "
                         "or a file of your own")  # fmt: skip


def test_rows_are_packed_as_far_as_needed(client: Client) -> None:
    """Of 24 to 26 tokens a sample, 64 are two and the beginning of a third."""
    rows, _, (note,) = client.ask(f"{MOT}[code]:4", 7, pack=True)
    assert note == f"calibration: {MOT}[code]: 4 rows, 256 tokens of 12 samples"
    apart = client.ask(f"{MOT}[code]:12", 7)[0]
    rests = []
    for row in rows:
        assert len(row) == 64
        for _ in range(2):
            (whole,) = (one for one in apart if row[: len(one)] == one)
            row = row[len(whole) :]
            apart.remove(whole)
        rests.append(row)
    assert len(apart) == 4
    assert all(any(one[: len(rest)] == rest for one in apart) for rest in rests)


def test_a_subset_that_ends_leaves_its_last_row(client: Client) -> None:
    rows, _, (note,) = client.ask(f"{MOT}[math]:50", pack=True)
    assert [len(row) for row in rows if len(row) != 64] == [len(min(rows, key=len))]
    assert f"{sum(map(len, rows))} tokens of 10 samples; 50 rows were requested" in note


@pytest.mark.slow
def test_a_build_goes_on_without_the_hub(client: Client, tmp_path: Path) -> None:
    local = tmp_path / "mine.jsonl"
    local.write_bytes(lines([chat("mine", n) for n in range(8)]))
    spec = f"{EVOL}@main:4,{local}:6"
    options = BuildOptions(
        ("q8_0",), str(EXAMPLE), compression=0.5, output=tmp_path / "out", name="half", chunk=32,
        calibration=CalibrationOptions(spec, max_length=64), compute=ComputeOptions("cpu"),
    )  # fmt: skip
    code, told = client.run(
        "build", EXAMPLE, "--recipe", "q8_0", "--name", "example", "--output", tmp_path / "out",
        "--calibration", spec, "--max-length", 64, "--chunk", 32, "--device", "cpu",
    )  # fmt: skip
    assert code == 0, told
    assert f"calibration: {EVOL}: 4 rows" in told
    folder = tmp_path / "out" / "example-GGUF"
    manifest = Manifest.load(folder)
    found = manifest.calibration
    assert found.spec == f"{EVOL}@main:4,mine.jsonl:6"
    assert [(one.title, one.rows, one.revision) for one in found.components] == [
        (EVOL, 4, COMMIT), ("mine.jsonl", 6, None),
    ]  # fmt: skip
    assert sum(one.tokens for one in found.components) == manifest.pruning.n_tokens
    card = (folder / "README.md").read_text()
    assert f"| [{EVOL}](https://huggingface.co/datasets/{EVOL}) at {COMMIT[:12]} | 4 |" in card
    assert "| `mine.jsonl` | 6 |" in card
    assert str(tmp_path) not in card
    assert not reads_texts(options)
    with pytest.raises(
        CalibrationError, match=r"HF_HUB_OFFLINE is set, and its records are not cached"
    ):
        reads_texts(replace(options, fresh=True))


def reads_texts(options: BuildOptions) -> bool:
    """Whether a build reads its texts anew, here where the Hub is not to be reached."""
    result = build(make_plan(options), Silent())
    return not next(stage for stage in result.stages if stage.name == "texts").reused


def test_a_refusal_comes_before_the_rows_of_others(client: Client) -> None:
    client.hub.requests.clear()
    assert "a/gated: gated" in client.ask(f"{MOT}[code]:60,a/gated:5")[1]
    assert len(client.hub.asked(".parquet")) <= 1, "a schema at most"


def test_a_plan_asks_nobody(client: Client) -> None:
    client.hub.requests.clear()
    code, told = client.run("plan", EXAMPLE, "--recipe", "q8_0", "--calibration", "reap-agentic")
    assert code == 0, told
    assert client.hub.requests == []
