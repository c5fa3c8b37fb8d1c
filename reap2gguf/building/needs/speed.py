"""How fast a machine is: rates that a short measurement finds, and tables that it scales.

The measurement takes well under a second and is kept for this machine in the user's cache folder,
as one small JSON file. A file that is damaged or of another machine is measured again. Processor
time is measured, not the time of the clock, so that other work on the machine changes little.

The tables come from bench/plan.py and bench/RESULTS.md: one core of a Xeon (Sapphire Rapids).
"""

from __future__ import annotations

import hashlib
import json
import marshal
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type

from reap2gguf import __version__
from reap2gguf.atomic import write_whole
from reap2gguf.errors import Reap2ggufError
from reap2gguf.files import is_plain
from reap2gguf.ggml import load_ggml
from reap2gguf.machine import available_threads
from reap2gguf.quantizing.kernels.compiled import load_kernels
from reap2gguf.quantizing.quantizer import load_quantizer

# Nanoseconds to quantize a weight on one core, with an importance matrix where the type takes one,
# by the compiled kernels where they make the type, and the seconds in which the tables of some
# types are made, once per process.
NANOSECONDS = {
    "F32": 0.8,
    "BF16": 0.5,
    "F16": 0.5,
    "Q8_0": 0.6,
    "MXFP4": 5.2,
    "NVFP4": 10.4,
    "TQ2_0": 2.4,
    "TQ1_0": 3.3,
    "Q4_0": 2.9,
    "Q5_0": 3.1,
    "Q4_1": 9.5,
    "Q5_1": 9.1,
    "Q6_K": 3.0,
    "Q5_K": 9.2,
    "Q4_K": 9.1,
    "Q3_K": 3.5,
    "Q2_K": 10.9,
    "IQ4_XS": 3.5,
    "IQ4_NL": 3.6,
    "IQ3_S": 47.0,
    "IQ3_XXS": 71.0,
    "IQ2_S": 27.0,
    "IQ2_XS": 61.0,
    "IQ2_XXS": 44.0,
    "IQ1_M": 561.9,
    "IQ1_S": 126.0,
}
# The same of types that ik_llama.cpp's library makes.
_IK_NANOSECONDS = {
    "IQ2_K": 330.0,
    "IQ3_K": 119.0,
    "IQ4_K": 179.0,
    "IQ5_K": 218.0,
    "IQ6_K": 452.0,
    "IQ4_KS": 300.0,
    "IQ2_KS": 1000.0,
    "IQ4_KSS": 2000.0,
    "IQ5_KS": 417.0,
    "IQ2_KT": 11_300.0,
    "IQ3_KT": 13_400.0,
    "IQ4_KT": 22_900.0,
    "IQ3_KS": 230.0,
    "IQ2_KL": 265.0,
    "IQ1_KT": 2600.0,
}
_IQ_TABLES = {"IQ3_S": 0.25, "IQ3_XXS": 0.15, "IQ2_S": 3.9, "IQ2_XS": 2.0, "IQ2_XXS": 1.0}
TABLE_SECONDS = {**_IQ_TABLES, "IQ1_M": 8.1, "IQ1_S": 8.1}
# The type that is measured for each class; other types of a class are scaled with it. Without
# kernels, types of a class are slower by about the same factor. libggml makes "ggml" in any case.
_MEASURED = {"plain": Type.Q8_0, "k": Type.Q4_K, "iq4": Type.IQ4_XS, "ggml": Type.MXFP4}
_UNWEIGHTED = ("plain", "ggml")
_ROWS, _COLUMNS = 64, 2048
_FILE_BYTES = 2**24
_MOST_CACHE_BYTES = 2**14
_TRIES = 3
_LOADS = 32
_FARTHEST = 30.0
_FARTHEST_QUANTIZING = 200.0  # without kernels, IQ4_XS takes 50 times as long
_PYTHON_SECONDS = 0.0041  # what `_unmarshal` takes on the reference machine


@dataclass(frozen=True)
class Speed:
    """Rates of one machine; the defaults are those of the reference machine."""

    flops: float = 125e9  # of one core, float32, in matrix products
    python: float = 1.0  # time that Python code takes, 1 on the reference machine
    quantize: Mapping[str, float] = field(
        default_factory=lambda: dict.fromkeys(_MEASURED, 1.0)
    )  # by class: time to quantize, 1 on the reference machine
    hash_bytes: float = 1.5e9  # of one core, SHA-256
    read_bytes: float = 1.5e9  # of the disk
    write_bytes: float = 6e8  # of the disk, until they are there

    def quantize_seconds(self, tensor_type: Type, n_weights: int) -> float:
        """Seconds of one core to quantize, tables aside."""
        factor = self.quantize[_class_of(tensor_type)]
        return n_weights * (NANOSECONDS | _IK_NANOSECONDS)[tensor_type.name] * 1e-9 * factor

    def table_seconds(self, tensor_type: Type) -> float:
        """Seconds in which a type's tables are made."""
        return TABLE_SECONDS.get(tensor_type.name, 0.0) * self.quantize["ggml"]


def _class_of(tensor_type: Type) -> str:
    name = tensor_type.name
    if name in _IK_NANOSECONDS or name in (
        "F32",
        "MXFP4",
        "NVFP4",
        "TQ1_0",
        "TQ2_0",
        "IQ1_M",
        "IQ1_S",
    ):
        return "ggml"
    if name in ("F16", "BF16", "Q8_0"):
        return "plain"
    return "iq4" if name.startswith("IQ4") else "k"


def machine_speed() -> Speed:
    """The rates of this machine: those that were kept, else measured now and kept."""
    path = _cache_file()
    if (kept := _read(path)) is not None:
        return kept
    found = measure(path.parent)
    with suppress(OSError, Reap2ggufError):  # a folder that cannot be written: measured each time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asdict(found)))
    return found


