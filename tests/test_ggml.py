from __future__ import annotations

import _ctypes
import ctypes
from collections.abc import Iterator
from pathlib import Path

import llama_cpp  # noqa: F401  # before the package's libggml: both call one library the same
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

import reap2gguf.ggml as ggml_module
from reap2gguf.errors import DependencyError
from reap2gguf.ggml import NEEDS_IMPORTANCE, Ggml, load_ggml

FLOATS = ("F32", "F16", "BF16")
SMALL_BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4")
BLOCKS_OF_256 = (
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_XXS", "IQ2_XS",
    "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS",
)  # fmt: skip
QUANTIZED_BY_GGUF_PY = (*FLOATS, *SMALL_BLOCKS[:5], "MXFP4")


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    return load_ggml()


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    generator = np.random.default_rng(1)
    return (generator.standard_t(4, (6, 512)) * 0.02).astype(np.float32)


@pytest.fixture(scope="module")
def importance() -> np.ndarray:
    return np.random.default_rng(2).lognormal(0, 2, 512).astype(np.float32)


def kind_named(name: str) -> GGMLQuantizationType:
    return GGMLQuantizationType[name]


@pytest.mark.parametrize("name", [*FLOATS, *SMALL_BLOCKS, *BLOCKS_OF_256])
def test_dequantizes_as_gguf_py_does(
    ggml: Ggml, rows: np.ndarray, importance: np.ndarray, name: str
) -> None:
    raw = ggml.quantize(rows, kind_named(name), importance)
    block, size = GGML_QUANT_SIZES[kind_named(name)]
    assert raw.shape == (6, 512 // block * size)
    expected = quants.dequantize(raw, kind_named(name))
    np.testing.assert_array_equal(ggml.dequantize(raw, kind_named(name)), expected)


@pytest.mark.parametrize("name", ["IQ1_S", "IQ1_M"])
def test_dequantizes_one_bit_types_as_gguf_py_does(ggml: Ggml, name: str) -> None:
    # quantizing these takes libggml 20 seconds to begin with, so any bytes serve
    block = GGML_QUANT_SIZES[kind_named(name)][1]
    raw = np.random.default_rng(5).integers(0, 256, (3, 2, block), dtype=np.uint8)
    scale = np.float16(0.01).view(np.uint16)
    if name == "IQ1_S":
        raw[..., :2] = scale.reshape(1).view(np.uint8)
    else:  # a nibble of the scale atop each of the last four numbers
        nibbles = [int(scale) >> shift & 15 for shift in (0, 4, 8, 12)]
        raw[..., -7::2] = raw[..., -7::2] & 15 | np.array(nibbles, np.uint8) << 4
    raw = raw.reshape(3, -1)
    found = ggml.dequantize(raw, kind_named(name))
    np.testing.assert_array_equal(found, quants.dequantize(raw, kind_named(name)))
    assert 0.01 < np.abs(found).max() < 1


@pytest.mark.parametrize("name", QUANTIZED_BY_GGUF_PY)
def test_quantizes_as_gguf_py_does(ggml: Ggml, rows: np.ndarray, name: str) -> None:
    expected = quants.quantize(rows, kind_named(name)).view(np.uint8)
    np.testing.assert_array_equal(ggml.quantize(rows, kind_named(name)), expected)


# mean relative error of each type on this data, doubled
@pytest.mark.parametrize(
    ("name", "limit"),
    [("Q8_0", 0.01), ("Q6_K", 0.03), ("Q5_K", 0.06), ("Q4_K", 0.12), ("IQ4_XS", 0.12),
     ("Q3_K", 0.25), ("IQ3_S", 0.25), ("Q2_K", 0.5), ("IQ2_S", 0.5)],
)  # fmt: skip
def test_values_come_back_close(
    ggml: Ggml, rows: np.ndarray, importance: np.ndarray, name: str, limit: float
) -> None:
    kind = kind_named(name)
    back = ggml.dequantize(ggml.quantize(rows, kind, np.ones_like(importance)), kind)
    assert np.linalg.norm(back - rows) / np.linalg.norm(rows) < limit


@pytest.mark.parametrize("name", ["Q4_K", "IQ4_XS", "IQ2_S"])
def test_importance_moves_the_error_to_unimportant_columns(
    ggml: Ggml, rows: np.ndarray, name: str
) -> None:
    kind = kind_named(name)
    heavy = np.ones(512, np.float32)
    heavy[::8] = 1000
    errors = [
        np.square(ggml.dequantize(ggml.quantize(rows, kind, weights), kind) - rows)[:, ::8].sum()
        for weights in (heavy, np.ones(512, np.float32))
    ]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)],
)
def test_float_types_round_as_torch_does(ggml: Ggml, name: str, dtype: torch.dtype) -> None:
    bits = np.random.default_rng(3).integers(0, 2**32, (64, 64), dtype=np.uint32)
    values = bits.view(np.float32)
    # ties between two BF16 values, and numbers below the smallest normal one
    values[0] = (bits[0] & 0xFFFF0000 | 0x8000).view(np.float32)
    values[1] = np.linspace(-1e-7, 1e-7, 64)
    values = np.where(np.abs(values) < 65504, values, np.float32(1))
    expected = torch.from_numpy(values).to(dtype)
    raw = ggml.quantize(values, kind_named(name))
    assert raw.tobytes() == expected.view(torch.uint8).numpy().tobytes()
    back = ggml.dequantize(raw, kind_named(name))
    np.testing.assert_array_equal(back, expected.to(torch.float32).numpy())


