"""Models that lie on the Hub: what is asked of it, when, and how often."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file

from reap2gguf.building import pipeline
from reap2gguf.building.plan import Plan, make_plan
from reap2gguf.errors import OutputError, SourceError
from reap2gguf.hub.source import Source
from reap2gguf.observing.layer_group import LayerGroup
from reap2gguf.observing.sweep import Sweep
from reap2gguf.options import BuildOptions, CalibrationOptions, ComputeOptions
from reap2gguf.progress import Silent
from tests.loopback_hub.model import layered_files, serving, shard_of, whole
from tests.loopback_hub.repository import COMMIT, OnDisk, Repository
from tests.loopback_hub.server import Fault, Hub
from tests.tiny import REPOSITORY, TinyQwen3Moe, TinyQwen35Moe

PROSE = REPOSITORY / "calibration" / "prose.txt"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return layered_files(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, bytes]) -> Iterator[Hub]:
    with serving(files, monkeypatch, tmp_path / "cache") as hub:
        yield hub


def options(output: Path, **changes: Any) -> BuildOptions:
    chosen = BuildOptions(
        recipes=("q8_0",),
        model="owner/name",
        output=output,
        calibration=CalibrationOptions(str(PROSE), samples=4, max_length=64),
        chunk=64,
        compute=ComputeOptions(device="cpu"),
    )
    return replace(chosen, **changes)


def plan(output: Path, **changes: Any) -> Plan:
    return make_plan(options(output, **changes))


def build(output: Path, **changes: Any) -> pipeline.BuildResult:
    return pipeline.build(plan(output, **changes), Silent())


def test_a_plan_reads_headers_only(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    found = plan(tmp_path / "out")
    assert found.model.facts.n_layers == 4
    assert found.checkpoint.unfetched_bytes == sum(
        len(content) for name, content in files.items() if name.endswith(".safetensors")
    )
    asked = hub.asked(".safetensors")
    assert len([line for line in asked if "index.json" not in line]) == 5
    assert all("bytes=0-" in line for line in asked if "index.json" not in line)
    for name in ("vocab.json", "LICENSE", "README.md"):
        assert not hub.asked(f"/{name}")


def test_a_build_fetches_each_shard_once(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    result = build(tmp_path / "out")
    for layer in range(5):
        assert len(whole(hub, shard_of(layer))) == 1
    assert result.manifest.source.revision == COMMIT
    assert (result.hf_folder / "LICENSE").read_text() == "free"
    assert "license: mit" in (result.hf_folder / "README.md").read_text()
    # what was fetched is what is there
    cached = Path(plan(tmp_path / "out").checkpoint.folder)
    assert {name: (cached / name).read_bytes() for name in files} == files
    assert plan(tmp_path / "out").checkpoint.unfetched_bytes == 0


def test_the_bundle_is_that_of_the_folder(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    ours = build(tmp_path / "out").gguf_folder
    folder = tmp_path / "name"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    theirs = build(tmp_path / "other", model=str(folder)).gguf_folder
    name = "name-REAP-0.25-Q8_0.gguf"
    ours_bytes, theirs_bytes = (ours / name).read_bytes(), (theirs / name).read_bytes()
    # the header names the source: owner/name and name
    assert ours_bytes[-100_000:] == theirs_bytes[-100_000:]
    assert (ours / "imatrix.gguf").read_bytes() == (theirs / "imatrix.gguf").read_bytes()


def test_a_tower_on_the_hub_is_looked_at_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A plan downloads no weights, so the build looks for values beyond F16, before it computes."""
    folder = TinyQwen35Moe(mtp=False).write(tmp_path / "model")
    name = "model.visual.blocks.0.mlp.linear_fc2.weight"
    found = load_file(folder / "model.safetensors")
    found[name][0, 0] = 1e5
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    notes: list[str] = []
    with serving(files, monkeypatch, tmp_path / "cache") as hub:
        planned = plan(tmp_path / "out")
        assert not planned.side_files[0].is_checked
        assert not whole(hub, "model.safetensors")
        progress = Silent()
        monkeypatch.setattr(progress, "note", notes.append)
        result = pipeline.build(planned, progress)
        assert result is not None
        (record,) = result.manifest.side_files
    assert record.tensors["v.blk.0.ffn_down.weight"] == "F32"
    assert [note for note in notes if "is written as F32" in note] == [
        f"'{name}' holds values up to 99840, beyond F16; v.blk.0.ffn_down.weight is written as F32"
    ]


def test_a_model_on_the_hub_that_was_pruned_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The plan fetches the source's manifest."""
    original = TinyQwen3Moe().write(tmp_path / "original")
    first = build(tmp_path / "first", model=str(original), keep_experts=6)
    files = {file.name: file.read_bytes() for file in first.hf_folder.iterdir()}
    with serving(files, monkeypatch, tmp_path / "cache"):
        history = plan(tmp_path / "out", keep_experts=4).history
    assert history is not None
    assert (history.label, history.n_experts, history.methods) == ("original", 8, ("reap",))
    assert history.experts == first.manifest.pruning.kept


