"""Lets the functions of a package for GPUs compute on a GPU alone.

Where flash-linear-attention is installed, transformers calls it instead of its own code, on any
device; but its kernels are Triton's, and Triton's run on a GPU alone. transformers keeps its own
function beside each one that it replaces.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

_REPLACING = "hub_kernels.py"  # transformers' file that replaces functions


def follow_devices(modules: Iterable[torch.nn.Module]) -> None:
    """Let replaced functions of these modules' classes be transformers' own on a CPU.

    It holds for all models of these classes in this process; on a GPU nothing changes.
    """
    for name in {type(module).__module__ for module in modules}:
        source = sys.modules[name]
        for key, function in list(vars(source).items()):
            if _is_replaced(function):
                setattr(source, key, _by_device(function))


def _is_replaced(function: Any) -> bool:
    """Whether a function is one of transformers that calls that of a package, if there is one."""
    return (
        inspect.isfunction(function)
        and hasattr(function, "__wrapped__")
        and function.__code__.co_filename.endswith(_REPLACING)
    )


def _by_device(function: Callable[..., Any]) -> Callable[..., Any]:
    own: Callable[..., Any] = inspect.unwrap(function)

    @wraps(function)
    def chosen(*args: Any, **options: Any) -> Any:
        first = next(one for one in (*args, *options.values()) if isinstance(one, Tensor))
        return (own if first.device.type == "cpu" else function)(*args, **options)

    return chosen
