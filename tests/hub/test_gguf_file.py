"""GGUF files on the Hub, read by ranges: never whole, of one commit, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

from reap2gguf.errors import ArtifactError, SourceError
from reap2gguf.gguf_files import reader
from reap2gguf.gguf_files.reader import GgufHeader, read_gguf_header
from reap2gguf.gguf_files.split import plan_split, read_whole_header, write_part
from reap2gguf.hub import ranges
from reap2gguf.hub.gguf_file import hub_gguf_name, open_hub_gguf
from reap2gguf.progress import Silent
from tests.exporting.files import export_files, plain
from tests.loopback_hub.model import serving
from tests.loopback_hub.repository import COMMIT
from tests.loopback_hub.server import Fault, Hub
from tests.tiny import TinyQwen3Moe

NAME = "tiny-Q8_0.gguf"
BLOCK = 2**14


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole file, the same in three parts, and what a repository has besides."""
    made = tmp_path_factory.mktemp("gguf")
    model = TinyQwen3Moe(n_layers=3, vocab=320).write(made / "model")
    whole = export_files(model, made, [plain("Q8_0")])["Q8_0"].rename(made / NAME)
    (made / "parts").mkdir()
    plan = plan_split(whole, 120_000)
    assert len(plan.parts) > 2
    with Silent().task("", 0, "") as task:
        for part in plan.parts:
            write_part(plan, part, made / "parts", task)
    (made / "mmproj-tiny-F16.gguf").write_bytes(b"GGUF")
    (made / "imatrix.gguf").write_bytes(b"GGUF")
    return made


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path) -> Iterator[Hub]:
    files = {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.gguf"))
    }
    monkeypatch.setattr(ranges, "_BLOCK", BLOCK)
    monkeypatch.setattr("reap2gguf.hub.gguf_file._HEADER_BYTES", 2**10)
    with serving(files, monkeypatch, tmp_path / "cache") as hub:
        yield hub


def opened(wanted: str, revision: str | None = None) -> GgufHeader:
    return open_hub_gguf("owner/name", revision, wanted, sleep=lambda seconds: None)


def expect_same(found: GgufHeader, expected: GgufHeader) -> None:
    """Both give the same keys, tensors and bytes, whole and in parts."""
    assert found.metadata == expected.metadata
    assert [*found.tensors] == [*expected.tensors]
    for name, info in expected.tensors.items():
        assert np.array_equal(found.read(name), expected.read(name)), name
        n_rows = info.n_bytes // info.row_bytes
        if n_rows > 2:
            part = found.read(name, 1, n_rows - 1)
            assert np.array_equal(part, expected.read(name, 1, n_rows - 1))


def test_the_same_as_on_disk(hub: Hub, folder: Path) -> None:
    found = opened(NAME)
    assert found.n_bytes == (folder / NAME).stat().st_size
    assert str(found.path) == f"owner/name:{NAME}"
    expect_same(found, read_gguf_header(folder / NAME))
    # by ranges of the commit, and of no other revision
    asked = hub.asked("/resolve/")
    assert asked
    assert all(f"/resolve/{COMMIT}/" in one and "bytes=" in one for one in asked)
    assert not any(one.endswith("-") for one in asked)


def test_all_parts_as_one(hub: Hub, folder: Path) -> None:
    parts = sorted((folder / "parts").iterdir())
    found = opened(f"parts/{parts[0].name}")
    expect_same(found, read_whole_header(parts[0]))
    assert found.n_bytes == sum(part.stat().st_size for part in parts)
    with pytest.raises(SourceError, match="is a later part; pass the first, tiny-Q8_0-00001-of-"):
        opened(f"parts/{parts[1].name}")
    del hub.files[f"parts/{parts[1].name}"]
    with pytest.raises(SourceError, match="no file 'parts/tiny-Q8_0-00002-of"):
        opened(f"parts/{parts[0].name}")


def test_a_header_needs_little(hub: Hub) -> None:
    header = opened(NAME)
    ahead = 2 * BLOCK + reader._PIECE_BYTES  # strings are cut out of pieces
    assert header.infos_end <= hub.bytes_sent < header.infos_end + ahead
    name = "blk.1.ffn_up_exps.weight"
    before = hub.bytes_sent
    header.read(name, 0, 4)
    fetched = hub.bytes_sent - before
    assert fetched <= header.tensors[name].n_bytes + 2 * BLOCK


