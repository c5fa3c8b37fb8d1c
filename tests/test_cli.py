from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import huggingface_hub
import pytest
from click.testing import CliRunner, Result
from safetensors.torch import save_file

import reap2gguf
from reap2gguf.cli import cli
from reap2gguf.hub import retry
from tests.conftest import CALIBRATION, Bundle
from tests.tiny import EXAMPLE, TinyQwen3Moe


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def all_commands(group: click.Group, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [prefix]
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found += all_commands(command, (*prefix, name))
        else:
            found.append((*prefix, name))
    return found


@pytest.mark.parametrize("command", all_commands(cli), ids=" ".join)
def test_every_help_has_an_example(command: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Example:" in result.output
    assert "reap2gguf " + " ".join(command) in result.output


def python_modules_after(*arguments: str) -> set[str]:
    """Modules that a command of ours has loaded when it ends."""
    code = (
        "import sys, json\n"
        "from reap2gguf.cli import cli\n"
        "try:\n    cli(sys.argv[1:])\n"
        "except SystemExit:\n    pass\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("recipes", "list"), ("build", "--samples", "0"), ("build", "--recipe", "no"),
     ("verify", "nowhere")],
    ids=" ".join,
)  # fmt: skip
def test_quick_commands_load_no_heavy_library(arguments: tuple[str, ...]) -> None:
    heavy = {"torch", "transformers", "datasets", "huggingface_hub", "pyarrow", "llama_cpp"}
    assert not heavy & python_modules_after(*arguments)


def not_a_moe(folder: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))


