"""What a stage depends on: what is reused after another build, and that nothing of it shows."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from reap2gguf import __version__
from reap2gguf.artifacts import made_with
from reap2gguf.building import keys, pipeline, record, stages
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.models.table import describe
from reap2gguf.observing import sweep as sweeps
from reap2gguf.options import CalibrationOptions, ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.quantizing.recipe import load_recipe
from reap2gguf.quantizing.resolve import resolve
from tests.building.builds import PROSE, build, contents, refuse_at, stages_reused, stop_at
from tests.exporting.files import gguf_tensors
from tests.tiny import REPOSITORY, TinyQwen3Moe
from tests.tokens import FULL_VOCAB

RECIPES = REPOSITORY / "recipes"


def prose(folder: Path, name: str, n_lines: int = 400) -> Path:
    """A text of its own, in a folder of its own."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(PROSE.read_text().splitlines()[:n_lines]))
    return path


class Notes(Silent):
    """Keeps the notes of a build."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    def note(self, text: str) -> None:
        self.notes.append(text)


class Earlier:
    """Builds of one checkpoint that have ended in several ways, each made once.

    The checkpoint, the texts and the output always lie in the same `folder`, with the same times of
    change, as they would for somebody who builds again.
    """

    def __init__(self, root: Path, model: TinyQwen3Moe) -> None:
        self.folder = root / "folder"
        self._root = root
        self._alone: dict[str, dict[str, bytes]] = {}
        self.model, self.output = self.folder / "tiny", self.folder / "out"
        text = prose(self.folder, "text.txt")
        self.arguments: dict[str, Any] = {
            "name": "name",
            "imatrix_text": text,
            "calibration": CalibrationOptions(str(text), samples=4, max_length=128),
        }
        model.write(self.model)
        shutil.copytree(self.folder, root / "none")

    def restore(self, end: str) -> None:
        """Bring the folder to where a build has ended: none, exported (interrupted), finished."""
        saved = self._root / end
        if not saved.is_dir():
            self.restore("none")
            with pytest.MonkeyPatch.context() as patch:
                if end == "finished":
                    self.build()
                else:
                    if end == "pruned":
                        stop_at(patch, stages.Export)
                    else:
                        refuse_at(patch, pipeline, "write_record")
                    with pytest.raises(KeyboardInterrupt):
                        self.build()
            shutil.copytree(self.folder, saved)
        shutil.rmtree(self.folder)
        shutil.copytree(saved, self.folder)

    def build(self, output: str = "out", **changes: Any) -> pipeline.BuildResult:
        """Build in the folder, with changed arguments."""
        arguments = self.arguments | {"model": str(self.model)} | changes
        return build(Path(arguments.pop("model")), self.folder / output, **arguments)

    def alone(self, name: str, changes: dict[str, Any]) -> dict[str, bytes]:
        """The bundle of changed arguments on an empty disk; made once for each name."""
        if name not in self._alone:
            self._alone[name] = contents(self.build("empty", **changes))
        return self._alone[name]


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Earlier:
    return Earlier(tmp_path_factory.mktemp("earlier"), TinyQwen3Moe())


def reused(result: pipeline.BuildResult) -> list[str]:
    return [stage for stage, is_reused in stages_reused(result).items() if is_reused]


STAGES = ["texts", "observe", "prune", "imatrix", "export", "verify"]


def test_another_ratio_reuses_the_observations(earlier: Earlier) -> None:
    earlier.restore("none")
    first = earlier.build(name=None)
    assert stages_reused(first) == dict.fromkeys(STAGES, False)
    half = earlier.build(name=None, compression=0.5)
    assert reused(half) == ["texts", "observe"]
    assert half.manifest.pruning.n_kept == 4
    assert half.hf_folder.name == "tiny-REAP-0.50"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"recipes": ("bf16",)}, ["texts", "observe", "prune", "imatrix"]),
        ({"compression": 0.5}, ["texts", "observe"]),
        ({"method": "frequency", "compression": 0.5}, ["texts", "observe"]),
        ({"chunk": 64}, ["observe", "prune"]),
        ({"imatrix_chunks": 2}, ["observe", "prune"]),
        ({"calibration": CalibrationOptions(str(PROSE), samples=3, max_length=128)}, []),
        ({"calibration": CalibrationOptions(str(PROSE), samples=4, max_length=64)}, []),
    ],
)
def test_other_arguments_redo_what_they_touch(
    changes: dict[str, Any], expected: list[str], earlier: Earlier
) -> None:
    earlier.restore("pruned")
    assert reused(earlier.build(**changes)) == expected


def change_nothing(tiny: Path, folder: Path) -> dict[str, Any]:
    return {}


def rename_the_text(tiny: Path, folder: Path) -> dict[str, Any]:
    text = prose(folder, "renamed.txt")
    return {"calibration": CalibrationOptions(str(text), samples=4, max_length=128)}


def read_another_text_of_that_name(tiny: Path, folder: Path) -> dict[str, Any]:
    text = prose(folder, "other/text.txt", 300)
    return {"calibration": CalibrationOptions(str(text), samples=4, max_length=128)}


def read_another_imatrix_text_of_that_name(tiny: Path, folder: Path) -> dict[str, Any]:
    return {"imatrix_text": prose(folder, "other/text.txt", 300)}


def rename_the_imatrix_text(tiny: Path, folder: Path) -> dict[str, Any]:
    return {"imatrix_text": prose(folder, "renamed.txt")}


def change_the_card(tiny: Path, folder: Path) -> dict[str, Any]:
    (tiny / "README.md").write_text("---\nlicense: mit\n---\n")
    return {}


def recommend_a_sampling(tiny: Path, folder: Path) -> dict[str, Any]:
    (tiny / "generation_config.json").write_text('{"temperature": 0.6}')
    return {}


def change_a_label(tiny: Path, folder: Path) -> dict[str, Any]:
    # the file with the other label would stay
    return {"recipes": ("q8_0",), "labels": {"q8_0": "Q8_0_OWN"}, "replace": True}


def change_the_template(tiny: Path, folder: Path) -> dict[str, Any]:
    (tiny / "chat_template.jinja").write_text("another template")
    return {}


def change_a_named_template(tiny: Path, folder: Path) -> dict[str, Any]:
    path = tiny / "tokenizer_config.json"
    named = [{"name": name, "template": "{{ messages }}"} for name in ("default", "tool_use")]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": named}))
    (tiny / "chat_template.jinja").unlink()
    return {}


def rename_the_recipe(tiny: Path, folder: Path) -> dict[str, Any]:
    (folder / "mine.toml").write_text((RECIPES / "q8_0.toml").read_text())
    return {"recipes": (str(folder / "mine.toml"),)}


def change_the_method(tiny: Path, folder: Path) -> dict[str, Any]:
    return {"method": "ean_sum"}


def change_the_seed(tiny: Path, folder: Path) -> dict[str, Any]:
    return {"calibration": CalibrationOptions(str(PROSE), samples=4, max_length=128, seed=7)}


def change_the_precision(tiny: Path, folder: Path) -> dict[str, Any]:
    return {"compute": ComputeOptions(device="cpu", dtype="bfloat16")}


def call_the_model_otherwise(tiny: Path, folder: Path) -> dict[str, Any]:
    tiny.rename(folder / "moved")
    return {"model": str(folder / "moved")}


@pytest.mark.parametrize(
    "end", [pytest.param("exported", marks=pytest.mark.slow), "finished"]
)  # fmt: skip
@pytest.mark.parametrize(
    "change",
    [
        change_nothing, rename_the_text, read_another_text_of_that_name,
        read_another_imatrix_text_of_that_name, rename_the_imatrix_text, change_the_card,
        recommend_a_sampling, change_a_label,
        change_the_template, change_a_named_template, rename_the_recipe, change_the_method,
        change_the_seed, change_the_precision, call_the_model_otherwise,
    ],
)  # fmt: skip
def test_what_was_done_before_shows_nowhere(
    change: Callable[[Path, Path], dict[str, Any]], end: str, earlier: Earlier
) -> None:
    """A bundle made after another one is what it is on an empty disk, byte for byte."""
    earlier.restore(end)
    changes = change(earlier.model, earlier.folder)
    found = contents(earlier.build(**changes))
    expected = earlier.alone(change.__name__, changes)
    assert found.keys() == expected.keys()
    for name, data in expected.items():
        assert found[name] == data, name


def test_what_nothing_has_changed_is_reused(earlier: Earlier) -> None:
    """The folder that is restored is, to the program, the one in which it has built."""
    earlier.restore("exported")
    assert reused(earlier.build()) == STAGES
    earlier.restore("finished")
    assert stages_reused(earlier.build()) == {}


class Upgrade:
    """Newer versions of this program and of every library, and the sweeps that run with them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.sweeps: list[str] = []
        self._patch = patch
        sweep = sweeps.sweep

        def counted(*arguments: Any, **named: Any) -> Any:
            self.sweeps.append(arguments[5])  # its title
            return sweep(*arguments, **named)

        patch.setattr(sweeps, "sweep", counted)

    def install(self, number: str = "99.1") -> None:
        self._patch.setattr(made_with, "version", lambda library: number)
        for module in (made_with, keys, record):
            self._patch.setattr(module, "__version__", number)


