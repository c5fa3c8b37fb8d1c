"""Speeds of the example: not how high, but of what, and that they are the clock's."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from reap2gguf.errors import ArtifactError, UsageError
from reap2gguf.evaluating.llama.speed import SpeedOptions, SpeedTest, measure_speed
from reap2gguf.progress import CallbackProgress, ProgressEvent, Silent
from tests.evaluating.llama.files import ONE_THREAD, export
from tests.tiny import TinyQwen3Moe

SHORT = SpeedOptions(prompts=(96,), generated=(6,), batches=(1, 3), repetitions=2)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speed")
    return export(TinyQwen3Moe().write(folder / "model"), folder, "BF16")


def test_speeds_of_all_tests(path: Path) -> None:
    events: list[ProgressEvent] = []
    begun = time.monotonic()
    found = measure_speed(path, ONE_THREAD, CallbackProgress(events.append), SHORT)
    seconds = time.monotonic() - begun
    assert [one.test for one in found] == ["pp96", "tg6", "tg6x3"]
    n_tokens = (96, 6, 18)
    counted = sum(
        2 * n / one.tokens_per_second.value for n, one in zip(n_tokens, found, strict=True)
    )
    assert 0 < counted < seconds
    for one in found:
        assert one.variant == path.name
        assert one.tokens_per_second.error >= 0
        assert (one.n_threads, one.on_gpu) == (1, False)
        assert 2**24 < one.peak_bytes < 2**29, "that of a small process, not of this one"
    assert events[-1].done == events[-1].total == 2 * sum(n_tokens)


def test_the_usual_tests_are_llama_benchs_and_those_of_several_users() -> None:
    assert SpeedOptions().tests() == [
        SpeedTest("pp512", 512, 0, 1),
        SpeedTest("tg128", 0, 128, 1),
        SpeedTest("tg128x4", 0, 128, 4),
        SpeedTest("tg128x8", 0, 128, 8),
        SpeedTest("tg128x16", 0, 128, 16),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SpeedOptions(prompts=(0,)), "tokens of a test of speed are"),
        (SpeedOptions(generated=(2**21,)), "tokens of a test of speed are"),
        (SpeedOptions(batches=(1, 257)), "batches are"),
        (SpeedOptions(repetitions=1), "repetitions are 1, expected 2"),
    ],
)
def test_tests_that_cannot_be(options: SpeedOptions, message: str, path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        measure_speed(path, ONE_THREAD, Silent(), options)


def test_a_test_that_llama_cpp_cannot_do_is_an_error(path: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ArtifactError, match=r"broken\.gguf"):
        measure_speed(broken, ONE_THREAD, Silent(), SHORT)
