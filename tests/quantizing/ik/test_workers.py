"""Types of ik_llama.cpp: made and read by its own library, labelled, and told apart.

What needs its package runs where that is installed; the rest runs with a library that is missing or
that breaks.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import reap2gguf
from reap2gguf.building.adopting import _file_type
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import DependencyError, RecipeError
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.gguf_files.tensor_types import LOADER_KEY, IkFileType, IkType, block_of, row_bytes
from reap2gguf.models.table import describe
from reap2gguf.quantizing.file_types import IK_MIXTURES
from reap2gguf.quantizing.ik import workers
from reap2gguf.quantizing.ik.workers import IkWorkers, RangeError, is_installed, library_path
from reap2gguf.quantizing.quantizer import load_quantizer
from reap2gguf.quantizing.recipe import load_recipe, parse_recipe
from reap2gguf.quantizing.resolve import resolve
from tests.exporting.files import plain
from tests.tiny import EXAMPLE, REPOSITORY, child_environment

needs_ik = pytest.mark.skipif(
    not is_installed(), reason="needs ik-llama-cpp-python: pip install 'reap2gguf[ik]'"
)
IMATRIX = REPOSITORY / "tests" / "data" / "tiny-qwen3-moe.imatrix.gguf"
# what trained and random weights lose, of their size: no more than this
ERRORS = {
    "IQ6_K": 0.03, "IQ5_K": 0.06, "IQ5_KS": 0.07, "IQ4_K": 0.1, "IQ4_KS": 0.12, "IQ4_KSS": 0.18,
    "IQ4_KT": 0.18, "IQ3_K": 0.2, "IQ3_KS": 0.25, "IQ3_KT": 0.3, "IQ2_KL": 0.32, "IQ2_K": 0.42,
    "IQ2_KS": 0.5, "IQ2_KT": 0.5, "IQ1_KT": 0.65,
}  # fmt: skip


@pytest.fixture(scope="module")
def pool() -> Iterator[IkWorkers]:
    path = library_path()
    assert path is not None
    with closing(IkWorkers(path, 2)) as found:
        yield found


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return (np.random.default_rng(0).standard_t(4, (3, 512)) * 0.02).astype(np.float32)


@needs_ik
@pytest.mark.parametrize("one", IkType, ids=lambda one: one.name)
def test_blocks_are_what_the_library_says(pool: IkWorkers, one: IkType) -> None:
    assert pool.describe(one, 768) == (*block_of(one), row_bytes(one, 768))


@needs_ik
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("one", IkType, ids=lambda one: one.name)
def test_values_come_back(pool: IkWorkers, rows: np.ndarray, one: IkType, weighted: bool) -> None:
    importance = np.random.default_rng(1).gamma(1, 1, 512).astype(np.float32) if weighted else None
    raw = pool.quantize(rows, one, importance)
    assert raw.shape == (3, row_bytes(one, 512))
    again = pool.dequantize(raw, one)
    error = np.linalg.norm(again - rows) / np.linalg.norm(rows)
    assert 0 < error < ERRORS[one.name]
    # rows are independent, and the package's quantizer is this one
    np.testing.assert_array_equal(pool.quantize(rows[1:2], one, importance), raw[1:2])
    np.testing.assert_array_equal(load_quantizer().quantize(rows, one, importance), raw)
    np.testing.assert_array_equal(load_quantizer().dequantize(raw, one), again)


@needs_ik
def test_requests_are_of_bounded_size(
    rows: np.ndarray, monkeypatch: pytest.MonkeyPatch, pool: IkWorkers
) -> None:
    whole = pool.quantize(rows, IkType.IQ4_KS, None)
    monkeypatch.setattr(workers, "_MOST_VALUES", 512)
    np.testing.assert_array_equal(pool.quantize(rows, IkType.IQ4_KS, None), whole)
    read = pool.dequantize(whole, IkType.IQ4_KS)
    monkeypatch.setattr(workers, "_MOST_VALUES", 2**20)
    np.testing.assert_array_equal(pool.dequantize(whole, IkType.IQ4_KS), read)


@needs_ik
def test_values_beyond_the_range_are_refused(pool: IkWorkers, rows: np.ndarray) -> None:
    with pytest.raises(RangeError, match="beyond IQ4_K's range"):
        pool.quantize(rows * np.float32(1e30), IkType.IQ4_K, None)
    with pytest.raises(ValueError, match="not a multiple of IQ4_K's block 256"):
        load_quantizer().quantize(rows[:, :300], IkType.IQ4_K)


@needs_ik
def test_a_process_that_ends_is_an_error_and_another_takes_its_place(rows: np.ndarray) -> None:
    path = library_path()
    assert path is not None
    own = IkWorkers(path, 1)
    expected = own.quantize(rows, IkType.IQ4_K, None)
    os.kill(own._idle[0].running.pid, signal.SIGKILL)
    with pytest.raises(DependencyError, match=r"its process ended while .* IQ4_K \(signal 9\)"):
        own.quantize(rows, IkType.IQ4_K, None)
    np.testing.assert_array_equal(own.quantize(rows, IkType.IQ4_K, None), expected)
    own.close()


def test_a_library_that_does_not_load_is_an_error(tmp_path: Path, rows: np.ndarray) -> None:
    (tmp_path / "libggml.so").write_bytes(b"no library")
    with pytest.raises(DependencyError, match=r"its process ended .*libggml\.so"):
        IkWorkers(tmp_path / "libggml.so", 1).quantize(rows, IkType.IQ4_K, None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ik") / "ik-IQ4_K.gguf"
    reap2gguf.quantize(EXAMPLE, "ik-iq4k", path, imatrix=IMATRIX)
    return path


@needs_ik
def test_the_header_says_what_loads_it(made: Path) -> None:
    header = read_gguf_header(made)
    assert header.metadata[LOADER_KEY] == "ik_llama.cpp"
    assert header.metadata["general.file_type"] == IkFileType.MOSTLY_IQ4_K
    assert header.tensors["blk.0.ffn_up_exps.weight"].tensor_type is IkType.IQ4_K
    assert _file_type(made, header) == "IQ4_K"
    plainly = made.with_name("plain.gguf")
    reap2gguf.quantize(EXAMPLE, "Q8_0", plainly)
    assert LOADER_KEY not in read_gguf_header(plainly).metadata


@needs_ik
def test_values_are_compared(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = reap2gguf.verify(EXAMPLE, made)
    assert not report.violations
    assert f"{made.parent.name}/{made.name}" in report.levels
    monkeypatch.setattr(workers, "library_path", lambda: None)
    report = reap2gguf.verify(EXAMPLE, made)
    assert not report.violations
    assert f"{made.parent.name}/{made.name}" not in report.levels
    assert any("values in IQ4_K not read: " in line for line in report.not_checked)


@needs_ik
def test_a_damaged_file_is_noticed(made: Path, tmp_path: Path) -> None:
    header, raw = read_gguf_header(made), bytearray(made.read_bytes())
    info = header.tensors["blk.1.ffn_up_exps.weight"]
    raw[info.offset : info.offset + 2 * row_bytes(IkType.IQ4_K, 256)] = bytes(
        2 * row_bytes(IkType.IQ4_K, 256)
    )
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(raw)
    assert any("ffn_up_exps" in one for one in reap2gguf.verify(EXAMPLE, damaged).violations)


@needs_ik
def test_a_bundle_says_which_file_loads_where(tmp_path: Path) -> None:
    """Instructions are for the other file, though it is the second."""
    options = reap2gguf.BuildOptions(
        recipes=("ik-iq4ks", "IQ4_XS"), output=tmp_path, name="both", compression=0, imatrix=IMATRIX
    )
    result = reap2gguf.build(options)
    assert result is not None
    names = [record.file for record in result.manifest.gguf]
    assert names == ["both-ik-IQ4_KS.gguf", "both-IQ4_XS.gguf"]
    assert [record.is_ik for record in result.manifest.gguf] == [True, False]
    card = (result.gguf_folder / "README.md").read_text()
    assert "`both-ik-IQ4_KS.gguf` loads only in [ik_llama.cpp]" in card
    assert "llama-server -m both-IQ4_XS.gguf" in card
    assert "FROM ./both-IQ4_XS.gguf" in (result.gguf_folder / "Modelfile").read_text()
    assert not reap2gguf.verify(result.gguf_folder, source=str(EXAMPLE)).violations


@needs_ik
def test_it_loads_and_generates_there(made: Path) -> None:
    """Its perplexity in ik_llama.cpp is near that of the unquantized model, 10.4 on this text."""
    bf16 = made.with_name("BF16.gguf")
    reap2gguf.quantize(EXAMPLE, "BF16", bf16)
    program = [sys.executable, "bench/ik_llama.py", "calibration/held-out.txt", made, bf16]
    ran = subprocess.run(
        [*map(str, program), "--chunks", "2"],
        cwd=REPOSITORY, env=child_environment({}), capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = [float(one) for one in re.findall(r"perplexity ([0-9.]+)", ran.stdout)]
    assert len(found) == 2
    assert found[0] == pytest.approx(found[1], rel=0.05)
    assert "says ''" not in ran.stdout


@needs_ik
@pytest.mark.parametrize("name", ["IQ2_K", "IQ3_K", "IQ4_K", "IQ5_K", "IQ6_K", "IQ4_KS", "IQ4_KSS"])
def test_types_are_those_of_its_own_quantizer(name: str, tmp_path: Path) -> None:
    from ik_llama_cpp import find_quantize_bin

    bf16 = tmp_path / "BF16.gguf"
    reap2gguf.quantize(EXAMPLE, "BF16", bf16)
    command = [
        str(find_quantize_bin()),
        "--dry-run",
        str(bf16),
        str(tmp_path / "o.gguf"),
        name,
        "2",
    ]
    said = subprocess.run(command, capture_output=True, text=True)
    theirs = {
        one: kind.upper()
        for one, kind in re.findall(
            r"\] +(\S+) - \[.*converting to (\w+)", said.stdout + said.stderr
        )
    }
    assert len(theirs) == 29
    with Checkpoint.open(EXAMPLE) as checkpoint:
        model = describe(checkpoint)
        tensors = model.gguf_tensors(checkpoint.tensors)
    found = resolve(plain(name), tensors, model.facts, model.facts.n_experts, False).tensor_types()
    assert {one: found[one].name for one in theirs} == theirs


def test_without_the_package_a_recipe_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(workers, "library_path", lambda: None)
    with pytest.raises(DependencyError, match=r"recipe ik-iq4ks needs ik-llama-cpp-python.*\[ik\]"):
        reap2gguf.quantize(EXAMPLE, "ik-iq4ks", tmp_path / "x.gguf")
    with pytest.raises(DependencyError, match="recipe ik-iq4k needs"):
        reap2gguf.plan(reap2gguf.BuildOptions(recipes=("ik-iq4k",), output=tmp_path))


@pytest.mark.parametrize("name", IK_MIXTURES)
def test_every_type_is_a_recipe_with_a_label_of_its_own(name: str) -> None:
    recipe = load_recipe(name.lower())
    assert (recipe.label, recipe.file_type, recipe.is_ik) == (f"ik-{name}", name, True)
    assert parse_recipe(recipe.source, name, "x") == recipe
    with pytest.raises(RecipeError, match="does not say that only ik_llama"):
        recipe.with_label("Q4_K_M")


def test_labels_and_types_are_told_apart() -> None:
    text = (
        'title = "T"\nlabel = "{}"\nfile_type = "{}"\n[[rules]]\nmatch = "attention"\ntype = "{}"\n'
    )
    assert parse_recipe(text.format("ik-mine", "IQ3_K", "iq6_k"), "x", "x.toml").is_ik
    for label, file_type, kind, message in (
        ("mine", "IQ3_K", "Q8_0", r"x\.toml, line 2: label 'mine' does not say"),
        ("ik-mine", "Q4_K_M", "Q8_0", r"x\.toml, line 2: label 'ik-mine' begins with 'ik-'"),
        ("mine", "Q4_K_M", "IQ6_K", "exists only in ik_llama.cpp, and llama.cpp cannot load it"),
    ):
        with pytest.raises(RecipeError, match=message):
            parse_recipe(text.format(label, file_type, kind), "x", "x.toml")
