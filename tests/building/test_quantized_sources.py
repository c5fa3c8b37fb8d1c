"""Whole builds of quantized checkpoints, from observing to verifying.

What is observed and exported is compared with builds of the decoded values in F32; what is pruned
with the source's own bytes, and with what transformers loads of the pruned folder.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from reap2gguf.api.builds import verify
from reap2gguf.api.evaluating import evaluate
from reap2gguf.building.pipeline import BuildResult
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.comparing.contents import contents_of_checkpoint
from reap2gguf.evaluating.options import EvaluateOptions
from reap2gguf.models.loading import load_whole
from reap2gguf.models.table import describe
from reap2gguf.options import ComputeOptions
from tests.building.builds import PROSE, build
from tests.families.deepseek import KIMI_K2, V3
from tests.families.qwen_vl import TinyQwen3Vl
from tests.models.converted import contents
from tests.models.converted_quantized import CASES
from tests.quantized import Quantized, as_compressed_fp8, as_fp8, as_mxfp4, as_packed
from tests.tiny import TinyQwen3Moe, save_sharded

LEFT = ("model.layers.0.mlp.experts.5.up_proj", "model.layers.1.mlp.experts.2.")
# as published: eight groups of experts, of which four are chosen
R1 = replace(V3, mtp=False, n_experts=32, n_groups=8, groups_per_token=4, top_k=8)
_EXPERTS_ONLY = [
    "lm_head",
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
]
THINKING = as_packed(replace(KIMI_K2, width=32), 32, only=".mlp.experts.")
THINKING = replace(THINKING, section={**THINKING.section, "ignore": _EXPERTS_ONLY})
BUILT = CASES | {
    "DeepSeek-R1": as_fp8(R1, (48, 40)),
    "Kimi-K2-Thinking": THINKING,
    "some experts not quantized": as_fp8(TinyQwen3Moe(n_shards=2), (16, 16), *LEFT),
    "fused": as_fp8(TinyQwen3Moe(fused=True), (16, 16)),
    "MXFP4": as_mxfp4(TinyQwen3Vl(width=96, vision=False)),
}


def plain_folder(folder: Path, case: Quantized, target: Path) -> Path:
    """The same model with its decoded values in F32, which nothing has to decode."""
    case.plain.write(target)
    with Checkpoint.open(folder) as opened:
        values = {name: torch.from_numpy(opened.read_float32(name)) for name in opened.tensors}
        names, plain = case_names(case), case.plain.tensors()
        rounded = {
            name: value if name in names else value.to(plain[name].dtype)
            for name, value in values.items()
        }
    save_sharded({name: value.contiguous() for name, value in rounded.items()}, target, 1)
    return target


def case_names(case: Quantized) -> set[str]:
    """The weights that are quantized."""
    stored = case.tensors().keys()
    return case.plain.tensors().keys() - stored | {
        name.removesuffix(suffix)
        for name in stored
        for suffix in ("_scale_inv", "_scale")
        if name.endswith(suffix)
    }


def stored_bytes(folder: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            found[name] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return found


def made(case: Quantized, root: Path, **changes: Any) -> tuple[Path, BuildResult]:
    folder = case.write(root / "source")
    how = {"recipes": ("q4km", "bf16"), "name": "model", "compression": 0.5} | changes
    return folder, build(folder, root / "out", **how)


@pytest.mark.parametrize("name", BUILT)
def test_builds(name: str, tmp_path: Path) -> None:
    case = BUILT[name]
    folder, result = made(case, tmp_path)
    assert result.hf_folder is not None
    kept = Manifest.load(result.hf_folder).pruning.kept
    with Checkpoint.open(folder) as source, Checkpoint.open(result.hf_folder) as pruned:
        model = describe(source)
        ours, theirs = stored_bytes(result.hf_folder), stored_bytes(folder)
        n_experts, n_groups = model.facts.n_experts, model.facts.n_groups
        for experts in kept.values():
            of_groups = Counter(expert * n_groups // n_experts for expert in experts)
            assert of_groups == dict.fromkeys(range(n_groups), len(experts) // n_groups)
        seen = 0
        for stored, data in theirs.items():
            role = model.role(source.weight_name(stored))
            layer, expert = role.layer, getattr(role, "expert", None)
            if expert is not None:
                if expert in kept[layer]:
                    new = kept[layer].index(expert)
                    renamed = stored.replace(f"experts.{expert}.", f"experts.{new}.")
                    assert ours.pop(renamed) == data
                    seen += 1
            elif layer in kept and len(ours[stored]) < len(data):
                entries = np.frombuffer(data, np.uint8).reshape(n_experts, -1)
                assert ours.pop(stored) == entries[list(kept[layer])].tobytes()
                seen += 1
            else:
                assert ours.pop(stored) == data
        assert not ours
        assert seen
        assert pruned.n_bytes == Manifest.load(result.hf_folder).hf.n_bytes  # type: ignore[union-attr]
        said = pruned.stored.config["quantization_config"]
        expected = dict(case.section)
        if name == "some experts not quantized":
            expected["modules_to_not_convert"] = said["modules_to_not_convert"]
        assert said == expected
    for source_folder in (None, folder):
        assert verify(result.gguf_folder, source=source_folder).violations == ()
        report = verify(result.hf_folder, source=source_folder)
        assert report.violations == ()
    assert {
        str(report.levels[f"model/{file.name}"]) for file in result.hf_folder.glob("*.safe*")
    } == {"exact"}


@pytest.mark.parametrize(
    "name", ["Qwen3-30B-A3B-FP8", "W4A16", "MXFP4", "DeepSeek-R1", "Kimi-K2-Thinking"]
)
def test_they_are_built_as_their_decoded_values_are(name: str, tmp_path: Path) -> None:
    case = BUILT[name]
    folder, result = made(case, tmp_path / "quantized")
    decoded = plain_folder(folder, case, tmp_path / "decoded")
    how: dict[str, Any] = {"recipes": ("q4km", "bf16"), "name": "model", "compression": 0.5}
    other = build(decoded, tmp_path / "out", **how)
    ours, theirs = (Manifest.load(one.gguf_folder) for one in (result, other))
    assert ours.pruning.kept == theirs.pruning.kept
    for file in ("imatrix.dat", "observations.safetensors"):
        pair = [(one.gguf_folder / file) for one in (result, other)]
        if file == "imatrix.dat":
            assert pair[0].read_bytes() == pair[1].read_bytes()
        else:
            first, second = map(load_file, pair)
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first)
    for record in ours.gguf:
        files = [contents(one.gguf_folder / record.file) for one in (result, other)]
        # experts in MXFP4 stay as they are stored (tests/models/test_gpt_oss.py)
        copied = {n for n, one in files[0]["tensors"].items() if one[0] == "MXFP4"}
        assert bool(copied) is (name == "MXFP4")
        assert all("_exps.weight" in one for one in copied)
        ours_and_theirs = [
            {n: one for n, one in file["tensors"].items() if n not in copied} for file in files
        ]
        assert ours_and_theirs[0] == ours_and_theirs[1]


@pytest.mark.parametrize(
    "case",
    [
        as_fp8(TinyQwen3Moe(), (16, 16)),
        as_packed(TinyQwen3Moe()),
        as_compressed_fp8(TinyQwen3Moe()),
        as_fp8(R1, (8, 8), "kv_b_proj"),
        THINKING,
    ],
    ids=["FP8", "int4", "FP8 of compressed-tensors", "DeepSeek-R1", "Kimi-K2-Thinking"],
)
def test_transformers_loads_both(
    case: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Source and pruned folder, in which it decodes the same experts to the same bfloat16."""
    quantizer = transformers.quantizers.quantizer_finegrained_fp8
    monkeypatch.setattr(quantizer, "is_accelerate_available", lambda: True)  # it needs none of it
    folder, result = made(case, tmp_path)
    assert result.hf_folder is not None
    for one in (folder, result.hf_folder):
        model, said = load_whole(one, dtype=torch.bfloat16, output_loading_info=True)
        assert not any(said.values())
        weights = model.state_dict()
        with Checkpoint.open(one) as opened:
            rounded, facts = opened.dequantized(), describe(opened).facts
            for layer in facts.moe_layers:
                at = f"model.layers.{layer}.mlp.experts."
                for expert in range(facts.n_experts):
                    for projection, first in (("gate", 0), ("up", facts.expert_width)):
                        found = rounded.read(f"{at}{expert}.{projection}_proj.weight")
                        fused = weights[f"{at}gate_up_proj"][expert]
                        theirs = fused[first : first + facts.expert_width].view(torch.int16)
                        np.testing.assert_array_equal(found.view(np.int16), theirs.numpy())
                    found = rounded.read(f"{at}{expert}.down_proj.weight")
                    theirs = weights[f"{at}down_proj"][expert].view(torch.int16)
                    np.testing.assert_array_equal(found.view(np.int16), theirs.numpy())


