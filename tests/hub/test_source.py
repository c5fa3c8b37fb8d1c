from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from reap2gguf.errors import SourceError
from reap2gguf.hub import retry
from reap2gguf.hub.source import Source, hub_name, resolve_source
from tests.loopback_hub.repository import COMMIT, Repository
from tests.loopback_hub.server import Hub


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST_WAIT", 0.0)


def http_error(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    # the HTTP client that huggingface_hub was built on differs between its versions
    transport = __import__(errors.Response.__module__.partition(".")[0])
    request = transport.Request("GET", "https://huggingface.co/api/models/owner/name")
    return kind("no", response=transport.Response(status, request=request))


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def model_info(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)


def refusal(model: str) -> str:
    with pytest.raises(SourceError) as caught:
        resolve_source(model)
    return str(caught.value)


def test_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "Some-Model"
    folder.mkdir()
    source = resolve_source(str(folder))
    assert source == Source("Some-Model", folder, None)
    assert source.short_name == "Some-Model"


def test_the_current_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "Some-Model"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert resolve_source(".").label == "Some-Model"


def test_a_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    failing(monkeypatch, AssertionError("asked the Hub"))
    assert resolve_source("owner/name").label == "name"


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_source("~/model").folder == tmp_path / "model"


def test_nothing_is_the_bundled_example(example: Path) -> None:
    source = resolve_source(None)
    assert source.label == "tiny-qwen3-moe"
    assert source.folder.samefile(example)


def test_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    message = refusal(str(path))
    assert str(path) in message
    assert "is a file" in message


@pytest.mark.parametrize(
    "model",
    ["nonsense", "", "a/b/c", "./owner/name", "/owner/name", "../name", "owner/", "/name", "a b/c",
     "owner/name@", "owner/name@v1@v2", "~nobody-here/name",
     "x" * 300],
)  # fmt: skip
def test_nonsense_names(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, AssertionError("asked the Hub"))
    message = refusal(model)
    assert message.startswith(f"{model}: ")
    assert "no such folder" in message


@pytest.mark.parametrize(
    "model", ["owner/na--me", "owner/-name", "owner/name.git", f"owner/{'n' * 120}", "a..b/name"]
)
def test_names_that_the_hub_library_refuses(model: str) -> None:
    assert model in refusal(model)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (http_error(errors.GatedRepoError, 403), "hf auth login"),
        (http_error(errors.RepositoryNotFoundError, 404), "no such repository"),
        (http_error(errors.RevisionNotFoundError, 404), "no revision 'v7'"),
        (http_error(errors.HfHubHTTPError, 503), "cannot be reached"),
        (errors.LocalEntryNotFoundError("not cached"), "hf download"),
        (errors.OfflineModeIsEnabled("offline"), "hf download"),
        (ConnectionError("no route"), "cannot be reached"),
        (TimeoutError("slow"), "cannot be reached"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_failures_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, error: Exception, advice: str
) -> None:
    failing(monkeypatch, error)
    message = refusal("owner/name@v7")
    assert message.startswith("owner/name: ")
    assert advice in message


def test_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal("no-such-owner/no-such-name")
    assert "no-such-owner/no-such-name" in message
    assert "hf download" in message


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("owner/Some.Name-1", "owner/Some.Name-1"),
        ("owner/name@refs/pr/1", "owner/name"),
        ("owner/name@v1.0", "owner/name"),
        (f"owner/name@{COMMIT}", "owner/name"),
    ],
)
def test_a_repository(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str, name: str
) -> None:
    repository = Repository(name, {"config.json": b"{}"}, revisions=("main", "refs/pr/1", "v1.0"))
    with Hub(repositories=[repository]) as hub:
        hub.serve(monkeypatch, tmp_path)
        source = resolve_source(model)
        huggingface_hub.close_session()
    assert (source.label, source.revision, source.folder.name) == (name, COMMIT, COMMIT)
    assert source.short_name == name.partition("/")[2]
    assert (source.folder / "config.json").read_bytes() == b"{}"


