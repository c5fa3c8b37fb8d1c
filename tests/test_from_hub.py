"""Models that lie on the Hub: what is asked of it, when, and how often."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub import Fault, Hub
from hub_repository import COMMIT, OnDisk, Repository
from safetensors.torch import save_file
from tiny import TinyQwen3Moe

from reap2gguf import pipeline
from reap2gguf.checkpoint import hub as hub_module
from reap2gguf.checkpoint import shards
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.source import Source, resolve_source
from reap2gguf.errors import CheckpointError, OutputError, SourceError
from reap2gguf.observe.run import SweepRun
from reap2gguf.options import BuildOptions, CalibrationOptions, ComputeOptions
from reap2gguf.plan import Plan, make_plan
from reap2gguf.progress import Silent

PROSE = Path(__file__).resolve().parent.parent / "calibration" / "prose.txt"
MODEL = TinyQwen3Moe(n_layers=4, hidden=32, width=16, head_dim=8, dense_width=32)
ENDS = "model-00005-of-00005.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A checkpoint of a shard a layer and one for both ends, with what travels with it."""
    folder = MODEL.write(tmp_path_factory.mktemp("source") / "tiny")
    (folder / "model.safetensors").unlink()
    by_shard: dict[str, dict[str, Any]] = {}
    for name, tensor in MODEL.tensors().items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 4
        by_shard.setdefault(f"model-{layer + 1:05d}-of-00005.safetensors", {})[name] = tensor
    for shard, tensors in by_shard.items():
        save_file(tensors, folder / shard, {"format": "pt"})
    weight_map = {name: shard for shard, tensors in by_shard.items() for name in tensors}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    (folder / "LICENSE").write_text("free")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    (folder / "vocab.json").write_text("{}")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, bytes]) -> Iterator[Hub]:
    monkeypatch.setattr(hub_module, "_FIRST_WAIT", 0.01)
    with Hub(dict(files)) as hub:
        hub.serve(monkeypatch, tmp_path / "cache")
        yield hub
    huggingface_hub.close_session()


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


def whole(hub: Hub, name: str) -> list[str]:
    """Requests for a whole file, or the rest of one."""
    return [
        asked
        for asked in hub.asked(f"GET /owner/name/resolve/{COMMIT}/{name}")
        if "bytes=" not in asked or asked.endswith("-")
    ]


def shard_of(layer: int) -> str:
    return f"model-{layer + 1:05d}-of-00005.safetensors"


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


