"""Pushes to a Hub on the loopback interface, by huggingface_hub's own client."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from huggingface_hub import constants, snapshot_download

import reap2gguf
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.bundle.sums import write_sums
from reap2gguf.cli import cli
from reap2gguf.errors import PublishError, UsageError, VerificationError
from reap2gguf.progress import Silent
from reap2gguf.publishing import contents
from reap2gguf.publishing.push import PushOptions, preview
from reap2gguf.publishing.remote import refusal
from reap2gguf.quantizing.labels import LabelledFile
from reap2gguf.verifying.bundle import check_bundle, verify_paths
from tests.building.builds import build
from tests.loopback_hub.repository import Repository
from tests.loopback_hub.server import Fault, Hub
from tests.publishing.push_kills import Rig, Runner, environment, tiny_bundle
from tests.publishing.push_room import GGUF_REPO, REPO, Room, close
from tests.tiny import ONE_THREAD, TinyQwen3Moe


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny finished build of two shards; its safetensors folder, not changed by a test."""
    return tiny_bundle(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """The same, for a test to change."""
    for name in ("model", "model-GGUF"):
        shutil.copytree(bundle.parent / name, tmp_path / "out" / name)
    return tmp_path / "out" / "model"


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Room]:
    monkeypatch.setattr("reap2gguf.publishing.upload.LARGE_BYTES", 300_000)
    with Hub() as hub:
        room = Room(hub, monkeypatch, tmp_path / "cache")
        room.uploads.part_bytes = 400_000
        yield room
    close()


def test_both_repositories_are_complete(room: Room, bundle: Path) -> None:
    published = room.push(bundle)
    assert published.urls == tuple(f"{room.hub.endpoint}/{name}" for name in (REPO, GGUF_REPO))
    assert published.others == ()
    room.check(bundle)
    assert room.told.notes == []
    assert room.hub.asked("POST /storage/complete/")  # in several parts
    for name in (REPO, GGUF_REPO):
        messages = [commit.message for commit in room.uploads.history[name]]
        assert messages[0] == "initial commit"
        assert messages[-1] == "Upload card, hashes and manifest"
        assert len(set(messages)) == len(messages)
    assert not (bundle.parent / ".work" / ".model.push").exists()


def test_either_folder_names_the_bundle_and_a_second_push_sends_nothing(
    room: Room, bundle: Path
) -> None:
    room.push(bundle)
    sent = len(room.wrote())
    room.push(bundle.with_name("model-GGUF"))
    assert room.wrote()[sent:] == ["POST /api/repos/create"] * 2
    assert room.told.notes[-1] == f"{GGUF_REPO}: 13 of 13 files are there already"
    room.check(bundle)


def test_after_an_addition_only_what_is_new_is_sent(room: Room, copy: Path) -> None:
    room.push(copy)
    before = {repo: len(room.uploads.history[repo]) for repo in (REPO, GGUF_REPO)}
    result = reap2gguf.add(copy, recipes="q4km", threads=1)
    room.push(copy)
    sent = {
        repo: {name for commit in room.uploads.history[repo][n:] for name in commit.added}
        for repo, n in before.items()
    }
    assert "model-Q4_K_M.gguf" in sent[GGUF_REPO]
    assert not any(name.endswith((".safetensors", "Q8_0.gguf")) for name in sent[REPO])
    # the picture of all files is another, those of the experts are not
    texts = {"Modelfile", "README.md", "SHA256SUMS", "reap2gguf.json", "bits.png"}
    assert sent[GGUF_REPO] - texts == {"model-Q4_K_M.gguf"}
    assert sent[REPO] <= texts
    room.check(result.hf_folder)


