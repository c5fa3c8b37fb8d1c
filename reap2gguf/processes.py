"""This process's place among those that torchrun started; read without loading torch."""

import os
from dataclasses import dataclass

_SET_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Processes:
    """One process of `size`; the first speaks and writes."""

    rank: int = 0
    local: int = 0  # among the processes of this machine: the number of its GPU
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def processes() -> Processes:
    """From the environment that torchrun sets; alone without it."""
    values = [os.environ.get(name, "") for name in _SET_BY_TORCHRUN]
    if not all(values) or not all(value.isdecimal() for value in values[:3]):
        return Processes()
    return Processes(*map(int, values[:3]))