def checked(ggml: Ggml, rows: np.ndarray, name: str) -> None:
    kind = kind_named(name)
    ggml.check_precision(rows, ggml.quantize(rows, kind), kind)


@pytest.mark.parametrize("name", ["F16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL"])
def test_values_that_a_type_would_lose_are_refused(ggml: Ggml, rows: np.ndarray, name: str) -> None:
    """Scales are stored in F16: below its smallest numbers every value becomes zero."""
    with pytest.raises(ValueError, match=rf"values up to .* are too small for {name}, which would"):
        checked(ggml, rows * np.float32(2.0**-40), name)


@pytest.mark.parametrize("name", ["F32", "BF16", "F16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL"])
def test_small_values_that_a_type_can_hold(ggml: Ggml, rows: np.ndarray, name: str) -> None:
    small = rows * np.float32(2.0**-8)
    checked(ggml, small, name)
    checked(ggml, np.zeros_like(rows), name)
    mixed = rows.copy()
    mixed[1:] *= np.float32(2.0**-60)  # such as the embeddings of tokens that are never used
    checked(ggml, mixed, name)
    if name in ("F32", "BF16"):
        ggml.quantize(rows * np.float32(2.0**-120), kind_named(name))


@pytest.mark.parametrize("name", [*FLOATS, "Q8_0", "Q4_K"])
def test_rows_need_not_be_contiguous(ggml: Ggml, name: str) -> None:
    columns = np.random.default_rng(4).normal(0, 1, (256, 3)).astype(np.float32)
    kind = kind_named(name)
    expected = ggml.quantize(np.ascontiguousarray(columns.T), kind)
    np.testing.assert_array_equal(ggml.quantize(columns.T, kind), expected)


@pytest.mark.parametrize("shape", [(511,), (6, 512), (513,), (1, 512)])
def test_importance_of_another_shape_is_refused(
    ggml: Ggml, rows: np.ndarray, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"importance .* for 512 columns"):
        ggml.quantize(rows, GGMLQuantizationType.Q4_K, np.ones(shape, np.float32))


@pytest.mark.parametrize("kind", sorted(NEEDS_IMPORTANCE), ids=lambda kind: kind.name)
def test_a_type_that_needs_importance_is_refused_without(
    ggml: Ggml, rows: np.ndarray, kind: GGMLQuantizationType
) -> None:
    with pytest.raises(ValueError, match=f"{kind.name} needs an importance matrix"):
        ggml.quantize(rows, kind)


@pytest.mark.parametrize("name", [*SMALL_BLOCKS, *BLOCKS_OF_256])
def test_rows_that_do_not_fill_blocks_are_refused(ggml: Ggml, name: str) -> None:
    columns = GGML_QUANT_SIZES[kind_named(name)][0] + 16
    with pytest.raises(ValueError, match=f"rows of {columns} are not a multiple of {name}'s block"):
        ggml.quantize(np.zeros((2, columns), np.float32), kind_named(name))


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """What `load_ggml` finds, to be filled by the test."""
    found: list[Path] = []
    monkeypatch.setattr(ggml_module, "_candidates", lambda: iter(found))
    ggml_module._load.cache_clear()
    yield found
    ggml_module._load.cache_clear()


def test_no_library_says_what_to_install(candidates: list[Path]) -> None:
    with pytest.raises(DependencyError, match="pip install libggml-python"):
        load_ggml()


def test_files_that_are_no_libggml_are_named(candidates: list[Path], tmp_path: Path) -> None:
    text = tmp_path / "libggml-base.so"
    text.write_text("not a library")
    other = Path(_ctypes.__file__)
    candidates += [text, other]
    with pytest.raises(DependencyError) as raised:
        load_ggml()
    assert str(text) in str(raised.value)
    assert str(other) in str(raised.value)


def test_a_later_candidate_is_taken_when_the_first_is_broken(
    candidates: list[Path], ggml: Ggml, tmp_path: Path
) -> None:
    broken = tmp_path / "libggml.so"
    broken.write_bytes(b"")
    candidates += [broken, ggml.path]
    assert load_ggml().path == ggml.path


def test_no_package_carries_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml_module, "_CARRIERS", (("no_such_package_at_all", "lib"),))
    assert list(ggml_module._candidates()) == []


class Foreign:
    """A libggml whose blocks have another size."""

    def ggml_quantize_chunk(self, *_: object) -> int:
        return 1

    def ggml_get_type_traits(self, _: int) -> ctypes._Pointer[ggml_module._TypeTraits]:
        return ctypes.pointer(ggml_module._TypeTraits(b"q8_0", 32, 0, 36))


def test_a_libggml_of_another_format_is_refused(rows: np.ndarray) -> None:
    foreign = Ggml(Path("other.so"), "9", Foreign())  # type: ignore[arg-type]
    with pytest.raises(DependencyError, match=r"wrote 1 bytes of Q8_0, expected 3264"):
        foreign.quantize(rows, GGMLQuantizationType.Q8_0)
    with pytest.raises(DependencyError, match=r"Q8_0 as blocks of 32 in 36 bytes"):
        foreign.dequantize(np.zeros((1, 34), np.uint8), GGMLQuantizationType.Q8_0)
