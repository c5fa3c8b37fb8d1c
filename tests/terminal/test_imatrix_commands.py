"""`imatrix` and its commands as they are typed."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

import reap2gguf
from reap2gguf.errors import UsageError
from reap2gguf.gguf_files.imatrix import load_imatrix, save_both, save_dat
from reap2gguf.terminal import imatrix_commands
from tests.conftest import Bundle
from tests.test_cli import run
from tests.tiny import REPOSITORY

FILE = REPOSITORY / "tests" / "data" / "tiny-qwen3-moe.imatrix.gguf"


def test_a_model_in_place_of_a_command_computes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[tuple[object, ...]] = []

    def compute(model: str, text: Path, output: Path, **_: object) -> reap2gguf.Imatrix:
        seen.append((model, text, output))
        return load_imatrix(FILE)

    monkeypatch.setattr(reap2gguf, "imatrix", compute)
    options = ("--text", "t.txt", "-o", "o.gguf")
    for words in (
        ("./model", *options),
        (*options, "./model"),
        ("compute", "./model", *options),
        ("-m", "./model", *options),
        ("./model", "-ohome.gguf", "--text", "t.txt"),
    ):
        result = run("imatrix", *words)
        assert result.exit_code == 0, result.output
    assert seen[:4] == [("./model", Path("t.txt"), Path("o.gguf"))] * 4
    assert seen[4] == ("./model", Path("t.txt"), Path("home.gguf"))
    (tmp_path / "shows").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run("imatrix", "shows", *options).exit_code == 0  # a folder that is there
    assert seen[5][0] == "shows"


def test_a_mistyped_command_is_no_model() -> None:
    result = run("imatrix", "shwo", FILE)
    assert result.exit_code == 2
    assert "there is no command 'shwo'; did you mean show?" in result.output
    result = run("imatrix", "./model", "-o", "o.gguf")
    assert "Missing option '--text'" in result.output
    assert "imatrix compute --help" in result.output


def test_every_command_is_in_the_help() -> None:
    help_text = run("imatrix", "--help").output
    for name, command in imatrix_commands.imatrix.commands.items():
        assert f"  {name} " in help_text
        assert f"reap2gguf imatrix {name} " in (command.help or "")


def test_show() -> None:
    result = run("imatrix", "show", FILE, "--below", "7500", "--experts")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "tiny-qwen3-moe.imatrix.gguf: 241 chunks of 512 tokens of calib.txt"
    rows = [line.split() for line in lines]
    assert ["1", "2855.78", "12.23%", "0.732"] in rows
    names = ["ffn_down_exps,", "ffn_gate_exps,", "ffn_up_exps"]
    # llama-imatrix reached 15 of 16 experts of layer 1
    first = next(row for row in rows if row[:3] == ["1", "16", "1"])
    assert first[-3:] == names
    assert any(":0 " in line for line in lines if line.startswith("      "))
    assert "experts, one per tensor: 3 of 192 never hit" in result.output
    assert "fewer than 7,500 tokens" in " ".join(result.output.split())


def test_show_for_programs(tmp_path: Path) -> None:
    values = json.loads(run("imatrix", "show", FILE, "--json").output)
    counts = load_imatrix(FILE).entries["blk.1.ffn_up_exps.weight"].counts.tolist()
    hits = {one["name"]: one["hits"] for one in values["experts"]}
    assert hits["blk.1.ffn_up_exps.weight"] == counts
    assert (values["below"], len(values["tensors"]), len(values["layers"])) == (100, 32, 4)
    rows = list(csv.DictReader(run("imatrix", "show", FILE, "--csv").output.splitlines()))
    assert len(rows) == 32
    (row,) = [one for one in rows if one["name"] == "blk.1.ffn_up_exps.weight"]
    assert (row["n_experts"], row["n_unseen"], row["n_values"]) == ("16", "1", "3840")
    result = run("imatrix", "show", FILE, "--csv", "--json")
    assert "--csv and --json exclude each other" in result.output
    save_dat(load_imatrix(FILE), tmp_path / "old.dat")
    text = " ".join(run("imatrix", "show", tmp_path / "old.dat").output.split())
    assert "tokens per expert are not known for 12 tensors, such as blk.0.ffn_down_exps" in text
    assert (
        json.loads(run("imatrix", "show", tmp_path / "old.dat", "--json").output)["experts"] == []
    )


def test_show_refuses_what_is_no_matrix(tmp_path: Path) -> None:
    (tmp_path / "no.dat").write_bytes(b"\xff" * 64)
    result = run("imatrix", "show", tmp_path / "no.dat")
    assert result.exit_code == 2
    assert f"{tmp_path / 'no.dat'}: -1 entries; this is not an imatrix" in result.output
    with pytest.raises(UsageError, match="below"):
        reap2gguf.imatrix_statistics(FILE, below=0)
    assert reap2gguf.imatrix_statistics(load_imatrix(FILE)) == reap2gguf.imatrix_statistics(FILE)


def test_slice(built: Bundle, tmp_path: Path) -> None:
    output = tmp_path / "cut.gguf"
    result = run("imatrix", "slice", FILE, "--kept", built.gguf, "-o", output)
    assert result.exit_code == 0, result.output
    assert f"{FILE}: 12 of 16 experts per layer are kept" in result.output
    assert f"{output}: covers " in result.output
    assert {one.name for one in tmp_path.iterdir()} == {"cut.gguf", "cut.dat"}
    result = run("imatrix", "slice", output, "--kept", built.hf, "-o", tmp_path / "b.gguf")
    assert "has the experts of the pruned model already, so none are cut" in result.output
    words = ("imatrix", "slice", FILE, "--kept", built.hf, "-o", output, "--json")
    assert f"{output}: exists already" in run(*words).output
    words = (*words, "--overwrite")
    values = json.loads(run(*words).output)
    assert (values["experts_before"], values["experts_after"], values["entries"]) == (16, 12, 32)
    assert values["coverage"]["n_tensors"] == 28


def test_merge(tmp_path: Path) -> None:
    one, two, output = (tmp_path / f"{name}.gguf" for name in ("one", "two", "sum"))
    matrix = load_imatrix(FILE)
    save_both(matrix, one)
    entries = {name: entry for name, entry in matrix.entries.items() if "attn_q" not in name}
    save_both(replace(matrix, entries=entries, dataset="more.txt"), two)
    result = run("imatrix", "merge", one, two, "-o", output)
    assert result.exit_code == 0, result.output
    assert f"{two}: has no entry for 4 tensors of the others, such as blk.0.attn_q.weight" in (
        result.output
    )
    assert f"{output}: 32 matrices over 482 chunks" in result.output
    words = ("imatrix", "merge", one, two, "-o", output, "--json")
    assert f"{output}: exists already" in run(*words).output
    values = json.loads(run(*words, "--overwrite").output)
    assert (values["datasets"], values["chunks"]) == (["calib.txt", "more.txt"], 482)
    assert run("imatrix", "merge", one, "-o", output).exit_code == 2
