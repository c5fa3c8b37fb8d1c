"""Rented machines, and GPUs by their drivers' names."""

from __future__ import annotations

import pytest

from reap2gguf.building.needs.rented import GPUS, as_gpu, gpu_factor, rented_machine


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
    ],
)
def test_names_of_drivers(name: str, gpu: str) -> None:
    machine, host = rented_machine(gpu)
    assert gpu_factor(name) == host.gpu_factor
    assert machine.gpu == as_gpu(gpu)


def test_an_h100_is_the_measure() -> None:
    assert gpu_factor("NVIDIA H100 80GB HBM3") == pytest.approx(1)


def test_others_are_slower() -> None:
    slow = {gpu_factor(f"NVIDIA {name}") for name in ("A10", "GeForce RTX 4090", "Tesla T4")}
    assert len(slow) == 3
    assert min(slow) > 3
    assert gpu_factor("NVIDIA A100-PCIE-40GB") > gpu_factor("NVIDIA A100-SXM4-80GB")
    assert gpu_factor("NVIDIA B200") < 1
    assert gpu_factor("a GPU of tomorrow") > 1  # nothing is known of it


def test_a_table_of_plausible_machines() -> None:
    for name, offer in GPUS.items():
        gpu = as_gpu(name)
        assert gpu.free_bytes < gpu.n_bytes < offer.host * 2
