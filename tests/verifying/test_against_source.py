"""A bundle beside the model that was pruned: what agrees in itself may still be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import reap2gguf
from reap2gguf import BuildOptions, CalibrationOptions, ComputeOptions
from reap2gguf.artifacts.observations import Observations
from reap2gguf.bundle.layout import MANIFEST_FILE, OBSERVATIONS_FILE, PICTURES
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.cli import cli
from reap2gguf.quantizing.kernels.compiled import VARIABLE, load_kernels
from tests.conftest import CALIBRATION, Bundle
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe
from tests.verifying.mutations import change_manifest, copied, fix_hashes, rewrite

Tensors = dict[str, torch.Tensor]
Kept = Mapping[int, Sequence[int]]


@pytest.fixture
def light(built: Bundle, tmp_path: Path) -> Bundle:
    return copied(built, tmp_path / "build")


def with_source(bundle: Bundle) -> tuple[str, ...]:
    return reap2gguf.verify(bundle.gguf, source=bundle.source, threads=1).violations


# how quick types are compared if nothing is asked for
BY_KERNELS = "values" if load_kernels() is None else "exact"


def test_the_bundle_as_built_is_that_of_its_source(built: Bundle) -> None:
    report = reap2gguf.verify(built.gguf, source=built.source, threads=2)
    assert report.violations == ()
    assert report.not_checked == ()
    levels = {name: str(level) for name, level in report.levels.items()}
    inputs = {"imatrix.gguf", "calibration.txt", "observations.safetensors", *PICTURES}
    hashed = {name for name, level in levels.items() if level == "hashes"}
    assert {name.partition("/")[2] for name in hashed} == inputs - {"quality.png"}
    for name in hashed:
        del levels[name]
    assert levels.pop("example-GGUF/example-IQ4_K_M.gguf") == BY_KERNELS
    assert set(levels.values()) == {"exact"}


def swap_experts(tensors: Tensors, kept: Kept) -> None:
    first, second = (f"model.layers.0.mlp.experts.{e}.down_proj.weight" for e in kept[0][:2])
    tensors[first], tensors[second] = tensors[second], tensors[first]


def rotate_router(tensors: Tensors, kept: Kept) -> None:
    name = "model.layers.1.mlp.gate.weight"
    tensors[name] = tensors[name].roll(1, 0).contiguous()


def double_an_expert(tensors: Tensors, kept: Kept) -> None:
    first, second = (f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in kept[1][:2])
    tensors[first] = tensors[second].clone()


def swap_gate_and_up(tensors: Tensors, kept: Kept) -> None:
    stem = f"model.layers.1.mlp.experts.{kept[1][0]}"
    gate, up = (f"{stem}.{part}_proj.weight" for part in ("gate", "up"))
    tensors[gate], tensors[up] = tensors[up], tensors[gate]


def swap_layers(tensors: Tensors, kept: Kept) -> None:
    first, second = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
    tensors[first], tensors[second] = tensors[second], tensors[first]


def one_bit(tensors: Tensors, kept: Kept) -> None:
    tensors["model.norm.weight"].view(torch.int16)[7] ^= 1


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of a tiny model, which no test changes."""
    folder = tmp_path_factory.mktemp("small")
    return a_bundle_of(TinyQwen3Moe().write(folder / "source"), folder / "out")


@pytest.mark.parametrize(
    "change",
    [swap_experts, rotate_router, double_an_expert, swap_gate_and_up, swap_layers, one_bit],
)
def test_weights_that_were_wrong_before_the_first_gguf(
    change: Callable[[Tensors, Kept], None], small: Bundle, tmp_path: Path
) -> None:
    """The GGUF files were made from the same weights, and agree with them.

    Here the source is the side that is changed; its fingerprint may have missed that.
    """
    bundle = copied(small, tmp_path / "out")
    source = tmp_path / "source"
    shutil.copytree(small.source, source)
    tensors = load_file(source / "model.safetensors")
    change(tensors, Manifest.load(bundle.gguf).pruning.kept)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})

    def of_this_source(values: dict[str, Any]) -> None:
        values["source"]["fingerprint"] = fingerprint_of(source)

    path = bundle.gguf / OBSERVATIONS_FILE
    seen = replace(Observations.load(path), model_fingerprint=fingerprint_of(source))
    path.unlink()
    seen.save(path)
    change_manifest(bundle, of_this_source)
    report = reap2gguf.verify(bundle.gguf, threads=1)
    assert report.violations == ()
    assert "not compared with the source: pass --source MODEL" in report.not_checked
    found = reap2gguf.verify(bundle.gguf, source=source, threads=1).violations
    assert found
    assert all("differs from entry" in one for one in found), found


