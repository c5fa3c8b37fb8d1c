"""Objects are made whole or not at all, and not at all without a compiler."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from reap2gguf.quantizing.kernels import compiling


def test_without_a_compiler_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert compiling.compiler() is None
    assert compiling.compile_objects() == []


def test_a_compiler_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "OBJECTS", tmp_path / "objects")
    monkeypatch.setattr(compiling, "machine", lambda: "x86_64")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(subprocess.CalledProcessError):
        compiling.compile_objects()
    assert list((tmp_path / "objects").iterdir()) == []


def test_nothing_is_fused() -> None:
    words = compiling.command(["c++"], "x86-64-v3", Path("out.so"))
    assert "-ffp-contract=off" in words
    assert not any("fast-math" in word or word == "-Ofast" for word in words)