@contextmanager
def after_each_layer(
    monkeypatch: pytest.MonkeyPatch, look: Callable[[int], None]
) -> Iterator[None]:
    real = Sweep._all_batches

    def wrapped(self: Sweep, group: LayerGroup, task: Any) -> Any:
        flags = real(self, group, task)
        look(group.layers[-1])
        return flags

    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "_all_batches", wrapped)
        yield


def test_the_next_layer_is_fetched_while_one_computes(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[int, list[int]] = {}

    def look(index: int) -> None:
        if index in asked:
            return  # the second sweep reads what is there
        begun = time.monotonic()
        while index < 3 and not whole(hub, shard_of(index + 1)):
            assert time.monotonic() - begun < 300, "the next shard is not fetched"
            time.sleep(0.01)
        asked[index] = [layer for layer in range(4) if whole(hub, shard_of(layer))]

    with after_each_layer(monkeypatch, look):
        build(tmp_path / "out")
    assert asked == {0: [0, 1], 1: [0, 1, 2], 2: [0, 1, 2, 3], 3: [0, 1, 2, 3]}


def test_the_hub_goes_away_and_comes_back(hub: Hub, tmp_path: Path) -> None:
    chosen = plan(tmp_path / "out")
    gone = Fault(where=shard_of(2), after=2_000, ends_all=True)
    hub.faults = [gone]

    def come_back() -> None:
        assert gone.reached.wait(300)
        time.sleep(1)  # a request or two finds nobody
        hub.come()

    back = threading.Thread(target=come_back)
    back.start()
    try:
        result = pipeline.build(chosen, Silent())
    finally:
        back.join()
    assert result.manifest.pruning.n_kept == 6
    # of the others, each once
    assert [len(whole(hub, shard_of(layer))) for layer in (0, 1, 3)] == [1, 1, 1]


def test_a_build_goes_on_after_the_hub_was_gone(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    chosen = plan(tmp_path / "out")
    hub.faults = [Fault(where=shard_of(2), after=2_000, ends_all=True)]
    with pytest.raises(SourceError, match="complete files are kept") as caught:
        pipeline.build(chosen, Silent())
    assert "\n" not in str(caught.value)
    blobs = list((tmp_path / "cache").rglob("*.incomplete"))
    assert blobs == []
    hub.come()
    hub.requests.clear()
    build(tmp_path / "out")
    fetched = [layer for layer in range(5) if whole(hub, shard_of(layer))]
    assert fetched == [2, 3]


def test_a_gated_repository_is_explained(hub: Hub, tmp_path: Path) -> None:
    hub.repositories[0].gated = True
    with pytest.raises(SourceError, match=r"accept its terms there and run `hf auth login`"):
        plan(tmp_path / "out")


def test_offline_with_half_a_copy(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan(tmp_path / "out")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="the cache has no complete copy"):
        plan(tmp_path / "out")


def test_offline_with_a_whole_copy(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(tmp_path / "out")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    again = plan(tmp_path / "out")
    assert again.source == Source("owner/name", again.source.folder, COMMIT, again.source.snapshot)
    result = pipeline.build(again, Silent())
    assert result.stages == ()  # finished with the same inputs
    assert result.manifest == first.manifest


def test_the_cache_is_asked_for_room(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 3 * 10**8

    chosen = plan(tmp_path / "out")
    monkeypatch.setattr("reap2gguf.building.needs.room.shutil.disk_usage", lambda path: Usage)
    monkeypatch.setattr(type(chosen.checkpoint), "unfetched_bytes", 2 * 10**8 + 99_999_999)
    with pytest.raises(OutputError, match=r"299,999,999 bytes of weights are not downloaded yet"):
        pipeline.build(chosen, Silent())


def test_small_files_that_are_large_are_refused(hub: Hub, tmp_path: Path) -> None:
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(2**40)
    hub.files["tokenizer.json"] = OnDisk(big, "0" * 64)
    with pytest.raises(SourceError, match=r"'tokenizer\.json' has 1,099,511,627,776 bytes"):
        plan(tmp_path / "out")


def test_files_below_the_top_are_left_there(hub: Hub, tmp_path: Path) -> None:
    hub.files["onnx/config.json"] = b"{}"
    hub.files["original/consolidated.safetensors"] = b"x"
    build(tmp_path / "out")
    assert not hub.asked("/onnx/")
    assert not hub.asked("/original/")


def test_no_model_at_all(hub: Hub, tmp_path: Path) -> None:
    hub.repositories[0] = Repository("owner/name", {"README.md": b"empty"})
    with pytest.raises(SourceError, match=r"no config\.json"):
        plan(tmp_path / "out")