def test_each_try_that_failed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, ConnectionError("no route"))
    said: list[str] = []
    with pytest.raises(SourceError):
        resolve_source("owner/name", said.append)
    assert len(said) == 4
    assert said[0] == "owner/name: the Hub cannot be reached (no route); try 2 of 5 in 0 s"


@pytest.mark.parametrize(
    ("place", "label", "revision"),
    [
        (f"models--acme--Tiny-Qwen3-MoE/snapshots/{COMMIT}", "acme/Tiny-Qwen3-MoE", COMMIT),
        (f"models--gpt2/snapshots/{COMMIT}", "gpt2", COMMIT),
        (f"models--acme--Some.Name_1/snapshots/{COMMIT}", "acme/Some.Name_1", COMMIT),
        # what only looks like it
        (f"models--acme--name/other/{COMMIT}", COMMIT, None),
        ("models--acme--name/snapshots/main", "main", None),
        (f"datasets--acme--name/snapshots/{COMMIT}", COMMIT, None),
        (f"models--acme--na me/snapshots/{COMMIT}", COMMIT, None),
    ],
)
def test_a_snapshot_of_the_hubs_cache(
    place: str, label: str, revision: str | None, tmp_path: Path
) -> None:
    (tmp_path / place).mkdir(parents=True)
    source = resolve_source(str(tmp_path / place))
    assert (source.label, source.revision) == (label, revision)
    # also by a link to it
    (tmp_path / "alias").symlink_to(tmp_path / place)
    assert resolve_source(str(tmp_path / "alias")).label == label


@pytest.mark.parametrize(("name", "content"), [("x.gguf", b""), ("model", b"GGUF\3\0\0\0")])
def test_a_file_is_no_folder(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert "is a file; pass the folder that holds config.json" in refusal(str(tmp_path / name))


@pytest.mark.parametrize(
    "model",
    ["https://me:hunter2@huggingface.co/owner/name", "https://hunter2@huggingface.co/owner/name",
     "https://huggingface.co/owner/name?token=hunter2", "https://me:p@hunter2@host/x"],
)  # fmt: skip
def test_a_password_in_a_url_is_not_repeated(model: str) -> None:
    message = refusal(model)
    assert "hunter2" not in message
    assert message.startswith("https://")
    assert "log in with `hf auth login`" in message or "is not a page of" in message


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("https://huggingface.co/owner/name", "owner/name"),
        ("https://huggingface.co/owner/name/", "owner/name"),
        ("https://www.huggingface.co/owner/name?library=x#files", "owner/name"),
        ("https://hf.co/owner/name/tree/main", "owner/name@main"),
        ("https://huggingface.co/owner/name/tree/refs%2Fpr%2F3", "owner/name@refs/pr/3"),
        ("https://huggingface.co/owner/name/discussions/7", "owner/name"),
        ("HTTPS://HuggingFace.co/owner/name", "owner/name"),
        ("https://mirror.example.org:8443/hub/owner/name/tree/v1", "owner/name@v1"),
        ("owner/name@main", "owner/name@main"),
    ],
)
def test_the_address_of_a_page_is_a_name(
    address: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example.org:8443/hub")
    assert hub_name(address) == name


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "https://me:pw@example.org/a/b",
            "https://...@example.org/a/b: is not a page",
        ),
        ("ftp://huggingface.co/a/b", "is not a page of huggingface.co; expected https://"),
        ("https://huggingface.co/datasets/a/b", "is not the page of a model"),
        ("https://huggingface.co/a", "is not the page of a model"),
        ("https://huggingface.co", "is not the page of a model"),
        ("https://huggingface.co/a/b/blob/main/x.gguf", "is the page of one file; pass the model"),
        ("https://huggingface.co.example.org/a/b", "is not a page of huggingface.co"),
    ],
)
def test_other_addresses_are_refused(
    address: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert message in refusal(address)
    assert "pw" not in refusal(address)
