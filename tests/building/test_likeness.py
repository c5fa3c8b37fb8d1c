"""A build from the manifest of an earlier one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import reap2gguf
from reap2gguf.building.likeness import read_likeness
from reap2gguf.building.plan import make_plan
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.errors import ArtifactError, UsageError
from reap2gguf.options import CalibrationOptions, ComputeOptions
from tests.building import builds
from tests.tiny import TinyQwen3Moe

SPECIAL = """
title = "Mine"
label = "MINE"
file_type = "Q8_0"
[[rules]] # a comment
match = "blk.*.attn_v.weight"
type = "F16"
"""


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a calibration and a text for the importance matrix."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(builds.PROSE, "prose.txt")
    Path("imatrix.txt").write_text(builds.PROSE.read_text()[5000:15000])
    Path("mine.toml").write_text(SPECIAL)
    return tmp_path


def test_the_same_bundle_byte_for_byte(texts: Path, tiny: Path) -> None:
    first = builds.build(
        tiny,
        texts / "first",
        recipes=("mine.toml", "q4_k_s"),
        labels={"q4_k_s": "SMALL"},
        tensor_types=("ffn_down_exps=q8_0",),
        keep_experts=5,
        method="frequency",
        name="NAME",
        calibration=CalibrationOptions("prose.txt", samples=5, max_length=96, seed=7, pack=True),
        imatrix_text=Path("imatrix.txt"),
        chunk=64,
        imatrix_chunks=9,
        compute=ComputeOptions(device="cpu", dtype="bfloat16"),
    )
    Path("mine.toml").unlink()
    options = reap2gguf.options_like(first.gguf_folder, model=str(tiny), output=texts / "second")
    plan = make_plan(options)
    assert read_likeness(first.hf_folder).differences(plan) == []
    second = reap2gguf.build(plan)
    assert second is not None
    assert builds.contents(second) == builds.contents(first)
    names = {record.file: record.recipe for record in first.manifest.gguf}
    assert names == {"NAME-MINE.gguf": "mine+custom", "NAME-SMALL.gguf": "Q4_K_S+custom"}


def test_no_path_is_recorded(texts: Path, tiny: Path) -> None:
    result = builds.build(
        tiny,
        texts / "out",
        recipes=(str(texts / "mine.toml"),),
        calibration=CalibrationOptions(str(texts / "prose.txt"), samples=4, max_length=64),
        imatrix_text=texts / "imatrix.txt",
        chunk=64,
    )
    for file in (*result.hf_folder.glob("*.*"), *result.gguf_folder.glob("*.*")):
        assert str(texts).encode() not in file.read_bytes(), file
    record = result.manifest.options
    assert record is not None
    assert (record.spec, record.imatrix_text) == ("prose.txt", "imatrix.txt")
    assert [(one.option, one.name) for one in record.inputs] == [
        ("--calibration", "prose.txt"), ("--imatrix-text", "imatrix.txt"),
    ]  # fmt: skip
    for card in (result.hf_folder / "README.md", result.gguf_folder / "README.md"):
        text = card.read_text()
        assert (
            f"`reap2gguf build MODEL --like reap2gguf.json`, where MODEL is `{tiny.name}`" in text
        )


@pytest.fixture
def small(texts: Path, tiny: Path) -> Path:
    """A finished bundle's folder."""
    values: dict[str, Any] = {
        "calibration": CalibrationOptions("prose.txt", samples=4, max_length=64),
        "imatrix_text": Path("imatrix.txt"),
        "chunk": 64,
    }
    return builds.build(tiny, texts / "small", **values).gguf_folder


def test_what_differs_is_listed(small: Path, tiny: Path, tmp_path: Path) -> None:
    Path("prose.txt").write_text("Other words. " * 400)
    TinyQwen3Moe(seed=99).write(tmp_path / "other")
    likeness = read_likeness(small / "reap2gguf.json")
    plan = make_plan(likeness.build_options(model=str(tmp_path / "other")))
    lines = "\n".join(likeness.differences(plan))
    assert "other is not the checkpoint that it was built from" in lines
    assert "--calibration reads no file with the SHA-256 of prose.txt" in lines
    assert "--calibration reads prose.txt, which it did not" in lines
    assert "imatrix" not in lines
    shutil.copytree(tiny, tmp_path / "renamed")
    plan = make_plan(likeness.build_options(model=str(tmp_path / "renamed")))
    assert any("the source is called renamed here" in line for line in likeness.differences(plan))
    on_gpu = replace(likeness.options, device="cuda")
    assert any(
        "computed on cuda" in line for line in replace(likeness, options=on_gpu).differences(plan)
    )


def test_missing_inputs_are_asked_for(small: Path, tiny: Path) -> None:
    likeness = read_likeness(small)
    with pytest.raises(UsageError, match=r"was the local folder .* pass that folder as MODEL"):
        likeness.build_options()
    Path("imatrix.txt").rename("moved.txt")
    with pytest.raises(UsageError, match=r"'imatrix.txt', which .* --imatrix-text FILE"):
        likeness.build_options(model=str(tiny))
    options = likeness.build_options(model=str(tiny), imatrix_text="moved.txt", compression=0.5)
    assert (options.imatrix_text, options.compression) == (Path("moved.txt"), 0.5)
    Path("prose.txt").unlink()
    with pytest.raises(UsageError, match=r"'prose.txt', which .* --calibration FILE"):
        likeness.build_options(model=str(tiny), imatrix_text="moved.txt")


