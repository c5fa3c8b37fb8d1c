"""What a build needs of a rented machine, from its plan; every way to rent one reads this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

from reap2gguf.building.needs.estimate import Reused, estimate, rented_estimate
from reap2gguf.building.needs.rented import H100, rented_cpu

if TYPE_CHECKING:
    from reap2gguf.building.plan import Plan

# An H100 with 16 cores is the machine of `Needs.seconds`.
_CORES = 16
# Peak of dense bfloat16 products, of the makers' data sheets, in units of an H100's.
GPU_SPEEDS: Mapping[str, float] = {
    "A10G": 0.07,
    "L4": 0.12,
    "A100": 0.32,
    "L40S": 0.37,
    "RTX PRO 6000": 0.5,
    "H100": 1.0,
    "H200": 1.0,
}
_SETUP_SECONDS = 300  # to start the machine and install the package
_DOWNLOAD_BYTES = 300e6  # per second, of weights from the Hub
_UPLOAD_BYTES = 100e6
_SPARE = 1.1  # of disk and memory: a system and its cache live there too
_SYSTEM_DISK = 20 * 2**30  # image, torch and its CUDA libraries
_SYSTEM_MEMORY = 4 * 2**30
_SAFETY = 3.0  # a timeout in units of the estimate
_LEAST_TIMEOUT = 1800
_MOST_TIMEOUT = 24 * 3600  # of Modal; a build that needs longer resumes


@dataclass(frozen=True)
class Needs:
    """What a build takes of a machine with one GPU. All of it is estimated, and none too small."""

    gpu_memory_bytes: int  # 0: it computes on the CPU
    memory_bytes: int
    disk_bytes: int
    seconds: float  # to build on an H100 (or its CPU) with 16 cores
    transfer_seconds: float  # to install, download the model and upload the results

    def seconds_on(self, gpu: str | None) -> float:
        """Time of the whole job on a GPU model, an unknown one counts as the slowest."""
        speed = GPU_SPEEDS.get(gpu, min(GPU_SPEEDS.values())) if gpu and self.needs_gpu else 1.0
        return self.transfer_seconds + self.seconds / speed

    def timeout(self, gpu: str | None) -> int:
        """Seconds after which the job is ended: three times its estimate, in whole minutes.

        At least half an hour and at most a day; what is ended then resumes.
        """
        wanted = 60 * ceil(_SAFETY * self.seconds_on(gpu) / 60)
        return min(max(wanted, _LEAST_TIMEOUT), _MOST_TIMEOUT)

    @property
    def needs_gpu(self) -> bool:
        return self.gpu_memory_bytes > 0

    def as_json(self) -> dict[str, Any]:
        """The numbers for programs, with the time limit for each GPU model."""
        limits = {gpu: self.timeout(gpu) for gpu in GPU_SPEEDS}
        return {**asdict(self), "timeout_seconds": limits}


def needs_of(plan: Plan) -> Needs:
    """What a plan needs on a machine that has nothing yet: no weights, no package, no work."""
    on_gpu = plan.options.compute.device != "cpu"
    nothing = Reused()
    needed = (
        rented_estimate(plan, nothing, H100)
        if on_gpu
        else estimate(plan, nothing, *rented_cpu(_CORES))
    )
    source = plan.checkpoint.n_stored_bytes
    transfers = source / _DOWNLOAD_BYTES + needed.disk_bytes / _UPLOAD_BYTES
    return Needs(
        int(_SPARE * needed.gpu_memory_bytes),
        int(_SPARE * needed.memory_bytes) + _SYSTEM_MEMORY,
        int(_SPARE * (source + needed.disk.room_bytes + needed.state_bytes)) + _SYSTEM_DISK,
        needed.seconds,
        _SETUP_SECONDS + transfers,
    )
