"""What comparing files is said to hold, on a CPU and where a GPU makes the blocks."""

from __future__ import annotations

from reap2gguf.exporting.device_blocks import device_threads
from reap2gguf.verifying.memory import comparing_bytes


def test_it_grows_with_the_threads_of_a_cpu() -> None:
    assert comparing_bytes(8, False) == 8 * comparing_bytes(1, False)


def test_a_gpu_never_needs_less_than_what_the_processor_takes_over() -> None:
    few, many = device_threads(1), 64
    assert few > 1  # a GPU is fed by more threads than such a machine has
    assert comparing_bytes(1, True) > comparing_bytes(1, False)
    assert comparing_bytes(many, True) == comparing_bytes(many, False)