def measure(folder: Path) -> Speed:
    """Measure this machine, in under a second; `folder` lies on the disk that is measured.

    What cannot be measured, such as a disk without space, keeps the reference machine's rate.
    """
    usual = Speed()
    rates: dict[str, Any] = {
        "flops": _flops,
        "python": lambda: _unmarshal() / _PYTHON_SECONDS,
        "quantize": _quantize,
        "hash_bytes": _hash_rate,
    }
    for name, rate in rates.items():
        try:
            rates[name] = rate()
        except Reap2ggufError:  # no libggml: whoever quantizes says so
            rates[name] = getattr(usual, name)
    written, read = _disk(folder)
    found = Speed(
        **rates, write_bytes=written or usual.write_bytes, read_bytes=read or usual.read_bytes
    )
    return _bounded(found)


def _least(work: Callable[[], object]) -> float:
    """Processor seconds of this thread for a piece of work: the least of some tries."""
    best = math.inf
    for _ in range(_TRIES):
        begun = time.thread_time()
        work()
        best = min(best, time.thread_time() - begun)
    return max(best, 1e-9)


def _flops() -> float:
    """Of one core: products so small that no library divides them among threads."""
    generator = np.random.default_rng(0)
    left = generator.standard_normal((256, 64, 64), dtype=np.float32)
    right, product = left[::-1].copy(), np.empty_like(left)
    return 2 * 64 * left.size / _least(lambda: np.matmul(left, right, out=product))


def _unmarshal() -> float:
    """Seconds to load and run code, which is what starting a program consists of."""
    source = "\n".join(
        f"def f{n}(x, y={n}):\n    return [x + y, {{'k': (x, y)}}]" for n in range(300)
    )
    code = marshal.dumps(compile(source, "measured", "exec"))

    def run() -> None:
        for _ in range(_LOADS):
            exec(marshal.loads(code), {})

    return _least(run)


def _quantize() -> dict[str, float]:
    quantizer = load_quantizer()
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((_ROWS, _COLUMNS), dtype=np.float32) * np.float32(0.02)
    importance = generator.random(_COLUMNS, dtype=np.float32) + np.float32(0.1)
    found = {}
    for name, tensor_type in _MEASURED.items():
        weighted = None if name in _UNWEIGHTED else importance
        quantizer.quantize(rows[:1], tensor_type, weighted)  # tries the kernel
        seconds = _least(lambda t=tensor_type, w=weighted: quantizer.quantize(rows, t, w))  # type: ignore[misc]
        found[name] = seconds / rows.size / (NANOSECONDS[tensor_type.name] * 1e-9)
    return found


def _hash_rate() -> float:
    data = b"x" * _FILE_BYTES
    return _FILE_BYTES / _least(lambda: hashlib.sha256(data).digest())


def _disk(folder: Path) -> tuple[float | None, float | None]:
    """Bytes per second that a disk writes and reads, of a small file that is removed again."""
    data = np.random.default_rng(0).bytes(_FILE_BYTES)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            begun = time.perf_counter()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            written = _FILE_BYTES / (time.perf_counter() - begun)
            if not hasattr(os, "posix_fadvise"):
                return written, None
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            begun = time.perf_counter()
            file.read()
            return written, _FILE_BYTES / (time.perf_counter() - begun)
    except OSError:
        return None, None  # a disk without room, or a folder that is not to be written


def _bounded(speed: Speed) -> Speed:
    """Rates that some machine may have: a measurement that was disturbed is not believed."""
    usual = Speed()
    return Speed(
        flops=_near(speed.flops, usual.flops),
        python=_near(speed.python, usual.python),
        quantize={
            name: _near(factor, 1.0, _FARTHEST_QUANTIZING)
            for name, factor in speed.quantize.items()
        },
        hash_bytes=_near(speed.hash_bytes, usual.hash_bytes),
        read_bytes=_near(speed.read_bytes, usual.read_bytes),
        write_bytes=_near(speed.write_bytes, usual.write_bytes),
    )


def _near(value: float, usual: float, farthest: float = _FARTHEST) -> float:
    """The value, within some tens of the usual one."""
    return min(max(value, usual / farthest), usual * farthest)


def _cache_file() -> Path:
    """Where this machine's rates are kept: processor, cores and versions are in the name."""
    try:
        label = load_ggml().label
    except Reap2ggufError:
        label = ""  # no libggml: whoever quantizes says so
    kernels = load_kernels()
    made_by = (label, "" if kernels is None else kernels.target)
    what = (_processor(), available_threads(), __version__, np.__version__, *made_by)
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(root)) / "reap2gguf" / f"speed-{key}.json"


def _processor() -> str:
    """The processor's name."""
    with suppress(OSError):  # Linux alone has this file
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return f"{line} {platform.node()}"
    return f"{platform.machine()} {platform.processor()} {platform.node()}"


def _read(path: Path) -> Speed | None:
    """The rates in a file; None if it is not there, or is not what `machine_speed` writes."""
    try:
        if not is_plain(path) or path.stat().st_size > _MOST_CACHE_BYTES:
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # they are measured again
    names = {one.name for one in fields(Speed)}
    if not isinstance(values, dict) or values.keys() != names:
        return None
    classes = values["quantize"]
    if not isinstance(classes, dict) or classes.keys() != _MEASURED.keys():
        return None
    numbers = [value for name, value in values.items() if name != "quantize"] + [*classes.values()]
    if not all(isinstance(number, float) and 0 < number < math.inf for number in numbers):
        return None
    return _bounded(Speed(**values))
