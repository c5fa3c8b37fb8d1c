"""`report` as it is typed."""

from __future__ import annotations

from pathlib import Path

import pytest

import reap2gguf
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.errors import ArtifactError, OutputError, UsageError
from tests.conftest import Bundle
from tests.reports import read_page, table_of
from tests.test_cli import run


def test_both_folders_make_the_same_page(built: Bundle, tmp_path: Path) -> None:
    one, other = tmp_path / "one.html", tmp_path / "other.html"
    result = run("report", built.gguf, "-o", one)
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"{one}: ")
    assert reap2gguf.report(built.hf, other) == other
    assert one.read_bytes() == other.read_bytes()
    page, manifest = read_page(one.read_text(encoding="utf-8")), Manifest.load(built.gguf)
    assert page.one("h1").text == manifest.name
    sizes = [
        row["size"].attributes["data-value"] for row in table_of(page, "GGUF files of this bundle")
    ]
    assert sizes == [str(record.n_bytes) for record in manifest.gguf]
    assert str(built.output) not in one.read_text(encoding="utf-8")


def test_the_default_output(built: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("report", built.hf).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == [f"{built.hf.name}-report.html"]


def test_a_bundle_stays_as_it_is(built: Bundle) -> None:
    for folder in (built.hf, built.gguf):
        with pytest.raises(UsageError, match="is in a folder of a bundle"):
            reap2gguf.report(built.hf, folder / "report.html")


def test_what_is_no_bundle(tmp_path: Path, built: Bundle) -> None:
    result = run("report", tmp_path)
    assert result.exit_code == 2
    assert "not a bundle: it holds no reap2gguf.json" in result.output
    with pytest.raises(OutputError, match="does not exist"):
        reap2gguf.report(built.hf, tmp_path / "none" / "report.html")


def test_a_damaged_file_is_named(bundle: Bundle, tmp_path: Path) -> None:
    (bundle.gguf / "imatrix.gguf").write_bytes(b"GGUF\x03")
    with pytest.raises(ArtifactError, match=r"imatrix\.gguf"):
        reap2gguf.report(bundle.gguf, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
