"""Outputs never destroy what a command reads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import reap2gguf
from reap2gguf import BuildOptions, CalibrationOptions, ComputeOptions
from reap2gguf.errors import OutputError, Reap2ggufError, UsageError
from reap2gguf.outputs import keep_inputs, output_file, output_path
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


def run(command: str, model: Path, text: Path, output: Path) -> None:
    if command == "observe":
        calibration = CalibrationOptions(str(text))
        reap2gguf.observe(model, output, calibration=calibration, compute=CPU)
    elif command == "imatrix":
        reap2gguf.imatrix(model, text, output, compute=CPU)
    else:
        reap2gguf.quantize(model, "bf16", output)


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