def test_a_header_longer_than_the_first_read(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plan(tmp_path / "out").checkpoint.tensors
    monkeypatch.setattr(shards, "_FIRST_BYTES", 100)
    found = plan(tmp_path / "out").checkpoint.tensors
    assert found == expected
    assert len(hub.asked("bytes=100-")) == 5


def test_a_server_that_knows_no_ranges(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hub._part", lambda answer, wanted: answer)
    assert plan(tmp_path / "out").model.facts.n_layers == 4
    monkeypatch.setattr(shards, "_FIRST_BYTES", 100)
    with pytest.raises(SourceError, match="not understood"):
        plan(tmp_path / "out")


@pytest.mark.parametrize(
    ("beginning", "said"),
    [
        (b"\xff" * 8, "claims a header of"),
        (b"\x40\0\0\0\0\0\0\0not json", "not valid JSON"),
        (b"", "too short"),
    ],
)
def test_a_header_that_cannot_be(hub: Hub, tmp_path: Path, beginning: bytes, said: str) -> None:
    hub.files[ENDS] = beginning + b" " * 100 if beginning else b""
    with pytest.raises(CheckpointError, match=said):
        plan(tmp_path / "out")


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


@contextmanager
def after_each_layer(
    monkeypatch: pytest.MonkeyPatch, look: Callable[[int], None]
) -> Iterator[None]:
    real = SweepRun._all_batches

    def wrapped(self: SweepRun, index: int, task: Any) -> Any:
        flags = real(self, index, task)
        look(index)
        return flags

    with monkeypatch.context() as patch:
        patch.setattr(SweepRun, "_all_batches", wrapped)
        yield


def test_the_next_layer_is_fetched_while_one_computes(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[int, list[int]] = {}

    def look(index: int) -> None:
        if index not in asked:  # the second sweep reads what is there
            asked[index] = [layer for layer in range(4) if whole(hub, shard_of(layer))]

    with after_each_layer(monkeypatch, look):
        build(tmp_path / "out")
    assert asked == {0: [0, 1], 1: [0, 1, 2], 2: [0, 1, 2, 3], 3: [0, 1, 2, 3]}


def test_fetched_or_not_it_is_the_same_model(hub: Hub, tmp_path: Path) -> None:
    before = plan(tmp_path / "out").checkpoint
    prints = before.fingerprint(), before.stamps()
    source = resolve_source("owner/name")
    with source.open() as checkpoint:
        for shard in checkpoint.shards:
            checkpoint.read(next(n for n, t in checkpoint.tensors.items() if t.path == shard))
    assert (checkpoint.fingerprint(), checkpoint.stamps()) == prints
    # and in a process that is offline, or is given the folder
    again = Checkpoint.open(source.folder)
    assert (again.fingerprint(), again.stamps()) == prints
    assert not hub.asked("vocab.json")


def test_the_hub_goes_away_and_comes_back(hub: Hub, tmp_path: Path) -> None:
    chosen = plan(tmp_path / "out")
    hub.faults = [Fault(where=shard_of(2), after=2_000, ends_all=True)]
    back = threading.Timer(1.5, hub.come)
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
    with pytest.raises(SourceError, match="what was fetched whole is kept") as caught:
        pipeline.build(chosen, Silent())
    assert "\n" not in str(caught.value)
    blobs = list((tmp_path / "cache").rglob("*.incomplete"))
    assert blobs == []
    hub.come()
    hub.requests.clear()
    build(tmp_path / "out")
    fetched = [layer for layer in range(5) if whole(hub, shard_of(layer))]
    assert fetched == [2, 3]


def test_what_comes_damaged_is_fetched_again(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve_source("owner/name")
    checkpoint = source.open()
    content = hub.files[ENDS]
    assert isinstance(content, bytes)
    real = shards.file_sha256
    seen: list[Path] = []

    def once_wrong(path: Path) -> str:
        seen.append(path)
        return "0" * 64 if len(seen) == 1 else real(path)

    monkeypatch.setattr(shards, "file_sha256", once_wrong)
    checkpoint.read("model.norm.weight")
    assert len(whole(hub, ENDS)) == 2
    monkeypatch.setattr(shards, "file_sha256", lambda path: "0" * 64)
    with pytest.raises(CheckpointError, match="its hash is not that of the file on the Hub"):
        checkpoint.read("model.layers.0.input_layernorm.weight")
    checkpoint.close()


def test_who_waits_is_let_go(hub: Hub, tmp_path: Path) -> None:
    checkpoint = resolve_source("owner/name").open()
    entered, release = threading.Event(), threading.Event()
    real = hub.answer

    def slow(request: Any) -> Any:
        if request.path.endswith(ENDS) and request.method == "GET":
            entered.set()
            release.wait(10)
        return real(request)

    hub.answer = slow  # type: ignore[method-assign]
    errors: list[BaseException] = []

    def read() -> None:
        try:
            checkpoint.read("model.norm.weight")
        except CancelledError as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    assert entered.wait(10)
    checkpoint.stop_fetching()
    reader.join(10)
    release.set()
    assert len(errors) == 1
    # and whoever reads later fetches it
    assert checkpoint.read("model.norm.weight").size == 32
    checkpoint.close()


def test_a_gated_repository_is_explained(hub: Hub, tmp_path: Path) -> None:
    hub.repositories[0].gated = True
    with pytest.raises(SourceError, match=r"accept its terms there and run `hf auth login`"):
        plan(tmp_path / "out")


def test_offline_with_half_a_copy(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan(tmp_path / "out")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="the cache has no whole copy"):
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
    monkeypatch.setattr("reap2gguf.running.shutil.disk_usage", lambda path: Usage)
    monkeypatch.setattr(type(chosen.checkpoint), "unfetched_bytes", 2 * 10**8 + 99_999_999)
    with pytest.raises(OutputError, match=r"299,999,999 bytes of weights are still to be fetched"):
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


def test_whatever_goes_wrong_reaches_who_waits(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise TypeError("something new")

    checkpoint = resolve_source("owner/name").open()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    with pytest.raises(TypeError, match="something new"):
        checkpoint.read("model.norm.weight")
    checkpoint.close()
