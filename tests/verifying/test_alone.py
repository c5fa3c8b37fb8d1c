"""GGUF files with nothing beside them: what is checked, and what is said of the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

import reap2gguf
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.verifying.report import Level
from tests.gguf_source.files import exported, in_parts
from tests.test_cli import run
from tests.tiny import TinyQwen3Moe

MODEL = TinyQwen3Moe(hidden=256, width=256, n_experts=6)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return exported(MODEL, tmp_path, "Q8_0")


def test_the_closing_lines_say_how_to_compare_more(file: Path) -> None:
    result = run("verify", file)
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert "values not compared: pass --source MODEL.gguf, the file that it was made from" in words
    assert f"OK: {file.name} verified" in words


def test_it_is_compared_with_nothing(file: Path, tmp_path: Path) -> None:
    report = reap2gguf.verify(file)
    assert set(report.levels.values()) == {Level.NOTHING}
    assert run("verify", file, "--require", "values").exit_code == 1
    first, *others = in_parts(file, tmp_path / "parts", 500_000)
    assert others
    assert not reap2gguf.verify(first).violations
    others[0].unlink()
    assert run("verify", first).exit_code != 0


def test_values_that_are_not_finite(file: Path) -> None:
    info = read_gguf_header(file).tensors["blk.1.ffn_up_exps.weight"]
    with open(file, "r+b") as opened:
        opened.seek(info.offset)
        opened.write(b"\x00\x7e")  # the scale of a block
    (found,) = reap2gguf.verify(file).violations
    assert "blk.1.ffn_up_exps.weight expert 0 holds NaN or infinite values" in found


def test_a_file_that_ends_early(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-500])
    result = run("verify", file)
    assert result.exit_code != 0
    assert "truncated" in result.output
