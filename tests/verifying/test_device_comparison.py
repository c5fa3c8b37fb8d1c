"""What a GPU verifies has the violations, words and levels of a CPU; a stand-in does its work.

The stand-in is libggml behind the interface of `Gpu` (`test_device_blocks.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import DependencyError
from reap2gguf.exporting import device_blocks
from reap2gguf.exporting.row_ranges import BlockMaker, RowRange
from reap2gguf.ggml import load_ggml
from reap2gguf.gguf_files.imatrix import Imatrix
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.models.table import describe
from reap2gguf.options import ComputeOptions
from reap2gguf.progress import CallbackProgress
from reap2gguf.quantizing.kernels.compiled import load_kernels
from reap2gguf.quantizing.kernels.cuda import Quantized
from reap2gguf.quantizing.kernels.driver import CudaError
from reap2gguf.quantizing.quantizer import SAMPLE, Quantizer
from reap2gguf.verifying import gguf_values
from reap2gguf.verifying.comparison import Comparison
from reap2gguf.verifying.exactness import Exactness
from reap2gguf.verifying.gguf_values import Compared, FileValues, compare_files
from tests.exporting.files import (
    export_files,
    gguf_tensors,
    plain,
    random_imatrix,
    write_small_tokenizer,
)
from tests.exporting.test_device_blocks import FakeGpu, with_kernels
from tests.tiny import TinyQwen3Moe
from tests.verifying.gguf_changes import Rows, change_rows

RECIPES = ("Q4_K_M", "IQ4_XS", "Q8_0", "Q3_K_M", "BF16", "MXFP4_MOE")
UP = "blk.0.ffn_up_exps.weight"
STORED_UP = "model.layers.0.mlp.experts.{}.up_proj.weight"
SHAPE = TinyQwen3Moe(n_layers=1, hidden=256, width=256, n_experts=3, head_dim=64, vocab=291)
needs_kernels = pytest.mark.skipif(load_kernels() is None, reason="no kernels are compiled here")


@dataclass
class Files:
    """A checkpoint and GGUF files of it."""

    folder: Path
    paths: list[Path]
    imatrix: Imatrix | None
    n_threads: int = 1
    every_type: bool = True

    def compared(self, device: str, notes: list[str] | None = None) -> list[Compared]:
        exactness = Exactness(self.every_type, self.imatrix, load_ggml().label)
        said: list[str] = [] if notes is None else notes
        progress = CallbackProgress(
            lambda event: said.append(event.text) if event.kind == "note" else None
        )
        with Checkpoint.open(self.folder) as checkpoint:
            tensors = describe(checkpoint).gguf_tensors(checkpoint.tensors)
            files = [FileValues(read_gguf_header(path), tensors, exactness) for path in self.paths]
            return compare_files(files, checkpoint, self.n_threads, progress, device)

    def agreed(self) -> list[Compared]:
        """What a GPU finds, which is what a processor finds."""
        found = self.compared("cuda")
        assert found == self.compared("cpu")
        return found

    def path(self, recipe: str) -> Path:
        return next(path for path in self.paths if path.stem == recipe)


def files_of(shape: TinyQwen3Moe, folder: Path, weighted: bool = True) -> Files:
    made = shape.write(folder / "model")
    write_small_tokenizer(made)
    imatrix = random_imatrix(gguf_tensors(made)) if weighted else None
    paths = export_files(made, folder, map(plain, RECIPES), imatrix)
    return Files(made, list(paths.values()), imatrix)


@pytest.fixture(
    scope="module",
    params=["bfloat16", *(pytest.param(n, marks=pytest.mark.slow) for n in ("float16", "float32"))],
)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Files of a checkpoint that is stored in that dtype; tests leave them as they are."""
    shape = replace(SHAPE, dtype=getattr(torch, request.param))
    return files_of(shape, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def own(tmp_path: Path) -> Files:
    """Files that a test may change."""
    return files_of(SHAPE, tmp_path)


@pytest.fixture(autouse=True)
def _has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_blocks, "_MUCH_WORK", 0)
    monkeypatch.setattr(Quantizer, "is_reference", True)
    monkeypatch.setattr(gguf_values, "load_quantizer", lambda: with_kernels(SAMPLE))