def test_what_is_downloaded_again_verifies(room: Room, bundle: Path, tmp_path: Path) -> None:
    room.push(bundle, max_bytes=700_000)
    names = [name for name in room.files(GGUF_REPO) if name.endswith("-of-00003.gguf")]
    assert len(names) == 3
    # as folders of their own, and as the cache lays them out
    folders = [
        Path(snapshot_download(name, local_dir=tmp_path / name)) for name in (REPO, GGUF_REPO)
    ]
    folders += [Path(snapshot_download(name)) for name in (REPO, GGUF_REPO)]
    report = verify_paths(folders[1:], 1, Silent())
    assert report.violations == ()
    assert report.checked[:2] == ("thing-GGUF", "thing")  # with the one beside it
    part = folders[1] / sorted(names)[1]
    raw = bytearray(part.read_bytes())
    raw[-1000:] = bytes(1000)
    part.write_bytes(raw)
    write_sums(folders[1], 1)
    assert "differs from" in " ".join(verify_paths([folders[1]], 1, Silent()).violations)
    part.unlink()
    assert (
        f"thing-GGUF: {part.name} is missing" in verify_paths([folders[1]], 1, Silent()).violations
    )


def test_llama_cpp_loads_the_parts_of_a_download(room: Room, bundle: Path, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    room.push(bundle, max_bytes=700_000)
    folder = Path(snapshot_download(GGUF_REPO, local_dir=tmp_path / "down"))
    first = Manifest.load(folder).gguf[0].first
    assert first == "model-BF16-00001-of-00003.gguf"

    def logits(path: Path) -> Any:
        model = llama_cpp.Llama(str(path), n_ctx=32, logits_all=True, verbose=False, **ONE_THREAD)
        model.eval([1, 2, 3, 4])
        found = np.array(model.scores[:4])
        model.close()
        return found

    whole = bundle.with_name("model-GGUF") / "model-BF16.gguf"
    assert np.array_equal(logits(folder / first), logits(whole))


def test_a_busy_hub_is_tried_again(room: Room, bundle: Path) -> None:
    """Whatever it is asked, twice over."""
    asked = {
        "/api/whoami-v2": "GET", "/api/repos/create": "POST", "/tree/": "GET",
        "/preupload/": "POST", "/objects/batch": "POST", "/storage/": "PUT",
        "/storage/complete/": "POST", "/storage/verify": "POST", "/api/validate-yaml": "POST",
        "/commit/": "POST", "/resolve/": "GET",
    }  # fmt: skip
    headers = {"Retry-After": "3"}
    for where, method in asked.items():
        room.hub.faults += [
            Fault(503, where, method), Fault(429, where, method, headers=headers, times=2)
        ]  # fmt: skip
    room.push(bundle)
    assert not any(fault.times for fault in room.hub.faults)
    room.check(bundle)
    # huggingface_hub waits by itself for some of them, and loses what one asks for
    waits = [int(wait) for wait in room.waits]
    assert waits[:3] == [1, 3, 4]
    assert set(waits) <= {1, 2, 3, 4}


@pytest.mark.parametrize("where", ["/storage/", "/commit/", "/objects/batch", "/preupload/"])
def test_an_answer_that_is_lost_is_made_good(where: str, room: Room, bundle: Path) -> None:
    method = "PUT" if where == "/storage/" else "POST"
    room.hub.faults = [Fault(where=where, method=method, after=0, reset=True, times=2)]
    room.push(bundle)
    assert room.hub.faults[0].times == 0
    if where != "/storage/":  # of a part, the answer is its receipt
        room.check(bundle)


def test_a_hub_that_dies_and_comes_back(room: Room, bundle: Path) -> None:
    def come() -> None:
        for _ in range(1200):
            with suppress(OSError):  # the old one may not have left yet
                room.hub.come()
                return
            Event().wait(0.05)

    room.waiting = come
    room.hub.faults = [Fault(where="/commit/", method="POST", after=0, ends_all=True)]
    room.push(bundle)
    assert len(room.waits) == 1
    assert "the Hub cannot be reached" in room.told.notes[0]
    room.check(bundle)


def test_a_hub_that_stays_away(room: Room, bundle: Path) -> None:
    room.hub.leave()
    message = room.refused(PublishError, bundle)
    room.hub.come()
    assert "cannot be reached in 5 tries" in message
    assert "run the same command again" in message
    assert len(room.waits) == 4


def test_a_hub_that_refuses_everything_for_long_is_gone_on_with(room: Room, bundle: Path) -> None:
    room.hub.faults = [Fault(503, "/commit/", "POST", times=5)]
    room.uploads.strike_at = -1
    assert "HTTP 503" in room.refused(PublishError, bundle)
    room.push(bundle)
    room.check(bundle)


@pytest.mark.parametrize(
    ("status", "words", "message"),
    [
        (401, "Invalid credentials in Authorization header", "run `hf auth login` again"),
        (403, "You have no rights", "HTTP 403, You have no rights"),
        (
            403,
            "Private repository storage limit reached",
            "no storage left for it (Private",
        ),
        (402, "Payment required", "the Hub has no storage left for it (Payment required)"),
        (413, "Too large", "the Hub has no storage left for it (Too large)"),
        (507, "Insufficient", "the Hub has no storage left for it (Insufficient)"),
        (422, "Strange name", "the Hub refuses it (HTTP 422, Strange name)"),
    ],
)
@pytest.mark.parametrize("where", ["/api/repos/create", "/commit/"])
def test_a_refusal_is_one_line_with_advice(
    where: str, status: int, words: str, message: str, room: Room, bundle: Path
) -> None:
    room.hub.faults = [Fault(status, where, "POST", headers={"X-Error-Message": words}, times=9)]
    assert message in room.refused(PublishError, bundle)
    assert room.waits == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("Request error: HTTP status client error (403 Forbidden), domain: x"), "403"),
        (RuntimeError("Request error: HTTP status client error (429 Too Many)"), None),
        (RuntimeError("connection closed before message completed"), None),
        (PermissionError("token refresh failed"), "does not accept the token"),
        (PermissionError(1, "Operation not permitted"), None),  # of a firewall
        (FileNotFoundError(2, "No such file", "a.gguf"), "a.gguf: cannot be read (No such file)"),
        (json.JSONDecodeError("Expecting value", "<html>", 0), None),
        (ValueError("Malformed response from server"), "does not accept it (Malformed response"),
    ],
)
def test_what_will_not_pass_is_refused(error: Exception, message: str | None) -> None:
    """Errors as hf_xet and huggingface_hub raise them."""
    found = refusal(error, REPO)
    assert (found is None) == (message is None)
    assert message is None or message in str(found)


