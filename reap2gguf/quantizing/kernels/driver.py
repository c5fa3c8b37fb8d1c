"""The CUDA driver through ctypes: memory, streams and launches on one GPU.

Everything is in the GPU's primary context, which is torch's too, so that both share it. A call that
waits does so without the interpreter's lock, and lets the processor do other work meanwhile.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_LIBRARIES = ("libcuda.so.1", "libcuda.so", "nvcuda.dll")
_MAJOR, _MINOR = 75, 76  # attributes: the compute capability
_BLOCKING_SYNC, _NO_TIMING = 1, 2  # flags of an event
_NON_BLOCKING = 1  # flag of a stream: apart from the default stream
_RELAXED = 2  # this thread does not disturb a graph that another one records
_NAMES = {
    "cuDevicePrimaryCtxRetain",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemsetD8Async",
    "cuStreamCreateWithPriority",
    "cuStreamSynchronize",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuLaunchKernel",
    "cuInit",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDriverGetVersion",
    "cuCtxSetCurrent",
    "cuCtxGetStreamPriorityRange",
    "cuThreadExchangeStreamCaptureMode",
    "cuGetErrorString",
}


class CudaError(Exception):
    """The driver refused a call."""


@dataclass(frozen=True)
class Function:
    """A kernel of a loaded module."""

    name: str
    handle: ctypes.c_void_p


class Driver:
    """The first GPU that this process may use. Threads may share one.

    Raises CudaError if there is no driver or no GPU.
    """

    def __init__(self) -> None:
        self._library = _load()
        self._entered = threading.local()
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._context = context
        major, minor = (self._attribute(number, device) for number in (_MAJOR, _MINOR))
        self.arch = f"sm_{major}{minor}"
        version = ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(version))
        self.version = version.value

    def _attribute(self, number: int, device: ctypes.c_int) -> int:
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), number, device)
        return value.value

    def call(self, name: str, *arguments: object) -> None:
        """One call of the driver; CudaError with its words if it fails."""
        if code := getattr(self._library, name)(*arguments):
            words = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(words))
            text = words.value.decode() if words.value else "unknown error"
            raise CudaError(f"{name}: {text} ({code})")

    def enter(self) -> None:
        """Make this thread one that works on the GPU."""
        if not hasattr(self._entered, "done"):
            self.call("cuCtxSetCurrent", self._context)
            mode = ctypes.c_int(_RELAXED)
            self.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
            self._entered.done = True

    def load(self, cubin: bytes, *names: str) -> tuple[Function, ...]:
        """Kernels of compiled code; they stay loaded."""
        module = ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), cubin)
        found = []
        for name in names:
            handle = ctypes.c_void_p()
            self.call("cuModuleGetFunction", ctypes.byref(handle), module, name.encode())
            found.append(Function(name, handle))
        return tuple(found)


class Memory:
    """Memory of the GPU, or of the host and pinned: a buffer that grows, and is freed with it."""

    def __init__(self, driver: Driver, is_pinned: bool) -> None:
        self._driver, self._is_pinned = driver, is_pinned
        self.address, self.n_bytes = 0, 0

    def at_least(self, n_bytes: int) -> int:
        """The address of this many bytes. What was in them before may be lost."""
        if n_bytes > self.n_bytes:
            self.free()
            address = ctypes.c_void_p()
            if self._is_pinned:
                self._driver.call("cuMemHostAlloc", ctypes.byref(address), n_bytes, 0)
            else:
                self._driver.call("cuMemAlloc_v2", ctypes.byref(address), n_bytes)
            self.address, self.n_bytes = address.value or 0, n_bytes
        return self.address

    def view(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        """The first bytes of pinned memory; not to be used after it grew or was freed."""
        assert self._is_pinned
        address = self.at_least(max(1, n_bytes))
        return np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(address))

    def free(self) -> None:
        """Give it back."""
        if self.address:
            free = "cuMemFreeHost" if self._is_pinned else "cuMemFree_v2"
            self._driver.call(free, ctypes.c_void_p(self.address))
        self.address = self.n_bytes = 0


class Stream:
    """A queue of copies and launches, done in their order. Other work on the GPU goes before it."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._stream, self._done = ctypes.c_void_p(), ctypes.c_void_p()
        least, most = ctypes.c_int(), ctypes.c_int()
        driver.call("cuCtxGetStreamPriorityRange", ctypes.byref(least), ctypes.byref(most))
        driver.call("cuStreamCreateWithPriority", ctypes.byref(self._stream), _NON_BLOCKING, least)
        driver.call("cuEventCreate", ctypes.byref(self._done), _BLOCKING_SYNC | _NO_TIMING)

    def to_device(self, target: int, source: npt.NDArray[np.generic]) -> None:
        """Copy a contiguous array to the GPU; at once only if it is pinned."""
        self._driver.call(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_void_p(target),
            ctypes.c_void_p(source.ctypes.data),
            ctypes.c_size_t(source.nbytes),
            self._stream,
        )

    def to_host(self, target: npt.NDArray[np.generic], source: int) -> None:
        """Copy from the GPU into a contiguous array; at once only if it is pinned."""
        self._driver.call(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(target.ctypes.data),
            ctypes.c_void_p(source),
            ctypes.c_size_t(target.nbytes),
            self._stream,
        )

    def clear(self, target: int, n_bytes: int) -> None:
        """Set bytes of the GPU to zero."""
        self._driver.call(
            "cuMemsetD8Async", ctypes.c_void_p(target), 0, ctypes.c_size_t(n_bytes), self._stream
        )

    def launch(
        self, function: Function, n_blocks: int, n_threads: int, arguments: Sequence[object]
    ) -> None:
        """Run a kernel: addresses and numbers as ctypes values, in the order of its parameters."""
        addresses = (ctypes.c_void_p * len(arguments))(
            *(ctypes.addressof(value) for value in arguments)  # type: ignore[arg-type]
        )
        self._driver.call(
            "cuLaunchKernel",
            function.handle,
            n_blocks,
            1,
            1,
            n_threads,
            1,
            1,
            0,
            self._stream,
            addresses,
            None,
        )

    def wait(self) -> None:
        """Return when everything that was queued is done. Raises CudaError if any of it failed."""
        self._driver.call("cuEventRecord", self._done, self._stream)
        self._driver.call("cuEventSynchronize", self._done)


def _load() -> ctypes.CDLL:
    """The driver's library, under the first name that it has here. Raises CudaError."""
    problems: list[str] = []
    for name in _LIBRARIES:
        try:
            library = ctypes.CDLL(name)
            for function in _NAMES:
                getattr(library, function).restype = ctypes.c_int
            return library
        except OSError as error:  # not here under this name, or not to be loaded
            problems.append(str(error))
        except AttributeError as error:
            raise CudaError(f"{name}: too old ({error})") from error
    raise CudaError(f"no CUDA driver was found ({problems[0]})")