@pytest.fixture
def upgrade(monkeypatch: pytest.MonkeyPatch) -> Upgrade:
    return Upgrade(monkeypatch)


def test_an_upgrade_repeats_no_sweep(earlier: Earlier, upgrade: Upgrade) -> None:
    """It is said which versions the results were made with, and the manifest records them."""
    earlier.restore("exported")
    upgrade.install()
    notes: list[str] = []
    result = earlier.build(progress=Notes(notes))
    assert upgrade.sweeps == []
    assert reused(result) == ["texts", "observe", "prune", "imatrix"]
    (line,) = (note for note in notes if note.startswith("observe: "))
    torch = version("torch")
    assert re.fullmatch(
        rf"observe: made with reap2gguf {__version__}, torch {re.escape(torch)}.*, now reap2gguf "
        r"99\.1, torch 99\.1.*: reused \(--fresh to redo it\)",
        line,
    )
    made = result.manifest.made_with
    assert {stage: found["reap2gguf"] for stage, found in made.items()} == {
        stage: __version__ for stage in ("texts", "observe", "imatrix")
    }
    assert made["observe"]["torch"] == torch


def test_after_an_upgrade_another_ratio_reuses_the_observations(
    earlier: Earlier, upgrade: Upgrade
) -> None:
    earlier.restore("finished")
    upgrade.install()
    result = earlier.build(compression=0.5, name="half")
    assert upgrade.sweeps == ["Importance matrix"]
    assert reused(result) == ["texts", "observe"]
    assert result.manifest.made_with["imatrix"]["torch"] == "99.1"


