"""The files that damages are made with: what is read and written unchanged keeps every byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations.damage import Absent, Copy, Damage
from tests.mutations.gguf_edit import read_gguf
from tests.mutations.models import Sound, make
from tests.mutations.runs import Run, catalog, run_all
from tests.mutations.safetensors_edit import read_shard


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return make("qwen3.5", tmp_path_factory.mktemp("edits"))


def test_files_keep_every_byte(sound: Sound) -> None:
    ggufs, shards = list(sound.gguf.glob("*.gguf")), list(sound.hf.glob("*.safetensors"))
    assert len(ggufs) == 4
    assert shards
    for file in ggufs:
        assert read_gguf(file).encoded() == file.read_bytes(), file.name
    for file in shards:
        assert read_shard(file).encoded() == file.read_bytes(), file.name


def test_a_damage_that_changes_nothing_is_an_error(sound: Sound, tmp_path: Path) -> None:
    nothing = Damage("G", "nothing", lambda copy: copy.put(copy.exact, copy.exact.read_bytes()))
    with pytest.raises(AssertionError, match="nothing"):
        run_all(Run.BESIDE, sound, [nothing], tmp_path)


def test_the_sound_bundle_is_never_written(sound: Sound, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in sound.gguf.iterdir()}

    def damage(copy: Copy) -> None:
        for file in copy.gguf.iterdir():
            copy.put(file, b"other")

    report = run_all(Run.BESIDE, sound, [Damage("G", "all", damage)], tmp_path)
    assert [outcome.caught for outcome in report.outcomes] == [True]
    assert before == {file: file.read_bytes() for file in sound.gguf.iterdir()}


def test_what_is_absent_has_no_outcome(sound: Sound, tmp_path: Path) -> None:
    def absent(copy: Copy) -> None:
        raise Absent("no such thing")

    assert not run_all(Run.BESIDE, sound, [Damage("G", "none", absent)], tmp_path).outcomes


def test_another_error_than_the_programs_is_no_catch(sound: Sound, tmp_path: Path) -> None:
    def broken(copy: Copy) -> None:
        raise ValueError("a bug")

    (outcome,) = run_all(Run.BESIDE, sound, [Damage("G", "bug", broken)], tmp_path).outcomes
    assert outcome.crashed
    assert not outcome.caught


def test_the_catalog_covers_every_group(sound: Sound) -> None:
    damages = catalog(sound)
    assert {damage.group for damage in damages} == set("GKCFSPIMB")
    assert all(damage.harmless == "" or len(damage.harmless) > 10 for damage in damages)
