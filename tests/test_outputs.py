"""Outputs never destroy what a command reads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import reap2gguf
from reap2gguf import BuildOptions, CalibrationOptions, ComputeOptions
from reap2gguf.cli import cli
from reap2gguf.errors import OutputError, Reap2ggufError, UsageError
from reap2gguf.outputs import claimed, keep_inputs, output_file, output_path
from tests.terminal.test_help import found_command
from tests.test_cli import all_commands
from tests.tiny import TinyQwen3Moe

CPU = ComputeOptions(device="cpu", threads=1)
TEXT = "Each line says a little, and then a little more than that.\n" * 60


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "t.txt").write_text(TEXT)
    return TinyQwen3Moe().write(tmp_path / "m")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def shard_of(model: Path) -> str:
    return min(file.name for file in model.glob("*.safetensors"))


def run(command: str, model: Path, text: Path, output: Path, **more: bool) -> None:
    if command == "observe":
        calibration = CalibrationOptions(str(text))
        reap2gguf.observe(model, output, calibration=calibration, compute=CPU, **more)
    elif command == "imatrix":
        reap2gguf.imatrix(model, text, output, compute=CPU, **more)
    elif command == "prune":
        reap2gguf.prune(model, None, output, method="aimer", keep_experts=6, **more)
    else:
        reap2gguf.quantize(model, "bf16", output, **more)


@pytest.mark.parametrize("name", ["SHARD", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("command", ["observe", "imatrix", "quantize"])
def test_no_file_of_the_model_is_replaced(
    model: Path, tmp_path: Path, command: str, name: str
) -> None:
    before = contents(tmp_path)
    (tmp_path / "link").symlink_to(model)
    target = shard_of(model) if name == "SHARD" else name
    for output in (model / target, tmp_path / "link" / target):
        with pytest.raises(UsageError, match=f"{target}: writing it would replace"):
            run(command, model, tmp_path / "t.txt", output)
    (tmp_path / "link").unlink()
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "output"),
    [
        ("t.txt", "t.txt"),
        ("x.dat", "x.gguf"),
        ("x.gguf.part", "x.gguf"),
        ("x.dat.part", "x.gguf"),
        ("x.gguf.state", "x.gguf"),
        ("x.gguf.state.old", "x.gguf"),
    ],
)
def test_no_text_is_replaced(model: Path, tmp_path: Path, text: str, output: str) -> None:
    (tmp_path / text).write_text(TEXT)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=f"would replace the input .*{text}"):
        reap2gguf.imatrix(model, tmp_path / text, tmp_path / output, compute=CPU)
    assert contents(tmp_path) == before


def test_no_calibration_file_is_replaced(model: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    for spec in (tmp_path / "t.txt", tmp_path / "texts"):
        (tmp_path / "texts").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "t.txt", tmp_path / "texts" / "t.txt")
        output = spec if spec.is_file() else spec / "t.txt"
        with pytest.raises(UsageError, match="would replace the input"):
            reap2gguf.observe(model, output, calibration=CalibrationOptions(str(spec)), compute=CPU)
        assert output.read_text() == TEXT
    assert before.items() <= contents(tmp_path).items()


def test_no_recipe_and_no_imatrix_is_replaced(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('title = "t"\nlabel = "BF16"\nfile_type = "BF16"\n')
    for given, output in (("r.toml", "r.toml"), ("r.toml", "link.toml")):
        if output != given:
            (tmp_path / output).symlink_to(recipe)
        with pytest.raises(UsageError, match=r"would replace the input .*r\.toml"):
            reap2gguf.quantize(model, str(tmp_path / given), tmp_path / output)
    matrix = Path(shutil.copy("tests/data/tiny-qwen3-moe.imatrix.gguf", tmp_path / "im.gguf"))
    before = matrix.read_bytes()
    with pytest.raises(UsageError, match=r"would replace the input .*im\.gguf"):
        reap2gguf.quantize(model, "bf16", matrix, imatrix=matrix)
    assert matrix.read_bytes() == before


def test_an_older_output_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    for name in ("observations.safetensors", "x.gguf", "x.dat"):
        (tmp_path / "m" / name).write_text("old")
        keep_inputs([tmp_path / "m" / name], [tmp_path / "m" / "a.safetensors"], tmp_path / "m")


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a pipe"])
def test_only_files_and_links_are_replaced(model: Path, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out.gguf"
    if kind == "folder":
        output.mkdir()
    elif kind == "pipe":
        os.mkfifo(output)
    else:
        os.mkfifo(tmp_path / "pipe")
        output.symlink_to(tmp_path / "pipe")
    with pytest.raises(OutputError, match=r"out\.gguf: a .*, which is not replaced"):
        reap2gguf.imatrix(model, tmp_path / "t.txt", output, compute=CPU)
    (tmp_path / "null").symlink_to("/dev/null")  # the device itself is not risked in a test
    with pytest.raises(OutputError, match="null: a link to a device, which is not replaced"):
        reap2gguf.quantize(model, "bf16", tmp_path / "null")


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "", "a" * 300 + "/b", 5, None])
def test_names_that_no_file_can_have(name: object, tmp_path: Path) -> None:
    path = str(tmp_path / name) if isinstance(name, str) and name else name
    for check in (output_path, output_file):
        with pytest.raises((UsageError, OutputError)) as error:
            check(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"follow_links": "false"},
        {"threads": -1},
        {"threads": 1.5},
        {"threads": "x"},
        {"threads": 10**30},
        {"threads": 0},
        {"output": "a" * 300},
        {"output": "a\0"},
        {"imatrix": 5},
        {"recipe": None},
        {"model": "a\0b"},
        {"labels": 5},
        {"progress": 5},
    ],
)
def test_quantize_refuses_values_of_another_kind(
    model: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    arguments: dict[str, object] = {
        "model": model,
        "recipe": "bf16",
        "output": tmp_path / "x.gguf",
    }
    with pytest.raises(Reap2ggufError):
        reap2gguf.quantize(**(arguments | options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"recipes": None},
        {"recipes": (None,)},
        {"recipes": 5},
        {"name": 5},
        {"compression": "0.25"},
        {"compression": False},
        {"keep_experts": 12.0},
        {"keep_experts": "12"},
        {"keep_experts": True},
        {"chunk": None},
        {"calibration": None},
        {"compute": 5},
        {"follow_links": "false"},
        {"fresh": 1},
        {"check_space": None},
        {"output": "a\0"},
    ],
)
def test_build_options_refuse_values_of_another_kind(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"is .*, expected"):
        BuildOptions(**({"recipes": "q4km"} | options))  # type: ignore[arg-type]


def test_stages_refuse_values_of_another_kind(model: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "x.gguf", tmp_path / "t.txt"
    for make in (
        lambda: reap2gguf.observe(model, out, calibration=5),  # type: ignore[arg-type]
        lambda: reap2gguf.observe(model, out, compute=5),  # type: ignore[arg-type]
        lambda: reap2gguf.imatrix(model, text, out, chunk=None),  # type: ignore[arg-type]
        lambda: reap2gguf.imatrix(model, text, out, chunk=7),
        lambda: reap2gguf.imatrix(model, 5, out),  # type: ignore[arg-type]
        lambda: reap2gguf.select(model, out, compression="0.25"),  # type: ignore[arg-type]
        lambda: reap2gguf.select(model, out, keep_experts=12.0),  # type: ignore[arg-type]
        lambda: reap2gguf.verify(out, threads="x"),  # type: ignore[arg-type]
        lambda: reap2gguf.verify(5),  # type: ignore[arg-type]
        lambda: reap2gguf.verify(out, exact="no"),  # type: ignore[arg-type]
        lambda: BuildOptions(Path("r.toml"), compute=None),  # type: ignore[arg-type]
        lambda: CalibrationOptions(pack="no"),  # type: ignore[arg-type]
        lambda: CalibrationOptions(None),  # type: ignore[arg-type]
    ):
        with pytest.raises(UsageError, match=r"is .*, expected"):
            make()
    assert BuildOptions(Path("r.toml")).recipes == ("r.toml",)  # type: ignore[arg-type]


WRITES_A_BUNDLE = {
    "build",
    "add",
    "plan",
    "bundle",
    "jobs",
    "push",
}  # locks and folders of their own


def test_every_command_that_writes_a_file_can_overwrite_it() -> None:
    """By its options: so a new command cannot forget the rule."""
    found = []
    for names in all_commands(cli):
        options = {name for one in found_command(names).params for name in one.opts}
        if "--output" in options and names[0] not in WRITES_A_BUNDLE:
            found.append(" ".join(names))
            assert "--overwrite" in options, names
    assert {"observe", "imatrix compute", "quantize", "recipes fit", "report"} <= set(found)


@pytest.mark.parametrize("command", ["observe", "imatrix", "quantize"])
def test_what_is_there_is_not_replaced_unasked(model: Path, tmp_path: Path, command: str) -> None:
    output, text = tmp_path / "out.gguf", tmp_path / "t.txt"
    run(command, model, text, output)
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=r"out\.gguf: exists already; pass another output"):
        run(command, model, text, output)
    assert contents(tmp_path) == before
    output.write_bytes(b"another")
    run(command, model, text, output, overwrite=True)
    assert contents(tmp_path) == before


def test_either_file_of_a_matrix_counts(model: Path, tmp_path: Path) -> None:
    (tmp_path / "x.dat").write_text("mine")
    with pytest.raises(OutputError, match=r"x\.dat: exists already"):
        run("imatrix", model, tmp_path / "t.txt", tmp_path / "x.gguf")
    assert (tmp_path / "x.dat").read_text() == "mine"


def test_a_file_in_a_folder_that_was_named(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    found = reap2gguf.quantize(model, "bf16", tmp_path / "out").path
    with pytest.raises(OutputError, match=rf"{found.name}: exists already"):
        reap2gguf.quantize(model, "bf16", tmp_path / "out")
    assert reap2gguf.quantize(model, "bf16", tmp_path / "out", overwrite=True).path == found


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_prune_never_replaces_by_a_folder(model: Path, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out"
    if kind == "folder":
        output.mkdir()
    elif kind == "file":
        output.write_text("mine")
    else:
        output.symlink_to(tmp_path / "gone")
    with pytest.raises(OutputError, match="out: exists already"):
        reap2gguf.prune(model, None, output, method="aimer", keep_experts=6, overwrite=True)
    assert output.is_symlink() or output.exists()


def test_an_interrupted_run_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.gguf"
    monkeypatch.setattr("reap2gguf.exporting.journal.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("reap2gguf.exporting.journal.MAX_TIME_SHARE", 1e9)
    with monkeypatch.context() as broken:
        broken.setattr("reap2gguf.exporting.gguf_export.rename", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run("quantize", model, tmp_path, output)
    left = {path.name for path in tmp_path.iterdir()}
    assert {"out.gguf.part", "out.gguf.journal"} <= left
    assert "out.gguf" not in left
    run("quantize", model, tmp_path, output)
    assert {path.name for path in tmp_path.iterdir()} == {"m", "t.txt", "out.gguf"}


def _interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("command", ["observe", "imatrix", "quantize", "prune"])
def test_two_at_once(model: Path, tmp_path: Path, command: str) -> None:
    """The second is told who writes, and nothing of the first is touched."""
    output, text = tmp_path / "out.gguf", tmp_path / "t.txt"
    with claimed([output]):
        before = contents(tmp_path)
        with pytest.raises(
            OutputError, match=rf"another command is writing it \(process {os.getpid()}\)"
        ):
            run(command, model, text, output)
        assert contents(tmp_path) == before
    assert not (tmp_path / ".out.gguf.lock").exists()
    run(command, model, text, output)


def test_prune_begins_again_after_a_kill(model: Path, tmp_path: Path) -> None:
    """What a killed run has left beside the folder goes with the next one."""
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / "model.safetensors").write_text("half")
    (tmp_path / ".out.lock").write_text("1")
    run("prune", model, tmp_path, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"m", "t.txt", "out"}


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    place = Path("/proc/self")  # root may write anywhere but on a file system that refuses it
    with (
        pytest.raises(OutputError, match=r"/proc/self/x: cannot be written"),
        claimed([place / "x"]),
    ):
        pass
    with claimed([None]):
        pass
