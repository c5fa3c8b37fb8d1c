"""What this machine has, and what is missing for which command."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from reap2gguf.doctor import machine, software
from reap2gguf.doctor.finding import Finding, State

__all__ = ["CHECKS", "Finding", "State", "diagnose"]

Check = Callable[[], Finding | Iterable[Finding]]

# every check, by heading
CHECKS: dict[str, tuple[Check, ...]] = {
    "Program": (
        software.program,
        software.python,
        software.required_packages,
        software.libggml,
        software.kernels,
        software.shipped,
    ),
    "Running GGUF files": (
        software.llama_cpp_python,
        software.llama_programs,
        software.vendored,
    ),
    "Machine": (
        machine.gpus,
        machine.flash_linear_attention,
        machine.processors,
        machine.memory,
        machine.disks,
    ),
    "Hub": (
        machine.hub_endpoint,
        machine.hub_token,
    ),
}


def diagnose() -> Iterator[tuple[str, Finding]]:
    """Run every check: a heading and a finding each."""
    for heading, checks in CHECKS.items():
        for check in checks:
            found = check()
            for finding in (found,) if isinstance(found, Finding) else found:
                yield heading, finding