def test_after_an_upgrade_a_finished_bundle_is_up_to_date(
    earlier: Earlier, upgrade: Upgrade
) -> None:
    earlier.restore("finished")
    upgrade.install()
    notes: list[str] = []
    assert stages_reused(earlier.build(progress=Notes(notes))) == {}
    (line,) = (note for note in notes if "up to date" in note)
    assert line.startswith(f"name: up to date, made with reap2gguf {__version__}")


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        ("TEXTS_FORMAT", ["observe", "prune", "imatrix", "export", "verify"]),
        ("OBSERVE_FORMAT", ["texts", "prune", "imatrix", "export", "verify"]),
        ("PRUNE_FORMAT", ["texts", "observe"]),
        ("IMATRIX_FORMAT", ["texts", "observe", "prune"]),
        ("EXPORT_FORMAT", ["texts", "observe", "prune", "imatrix"]),
    ],
)
def test_a_higher_format_number_repeats_its_stage(
    number: str, expected: list[str], earlier: Earlier, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier.restore("exported")
    monkeypatch.setattr(keys, number, 99)
    assert reused(earlier.build()) == expected


def test_weights_that_are_written_again_are_observed_again(earlier: Earlier) -> None:
    """Their time of change has changed, although their bytes have not."""
    earlier.restore("finished")
    path = earlier.model / "model.safetensors"
    path.write_bytes(path.read_bytes())
    assert reused(earlier.build()) == ["texts"]


def test_weights_changed_where_no_sample_is_taken_are_observed_again(tmp_path: Path) -> None:
    earlier = Earlier(tmp_path, TinyQwen3Moe(vocab=FULL_VOCAB))  # of smaller ones all is read
    earlier.restore("finished")
    path = earlier.model / "model.safetensors"
    whole = path.read_bytes()

    def fingerprint() -> str:
        with Checkpoint.open(earlier.model) as checkpoint:
            return checkpoint.fingerprint()

    before = fingerprint()
    with Checkpoint.open(earlier.model) as checkpoint:
        head = checkpoint.tensors["lm_head.weight"]
    # the lowest bit of a weight every 1000 bytes, until one is in no sample
    for position in range(head.offset, head.offset + head.n_bytes, 1000):
        changed = bytearray(whole)
        changed[position] ^= 1
        path.write_bytes(changed)
        if fingerprint() == before:
            break
    assert fingerprint() == before
    assert path.read_bytes() != whole
    again = earlier.build()
    assert reused(again) == ["texts"]
    assert contents(again) == contents(earlier.build("empty"))


def test_a_fixed_tokenizer_is_used(earlier: Earlier) -> None:
    earlier.restore("pruned")
    (earlier.model / "chat_template.jinja").write_text("another template")
    result = earlier.build()
    metadata = read_gguf_header(result.gguf_folder / "name-Q8_0.gguf").metadata
    assert metadata["tokenizer.chat_template"] == "another template"


def test_the_package_of_ik_llama_cpp_is_a_part_of_keys_and_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It decides the bytes of its types, and of no others."""
    model = TinyQwen3Moe(hidden=256, width=256).write(tmp_path / "tiny")
    tensors = gguf_tensors(model)
    with Checkpoint.open(model) as checkpoint:
        facts = describe(checkpoint).facts
    plain, theirs = (
        resolve(load_recipe(name), tensors, facts, facts.n_experts, has_imatrix=True)
        for name in ("q8_0", "IQ4_K")
    )
    found = []
    for number in ("0.1.5", "0.1.6"):
        monkeypatch.setattr(keys, "package_version", lambda number=number: number)
        monkeypatch.setattr(record, "package_version", lambda number=number: number)
        found.append((keys.recipe_key(plain), keys.recipe_key(theirs)))
        assert record.ik_versions([plain]) == {}
        assert record.ik_versions([plain, theirs]) == {"ik-llama-cpp-python": number}
    (plain_before, theirs_before), (plain_after, theirs_after) = found
    assert plain_before == plain_after
    assert theirs_before != theirs_after