def unknown_architecture(folder: Path) -> None:
    config = TinyQwen3Moe().config() | {"architectures": ["FutureMoeForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))


def missing_shard(folder: Path) -> None:
    TinyQwen3Moe(n_shards=3).write(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model-00002-of-00003.safetensors").unlink()


def unexplained_tensor(folder: Path) -> None:
    import torch

    tensors = TinyQwen3Moe().tensors() | {"model.adapter": torch.zeros(4)}
    save_file(tensors, folder / "model.safetensors")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (not_a_moe, "LlamaForCausalLM has no experts"),
        (unknown_architecture, "architecture FutureMoeForCausalLM is not implemented"),
        (missing_shard, "1 of 3 shards missing: 'model-00002-of-00003.safetensors'"),
        (unexplained_tensor, "'model.adapter' has no meaning"),
        (pickled, "pickled weights"),
        (not_json, "not valid JSON"),
    ],
)
def test_a_bad_checkpoint_is_one_line(
    spoil: Callable[[Path], None], message: str, tiny: Path
) -> None:
    spoil(tiny)
    for command in ("plan", "build"):
        one_line(run(command, tiny, "--recipe", "q8_0"), message)


def one_line(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert len([line for line in result.output.splitlines() if line.startswith("Error")]) == 1


RULE = '[[rules]]\nmatch = "{match}"\ntype = "Q8_0"\n'
HEAD = 'title = "t"\nlabel = "L"\nfile_type = "Q4_K_M"\n'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere", "--recipe", "q8_0"], "./nowhere: no such folder"),
        (["{tiny}", "--recipe", "q9"], "no recipe 'q9'"),
        (["{tiny}", "--recipe", "{idle}"], "rule 'blk.*.ssm_out.weight' matches no tensor"),
        (["{tiny}", "--recipe", "q8_0", "--keep-experts", "9"], "the model has 8 experts"),
        (["{tiny}", "--recipe", "q8_0", "--keep-experts", "1"], "keep at least 2"),
        (["{tiny}", "--recipe", "q8_0", "--compression", "1.5"], "less than 1"),
        (["nowhere", "--recipe", "q8_0", "--compression", "25"], "for 25 % pass 0.25"),
        (["nowhere", "--recipe", "q8_0", "--keep-experts", "0"], "expected 1 or more"),
        (["{tiny}", "--recipe", "q8_0", "--compression", "x"], "is neither a number"),
        (["{tiny}", "--recipe", "q8_0,,q4km"], "expected names with commas between"),
        (["{tiny}", "--tensor-type", "none=f16"], "--tensor-type *none*=F16: matches no tensor"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_one_line(
    arguments: list[str], message: str, tiny: Path, tmp_path: Path
) -> None:
    idle = tmp_path / "idle.toml"
    idle.write_text(HEAD + RULE.format(match="blk.*.ssm_out.weight"))
    filled = [argument.format(tiny=tiny, idle=idle) for argument in arguments]
    for command in ("plan", "build"):
        one_line(run(command, *filled), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"\xff\xff", "not UTF-8"), (b"short", "do not fill one row")],
)
def test_a_bad_text_is_one_line(
    content: bytes | None, message: str, tiny: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    result = run("observe", tiny, "--calibration", text, "-o", tmp_path / "o.safetensors")
    one_line(result, message)
    assert not (tmp_path / "o.safetensors").exists()


def test_the_stages_one_by_one_make_the_same_gguf(built: Bundle, tmp_path: Path) -> None:
    seen, pruned = tmp_path / "seen.safetensors", tmp_path / "example"
    text = CALIBRATION / "prose.txt"
    flags = ("--device", "cpu")
    steps = [
        ("observe", built.source, "--calibration", text, "--max-length", 512, *flags, "-o", seen),
        ("prune", built.source, "--observations", seen, "--compression", 0.25, "-o", pruned),
        ("imatrix", pruned, "--text", text, *flags, "-o", tmp_path / "imatrix.gguf"),
        ("quantize", pruned, "--recipe", "unsloth-iq4km", "--imatrix", tmp_path / "imatrix.gguf",
         *flags, "-o", tmp_path / "example.gguf"),
        ("verify", pruned, tmp_path / "example.gguf"),
    ]  # fmt: skip
    for step in steps:
        result = run(*step)
        assert result.exit_code == 0, result.output
        assert ("quantizing: " in result.output) == (step[0] == "quantize")
    from reap2gguf.gguf_files.reader import read_gguf_header

    one = read_gguf_header(tmp_path / "example.gguf")
    other = read_gguf_header(built.gguf / "example-IQ4_K_M.gguf")
    assert one.tensors.keys() == other.tensors.keys()
    for name in one.tensors:
        assert one.read(name).tobytes() == other.read(name).tobytes()
    own = {key for key in other.metadata if key.startswith("reap2gguf.")}
    # a build knows the name of its source even if that is a folder
    base = {key for key in other.metadata if key.startswith("general.base_model.")}
    theirs = other.metadata.keys() - own - base
    assert {k: one.metadata[k] for k in theirs} == {k: other.metadata[k] for k in theirs}
    assert (tmp_path / "imatrix.dat").is_file()
    kept = json.loads((pruned / "kept_experts.json").read_text())["kept_experts"]
    flat = [expert for layer in sorted(kept) for expert in kept[layer]]
    assert flat == other.metadata["reap2gguf.kept_experts"]


def test_observations_of_another_checkpoint_are_refused(tiny: Path, tmp_path: Path) -> None:
    text = CALIBRATION / "prose.txt"
    seen = tmp_path / "seen.safetensors"
    flags = ("--max-length", 64, "--samples", 2, "-o", seen)
    assert run("observe", tiny, "--calibration", text, *flags).exit_code == 0
    other = TinyQwen3Moe(seed=1).write(tmp_path / "other")
    result = run("prune", other, "--observations", seen, "-o", tmp_path / "out")
    one_line(result, "of another checkpoint")
    result = run("prune", tiny, "--observations", seen, "-o", tmp_path / "gone" / "out")
    one_line(result, "does not exist; create it first")
    assert run("prune", tiny, "--observations", seen, "-o", tmp_path / "out").exit_code == 0
    one_line(run("prune", tiny, "--observations", seen, "-o", tmp_path / "out"), "exists already")


def test_quantize_refuses_an_imatrix_of_the_unpruned_model(built: Bundle, tmp_path: Path) -> None:
    result = run(
        "quantize", built.source, "--recipe", "q4km", "--imatrix", built.gguf / "imatrix.gguf",
        "-o", tmp_path / "x.gguf",
    )  # fmt: skip
    one_line(result, "it is of another model, such as the one before pruning")
    assert list(tmp_path.iterdir()) == []


def test_plan_prints_counts_types_and_sizes(example: Path) -> None:
    result = run("plan", example, "--recipe", "unsloth-iq4km", "--keep-experts", 12, "--tensors")
    assert result.exit_code == 0
    for expected in (
        "keeps 12 of 16", "11.3 M of 14.4 M parameters remain",
        "blk.*.ffn_down_exps.weight  Q5_K   x4",
        "rule token_embd.weight", "5.20 bits per weight", "time: about ",
    ):  # fmt: skip
        assert expected in result.output
    values = json.loads(run("plan", example, "--recipe", "q8_0", "--json").stdout)
    assert values["files"][0]["tensors"]["token_embd.weight"] == "Q8_0"


def test_recipes(tmp_path: Path) -> None:
    assert "blk.*.ffn_down_exps.weight   Q5_K" in run("recipes", "show", "unsloth-iq4km").output
    assert "fits tiny-qwen3-moe" in run("recipes", "check", "q4km").output
    bad = tmp_path / "bad.toml"
    bad.write_text(HEAD + RULE.format(match="blk.9.*"))
    one_line(run("recipes", "check", bad), "matches no tensor")
    checked = run("recipes", "check", "unsloth-iq4km").output
    assert "the Hub shows files with the label IQ4_K_M as Q4_K_M; give another with" in checked
    assert "the Hub" not in run("recipes", "check", "q4km").output


def test_labels_that_hide_each_other(example: Path) -> None:
    both = ("--recipe", "unsloth-iq4km", "--recipe", "q4km")
    shown = " ".join(run("plan", example, *both).output.split())
    assert "warning: `llama-server -hf OWNER/NAME:Q4_K_M` opens " in shown
    way_out = ("--label", "unsloth-iq4km=Q4_K_M_MIX")
    assert " ".join(way_out) in shown
    values = json.loads(run("plan", example, *both, "--json").stdout)
    assert len(values["warnings"]) == 1
    values = json.loads(run("plan", example, *both, *way_out, "--json").stdout)
    assert values["warnings"] == []
    assert [file["file"] for file in values["files"]] == [
        "tiny-qwen3-moe-REAP-0.25-Q4_K_M_MIX.gguf",
        "tiny-qwen3-moe-REAP-0.25-Q4_K_M.gguf",
    ]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("Q4", "'Q4' is not RECIPE=LABEL"),
        ("=Q4", "'=Q4' is not RECIPE=LABEL"),
        ("q4km=", "'q4km=' is not RECIPE=LABEL"),
        ("q8_0=X", "--label q8_0=X: no recipe 'q8_0' is asked for; expected one of q4km"),
        ("q4km=a/b", "recipe 'q4km': label 'a/b', expected letters, digits"),
        ("q4km=BF16", "two recipes have the label 'BF16'"),
    ],
)
def test_a_bad_label_is_one_line(label: str, message: str, tiny: Path) -> None:
    result = run("plan", tiny, "--recipe", "q4km", "--recipe", "bf16", "--label", label)
    one_line(result, message)


