from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from reap2gguf import atomic
from reap2gguf.building.finished import Inputs
from reap2gguf.building.workdir import Workdir
from reap2gguf.bundle.layout import BundleFolders
from reap2gguf.errors import OutputError
from reap2gguf.publishing.admission import AcceptedRepos

IDENTITY = {"source": "model", "fingerprint": "0123456789abcdef"}


@pytest.fixture
def work(tmp_path: Path) -> Workdir:
    """A prepared work folder."""
    work = Workdir(tmp_path, "name")
    work.prepare(IDENTITY, fresh=False)
    return work


INPUTS = Inputs("base", {"name-Q8_0.gguf": "key"})


def finalize(work: Workdir) -> None:
    for folder, name in ((work.hf, "config.json"), (work.gguf, "name.gguf")):
        folder.mkdir()
        (folder / name).write_text("contents")
    work.finalize(INPUTS, [])


def test_work_of_another_model_is_not_touched(work: Workdir) -> None:
    work.hf.mkdir()
    other = {"source": "owner/other", "fingerprint": "f" * 64}
    again = Workdir(work.output, work.name)
    with pytest.raises(OutputError) as caught:
        again.prepare(other, fresh=False)
    assert str(caught.value) == (
        f"{work.root}: holds the work of another model, 'model' (0123456789ab...), but this model "
        "is 'owner/other' (ffffffffffff...); pass --fresh to start over in it, or another --name "
        "or --output"
    )
    assert work.hf.is_dir()
    again.prepare(other, fresh=True)
    assert not work.hf.is_dir()


@pytest.mark.parametrize("text", [None, "", "{}", '{"fingerprint": 3}'])
def test_a_folder_of_unknown_work_is_not_touched(tmp_path: Path, text: str | None) -> None:
    work = Workdir(tmp_path, "name")
    work.root.mkdir(parents=True)
    (work.root / "thesis.txt").write_text("")
    if text is not None:
        (work.root / "build.json").write_text(text)
    with pytest.raises(OutputError, match="pass --fresh to start over in it"):
        work.prepare(IDENTITY, fresh=False)
    assert (work.root / "thesis.txt").exists()


def test_a_second_build_is_refused_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    with Workdir(tmp_path, "name").locked():
        with (
            pytest.raises(
                OutputError, match=rf"another build of name .* \(process {os.getpid()}\)"
            ),
            Workdir(tmp_path, "name").locked(),
        ):
            pass
        with Workdir(tmp_path, "another").locked():
            pass
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from reap2gguf.building.workdir import Workdir\n"
        "with Workdir(Path(sys.argv[1]), 'name').locked(): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    with Workdir(tmp_path, "name").locked():
        pass


def test_what_is_finalized_is_finished(work: Workdir) -> None:
    finalize(work)
    assert (work.final_hf / "config.json").is_file()
    assert not work.root.exists()
    finished = work.finished()
    assert finished is not None
    assert finished.inputs == INPUTS
    assert finished.changed(work.output, ["name-GGUF/name.gguf", "name/config.json"]) == []


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"inputs": "base"}', '{"base": 3}', '{"base": "b", "files": 3}',
     '{"base": "b", "files": {"a": "many"}}'],
)  # fmt: skip
def test_a_damaged_record_finishes_nothing(work: Workdir, text: str) -> None:
    finalize(work)
    (work.shared / ".name.finished.json").write_text(text)
    assert work.finished() is None


def test_builds_of_two_names_may_write_one_file_of_both(tmp_path: Path) -> None:
    one, other = Workdir(tmp_path, "one"), Workdir(tmp_path, "other")
    for work in (one, other):
        work.prepare(IDENTITY, fresh=False)
    path = one.shared_file("observations", "key")
    assert path == other.shared_file("observations", "key")

    def save_while_the_other_does(own: Path) -> None:
        atomic.write_whole(own, "same")
        other.share(lambda theirs: atomic.write_whole(theirs, "same"), path)

    one.share(save_while_the_other_does, path)
    assert path.read_text() == "same"
    assert [file.name for file in path.parent.iterdir()] == ["key.safetensors"]


