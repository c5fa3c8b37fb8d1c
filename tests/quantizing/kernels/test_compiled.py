"""Objects are compiled, chosen by the processor, and refused if they are of another source."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from reap2gguf.ggml import load_ggml
from reap2gguf.quantizing.kernels import compiled, compiling

needs_objects = pytest.mark.skipif(
    compiled.load_kernels() is None, reason="no kernels for this machine are compiled"
)


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    compiled._find.cache_clear()
    yield
    compiled._find.cache_clear()  # what a test pretends is not for the next file


def test_installing_has_compiled_them() -> None:
    if compiling.compiler() is None or compiling.machine() not in compiling.TARGETS:
        pytest.skip("nothing can be compiled here")
    assert compiled.load_kernels() is not None, "run `pip install -e .` again: the source changed"


@needs_objects
@pytest.mark.parametrize("target", compiling.TARGETS.get(compiling.machine(), ()))
def test_every_object_makes_the_same_bytes(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "TARGETS", {compiling.machine(): (target,)})
    kernels = compiled.load_kernels()
    if kernels is None:
        pytest.skip(f"this processor does not do {target}")
    rows = np.random.default_rng(2).standard_normal((70, 512)).astype(np.float32)
    importance = np.linspace(0, 2, 512, dtype=np.float32)
    found, is_odd = kernels.quantize(rows, T.Q4_K, importance)
    assert not is_odd.any()
    assert (found == load_ggml().quantize(rows, T.Q4_K, importance)).all()


@needs_objects
def test_an_object_of_another_source_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(compiling.SOURCE, tmp_path / "source")
    with (tmp_path / "source" / "lanes.h").open("a") as file:
        file.write("// changed\n")
    monkeypatch.setattr(compiling, "SOURCE", tmp_path / "source")
    assert "compiled from another source" in str(compiled.find_kernels())


def test_a_file_that_is_no_object_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "OBJECTS", tmp_path)
    for target in compiling.TARGETS.get(compiling.machine(), ()):
        compiling.object_file(target).write_bytes(b"\x7fELF" + bytes(100))
    assert isinstance(compiled.find_kernels(), str)
    assert compiled.load_kernels() is None


def test_without_objects_the_reason_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "OBJECTS", tmp_path)
    monkeypatch.setattr(compiled, "TARGETS", {"any": ("x86-64-v3",)})
    monkeypatch.setattr(compiled, "machine", lambda: "any")
    monkeypatch.setattr(compiled, "processor_flags", lambda: compiled._NEEDED["x86-64-v3"])
    assert "with a C++ compiler here, install reap2gguf again" in str(compiled.find_kernels())


def test_a_processor_without_the_instructions_uses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "machine", lambda: "x86_64")
    monkeypatch.setattr(compiled, "processor_flags", lambda: frozenset({"sse2"}))
    assert "no AVX2" in str(compiled.find_kernels())


@needs_objects
@pytest.mark.parametrize("tensor_type", [T.IQ3_S, T.IQ2_XXS])
def test_a_codebook_that_is_not_given_is_an_error(tensor_type: T) -> None:
    kernels = compiled.load_kernels()
    assert kernels is not None
    with pytest.raises(ValueError, match=f"{tensor_type.name} needs the tables"):
        kernels.quantize(np.ones((2, 256), np.float32), tensor_type, np.ones(256, np.float32))
