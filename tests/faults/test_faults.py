"""A sample of what `fault_runs.py` does everywhere: small, and with `-m ""` larger."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.fault_layer import tree
from tests.faults.fault_runs import NAME, STAGES, Rig, is_one_line, points
from tests.faults.fault_zygote import Zygote

WRITING = ("write", "rename", "fsync")
ALL = (*WRITING, "read")


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("faults")
    with Zygote(folder) as zygote:
        yield Rig(folder, zygote)


@pytest.fixture(scope="module")
def reference(rig: Rig) -> tuple[dict[str, bytes], list[str]]:
    return rig.reference(ALL)


@pytest.fixture(scope="module")
def bundle(reference: tuple[dict[str, bytes], list[str]]) -> dict[str, bytes]:
    """What an uninterrupted build leaves."""
    return reference[0]


@pytest.fixture(scope="module")
def operations(reference: tuple[dict[str, bytes], list[str]]) -> list[str]:
    """Every operation of a build, in order."""
    return reference[1]


def few_or(many: int, few: int = 1) -> Any:
    """Two parameters of a test: a few points, and in the slow tests many."""
    return [pytest.param(few, marks=pytest.mark.fewer), pytest.param(many, marks=pytest.mark.slow)]


def renames(log: list[str], name: str) -> list[int]:
    """Where files whose path holds `name` take their names."""
    return [i for i, line in enumerate(log) if line.startswith("rename") and name in line]


# an operation in the middle of each stage
IN_STAGE = {
    "texts": "write: open /.work/model/build.json.part",
    "observe": "write: write /.work/model/observe.state.part",
    "prune": "write: pwrite /.work/model/model/model.safetensors.part",
    "imatrix": "write: write /.work/model/imatrix.state.part",
    "export": "write: pwrite /.work/model/model-GGUF/model-Q8_0.gguf.part",
    "verify": "read: open /.work/model/model-GGUF/model-Q4_K_M.gguf",
    "publish": "rename: replace /.work/model/model-GGUF/SHA256SUMS.part",
}


def one_in_each_stage(log: list[str]) -> list[int]:
    """One operation in each stage."""
    found = [[i for i, line in enumerate(log) if line == piece] for piece in IN_STAGE.values()]
    return [places[len(places) // 2] for places in found]


def at_each_stage(log: list[str]) -> list[int]:
    """Operations spread over every stage, three between two signs that a stage begins or ends."""
    ends = [log.index(f"fsync: fsync /.work/{name}") for name in ("texts", "observations")]
    ends += renames(log, "stages.json")
    chosen: set[int] = set()
    for first, last in zip([0, *ends], [*ends, len(log) - 1], strict=True):
        chosen |= {first + at for at in points(last - first + 1, 3)}
    return sorted(chosen)


@pytest.mark.parametrize(
    ("power_cut", "choose"),
    [
        # which is more than killed
        pytest.param(True, one_in_each_stage, marks=pytest.mark.fewer),
        pytest.param(False, at_each_stage, marks=pytest.mark.slow),
        pytest.param(True, at_each_stage, marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere_and_resumed(
    rig: Rig, bundle: dict[str, bytes], operations: list[str], power_cut: bool,
    choose: Callable[[list[str]], list[int]],
) -> None:  # fmt: skip
    stopped = set()
    for at in choose(operations):
        outcome = rig.build({"kinds": ALL, "at": at, "power_cut": power_cut})
        assert outcome.code == -9, operations[at]
        reached = rig.finished_stages()
        stopped |= {next((stage for stage in STAGES if stage not in reached), "publish")}
        assert not rig.resume(bundle), f"done again after {operations[at]}"
    assert stopped >= {*STAGES}


@pytest.mark.parametrize(
    ("others", "n_points"),
    [
        pytest.param(("--keep-experts", "4"), 1, marks=pytest.mark.fewer),
        pytest.param(("--keep-experts", "4"), 3, marks=pytest.mark.slow),
        pytest.param(("--recipe", "bf16"), 3, marks=pytest.mark.slow),
    ],
)
def test_killed_while_the_work_of_other_arguments_is_cleared_away(
    rig: Rig, bundle: dict[str, bytes], operations: list[str], others: tuple[str, ...],
    n_points: int,
) -> None:  # fmt: skip
    """Neither build may take what the other left for its own."""
    before_the_record = renames(operations, "stages.json")[-1] + 3

    def interrupted() -> None:
        assert rig.build({"kinds": ALL, "at": before_the_record}).code == -9

    interrupted()
    log = rig.build({"kinds": ("write", "rename")}, more=others).log
    other_bundle = tree(rig.output)
    shutil.rmtree(rig.output)
    made = f"/.work/{NAME}/{NAME}"  # both folders' names begin so
    cleared = [
        i for i, line in enumerate(log) if line.startswith(("write: unlink", "write: rmdir"))
        and made in line and not line.endswith(".part")
    ]  # fmt: skip
    for at in [cleared[i] for i in points(len(cleared), n_points)]:
        for more, expected in ((), bundle), (others, other_bundle):
            interrupted()
            rig.build({"kinds": ("write", "rename"), "at": at}, more=others)
            outcome = rig.build(more=more)
            assert outcome.code == 0, (log[at], outcome.errors)
            assert tree(rig.output) == expected, log[at]
            shutil.rmtree(rig.output)


@pytest.mark.parametrize("n_points", few_or(4))
def test_killed_by_the_clock(rig: Rig, bundle: dict[str, bytes], n_points: int) -> None:
    seconds = rig.build().seconds
    shutil.rmtree(rig.output)
    for number in range(n_points):
        rig.build(after=(number + 1) / (n_points + 1) * seconds)
        assert not rig.resume(bundle)


@pytest.mark.parametrize(
    ("error", "n_points"),
    [
        pytest.param(errno.ENOSPC, 3, marks=pytest.mark.fewer),
        pytest.param(errno.ENOSPC, 14, marks=pytest.mark.slow),
        pytest.param(errno.EIO, 14, marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fails_once(
    rig: Rig, bundle: dict[str, bytes], error: int, n_points: int
) -> None:
    log = rig.build({"kinds": WRITING}).log
    shutil.rmtree(rig.output)
    of_files = [at for at, line in enumerate(log) if not line.endswith(".log")]
    for at in (of_files[number] for number in points(len(of_files), n_points)):
        outcome = rig.build({"kinds": WRITING, "at": at, "error": error})
        assert outcome.code == 2, (log[at], outcome.errors)
        assert is_one_line(outcome), (log[at], outcome.errors)
        assert os.strerror(error) in outcome.error_lines[0]
        assert not rig.resume(bundle), log[at]


def test_a_log_that_cannot_be_written_stops_no_build(rig: Rig, bundle: dict[str, bytes]) -> None:
    log = rig.build({"kinds": WRITING}).log
    shutil.rmtree(rig.output)
    of_log = [at for at, line in enumerate(log) if line.endswith(".log")]
    outcome = rig.build({"kinds": WRITING, "at": of_log[2], "error": errno.ENOSPC})
    assert outcome.code == 0, outcome.errors
    assert "the log could not be written (No space left on device)" in outcome.errors
    assert not rig.resume(bundle)


@pytest.mark.parametrize("n_points", few_or(10, few=3))
def test_a_disk_that_cannot_be_read_once(rig: Rig, bundle: dict[str, bytes], n_points: int) -> None:
    log = rig.build({"kinds": ("read",)}).log
    shutil.rmtree(rig.output)
    for at in points(len(log), n_points):
        outcome = rig.build({"kinds": ("read",), "at": at, "error": errno.EIO})
        if outcome.code == 0:  # the plan only looked there for what may be reused
            assert log[at].startswith("read: open /.work/"), (log[at], outcome.errors)
        else:
            # what cannot be read back has failed its check
            assert outcome.code in (1, 2), (log[at], outcome.errors)
            assert is_one_line(outcome), (log[at], outcome.errors)
            assert os.strerror(errno.EIO) in outcome.errors
        assert not rig.resume(bundle), log[at]


@pytest.mark.parametrize("n_points", few_or(4, few=2))
def test_asked_to_end(
    rig: Rig, bundle: dict[str, bytes], operations: list[str], n_points: int
) -> None:
    for number in (2, 15):
        for at in points(len(operations) * 9 // 10, n_points):
            outcome = rig.build({"kinds": ALL, "at": at, "signal": number})
            assert outcome.code == 130, (operations[at], outcome.errors)
            assert is_one_line(outcome), (operations[at], outcome.errors)
            assert "Interrupted. Resume with: reap2gguf build " in outcome.errors
            assert not rig.resume(bundle)


def test_an_interrupted_sweep_goes_on_from_its_layer(rig: Rig, operations: list[str]) -> None:
    kept = renames(operations, ".state")
    assert len(kept) == 2, "a state after the first of two layers, in both sweeps"
    for at in kept:
        rig.build({"kinds": ALL, "at": at + 2})
        outcome = rig.build()
        assert "resuming from layer 1 of 2" in outcome.errors
        shutil.rmtree(rig.output)


def test_an_interrupted_export_writes_no_tensor_twice(rig: Rig, operations: list[str]) -> None:
    def tensors(lines: list[str]) -> int:
        return sum(line.startswith("write: pwrite") and ".gguf" in line for line in lines)

    at = renames(operations, "export.json")
    middle = at[len(at) // 2]
    rig.build({"kinds": ALL, "at": middle + 2})
    second = rig.build({"kinds": ALL})
    shutil.rmtree(rig.output)
    headers, racing = 2, 2 * 2  # each file's header, and what two threads were at
    before = tensors(operations[: middle + 2])
    assert tensors(second.log) <= tensors(operations) - before + headers + racing


def test_an_interrupted_pruning_writes_no_shard_twice(rig: Rig) -> None:
    arguments = {"kinds": ("rename",)}
    log = rig.build(arguments).log
    shutil.rmtree(rig.output)
    shards = [i for i, line in enumerate(log) if f"{NAME}/model" in line and "export" not in line]
    assert shards
    outcome = rig.build({**arguments, "at": shards[0] + 1})
    assert outcome.code == -9
    again = rig.build(arguments).log
    shutil.rmtree(rig.output)
    shards = [line for line in again if f"/{NAME}/model." in line or f"/{NAME}/model-0" in line]
    assert not [line for line in shards if "safetensors.part" in line]


@pytest.fixture
def small_disk(rig: Rig) -> Iterator[Path]:
    """A file system with room for half of a bundle."""
    folder = rig.output
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode:
        folder.rmdir()
        pytest.skip("a tmpfs cannot be mounted here, which takes root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
    folder.rmdir()


def test_a_disk_too_small_is_refused_before_the_work(rig: Rig, small_disk: Path) -> None:
    outcome = rig.build()
    assert outcome.code == 2
    assert is_one_line(outcome)
    assert "are free on that disk" in outcome.error_lines[0]
    assert not list(small_disk.rglob("*.safetensors"))


def test_a_disk_too_small_that_is_not_asked(rig: Rig, small_disk: Path) -> None:
    outcome = rig.build(None, more=("--no-space-check",))
    assert outcome.code == 2, outcome.errors
    assert is_one_line(outcome)
    assert "No space left on device; free some" in outcome.error_lines[0].replace(")", "")
    assert tree(small_disk) == {}
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert rig.build().code == 0
    rig.check_finals()


# Stages that overlap: their operations come in another order each time, so a point is any moment.


@pytest.fixture(scope="module")
def rig_of_two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("overlap")
    with Zygote(folder) as zygote:
        yield Rig(folder, zygote, threads=2)


def while_stages_overlap(log: list[str], wanted: int) -> list[int]:
    """Operations from where the experts are known to where everything is verified."""
    first = log.index("fsync: fsync /.work/observations") + 1
    last = max(i for i, line in enumerate(log) if "stages.json" in line)
    return [first + at for at in points(last - first + 1, wanted)]


@pytest.mark.parametrize(
    ("power_cut", "n_points"),
    [
        pytest.param(True, 4, marks=pytest.mark.fewer),
        pytest.param(False, 30, marks=pytest.mark.slow),
        pytest.param(True, 60, marks=pytest.mark.slow),
    ],
)
def test_killed_while_stages_overlap(rig_of_two: Rig, power_cut: bool, n_points: int) -> None:
    rig = rig_of_two
    bundle, operations = rig.reference(ALL)
    stopped: set[frozenset[str]] = set()
    for at in while_stages_overlap(operations, n_points):
        outcome = rig.build({"kinds": ALL, "at": at, "power_cut": power_cut})
        assert outcome.code in (-9, 0), outcome.errors  # 0: this time it had fewer operations
        stopped.add(frozenset(rig.finished_stages()))
        assert not rig.resume(bundle), f"done again after operation {at}"
    assert len(stopped) > 1


@pytest.mark.parametrize("n_points", few_or(20, few=3))
def test_a_disk_that_fails_while_stages_overlap(rig_of_two: Rig, n_points: int) -> None:
    rig = rig_of_two
    bundle, operations = rig.reference(WRITING)
    for at in while_stages_overlap(operations, n_points)[:-1]:
        outcome = rig.build({"kinds": WRITING, "at": at, "error": errno.ENOSPC})
        if outcome.code == 0:  # the log of the build, or fewer operations
            assert "could not be written" in outcome.errors or len(outcome.log) <= at
        else:
            assert outcome.code == 2, outcome.errors
            assert is_one_line(outcome), outcome.errors
            assert os.strerror(errno.ENOSPC) in outcome.error_lines[0]
        assert not rig.resume(bundle)


@pytest.mark.parametrize("n_points", few_or(12, few=2))
def test_asked_to_end_while_stages_overlap(rig_of_two: Rig, n_points: int) -> None:
    rig = rig_of_two
    bundle, operations = rig.reference(ALL)
    for at in while_stages_overlap(operations, n_points + 1)[:-1]:
        outcome = rig.build({"kinds": ALL, "at": at, "signal": 2})
        assert outcome.code in (130, 0), outcome.errors
        if outcome.code == 130:
            assert is_one_line(outcome), outcome.errors
            assert "Interrupted. Resume with: reap2gguf build " in outcome.errors
        assert not rig.resume(bundle)


@pytest.mark.parametrize("n_points", few_or(12, few=2))
def test_asked_to_end_twice_while_stages_overlap(rig_of_two: Rig, n_points: int) -> None:
    """The second Ctrl-C comes while the threads of the first one's stages still end."""
    rig = rig_of_two
    bundle, operations = rig.reference(ALL)
    ended = []
    for at in while_stages_overlap(operations, n_points + 2)[1:-1]:
        fault = {"kinds": ALL, "at": at, "signal": 2, "again_after": 1}
        outcome = rig.build(fault)
        ended.append(outcome.code)
        assert outcome.code in (130, 0), outcome.errors
        if outcome.code == 130:
            assert is_one_line(outcome), outcome.errors
            assert "Interrupted. Resume with: reap2gguf build " in outcome.errors
        assert "Traceback" not in outcome.errors
        assert not rig.resume(bundle)
    assert 130 in ended


@pytest.mark.parametrize("n_points", few_or(12, few=2))
def test_a_source_file_vanishes_while_stages_overlap(rig_of_two: Rig, n_points: int) -> None:
    """One line that names it; and when it is there again, the build resumes."""
    rig = rig_of_two
    bundle, operations = rig.reference(ALL)
    shards = sorted(rig.source.glob("*.safetensors"))
    ended = []
    for number, at in enumerate(while_stages_overlap(operations, 2 * n_points)[:n_points]):
        shard = shards[number % len(shards)]
        outcome = rig.build({"kinds": ALL, "at": at, "gone": str(shard)})
        shard.with_name(f"{shard.name}.gone").rename(shard)
        ended.append(outcome.code)
        assert outcome.code in (2, 0), outcome.errors  # 0: nobody opened it any more
        if outcome.code == 2:
            assert is_one_line(outcome), outcome.errors
            assert shard.name in outcome.error_lines[0]
        assert "Traceback" not in outcome.errors
        assert not rig.resume(bundle)
    assert 2 in ended