def test_room_that_is_wanted_and_free(work: Workdir) -> None:
    free = work.free_bytes()
    work.check_room(free // 2)
    with pytest.raises(OutputError, match=rf"writes {2 * free:,} bytes \(0 are already written\)"):
        work.check_room(2 * free)
    work.hf.mkdir()
    with (work.hf / "sparse").open("wb") as file:
        file.truncate(2 * free)
    work.check_room(2 * free)  # what is written already needs no room


def test_a_fresh_start_lasts_until_the_build_is_finished(work: Workdir) -> None:
    assert not work.is_fresh
    work.prepare(IDENTITY, fresh=True)
    assert work.is_fresh
    work.prepare(IDENTITY, fresh=False)
    assert work.is_fresh
    finalize(work)
    assert not work.is_fresh


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match="cannot be written"),
        Workdir(tmp_path / "file", "name").locked(),
    ):
        pass


def test_an_output_that_is_read_only(tmp_path: Path) -> None:
    if os.getuid() == 0:
        # root may write anywhere but on a file system that refuses it
        work = Workdir(Path("/proc/self"), "name")
    else:
        tmp_path.chmod(0o555)
        work = Workdir(tmp_path, "name")
    with pytest.raises(OutputError, match=r"\.work: cannot be written \("), work.locked():
        pass


def test_the_record_tells_what_it_cost(work: Workdir) -> None:
    for folder in (work.hf, work.gguf):
        folder.mkdir()
    work.finalize(INPUTS, [{"name": "prune", "seconds": 1.5}])
    record = json.loads((work.shared / ".name.finished.json").read_text())
    assert record["stages"] == [{"name": "prune", "seconds": 1.5}]


@pytest.mark.parametrize("kind", ["link", "dangling link", "second name"])
def test_a_lock_that_is_another_file_is_not_written_to(tmp_path: Path, kind: str) -> None:
    victim, lock = tmp_path / "victim", tmp_path / "out" / ".work" / ".name.lock"
    victim.write_text("mine")
    lock.parent.mkdir(parents=True)
    if kind == "second name":
        os.link(victim, lock)
    else:
        lock.symlink_to(victim if kind == "link" else tmp_path / "gone")
    with (
        pytest.raises(OutputError, match=r"\.name\.lock: cannot be written .* remove it"),
        Workdir(tmp_path / "out", "name").locked(),
    ):
        pass
    assert victim.read_text() == "mine"
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    "place",
    [".work", ".work/name", ".work/name/name", ".work/name/name-GGUF", ".work/texts",
     ".work/observations", ".work/.name.old", ".work/.name.adding", "name", "name-GGUF"],
)  # fmt: skip
def test_no_folder_of_a_build_may_be_a_link(tmp_path: Path, place: str) -> None:
    victim = tmp_path / "victim"
    (victim / "inner").mkdir(parents=True)
    (victim / "finalizing.json").write_text("{}")
    path = tmp_path / "out" / place
    path.parent.mkdir(parents=True)
    path.symlink_to(victim)
    work = Workdir(tmp_path / "out", "name")
    with pytest.raises(OutputError, match=f"{path}: a link, which is not followed"):
        work.prepare(IDENTITY, fresh=True)
    assert sorted(file.name for file in victim.iterdir()) == ["finalizing.json", "inner"]
    assert path.is_symlink()


def test_a_record_that_is_a_link_finishes_nothing(work: Workdir, tmp_path: Path) -> None:
    finalize(work)
    record = work.shared / ".name.finished.json"
    record.rename(tmp_path / "elsewhere.json")
    record.symlink_to(tmp_path / "elsewhere.json")
    assert work.finished() is None


def test_what_a_push_writes_is_not_behind_a_link(tmp_path: Path) -> None:
    folders = BundleFolders(tmp_path, "name")
    with folders.locked():
        folders.push.symlink_to(tmp_path)
        with pytest.raises(OutputError, match=r"\.name\.push: a link, which is not followed"):
            atomic.make_folder(folders.push)
        folders.push.unlink()
        atomic.make_folder(folders.push)
        victim = tmp_path / "victim"
        victim.write_text("mine")
        (folders.push / "repositories.json").symlink_to(victim)
        accepted = AcceptedRepos(folders.push)
        assert accepted.names() == []
        accepted.add("owner/name")
        assert accepted.names() == ["owner/name"]
        assert victim.read_text() == "mine"