def test_doctor_tells_versions() -> None:
    import torch

    result = run("doctor")
    assert result.exit_code == 0
    assert torch.__version__ in result.output
    assert "libggml" in result.output


def test_an_interrupt_says_how_to_resume(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reap2gguf.building import pipeline, plan

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    words = ["build", str(tiny), "--recipe", "q8_0", "--output", f"{tmp_path}/a b"]
    monkeypatch.setattr("sys.argv", ["reap2gguf", *words, "--fresh"])
    command = f"reap2gguf build {tiny} --recipe q8_0 --output '{tmp_path}/a b'"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "build", interrupt)
        result = run(*words, "--fresh")
    assert result.exit_code == 130
    assert result.output.endswith(f"Interrupted. Resume with: {command}\n"), "it is begun"
    monkeypatch.setattr(plan, "make_plan", interrupt)
    result = run(*words, "--fresh")
    assert result.output.splitlines()[-1] == f"Interrupted. Resume with: {command} --fresh"


@pytest.mark.parametrize("name", ["evaluate", "compare"])
def test_an_interrupt_says_that_nothing_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **others: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reap2gguf, name, interrupt)
    for more in ([], ["-o", "found.json"]):
        words = [name, str(EXAMPLE), *more]
        monkeypatch.setattr("sys.argv", ["reap2gguf", *words])
        last = run(*words).output.splitlines()[-1]
        resumes = f"Interrupted. Resume with: reap2gguf {' '.join(words)}"
        restarts = (
            "Interrupted. Nothing is kept of it: only a run with --output FILE can be resumed."
        )
        assert last == (resumes if more else restarts)