def test_what_was_read_is_kept_up_to_a_bound(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_MOST_KEPT", 4)
    header = opened(NAME)
    assert isinstance(header, GgufHeader)
    name = "blk.0.ffn_up_exps.weight"
    assert header.tensors[name].n_bytes < 3 * BLOCK
    first = header.read(name)
    n_asked = len(hub.requests)
    assert np.array_equal(header.read(name), first)
    assert len(hub.requests) == n_asked
    for other in header.tensors:
        header.read(other)
        assert len(header.blocks._kept) <= 4  # type: ignore[attr-defined]
    n_asked = len(hub.requests)
    assert np.array_equal(header.read(name), first)
    assert len(hub.requests) > n_asked


def test_the_rest_of_a_tensor_comes_ahead(hub: Hub) -> None:
    header = opened(NAME)
    name = "blk.2.ffn_up_exps.weight"
    n_rows = header.tensors[name].n_bytes // header.tensors[name].row_bytes
    for first in range(0, n_rows, 8):
        header.read(name, first, first + 8)
    n_asked = len(hub.requests)
    assert header.read(name).size == header.tensors[name].n_bytes
    assert len(hub.requests) == n_asked


@pytest.mark.parametrize("after", [None, 100], ids=["busy", "cut off"])
def test_a_request_that_fails_is_repeated(hub: Hub, folder: Path, after: int | None) -> None:
    header = opened(NAME)
    hub.faults += [Fault(503, where=NAME, times=3, after=after, reset=after is not None)]
    expect_same(header, read_gguf_header(folder / NAME))
    assert not hub.faults[0].times


def test_a_hub_that_is_gone_is_an_error_and_then_is_not(hub: Hub, folder: Path) -> None:
    header = opened(NAME)
    name = "blk.2.ffn_up_exps.weight"
    hub.faults += [Fault(503, where=NAME, times=10**6)]
    with pytest.raises(SourceError, match=r"owner/name: the Hub cannot be reached in 5 tries"):
        header.read(name)
    hub.faults.clear()
    assert np.array_equal(header.read(name), read_gguf_header(folder / NAME).read(name))


def test_a_file_that_is_shorter_than_it_says(hub: Hub, folder: Path) -> None:
    header = opened(NAME)
    hub.files[NAME] = (folder / NAME).read_bytes()[: header.infos_end + 100]
    with pytest.raises(SourceError, match="owner/name"):
        header.read([*header.tensors][-1])


def test_a_file_that_is_none(hub: Hub) -> None:
    hub.files[NAME] = b"GGUF" + b"\xff" * 100
    with pytest.raises(ArtifactError, match=f"owner/name:{NAME}"):
        opened(NAME)
    hub.files[NAME] = b""
    with pytest.raises(ArtifactError, match="empty"):
        opened(NAME)


def test_by_quant_type(hub: Hub, folder: Path) -> None:
    del hub.files[NAME]
    first = sorted((folder / "parts").iterdir())[0].name
    assert str(opened("q8_0").path) == f"owner/name:parts/{first}"
    hub.files[NAME] = (folder / NAME).read_bytes()
    with pytest.raises(SourceError, match=rf"2 files fit 'q8_0'; .*parts/{first}, {NAME}"):
        opened("q8_0")
    with pytest.raises(SourceError, match=r"no file 'Q4_K_M'; pass owner/name:FILE") as caught:
        opened("Q4_K_M")
    assert "mmproj" not in str(caught.value)
    assert "imatrix" not in str(caught.value)
    hub.files.clear()
    with pytest.raises(SourceError, match="one of none"):
        opened("Q4_K_M")


def test_what_is_not_there(hub: Hub) -> None:
    with pytest.raises(SourceError, match="no revision 'v9' on the Hub"):
        opened(NAME, "v9")
    with pytest.raises(SourceError, match="no such repository"):
        open_hub_gguf("owner/other", None, NAME)
    hub.repositories[0].gated = True
    with pytest.raises(SourceError, match="gated"):
        opened(NAME)


def test_a_file_in_the_cache_is_read_from_there(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huggingface_hub.hf_hub_download("owner/name", NAME)
    n_asked = len(hub.asked("/resolve/"))
    expect_same(opened(NAME), read_gguf_header(folder / NAME))
    assert len(hub.asked("/resolve/")) == n_asked
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    expect_same(opened(NAME), read_gguf_header(folder / NAME))
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE is set"):
        opened("parts/other.gguf")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name:file.gguf", ("owner/name", None, "file.gguf")),
        ("owner/name:sub/file.gguf", ("owner/name", None, "sub/file.gguf")),
        ("owner/name@v1.2:Q4_K_M", ("owner/name", "v1.2", "Q4_K_M")),
        (
            "https://huggingface.co/owner/name/blob/main/BF16/file.gguf",
            ("owner/name", "main", "BF16/file.gguf"),
        ),
        (
            "https://huggingface.co/owner/name/resolve/main/file.gguf?download=true",
            ("owner/name", "main", "file.gguf"),
        ),
        ("owner/name", None),
        ("./build/file.gguf", None),
        ("https://example.org/owner/name/blob/main/file.gguf", None),
        ("../owner/name:file.gguf", None),
        ("owner/name:", None),
    ],
)
def test_names(text: str, expected: tuple[str, str | None, str] | None) -> None:
    assert hub_gguf_name(text) == expected