def test_a_storage_that_is_full(room: Room, bundle: Path) -> None:
    room.uploads.batch_error = (403, "Public storage limit reached")
    assert "the Hub has no storage left for it (LFS batch" in room.refused(PublishError, bundle)
    assert room.waits == []


def test_who_may_not_write_is_told_first(
    room: Room, bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    message = room.refused(PublishError, bundle, "you/thing")
    assert "the token belongs to 'me', who is neither you" in message
    assert "'me', 'team'" in message
    room.uploads.role = "read"
    assert "may only read; run `hf auth login`" in room.refused(PublishError, bundle)
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert "does not accept the token (HTTP 401)" in room.refused(PublishError, bundle)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert room.refused(PublishError, bundle) == "not logged in to the Hub: run `hf auth login`"
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in room.refused(PublishError, bundle)
    assert room.wrote() == []


@pytest.mark.parametrize(
    "repo", ["name", "a/b/c", "a/b--c", "a/.b", "a/b.git", "", "a/" + "b" * 93]
)
def test_a_name_that_the_hub_does_not_take(repo: str, room: Room, bundle: Path) -> None:
    room.refused(PublishError, bundle, repo)
    assert room.hub.requests == []


def test_an_organization_is_an_owner_too(room: Room, bundle: Path) -> None:
    room.push(bundle, "team/thing")
    assert "team/thing-GGUF" in (room.files("team/thing")["README.md"]).decode()


def _flip(raw: bytes) -> bytes:
    return bytes([raw[0] ^ 1]) + raw[1:]


@pytest.mark.parametrize("name", ["model-Q8_0.gguf", "calibration.txt"])
def test_a_byte_that_is_flipped_on_the_way_is_found(name: str, room: Room, bundle: Path) -> None:
    room.uploads.spoil = lambda path, raw: _flip(raw) if path == name else raw
    with pytest.raises(VerificationError) as caught:
        room.push(bundle)
    kind = "SHA-256" if name.endswith(".gguf") else "git hash"
    assert caught.value.violations == [
        f"{GGUF_REPO}: {name} has a different {kind} than what was sent"
    ]
    room.uploads.spoil = None
    room.push(bundle)
    room.check(bundle)


def test_a_byte_that_is_flipped_on_the_way_back_is_found(room: Room, bundle: Path) -> None:
    raw = (bundle / "config.json").read_bytes()
    room.hub.faults = [Fault(200, "/config.json", body=_flip(raw))]
    with pytest.raises(VerificationError) as caught:
        room.push(bundle)
    assert caught.value.violations == [
        f"{REPO}: config.json was read back with other bytes than were sent"
    ]


def test_a_file_that_was_changed_after_the_build_is_refused(room: Room, copy: Path) -> None:
    (copy / "config.json").write_text("{}")
    gguf = copy.with_name("model-GGUF")
    (gguf / "notes.txt").write_text("mine")
    with pytest.raises(VerificationError, match="nothing was uploaded") as caught:
        room.push(copy)
    found = caught.value.violations
    assert "model: config.json has a different SHA-256 than the build recorded" in found
    assert "model-GGUF: notes.txt is not part of the bundle; move it away" in found
    assert room.wrote() == []


@pytest.mark.parametrize("name", ["config.json", "../model-GGUF/model-BF16.gguf"])
def test_a_file_that_changes_after_its_hash_was_compared_is_refused(
    name: str, room: Room, copy: Path
) -> None:
    def check_and_change(*arguments: Any) -> None:
        check_bundle(*arguments)
        (copy / name).write_bytes((copy / name).read_bytes()[:-1] + b" ")

    room.check_bundle = check_and_change
    with pytest.raises(VerificationError, match="nothing was uploaded") as caught:
        room.push(copy, max_bytes=900_000)
    assert caught.value.violations == [f"{(copy / name).resolve()}: changed while it was read"]
    assert room.wrote() == []


def test_experts_that_are_too_few_are_refused(room: Room, copy: Path) -> None:
    gguf = copy.with_name("model-GGUF")
    path = gguf / "model-Q8_0.gguf"
    raw = path.read_bytes()
    at = raw.index(b"qwen3moe.expert_count") + len("qwen3moe.expert_count") + 4
    path.write_bytes(raw[:at] + (5).to_bytes(4, "little") + raw[at + 4 :])
    write_sums(gguf, 1)
    with pytest.raises(VerificationError) as caught:
        room.push(copy, max_bytes=900_000)
    assert "model-Q8_0.gguf: qwen3moe.expert_count is 5, expected 6" in caught.value.violations
    assert any("router rows" in violation for violation in caught.value.violations)
    assert room.wrote() == []


def test_what_is_no_bundle_is_refused(room: Room, copy: Path, tmp_path: Path) -> None:
    assert "holds no reap2gguf.json" in room.refused(UsageError, tmp_path)
    manifest = json.loads((copy / "reap2gguf.json").read_text())
    manifest["pruning"]["method"] = "frequency"
    (copy / "reap2gguf.json").write_text(json.dumps(manifest))
    assert "are from different builds" in room.refused(UsageError, copy)
    shutil.rmtree(copy)
    assert "both folders of a bundle" in room.refused(UsageError, copy.with_name("model-GGUF"))
    assert room.hub.requests == []


def test_private_repositories(room: Room, bundle: Path) -> None:
    room.push(bundle, private=True)
    assert [repo.private for repo in room.hub.repositories] == [True, True]
    room.push(bundle)  # they stay so
    room.hub.repositories[1].private = False
    message = room.refused(PublishError, bundle, private=True)
    assert message.startswith(f"{GGUF_REPO}: exists and is public")


def test_somebody_elses_work_is_not_overwritten(room: Room, bundle: Path) -> None:
    theirs = {"config.json": b"{}", "notes.md": b"mine", ".gitattributes": b""}
    room.hub.repositories.append(Repository(REPO, dict(theirs)))
    assert "holds a different config.json" in room.refused(PublishError, bundle)
    manifest = json.dumps({"name": "another"}).encode()
    room.hub.repositories[0] = Repository(REPO, {**theirs, "reap2gguf.json": manifest})
    assert "holds the bundle 'another'" in room.refused(PublishError, bundle)
    assert room.wrote() == []


def test_files_that_are_not_of_the_bundle_stay(room: Room, bundle: Path) -> None:
    theirs = {"README.md": b"# To come", "notes.md": b"mine", ".gitattributes": b""}
    room.hub.repositories.append(Repository(REPO, dict(theirs)))
    room.uploads.history[REPO] = []
    assert room.push(bundle).others == (f"{REPO}: notes.md",)
    assert room.files()["notes.md"] == b"mine"
    assert b"thing" in room.files()["README.md"]


def test_what_an_earlier_push_left_is_replaced(room: Room, bundle: Path) -> None:
    room.push(bundle)
    whole = set(room.files(GGUF_REPO))
    room.push(bundle, max_bytes=900_000)
    parts = {f"model-BF16-0000{number}-of-00002.gguf" for number in (1, 2)}
    assert room.files(GGUF_REPO).keys() == whole - {"model-BF16.gguf"} | parts
    last = room.uploads.history[GGUF_REPO][-1]
    assert last.removed == ["model-BF16.gguf"]
    assert "README.md" in last.added
    room.push(bundle, max_bytes=700_000)  # cut otherwise
    assert room.uploads.history[GGUF_REPO][-1].removed == [*sorted(parts), "model-Q8_0.gguf"]
    room.push(bundle)
    assert room.files(GGUF_REPO).keys() == whole


def test_a_dry_run_says_what_goes_and_what_would_be_refused(room: Room, bundle: Path) -> None:
    room.push(bundle, max_bytes=900_000)
    parts = [f"model-BF16-0000{number}-of-00002.gguf" for number in (1, 2)]
    done = CliRunner().invoke(cli, ["push", str(bundle), REPO, "--dry-run"])
    for part in parts:
        assert f"  {part}                from an earlier push, will be removed\n" in done.output
    assert "\n  1 file to upload" in done.output
    room.push(bundle)
    going = f"{GGUF_REPO}: removing files of an earlier push: {', '.join(parts)}"
    assert going in room.told.notes
    refused = CliRunner().invoke(cli, ["push", str(bundle), REPO, "--dry-run", "--private"])
    assert refused.exit_code == 2
    assert f"Error: {REPO}: exists and is public" in refused.output
    del room.files()["reap2gguf.json"]
    room.files()["config.json"] = b"{}"
    with pytest.raises(PublishError, match=f"{REPO}: holds a different config.json"):
        preview(PushOptions(bundle, REPO), check_bundle, Silent())


def test_labels_that_hide_each_other_are_reported(
    room: Room, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(files: list[LabelledFile]) -> list[str]:
        return [f"{' hides '.join(file.name for file in files)}; pass --label"]

    monkeypatch.setattr(contents, "label_warnings", found)
    warning = "model-BF16.gguf hides model-Q8_0.gguf; pass --label"
    dry = CliRunner().invoke(cli, ["push", str(bundle), REPO, "--dry-run"])
    assert f"\nwarning: {warning}\n" in dry.output
    room.push(bundle)
    assert warning in room.told.notes


def test_a_dry_run_writes_nothing(room: Room, bundle: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in bundle.parent.rglob("*")}
    found = preview(PushOptions(bundle, REPO, max_bytes=900_000), check_bundle, Silent())
    assert found.remote == {REPO: None, GGUF_REPO: None}
    assert found.unchecked == ()
    assert len(found.prepared.splits) == 1
    room.push(bundle, max_bytes=900_000)
    sizes = {name: len(raw) for name, raw in room.files(GGUF_REPO).items()}
    foreseen = {file.name: file.n_bytes for file in found.prepared.gguf.files}
    assert sizes == {**foreseen, ".gitattributes": sizes[".gitattributes"]}
    sent = len(room.wrote())
    again = preview(PushOptions(bundle, REPO), check_bundle, Silent())
    states = {file.name: again.state(GGUF_REPO, file) for file in again.prepared.gguf.files}
    assert states["imatrix.gguf"] == "already there"
    assert states["model-BF16.gguf"] == "to upload"
    assert states["README.md"] == "will be replaced"
    room.hub.leave()
    away = preview(PushOptions(bundle, REPO), check_bundle, Silent())
    assert away.remote is None
    assert [reason.split(" (")[0] for reason in away.unchecked] == [
        "the permission to write", "which files exist already",
    ]  # fmt: skip
    assert all("the Hub cannot be reached" in reason for reason in away.unchecked)
    room.hub.come()
    assert len(room.wrote()) == sent
    after = {path: path.stat().st_mtime_ns for path in bundle.parent.rglob("*")}
    assert {p for p in after if p not in before or after[p] != before[p]} <= {
        bundle.parent / ".work", bundle.parent / ".work" / ".model.lock"
    }  # fmt: skip


def test_the_command(room: Room, bundle: Path) -> None:
    runner = CliRunner()
    dry = runner.invoke(cli, ["push", str(bundle), REPO, "--dry-run", "--max-file-size", "900000B"])
    assert dry.exit_code == 0, dry.output
    assert "model-BF16.gguf will be split into 2 parts\nnothing was uploaded\n" in dry.output
    done = runner.invoke(cli, ["push", str(bundle), REPO])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [f"{room.hub.endpoint}/{n}" for n in (REPO, GGUF_REPO)]
    refused = runner.invoke(cli, ["push", str(bundle), "nobody/thing"])
    assert refused.exit_code == 2
    assert refused.output.splitlines()[-1].startswith("Error: nobody/thing: the token belongs")
    room.uploads.spoil = lambda path, raw: _flip(raw)
    spoiled = runner.invoke(cli, ["push", str(bundle), "me/other"])
    assert spoiled.exit_code == 1
    assert "me/other: config.json has a different git hash than what was sent" in spoiled.output


@pytest.mark.parametrize("repo", [REPO, GGUF_REPO])
def test_a_bundle_without_safetensors_is_one_repository(
    room: Room, tmp_path: Path, repo: str
) -> None:
    source = TinyQwen3Moe().write(tmp_path / "source")
    (source / "generation_config.json").write_text('{"temperature": 0.7}')
    folder = build(source, tmp_path / "out", name="model", compression=0).gguf_folder
    shown = preview(PushOptions(folder, repo), check_bundle, Silent())
    assert [one.repo for one in shown.prepared.repos] == [GGUF_REPO]
    assert shown.unchecked == ()
    assert room.push(folder, repo).urls == (f"{room.hub.endpoint}/{GGUF_REPO}",)
    assert [one.name for one in room.hub.repositories] == [GGUF_REPO]
    found = room.files(GGUF_REPO)
    assert found.keys() == {file.name for file in folder.iterdir()} | {".gitattributes"}
    card = found["README.md"].decode()
    assert "quantized_by: me\n" in card
    assert "\nhf download me/thing-GGUF model-Q8_0.gguf" in card
    assert "llama.cpp takes the sampling" in card
    (tmp_path / "down").mkdir()
    for name in found.keys() - {".gitattributes"}:
        (tmp_path / "down" / name).write_bytes(found[name])
    report = verify_paths([tmp_path / "down"], 1, Silent())
    assert report.violations == ()
    assert room.push(folder, repo).others == ()


def test_pushes_that_are_killed_go_on(bundle: Path, tmp_path: Path) -> None:
    """A sample; push_kills.py does as many as one likes."""
    with Hub() as hub, Runner(environment(hub, tmp_path / "home"), tmp_path) as runner:
        rig = Rig(bundle, hub, runner)
        whole, n_requests, n_operations = rig.reference()
        rig.killed_at_request(n_requests // 2, True, whole)
        rig.killed_at_operation(n_operations // 2, whole)