def a_bundle_of(source: Path, output: Path, mtp: str = "prune") -> Bundle:
    """A bundle of a tiny model with a quarter of its experts removed."""
    calibration = CalibrationOptions(str(CALIBRATION / "prose.txt"), samples=4, max_length=64)
    options = BuildOptions(
        recipes=("bf16",),
        model=str(source),
        output=output,
        name="example",
        compression=0.25,
        mtp=mtp,
        calibration=calibration,
        chunk=64,
        compute=ComputeOptions(device="cpu"),
    )
    result = reap2gguf.build(options)
    assert result is not None
    return Bundle(output, result.hf_folder, result.gguf_folder, source)


def fingerprint_of(source: Path) -> str:
    with Checkpoint.open(source) as checkpoint:
        return checkpoint.fingerprint()


def test_another_model_is_a_clear_violation(light: Bundle, tmp_path: Path) -> None:
    other = TinyQwen3Moe().write(tmp_path / "other")
    report = reap2gguf.verify(light.gguf, source=other, threads=1)
    (found,) = report.violations
    assert "the bundle was not made from other: it was made from 'tiny-qwen3-moe'" in found
    assert found.endswith("pass the model that was pruned to --source")
    assert report.levels["example/model.safetensors"] < 3


def test_other_experts_than_the_manifest_says(light: Bundle) -> None:
    def change(values: dict[str, Any]) -> None:
        kept = values["pruning"]["kept"]["3"]
        dropped = next(expert for expert in range(16) if expert not in kept)
        values["pruning"]["kept"]["3"] = sorted([*kept[1:], dropped])

    change_manifest(light, change)
    assert any("of the source's model.layers.3.mlp.gate" in one for one in with_source(light))


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("tokenizer_config.json", b"{}", "is not a copy of"),
        ("generation_config.json", None, "generation_config.json is missing"),
        ("chat_template.jinja", b"{{ 1 }}", "is not a copy of"),
        ("LICENSE", b"mine", "LICENSE is not a file of the source"),
        ("special_tokens_map.json", b"{}", "special_tokens_map.json is not a file of the source"),
    ],
)
def test_a_small_file_that_is_not_the_sources(
    name: str, change: bytes | None, named: str, light: Bundle
) -> None:
    path = light.hf / name
    path.unlink(missing_ok=True)
    if change is not None:
        path.write_bytes(change)
    fix_hashes(light)
    found = with_source(light)
    assert any(named in one for one in found), found


@pytest.mark.parametrize(
    ("key", "value"), [("rope_theta", 5e5), ("auto_map", {"AutoModel": "x.Y"}), ("dtype", None)]
)
def test_a_config_that_is_not_the_pruned_one(key: str, value: object, light: Bundle) -> None:
    path = light.hf / "config.json"
    config = json.loads(path.read_text()) | {key: value}
    rewrite(path, lambda _: json.dumps(config).encode())
    fix_hashes(light)
    found = with_source(light)
    assert any("config.json differs from the planned one" in one for one in found), found
    if key == "auto_map":
        assert any("config.json is not one that pruning writes" in one for one in found)


def test_a_gguf_folder_alone_is_compared_with_the_pruned_source(
    light: Bundle, tmp_path: Path
) -> None:
    light.hf.rename(tmp_path / "away")
    report = reap2gguf.verify(light.gguf, threads=1)
    assert "values not compared: the safetensors are not beside it" in report.not_checked
    assert str(report.levels["example-GGUF/example-BF16.gguf"]) == "hashes"
    report = reap2gguf.verify(light.gguf, source=light.source, threads=1)
    assert report.violations == ()
    assert str(report.levels["example-GGUF/example-BF16.gguf"]) == "exact"
    assert str(report.levels["example-GGUF/example-IQ4_K_M.gguf"]) == BY_KERNELS


@pytest.mark.parametrize("mtp", ["prune", "drop"])
def test_a_model_with_tower_and_mtp_block(mtp: str, tmp_path: Path) -> None:
    bundle = a_bundle_of(TinyQwen35Moe().write(tmp_path / "source"), tmp_path / "out", mtp)
    report = reap2gguf.verify(bundle.gguf, source=bundle.source, threads=1)
    assert report.violations == ()
    assert report.not_checked == ()