def test_evaluation(tmp_path: Path) -> None:
    """A source in FP8 and its pruned folder have the perplexities of their decoded values."""
    case = BUILT["Qwen3-30B-A3B-FP8"]
    folder, result = made(case, tmp_path / "quantized", recipes=("bf16",))
    assert result.hf_folder is not None
    pairs = []
    for number, one in enumerate((folder, result.hf_folder)):
        with Checkpoint.open(one) as opened:
            values = {n: torch.from_numpy(opened.read_float32(n)) for n in opened.tensors}
            bits = 8 * opened.n_bytes / opened.n_parameters
            assert 8 < bits < 16
        plain = tmp_path / str(number)
        shutil.copytree(
            one, plain, ignore=shutil.ignore_patterns("*.safetensors", "reap2gguf.json")
        )
        config = json.loads((plain / "config.json").read_text())
        del config["quantization_config"]
        (plain / "config.json").write_text(json.dumps(config))
        save_sharded(values, plain, 1)
        pairs.append((plain, bits))
    options = EvaluateOptions(str(PROSE), chunk=64, chunks=2)
    compute = ComputeOptions(device="cpu")
    found = evaluate(folder, result.hf_folder, options=options, compute=compute)
    expected = evaluate(*(plain for plain, _ in pairs), options=options, compute=compute)
    for ours, theirs, (_, bits) in zip(found.variants, expected.variants, pairs, strict=True):
        assert ours.perplexity == theirs.perplexity
        assert ours.bits_per_weight == pytest.approx(bits)
    assert [one.divergence for one in found.comparisons] == [
        one.divergence for one in expected.comparisons
    ]


