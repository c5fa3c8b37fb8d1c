"""What a build verifies before anything gets its final name: every byte of a small file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import reap2gguf
from reap2gguf.building import exact, verify_stage
from reap2gguf.building.exact import exact_recipes
from reap2gguf.building.plan import make_plan
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.options import CalibrationOptions
from reap2gguf.progress import Silent
from reap2gguf.verifying.bundle import verify_bundle
from reap2gguf.verifying.exactness import EXACT_TYPES
from tests.building.builds import PROSE, build, options
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

WIDE = TinyQwen3Moe(n_layers=1, hidden=256, width=256, n_experts=4, head_dim=64)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[verify_stage.Verify]:
    """The verification of a build whose files are written."""
    root = tmp_path_factory.mktemp("written")
    found: list[verify_stage.Verify] = []

    def stop(self: verify_stage.Verify) -> Any:
        self.run.joint.wait(["export"])
        found.append(self)
        raise KeyboardInterrupt

    source = WIDE.write(root / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_stage.Verify, "compute", stop)
        with pytest.raises(KeyboardInterrupt):
            build(source, root / "out", recipes=("q4km", "q8_0"))
    (verify,) = found
    verify.run.progress = Silent()  # of a run that ended
    with verify.run.plan.checkpoint:
        yield verify


def violations_of(written: verify_stage.Verify) -> list[str]:
    return [*written._check_folder()[0], *written._check_files()[0]]


@pytest.mark.parametrize("label", ["Q4_K_M", "Q8_0"])
def test_every_changed_bit_of_a_gguf_is_found(label: str, written: verify_stage.Verify) -> None:
    assert violations_of(written) == []
    path = next(path for path in written.outputs if path.name.endswith(f"{label}.gguf"))
    raw = path.read_bytes()
    start = min(info.offset for info in read_gguf_header(path).tensors.values())
    generator = np.random.default_rng(0)
    places = [*generator.integers(0, start, 2), *generator.integers(start, len(raw), 4)]
    for place in places:
        damaged = bytearray(raw)
        damaged[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        violations = violations_of(written)
        path.write_bytes(raw)
        assert violations, place
        assert all(path.name in violation for violation in violations)


def test_every_changed_bit_of_the_safetensors_is_found(written: verify_stage.Verify) -> None:
    (path,) = written.outputs[0].glob("*.safetensors")
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    generator = np.random.default_rng(1)
    for place in generator.integers(start, len(raw), 2):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        violations = violations_of(written)
        path.write_bytes(raw)
        assert violations, place


def test_what_was_compared_is_recorded(written: verify_stage.Verify) -> None:
    passed = [*written._check_folder()[1], *written._check_files()[1]]
    assert passed[0].endswith("byte for byte")
    assert len(passed) == 3
    for line in passed[1:]:
        assert line.endswith("15 tensors by name, shape and type, byte for byte")


def test_large_files_are_compared_within_bounds(
    written: verify_stage.Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_stage, "exact_recipes", lambda plan, has_gpu: frozenset({"q8_0"}))
    violations, passed = written._check_files()
    assert violations == []
    assert sorted(line.rpartition(", ")[2] for line in passed) == [
        "byte for byte",
        "values within bounds",
    ]


def test_which_files_are_quantized_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = WIDE.write(tmp_path / "tiny")
    plan = make_plan(options(source, tmp_path / "out", recipes=("q4km", "bf16")))
    with plan.checkpoint:
        both = {"q4km", "bf16"}
        assert exact_recipes(plan, has_gpu=False) == both
        monkeypatch.setattr(exact, "SMALL_FILE", plan.recipes[0].n_bytes + 1)
        # few tokens: quantizing the large file again costs nothing, as it holds exact types
        assert exact_recipes(plan, has_gpu=False) == both
        # what the kernels make quickly is quantized again, however large
        monkeypatch.setattr(exact, "SMALL_FILE", 1)
        assert exact_recipes(plan, has_gpu=True) == both
        monkeypatch.setattr(exact, "QUICK_TYPES", EXACT_TYPES)  # as if Q4_K_M had codebooks
        assert exact_recipes(plan, has_gpu=True) == {"bf16"}
        monkeypatch.setattr(exact, "tokens_at_most", lambda plan: 2**40)
        assert exact_recipes(plan, has_gpu=True) == both


def test_the_rule_does_not_depend_on_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = WIDE.write(tmp_path / "tiny")
    monkeypatch.setattr(exact, "SMALL_FILE", 1)
    monkeypatch.setattr(exact, "QUICK_TYPES", EXACT_TYPES)
    plan = make_plan(options(source, tmp_path / "out", recipes=("q4km",)))
    with plan.checkpoint:
        compute = plan.options.compute
        for tokens in (2**10, 2**20, 2**30):
            monkeypatch.setattr(exact, "tokens_at_most", lambda plan, n=tokens: n)
            found = {
                exact_recipes(
                    replace(
                        plan, options=replace(plan.options, compute=replace(compute, threads=n))
                    ),
                    has_gpu=False,
                )
                for n in (1, 64)
            }
            assert len(found) == 1


@pytest.mark.parametrize("shape", [WIDE, TinyQwen35Moe()], ids=["qwen3", "qwen3.5"])
def test_zeros_of_the_source_are_no_violation(
    shape: TinyQwen3Moe | TinyQwen35Moe, tmp_path: Path
) -> None:
    """`build` and `verify` agree: what is zero in the source is right if it is zero in the file."""
    source = shape.write(tmp_path / "tiny")
    tensors = load_file(source / "model.safetensors")
    zeroed = [
        name
        for name in tensors
        if name.endswith(("k_proj.weight", "experts.1.up_proj.weight", "attn.qkv.weight"))
    ]
    assert zeroed
    for name in zeroed:
        tensors[name].zero_()
    for name in tensors:
        if name.endswith("experts.down_proj"):
            tensors[name][2].zero_()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    calibration = CalibrationOptions(str(PROSE), samples=2, max_length=64)
    recipes = ("q4km", "bf16") if shape is WIDE else ("q8_0", "bf16")
    changes: dict[str, Any] = {"recipes": recipes, "calibration": calibration}
    whole = build(source, tmp_path / "out", compression=0.0, **changes)
    assert reap2gguf.verify(whole.gguf_folder, source=source, threads=1).violations == ()
    result = build(source, tmp_path / "out", keep_experts=shape.n_experts - 1, **changes)
    assert result.hf_folder is not None
    assert verify_bundle(result.gguf_folder, 1, Silent()).violations == ()
    assert verify_bundle(result.hf_folder, 1, Silent()).violations == ()
    found = load_file(result.hf_folder / "model.safetensors")
    assert not any(torch.any(found[name]) for name in zeroed if ".experts." not in name)