def test_a_source_with_auto_map(tmp_path: Path) -> None:
    """What names Python code is not carried into the bundle, which verify would refuse."""
    source = TinyQwen3Moe().write(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling.Model"}
    (source / "config.json").write_text(json.dumps(config))
    bundle = a_bundle_of(source, tmp_path / "out")
    assert "auto_map" not in json.loads((bundle.hf / "config.json").read_text())
    assert with_source(bundle) == ()


def test_a_folder_of_prune_beside_its_source(tmp_path: Path) -> None:
    source = TinyQwen3Moe().write(tmp_path / "source")
    calibration = CalibrationOptions(str(CALIBRATION / "prose.txt"), samples=4, max_length=64)
    compute = ComputeOptions(device="cpu")
    seen = reap2gguf.observe(
        source, tmp_path / "seen.safetensors", calibration=calibration, compute=compute
    )
    reap2gguf.prune(source, seen, tmp_path / "pruned", compression=0.25)
    report = reap2gguf.verify(tmp_path / "pruned", source=source)
    assert report.violations == ()
    assert str(report.levels["pruned/model.safetensors"]) == "exact"
    record = tmp_path / "pruned" / "kept_experts.json"
    values = json.loads(record.read_text())
    values["kept_experts"]["0"] = list(range(6))
    values["kept_experts"]["1"] = list(range(6))
    record.write_text(json.dumps(values))
    assert reap2gguf.verify(tmp_path / "pruned", source=source).violations
    record.write_text('{"kept_experts": {"0": [true]}}')
    (found,) = reap2gguf.verify(tmp_path / "pruned", source=source).violations
    assert "layer '0' keeps [True], expected numbers of experts" in found
    record.unlink()
    result = CliRunner().invoke(cli, ["verify", str(tmp_path / "pruned"), "--source", str(source)])
    assert result.exit_code == 2
    assert "leave out --source" in result.output


def test_levels_and_what_was_not_checked_are_printed(
    built: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    arguments = ["verify", "-q", str(built.gguf)]
    plain = CliRunner().invoke(cli, arguments)
    assert plain.exit_code == 0
    lines = plain.stdout.splitlines()
    assert "  values, each within its type's error: example-GGUF/example-IQ4_K_M.gguf" in lines
    assert "  not compared with the source: pass --source MODEL" in lines
    values = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    assert values["levels"]["example/model.safetensors"] == "hashes"
    assert values["violations"] == []
    assert "not compared with the source: pass --source MODEL" in values["not_checked"]


@pytest.mark.parametrize(
    ("more", "code", "named"),
    [
        (["--require", "hashes"], 0, "OK: example-GGUF, example verified"),
        (["--require", "values"], 1, "example/model.safetensors: compared by hashes"),
        (["--require", "values", "--source"], 0, "OK: "),
        (["--require", "exact", "--source"], 1, "example-IQ4_K_M.gguf: compared by values"),
        (["--require", "exact", "--exact", "--source"], 0, "OK: "),
    ],
)
def test_what_is_required_must_be_reached(
    more: list[str], code: int, named: str, built: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without kernels, only `--exact` quantizes all types again."""
    monkeypatch.setenv(VARIABLE, "off")
    source = [str(built.source)] if more[-1] == "--source" else []
    result = CliRunner().invoke(cli, ["verify", "-q", str(built.gguf), *more, *source])
    assert result.exit_code == code, result.output
    assert named in result.output


def test_a_gguf_folder_alone_does_not_reach_values(light: Bundle, tmp_path: Path) -> None:
    light.hf.rename(tmp_path / "away")
    result = CliRunner().invoke(cli, ["verify", "-q", str(light.gguf), "--require", "values"])
    assert result.exit_code == 1
    assert "example-BF16.gguf: compared by hashes, --require asks for values" in result.output
    result = CliRunner().invoke(
        cli, ["verify", "--json", "-q", str(light.gguf), "--require", "values"]
    )
    assert result.exit_code == 1
    assert json.loads(result.stdout)["below_required"]


def test_both_manifests_are_one(light: Bundle) -> None:
    rewrite(light.hf / MANIFEST_FILE, lambda raw: raw.replace(b'"seed": 42', b'"seed": 43'))
    found = reap2gguf.verify(light.gguf, threads=1).violations
    assert found == ("example: reap2gguf.json differs from that of the GGUF folder",)