def test_an_interrupted_quantization_goes_on(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reap2gguf.exporting import gguf_export, journal
    from reap2gguf.exporting.row_ranges import Batch

    monkeypatch.setattr(journal, "SAVE_SECONDS", 0)
    monkeypatch.setattr(journal, "MAX_TIME_SHARE", 1e9)
    command = ("quantize", tiny, "--recipe", "q8_0", "--threads", 1, "-o")
    whole, resumed = tmp_path / "whole.gguf", tmp_path / "resumed.gguf"
    written: list[str] = []
    stop_at: str | None = None
    write = gguf_export._Job.run

    def counted(self: gguf_export._Job, batch: Batch) -> None:
        if batch[0].tensor.name == stop_at:
            raise KeyboardInterrupt
        written.append(batch[0].tensor.name)
        write(self, batch)

    monkeypatch.setattr(gguf_export._Job, "run", counted)
    assert run(*command, whole).exit_code == 0
    names = list(dict.fromkeys(written))
    stop_at = names[len(names) // 2]
    assert run(*command, resumed).exit_code == 130
    assert {path.name for path in tmp_path.glob("resumed*")} == {
        "resumed.gguf.part", "resumed.gguf.journal",
    }  # fmt: skip
    stop_at = None
    del written[:]
    assert run(*command, resumed).exit_code == 0
    assert list(dict.fromkeys(written)) == names[len(names) // 2 :]
    assert resumed.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.glob("*.gguf*")} == {"whole.gguf", "resumed.gguf"}


def test_a_full_disk_is_one_line(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reap2gguf.building import plan

    def full(options: object, note: object) -> None:
        raise OSError(28, os.strerror(28), "model.safetensors")

    monkeypatch.setattr(plan, "make_plan", full)
    one_line(run("build", tiny, "--recipe", "q8_0"), "model.safetensors: No space left on device")


def test_tries_at_the_hub_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(retry, "_FIRST_WAIT", 0.0)
    for arguments in ("plan owner/name --recipe bf16", "observe owner/name -o x"):
        result = run(*arguments.split())
        assert result.exit_code == 2
        announced, *tries, error = result.stderr.splitlines()
        assert announced.endswith("Reading owner/name ...")
        assert [line.partition("; ")[2] for line in tries] == [
            f"try {number} of 5 in 0 s" for number in (2, 3, 4, 5)
        ]
        assert error.startswith("Error: owner/name: ")


def test_quiet_prints_the_results_alone(tiny: Path, tmp_path: Path) -> None:
    command = ("build", tiny, "--recipe", "q8_0", "--output", tmp_path / "out", "--device", "cpu")
    result = run(*command, "-q")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert "Try it:  reap2gguf chat" in result.stdout
    result = run(*command, "-q", "-v")
    one_line(result, "--quiet and --verbose exclude each other")


def test_verbose_prints_the_causes_of_an_error(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reap2gguf.terminal.lines._SOON", 1e6)
    (tiny / "config.json").write_text("{")
    command = ("plan", tiny, "--recipe", "q8_0")
    assert len(run(*command).stderr.splitlines()) == 1
    lines = run(*command, "-v").stderr.splitlines()
    assert lines[0].startswith("Error: ")
    assert lines[1].startswith("  caused by JSONDecodeError: ")
    assert len(run(*command).stderr.splitlines()) == 1, "it holds for one command"
