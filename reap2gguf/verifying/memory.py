"""The memory of comparing GGUF files: upper bounds, for `plan` and for stages."""

from __future__ import annotations

from reap2gguf.exporting.device_blocks import device_threads

COMPARING_BYTES = 2**23  # of each thread, while safetensors are compared or hashed
_VALUES_BYTES = 7 * 2**24  # of each thread, while a file's ranges are compared: `comparison.py`
_BESIDE_A_GPU = 2**26  # of each thread: blocks and weights, pinned, and a file's rows


def comparing_bytes(n_threads: int, on_gpu: bool) -> int:
    """RAM that the comparison of GGUF files holds at most.

    Where a GPU makes the blocks, this is the larger of both ways, since the processor compares
    what the GPU does not settle.
    """
    on_cpu = _VALUES_BYTES * n_threads
    return max(on_cpu, _BESIDE_A_GPU * device_threads(n_threads)) if on_gpu else on_cpu