def test_a_model_and_datasets_of_the_hub_are_pinned(small: Path) -> None:
    values = json.loads((small / "reap2gguf.json").read_text())
    values["source"] |= {"label": "owner/name", "revision": "a" * 40}
    component = values["calibration"]["components"][0]
    values["calibration"]["components"] = [component | {"name": "o/data", "revision": "b" * 40}]
    values["options"] |= {"spec": "o/data:5", "imatrix_text": None}
    (small / "hub.json").write_text(json.dumps(values))
    options = read_likeness(small / "hub.json").build_options()
    assert options.model == "owner/name@" + "a" * 40
    assert options.calibration.revisions == {"o/data": "b" * 40}
    from reap2gguf.calibration.spec import decide

    decided = decide(options.calibration)
    assert (decided.label, decided.spec) == ("o/data:5", f"o/data@{'b' * 40}:5")
    pinned = replace(options.calibration, spec="o/data@main:5")
    assert decide(pinned).spec == "o/data@main:5"


def test_a_manifest_without_options(small: Path) -> None:
    path = small / "reap2gguf.json"
    values = json.loads(path.read_text())
    del values["options"]
    path.write_text(json.dumps(values))
    assert Manifest.load(small).options is None
    with pytest.raises(ArtifactError, match="records no options"):
        read_likeness(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": "5"}, "samples is '5', expected int"),
        ({"seed": True}, "seed is True"),
        ({"compression": float(2**70)}, "compression"),
        ({"inputs": None}, "a list of inputs"),
        ({"inputs": [{"option": "x", "name": 1, "sha256": ""}]}, "name is 1"),
        ({"inputs": [{}] * 20_001}, "inputs holds 20,001 values"),
        ({"more": 1}, "unexpected keyword"),
    ],
)
def test_options_have_bounds(change: dict[str, Any], message: str, small: Path) -> None:
    path = small / "reap2gguf.json"
    values = json.loads(path.read_text())
    values["options"] |= change
    path.write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match=message):
        read_likeness(small)


def changed(small: Path, **options: Any) -> Path:
    """A manifest with other options beside a bundle's own."""
    values = json.loads((small / "reap2gguf.json").read_text())
    values["options"] |= options
    (small / "changed.json").write_text(json.dumps(values))
    return small / "changed.json"


@pytest.fixture
def folder(texts: Path) -> Path:
    """A folder in the current one, with a file, a folder, and one named like a model's commit."""
    (texts / "folder" / "data").mkdir(parents=True)
    (texts / "folder" / f"model@{'a' * 40}").mkdir()
    (texts / "folder" / "secret.txt").write_text("secret")
    return texts / "folder"


def test_a_manifest_chooses_no_paths(small: Path, folder: Path) -> None:
    for field in ("imatrix_text", "observations", "imatrix", "spec"):
        for value in (
            "/etc/passwd", "../secret.txt", "folder/secret.txt", "~", "~/.ssh/id", "..", ".", "",
            "a\0b", "~\0/x", "a\\b",
        ):  # fmt: skip
            with pytest.raises(ArtifactError, match=f"{field} is .*may not choose paths"):
                read_likeness(changed(small, **{field: value}))


def test_a_slash_is_for_names_on_the_hub(small: Path, folder: Path) -> None:
    for spec in (
        "prose.txt", "a name (1), of a file.txt", "default:3,prose.txt:4", "owner/name",
        "owner/name[code](test):5,other/name@main:6",
    ):  # fmt: skip
        assert read_likeness(changed(small, spec=spec)).options.spec == spec
    for spec in (
        "prose.txt:3,/etc/passwd:4", "prose.txt:3,~root:4", "owner/name:3,../x:4",
        "owner/name@x/../../y:3", "folder/data:3", "folder/data", "folder/data.jsonl:3",
    ):  # fmt: skip
        with pytest.raises(ArtifactError, match="spec is "):
            read_likeness(changed(small, spec=spec))


def test_a_manifest_chooses_no_folder_as_the_model(small: Path, folder: Path) -> None:
    path = small / "reap2gguf.json"
    values = json.loads(path.read_text())
    for label in ("/srv/model", "../model", "~/model", "folder/model"):
        values["source"] |= {"label": label, "revision": "a" * 40}
        path.write_text(json.dumps(values))
        with pytest.raises(ArtifactError, match="model is "):
            read_likeness(small)


def test_a_missing_file_that_was_used_twice_is_asked_for_at_once(small: Path, tiny: Path) -> None:
    path = changed(small, imatrix_text="prose.txt")
    Path("prose.txt").unlink()
    with pytest.raises(UsageError, match="with --calibration FILE and --imatrix-text FILE"):
        read_likeness(path).build_options(model=str(tiny))


def test_without_recipes_the_manifest_is_named(small: Path, tiny: Path) -> None:
    path = small / "reap2gguf.json"
    values = json.loads(path.read_text())
    for record in values["gguf"]:
        record["adopted"] = True
    path.write_text(json.dumps(values))
    with pytest.raises(UsageError, match=r"reap2gguf.json: its GGUF files were made by other"):
        read_likeness(path).build_options(model=str(tiny))
    options = read_likeness(path).build_options(model=str(tiny), recipes=("q8_0",))
    assert options.recipes == ("q8_0",)