def test_contents(tmp_path: Path) -> None:
    """`compare` counts the bytes that are stored, scales included."""
    for name, kind in (("Qwen3-30B-A3B-FP8", "F8_E4M3"), ("W4A16", "INT4"), ("MXFP4", "MXFP4")):
        with Checkpoint.open(BUILT[name].write(tmp_path / name)) as opened:
            found = contents_of_checkpoint(opened, describe(opened))
            assert kind in found.total.types
            assert opened.n_bytes - 64 <= found.total.n_bytes <= opened.n_bytes


def test_names_in_the_config(tmp_path: Path) -> None:
    """`modules_to_not_convert` names the experts that remain by their new numbers."""
    case = BUILT["some experts not quantized"]
    _, result = made(case, tmp_path)
    assert result.hf_folder is not None
    kept = Manifest.load(result.hf_folder).pruning.kept
    said = json.loads((result.hf_folder / "config.json").read_text())["quantization_config"]
    expected = ["lm_head"]
    if 2 in kept[1]:
        expected.insert(0, f"model.layers.1.mlp.experts.{kept[1].index(2)}.")
    if 5 in kept[0]:
        expected.insert(0, f"model.layers.0.mlp.experts.{kept[0].index(5)}.up_proj")
    assert said["modules_to_not_convert"] == expected
    with Checkpoint.open(result.hf_folder) as opened:
        plain = [n for n, one in opened.tensors.items() if ".experts." in n and one.dtype == "BF16"]
        at = [entry for entry in expected if "experts" in entry]
        assert all(any(name.startswith(one) for one in at) for name in plain)
        assert len(plain) == sum(3 if one.endswith(".") else 1 for one in at)
