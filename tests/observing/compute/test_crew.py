"""Whatever the number of threads, a sweep on a CPU gives the same bits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from reap2gguf.observing.compute.crew import LONG, MOST_SLICES, Crew, Spread, current_slice
from reap2gguf.observing.importance import ImportanceObserver
from reap2gguf.observing.saliency import SaliencyObserver
from reap2gguf.options import ComputeOptions
from tests.observing.sweeps import rows_of, run_sweep
from tests.tiny import EXAMPLE, TinyQwen3Moe, TinyQwen35Moe

WRITERS: dict[str, Callable[[Path], Path]] = {
    "example": lambda folder: EXAMPLE,
    "qwen3": TinyQwen3Moe(n_layers=3, dense_layers=(1,)).write,
    "qwen3.5": TinyQwen35Moe().write,
}
# odd lengths, many rows per slice, and one so long that its products are divided
LENGTHS = {
    "example": [300] * 2 + [211, 47],
    "qwen3": [LONG + 77, 300, 300, 211] + [7] * 90,
    "qwen3.5": [131, 131, 131, 90, 77, 21, 5],
}


def bits(folder: Path, lengths: list[int], dtype: str, n_threads: int) -> dict[str, bytes]:
    """Everything that both kinds of sweeps sum, as bytes."""
    rows = rows_of(*lengths, seed=1)
    options = ComputeOptions(device="cpu", dtype=dtype, threads=n_threads)
    saliency, report = run_sweep(SaliencyObserver, folder, rows, options)
    assert report.n_dropped_rows == 0
    importance, report = run_sweep(ImportanceObserver, folder, rows, options)
    assert report.n_dropped_rows == 0
    found = {
        f"{layer}.{name}": np.asarray(values).tobytes()
        for layer, seen in saliency.layers.items()
        for name, values in vars(seen).items()
    }
    for name, entry in importance.entries.items():
        found[name] = entry.sums.tobytes() + np.asarray(entry.counts).tobytes()
    return found


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("which", WRITERS)
def test_sweeps_give_the_same_bits(which: str, dtype: str, tmp_path: Path) -> None:
    folder = WRITERS[which](tmp_path / "model")
    alone = bits(folder, LENGTHS[which], dtype, 1)
    assert alone
    for n_threads in (2, 7):
        assert bits(folder, LENGTHS[which], dtype, n_threads) == alone, n_threads


def test_torch_keeps_its_threads(tiny: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        bits(tiny, [20, 9], "float32", 2)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=[1, 2, 5])
def crew(request: pytest.FixtureRequest) -> Iterator[Crew]:
    crew = Crew(request.param)
    yield crew
    crew.close()


def test_slices_are_all_rows_in_order(crew: Crew) -> None:
    for shape in [(3, 700), (70, 100), (1, 1), (2000, 3)]:
        values = torch.arange(shape[0] * shape[1]).view(*shape)
        numbers = set()

        def run(rows: slice, values: Tensor = values, numbers: set[int] = numbers) -> Tensor:
            part = current_slice()
            assert part is not None
            own = values[rows]
            assert (part.begin, part.end) == (own.min(), own.max() + 1)
            assert torch.get_num_threads() == 1
            numbers.add(part.number)
            time.sleep(0.001 * (part.number % 3))  # slices end out of order
            return own

        assert torch.equal(crew.by_rows(run, values.shape), values)
        assert numbers == set(range(len(numbers)))
        assert len(numbers) <= MOST_SLICES
    assert current_slice() is None


def test_slices_may_meet_several_times(crew: Crew) -> None:
    values = torch.arange(4 * 600).view(4, 600)
    calls = []

    def add_all(helpers: Crew, parts: list[Tensor]) -> list[Tensor]:
        calls.append(len(parts))
        total = sum(helpers.in_order(torch.sum, parts))
        return [part + total for part in parts]

    def run(rows: slice) -> Tensor:
        part = current_slice()
        assert part is not None
        met = part.meet(values[rows], add_all)
        assert isinstance(met, Tensor)
        again = part.meet(met, add_all)
        assert isinstance(again, Tensor)
        return again

    once = values + values.sum()
    assert torch.equal(crew.by_rows(run, values.shape), once + once.sum())
    assert calls == [4, 4]


def test_a_slice_that_fails_stops_the_others(crew: Crew) -> None:
    def run(rows: slice) -> Tensor:
        part = current_slice()
        assert part is not None
        if part.number == 2:
            raise ArithmeticError("slice 2")
        joined = part.meet(torch.zeros(1), lambda helpers, parts: parts)
        assert isinstance(joined, Tensor)
        return joined

    with pytest.raises(ArithmeticError, match="slice 2"):
        crew.by_rows(run, torch.Size((4, 600)))
    again = crew.by_rows(lambda rows: torch.ones(1), torch.Size((4, 600)))
    assert again.tolist() == [1] * 4, "the crew can be used again"


def test_joint_work_that_fails_stops_the_slices(crew: Crew) -> None:
    def fail(helpers: Crew, parts: list[Tensor]) -> list[Tensor]:
        raise KeyboardInterrupt

    def run(rows: slice) -> Tensor:
        part = current_slice()
        assert part is not None
        part.meet(None, fail)
        raise AssertionError("no slice continues")

    with pytest.raises(KeyboardInterrupt):
        crew.by_rows(run, torch.Size((4, 600)))


def test_shared_work_comes_back_in_order(crew: Crew) -> None:
    def slow(number: int) -> int:
        time.sleep(0.001 * (number % 3))
        return number * number

    def run(rows: slice) -> Tensor:
        return torch.tensor(crew.together(slow, range(20)))

    squares = [number * number for number in range(20)]
    assert list(crew.in_order(slow, range(20))) == squares
    assert crew.by_rows(run, torch.Size((2, 600))).tolist() == squares * 2


@pytest.mark.parametrize("item", range(3))
def test_an_error_in_shared_work_is_raised(crew: Crew, item: int) -> None:
    def run(number: int) -> int:
        if number == item:
            raise ArithmeticError(f"item {number}")
        return number

    with pytest.raises(ArithmeticError, match=f"item {item}"):
        list(crew.in_order(run, range(3)))
    with pytest.raises(ArithmeticError, match=f"item {item}"):
        crew.by_rows(lambda rows: torch.tensor(crew.together(run, range(3))), torch.Size((2, 600)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_product_is_the_same_in_blocks(crew: Crew, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values, weight = torch.randn(2, LONG, 96, generator=generator).to(dtype), torch.randn(
        40, 96, generator=generator
    ).to(dtype)  # fmt: skip
    bias = weight[:, 0]
    for arguments in [(values, weight), (values, weight, bias), (values[0], weight)]:
        expected = linear(*arguments)
        with Spread(crew):
            found = linear(*arguments)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mask", ["causal", "given", "per head", "none"])
def test_a_long_attention_is_the_same_in_heads(crew: Crew, mask: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, LONG + 3, 8, generator=generator) for heads in (6, 2, 2)
    )
    options: dict[str, object] = {"enable_gqa": True, "is_causal": mask == "causal"}
    if mask in ("given", "per head"):
        given = torch.ones(LONG + 3, LONG + 3, dtype=torch.bool).tril()[None, None]
        options["attn_mask"] = given.expand(1, 6, -1, -1) if mask == "per head" else given
    expected = scaled_dot_product_attention(query, key, value, **options)  # type: ignore[arg-type]
    with Spread(crew):
        found = scaled_dot_product_attention(query, key, value, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("can't start new thread")])
def test_slices_that_cannot_all_start_do_not_wait_for_one_another(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    crew = Crew(2)
    submit, begun = crew._slices.submit, []

    def fails_at_the_fourth(*arguments: Any) -> Any:
        begun.append(arguments)
        if len(begun) == 4:
            raise error
        return submit(*arguments)

    def meet(rows: slice) -> torch.Tensor:
        part = current_slice()
        assert part is not None
        share: torch.Tensor = part.meet(values[rows], lambda crew, parts: parts)
        return share

    values = torch.ones(8, 512, 4)
    monkeypatch.setattr(crew._slices, "submit", fails_at_the_fourth)
    with pytest.raises(type(error)):
        crew.by_rows(meet, values.shape)
    del begun[:]
    monkeypatch.setattr(crew._slices, "submit", submit)
    assert torch.equal(crew.by_rows(meet, values.shape), values)
    crew.close()