def use(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    monkeypatch.setattr(device_blocks, "load_gpu", lambda: gpu)
    return gpu


def counted(monkeypatch: pytest.MonkeyPatch) -> list[T]:
    """The types of ranges that the processor quantizes from now on."""
    made: list[T] = []
    quantize = BlockMaker.quantize

    def count(self: BlockMaker, rows: RowRange, stored: Any, kind: T) -> Any:
        made.append(kind)
        return quantize(self, rows, stored, kind)

    monkeypatch.setattr(BlockMaker, "quantize", count)
    return made


@pytest.mark.parametrize(
    ("odd", "most_values"),
    [
        pytest.param(0, 2**22, marks=pytest.mark.slow),
        pytest.param(5, 2**22, marks=pytest.mark.slow),
        (3, 20_000),
    ],
)
def test_sound_files_are_settled_on_the_gpu(
    odd: int, most_values: int, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reap2gguf.gguf_files.rows.MAX_VALUES", most_values)
    gpu, made = use(FakeGpu(odd), monkeypatch), counted(monkeypatch)
    found = files.compared("cuda")
    assert [(one.violations, one.is_exact) for one in found] == [([], True)] * len(RECIPES)
    assert gpu.batch_rows
    assert gpu.is_closed
    assert set(made) <= {T.F32, T.BF16, T.F16, T.MXFP4}  # which it has no kernels for
    assert found == files.compared("cpu")


def flip(rows: Rows, random: np.random.Generator) -> None:
    rows.reshape(-1)[random.integers(rows.size)] ^= np.uint8(1 << random.integers(8))


def lose_a_row(rows: Rows, random: np.random.Generator) -> None:
    rows[random.integers(len(rows))] = 0


def lose_all(rows: Rows, random: np.random.Generator) -> None:
    rows[:] = 0


def fill_with_ones(rows: Rows, random: np.random.Generator) -> None:
    rows[random.integers(len(rows))] = 0xFF  # NaN in most types


def swap_thirds(rows: Rows, random: np.random.Generator) -> None:
    third = len(rows) // 3
    rows[:] = np.concatenate([rows[third : 2 * third], rows[:third], rows[2 * third :]])


def reverse(rows: Rows, random: np.random.Generator) -> None:
    rows[:] = rows[::-1].copy()


DAMAGE = (flip, lose_a_row, lose_all, fill_with_ones, swap_thirds, reverse)
SOURCES = (np.nan, np.inf, -np.inf, 1e-30, 1e-6, 0.0, 1e30, 60.0)


@pytest.mark.slow
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    damages=st.lists(
        st.tuples(st.sampled_from(RECIPES), st.sampled_from(DAMAGE), st.integers(0, 2**20)),
        max_size=3,
    ),
    source=st.none() | st.tuples(st.integers(0, 2), st.sampled_from(SOURCES)),
    odd=st.sampled_from((0, 4)),
    every_type=st.booleans(),
)
def test_both_find_the_same_in_the_same_words(
    damages: Sequence[tuple[str, Callable[[Rows, np.random.Generator], None], int]],
    source: tuple[int, float] | None,
    odd: int,
    every_type: bool,
    files: Files,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(FakeGpu(odd), monkeypatch)
    weights = files.folder / "model.safetensors"
    whole = {path: path.read_bytes() for path in (weights, *files.paths)}
    try:
        for recipe, damage, seed in damages:
            random = np.random.default_rng(seed)
            names = sorted(read_gguf_header(files.path(recipe)).tensors)
            name = UP if seed % 2 else names[random.integers(len(names))]
            change_rows(files.path(recipe), name, lambda rows, do=damage, r=random: do(rows, r))
        if source is not None:
            put(weights, STORED_UP.format(source[0]), source[1])
        found = replace(files, every_type=every_type).agreed()
    finally:
        for path, raw in whole.items():
            path.write_bytes(raw)
    if not damages and source is None:
        assert not any(one.violations for one in found)


def put(weights: Path, name: str, value: float) -> None:
    """Give a stored matrix this size, with the signs that it has."""
    tensors = load_file(weights)
    tensors[name][:] = value * torch.sign(tensors[name].float())
    save_file(tensors, weights, {"format": "pt"})


def test_values_that_a_type_loses_are_found(own: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are those that the GPU makes; what they stand for is compared by the processor."""
    use(FakeGpu(), monkeypatch)
    put(own.folder / "model.safetensors", STORED_UP.format(1), 3e-8)
    values = np.full((256, 256), 3e-8, np.float32)
    stored = load_file(own.folder / "model.safetensors")[STORED_UP.format(1)]
    raw = load_ggml()._quantize(values * np.sign(stored.float().numpy()), T.Q8_0, None)
    change_rows(own.path("Q8_0"), UP, lambda rows: rows[256:512].__setitem__(slice(None), raw))
    own.paths = [own.path("Q8_0")]
    (found,) = own.agreed()
    assert [line for line in found.violations if "the type loses these values" in line]


@needs_kernels
def test_types_that_are_tried_have_the_same_level(
    own: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within bounds, quick types are made again until some bytes differ."""
    monkeypatch.setattr(
        gguf_values, "load_quantizer", lambda: Quantizer(load_ggml(), load_kernels(), SAMPLE)
    )
    gpu = use(FakeGpu(), monkeypatch)
    own.every_type = False
    assert [one.is_exact for one in own.agreed()] == [True] * len(RECIPES)
    assert (T.Q4_K, True) in gpu.prepared
    change_rows(own.path("Q4_K_M"), UP, lambda rows: flip_a_level(rows))
    found = own.agreed()
    assert [one.differing for one in found] == [["Q4_K"], [], [], [], [], []]
    assert [one.is_exact for one in found] == [False, True, True, True, True, True]


def flip_a_level(rows: Rows) -> None:
    rows.reshape(-1)[144 * 9 + 20] ^= np.uint8(1)  # one step of one weight


def test_files_with_and_without_importance(own: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both in one pass: the blocks of one are not taken for those of the other."""
    gpu = use(FakeGpu(), monkeypatch)
    (own.folder.parent / "even").mkdir()
    even = export_files(own.folder, own.folder.parent / "even", [plain("Q4_K_M")])["Q4_K_M"]
    exactness = [Exactness(True, one, load_ggml().label) for one in (own.imatrix, None)]
    paths = [own.path("Q4_K_M"), even]
    with Checkpoint.open(own.folder) as checkpoint:
        tensors = describe(checkpoint).gguf_tensors(checkpoint.tensors)
        files = [
            FileValues(read_gguf_header(path), tensors, one)
            for path, one in zip(paths, exactness, strict=True)
        ]
        made, progress = counted(monkeypatch), CallbackProgress(lambda event: None)
        found = compare_files(files, checkpoint, 1, progress, "cuda")
    assert [(one.violations, one.is_exact) for one in found] == [([], True)] * 2
    assert {(T.Q4_K, True), (T.Q4_K, False)} <= set(gpu.prepared)
    assert set(made) == {T.F32}


def test_a_file_that_ends_too_early_is_named(own: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    use(FakeGpu(), monkeypatch)
    header = read_gguf_header(own.path("Q8_0"))
    words = []
    for device in ("cuda", "cpu"):
        with Checkpoint.open(own.folder) as checkpoint:
            tensors = describe(checkpoint).gguf_tensors(checkpoint.tensors)
            raw = header.path.read_bytes()
            header.path.write_bytes(raw[: len(raw) // 2])
            file = FileValues(header, tensors, Exactness(True, own.imatrix))
            quiet = CallbackProgress(lambda event: None)
            words.append(compare_files([file], checkpoint, 1, quiet, device)[0].violations)
            header.path.write_bytes(raw)
    assert words[0] == words[1]
    assert "ends inside tensor" in words[0][0]


def test_a_gpu_that_fails_leaves_the_rest_to_the_processor(
    own: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = use(FakeGpu(fails=True), monkeypatch)
    change_rows(own.path("Q4_K_M"), UP, lambda rows: rows[300].fill(0))
    notes: list[str] = []
    own.n_threads = 4
    found = own.compared("cuda", notes)
    failure = "cuLaunchKernel: out of order (719)"
    assert notes == [
        f"the GPU failed while it verified ({failure}); the processor verifies the rest"
    ]
    assert gpu.is_closed
    assert found == own.compared("cpu")
    assert len(found[0].violations) == 1


def test_without_a_gpu_the_processor_does_it(own: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise CudaError("cuInit: no device (100)")

    monkeypatch.setattr(device_blocks, "load_gpu", load)
    notes: list[str] = []
    found = own.compared("cuda", notes)
    assert [one.violations for one in found] == [[]] * len(RECIPES)
    assert notes == ["the GPU does not quantize: cuInit: no device (100); the processor does"]


def test_auto_takes_a_gpu_for_much_work_only(own: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ComputeOptions, "likely_device", property(lambda self: "cuda"))
    gpu = use(FakeGpu(), monkeypatch)
    own.compared("cpu")
    assert not gpu.batch_rows
    monkeypatch.setattr(device_blocks, "_MUCH_WORK", 2**28)
    own.compared("auto")
    assert not gpu.batch_rows
    monkeypatch.setattr(device_blocks, "_MUCH_WORK", 2**16)
    own.compared("auto")
    assert gpu.batch_rows


class WrongGpu(FakeGpu):
    """Makes wrong bytes of everything, but for the rows that it is tried with."""

    def channel(self) -> FakeGpu:
        return WrongGpu()

    def quantize_stored(self, *arguments: Any) -> Quantized:
        found = super().quantize_stored(*arguments)
        for blocks in found.blocks.values():
            blocks.data[:] ^= 64
        return found


def test_a_faulty_kernel_is_no_violation_of_a_file(
    own: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(WrongGpu(), monkeypatch)
    with pytest.raises(DependencyError, match="different bytes of the same values"):
        own.compared("cuda")
    monkeypatch.setattr(gguf_values, "load_quantizer", lambda: with_kernels(0))
    assert [one.violations for one in own.compared("cuda")] == [[]] * len(RECIPES)


def test_a_sample_is_read_by_the_processor(own: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU and a file that are wrong in the same way are found out."""
    use(WrongGpu(), monkeypatch)
    monkeypatch.setattr(gguf_values, "load_quantizer", lambda: with_kernels(0))
    own.paths = [own.path("Q8_0")]
    change_rows(own.paths[0], UP, lambda rows: rows.__ixor__(np.uint8(64)))
    checked: list[str] = []
    check = Comparison.check

    def count(self: Comparison, original: Any) -> None:
        checked.append(original.rows.tensor.name)
        check(self, original)

    monkeypatch.setattr(Comparison, "check", count)
    (found,) = own.compared("cuda")
    assert UP in checked
    assert len(found.violations) == 1
    assert found.violations[0].startswith(f"Q8_0.gguf: {UP} expert 0 differs")
