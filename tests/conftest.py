"""Fixtures: tiny checkpoints, and one finished bundle of the bundled example."""

from __future__ import annotations

import atexit
import gc
import importlib.util
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # each processor has a worker already

from reap2gguf.machine import available_threads
from reap2gguf.options import BuildOptions, CalibrationOptions, ComputeOptions
from reap2gguf.progress import Silent
from tests import plain_pictures
from tests.tiny import EXAMPLE, REPOSITORY, TinyQwen3Moe

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

if importlib.util.find_spec("llama_cpp"):
    # before libggml-python's library of the same name; tests that need it import it themselves
    importlib.import_module("llama_cpp")
    # it opens two files when it is imported, keeps them for its destructors and never closes them
    for file in ("outnull_file", "errnull_file"):
        atexit.register(getattr(importlib.import_module("llama_cpp._utils"), file).close)

# a busy machine is no reason to fail: what is generated matters, not how fast; and the same
# examples are drawn everywhere
settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")

MOST_WORKERS = 8  # each takes up to 1.5 GB
# A file runs in one worker: the longest begin first, so that all workers end at about one time.
LONGEST = (
    "test_faults.py", "test_in_build.py", "test_source.py", "test_beside.py",
    "test_against_llama_cpp.py", "test_hostile.py", "test_docs.py", "test_ranks.py",
    "test_k_quants.py", "test_deploy.py", "test_keys.py", "test_push.py",
    "test_damage.py", "test_any_config.py", "test_adding.py", "test_against_source.py",
    "test_hub_datasets.py", "test_facts.py", "test_contract.py", "test_device_comparison.py",
    "test_binary_files.py", "test_cli.py", "test_qwen3_5_llama_cpp.py", "test_template_worker.py",
    "test_from_hub_interrupted.py",
)  # fmt: skip

CALIBRATION = REPOSITORY / "calibration"


def pytest_configure(config: pytest.Config) -> None:
    """Keep what `plan` measures of this machine in a folder of this run, for all workers."""
    plain_pictures.use()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # as in a shell's background job, where nothing that a test starts would hear of it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tempfile.mkdtemp(prefix="reap2gguf-tests-")
        os.environ["XDG_CACHE_HOME"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: one worker per processor that this process may use."""
    return min(available_threads(), MOST_WORKERS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Bring the tests of the LONGEST files to the front, in that order.

    Left out is what is marked `fewer` where the slow tests of the same function run as well.
    """
    with_slow = (
        set() if config.option.markexpr else {_function(one) for one in items if _is(one, "slow")}
    )
    fewer = [one for one in items if _is(one, "fewer") and _function(one) in with_slow]
    if fewer:
        config.hook.pytest_deselected(items=fewer)
        items[:] = [one for one in items if one not in fewer]
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def _is(item: pytest.Item, marker: str) -> bool:
    return item.get_closest_marker(marker) is not None


def _function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def pytest_collection_finish() -> None:
    """Leave what is loaded by now out of the collections of garbage, which then take less time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def nothing_waits_for_the_disk() -> Iterator[None]:
    """Flush nothing: no test outlives a power cut, and workers waited a third of their time.

    `inspect.unwrap(os.fsync)` flushes.
    """
    flush = os.fsync

    @wraps(flush)
    def pretend(descriptor: FileDescriptorLike) -> None:
        os.fstat(descriptor if isinstance(descriptor, int) else descriptor.fileno())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", pretend)
        yield


@pytest.fixture(scope="session", autouse=True)
def every_file_is_closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail the last test of a process if a test has left a file open; its path names the test."""
    yield
    gc.collect()  # a file that lies in a cycle of references warns here, not after the summary
    folder, opened = str(tmp_path_factory.getbasetemp()), Path("/proc/self/fd")
    descriptors = opened.iterdir() if opened.is_dir() else ()
    left = [path for path in map(os.path.realpath, descriptors) if path.startswith(folder)]
    assert not left, f"files that a test has opened and not closed: {left}"


@pytest.fixture(scope="session")
def example() -> Path:
    """The bundled, trained checkpoint."""
    return EXAMPLE


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A random checkpoint of the default layout: 2 layers, 8 experts, 2D, one file."""
    return TinyQwen3Moe().write(tmp_path / "tiny")


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint whose rows fill blocks of 256, so that every type can hold it."""
    shape = TinyQwen3Moe(hidden=256, width=256, n_experts=3, head_dim=64)
    return shape.write(tmp_path_factory.mktemp("wide") / "model")


@dataclass(frozen=True)
class Bundle:
    """A finished build and what it was built from."""

    output: Path
    hf: Path
    gguf: Path
    source: Path


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The example at compression 0.25 in two recipes; built once, never changed by a test."""
    from reap2gguf.building.pipeline import build
    from reap2gguf.building.plan import make_plan

    output = tmp_path_factory.mktemp("built")
    options = BuildOptions(
        recipes=("unsloth-iq4km", "bf16"),
        model=str(EXAMPLE),
        output=output,
        name="example",
        compression=0.25,
        calibration=CalibrationOptions(str(CALIBRATION / "prose.txt"), max_length=512),
        compute=ComputeOptions(device="cpu"),
    )
    result = build(make_plan(options), Silent())
    return Bundle(output, result.hf_folder, result.gguf_folder, EXAMPLE)


@pytest.fixture
def bundle(built: Bundle, tmp_path: Path) -> Bundle:
    """A copy of the finished bundle that a test may damage."""
    output = tmp_path / "build"
    output.mkdir()
    shutil.copytree(built.hf, output / built.hf.name)
    shutil.copytree(built.gguf, output / built.gguf.name)
    return Bundle(output, output / built.hf.name, output / built.gguf.name, built.source)
