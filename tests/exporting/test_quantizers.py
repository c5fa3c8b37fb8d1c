"""What will quantize is said in one line, for every state of the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as T

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.exporting import device_blocks, quantizers
from reap2gguf.exporting.quantizers import Quantizers, note_quantizers, quantizers_of
from reap2gguf.models.table import describe
from reap2gguf.options import ComputeOptions
from reap2gguf.progress import CallbackProgress, Silent
from reap2gguf.quantizing.quantizer import Quantizer
from reap2gguf.quantizing.resolve import ResolvedRecipe, resolve
from tests.exporting.files import plain
from tests.families.gpt_oss import TINY as GPT_OSS
from tests.quantized import as_mxfp4


@dataclass(frozen=True)
class FakeKernels:
    """Kernels for all types but IQ1_M and MXFP4."""

    target: str = "x86-64-v4"

    def covers(self, tensor_type: T) -> bool:
        return tensor_type not in (T.IQ1_M, T.MXFP4, T.F32)


@pytest.fixture
def recipes(wide: Path) -> list[ResolvedRecipe]:
    with Checkpoint.open(wide) as checkpoint:
        model = describe(checkpoint)
        tensors = model.gguf_tensors(checkpoint.tensors)
        found = [
            resolve(plain(name), tensors, model.facts, model.facts.n_experts, has_imatrix=True)
            for name in ("Q4_K_M", "IQ1_M", "BF16")
        ]
    return found


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizers, "find_kernels", FakeKernels)
    monkeypatch.setattr(ComputeOptions, "likely_device", property(lambda self: "cuda"))


def weighted(recipes: list[ResolvedRecipe]) -> set[str]:
    return {name for name in recipes[0].tensor_types() if name.startswith("blk.")}


def test_types_are_named_where_libggml_makes_them(recipes: list[ResolvedRecipe]) -> None:
    found = quantizers_of(recipes, weighted(recipes), "cpu").line
    assert found == "quantizing: kernels (x86-64-v4); libggml for IQ1_M"
    found = quantizers_of([recipes[0]], weighted(recipes), "cpu").line
    assert found == "quantizing: kernels (x86-64-v4)"


def test_the_gpu_is_named_where_it_pays(
    recipes: list[ResolvedRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = weighted(recipes)
    assert "GPU" not in quantizers_of(recipes, names, "auto").line  # too little work
    on_gpu = quantizers_of(recipes, names, "cuda").line
    assert on_gpu.startswith(
        "quantizing: kernels (x86-64-v4), on the GPU for IQ2_XXS, Q2_K, Q4_K, "
    )
    assert on_gpu.endswith("; libggml for IQ1_M")
    assert "BF16" not in on_gpu
    monkeypatch.setattr(device_blocks, "_MUCH_WORK", 1)
    assert quantizers_of(recipes, names, "auto").line == on_gpu
    monkeypatch.setattr(ComputeOptions, "likely_device", property(lambda self: "cpu"))
    assert "GPU" not in quantizers_of(recipes, names, "auto").line


def test_without_kernels_the_reason_is_said(
    recipes: list[ResolvedRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizers, "find_kernels", lambda: "REAP2GGUF_KERNELS is off")
    assert quantizers_of(recipes, (), "cuda").line == (
        "quantizing: libggml, about ten times slower than compiled kernels; no kernels: "
        "REAP2GGUF_KERNELS is off"
    )


def test_a_kernel_that_fails_its_self_test_is_named(
    recipes: list[ResolvedRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[T, bool]] = []

    def uses_kernel(self: Quantizer, tensor_type: T, is_weighted: bool) -> bool:
        tried.append((tensor_type, is_weighted))
        return tensor_type is not T.Q6_K

    monkeypatch.setattr(Quantizer, "uses_kernel", uses_kernel)
    names = weighted(recipes)
    found = quantizers_of([recipes[0]], names, "cpu", Silent())
    assert found.differing == ("Q6_K",)
    assert found.line == (
        "quantizing: kernels (x86-64-v4); libggml, which is slower, for Q6_K: the kernel does not "
        "make its bytes here, please report it"
    )
    assert (T.Q4_K, True) in tried
    assert (T.F32, False) not in tried
    notes: list[str] = []
    progress = CallbackProgress(
        lambda event: notes.append(event.text) if event.kind == "note" else None
    )
    note_quantizers([recipes[0]], names, "cpu", progress)
    assert notes == [found.line]


def test_nothing_is_said_where_nothing_is_quantized() -> None:
    assert not Quantizers("x86-64-v4").line


def test_copied_blocks_are_not_quantized(tmp_path: Path) -> None:
    with Checkpoint.open(as_mxfp4(GPT_OSS).write(tmp_path / "model")) as checkpoint:
        model = describe(checkpoint)
        tensors = model.gguf_tensors(checkpoint.tensors)
        made = [resolve(plain("MXFP4_MOE"), tensors, model.facts, 8, True)]
    assert T.MXFP4 in made[0].tensor_types().values()
    assert "MXFP4" not in quantizers_of(made, set(), "cpu").line
