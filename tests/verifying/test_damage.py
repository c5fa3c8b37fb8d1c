"""Ten kinds of damage to a finished bundle, each found and named.

Hashes are mended after the damage (but where the hash is the damage), so that what finds it is the
check of contents.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from reap2gguf.bundle.layout import MANIFEST_FILE, SUMS_FILE
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.bundle.sums import hash_folder, write_sums
from reap2gguf.cli import cli
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.progress import Silent
from reap2gguf.verifying.bundle import verify_bundle, verify_pair, verify_paths
from tests.conftest import Bundle


def fix_hashes(bundle: Bundle) -> None:
    """Make every recorded hash fit the damaged files."""
    manifest = Manifest.load(bundle.gguf)
    files = hash_folder(bundle.hf, 1)
    del files[MANIFEST_FILE]
    manifest = replace(manifest, hf=replace(manifest.hf, files=files))
    manifest.save(bundle.hf)
    manifest.save(bundle.gguf)
    write_sums(bundle.gguf, 1)


def change_weights(bundle: Bundle, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = bundle.hf / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def gguf(bundle: Bundle, label: str = "BF16") -> Path:
    return bundle.gguf / f"example-{label}.gguf"


def change_gguf(path: Path, name: str, change: Callable[[np.ndarray], None]) -> None:
    """Change the rows of one tensor in place."""
    header = read_gguf_header(path)
    rows = header.read(name)
    change(rows)
    with path.open("r+b") as file:
        file.seek(header.tensors[name].offset)
        file.write(rows.tobytes())


def swap_rows(rows: np.ndarray) -> None:
    """Exchange experts 2 and 5 of 12, as (rows, bytes)."""
    experts = rows.reshape(12, -1)
    experts[[2, 5]] = experts[[5, 2]]


def an_expert_missing(bundle: Bundle) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.2.mlp.experts.7.up_proj.weight"]

    change_weights(bundle, change)


def a_router_row_too_many(bundle: Bundle) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        router = tensors["model.layers.1.mlp.gate.weight"]
        tensors["model.layers.1.mlp.gate.weight"] = torch.cat((router, router[:1]))

    change_weights(bundle, change)


def a_config_count_off_by_one(bundle: Bundle) -> None:
    path = bundle.hf / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_experts": 13}))


def two_experts_swapped_in_safetensors(bundle: Bundle) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        first, second = (
            f"model.layers.0.mlp.experts.{expert}.down_proj.weight" for expert in (2, 5)
        )
        tensors[first], tensors[second] = tensors[second], tensors[first]

    change_weights(bundle, change)


def two_experts_swapped_in_gguf(bundle: Bundle) -> None:
    change_gguf(gguf(bundle, "IQ4_K_M"), "blk.3.ffn_down_exps.weight", swap_rows)


def a_tensor_zeroed(bundle: Bundle) -> None:
    change_gguf(gguf(bundle, "IQ4_K_M"), "blk.1.attn_q.weight", lambda rows: rows.fill(0))


def a_nan(bundle: Bundle) -> None:
    def change(rows: np.ndarray) -> None:
        rows[3].view(np.uint16)[9] = 0x7FC0

    change_gguf(gguf(bundle), "blk.2.attn_k.weight", change)


def a_nan_in_safetensors(bundle: Bundle) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.3.self_attn.v_proj.weight"][5, 6] = torch.nan

    change_weights(bundle, change)


def a_truncated_shard(bundle: Bundle) -> None:
    path = bundle.hf / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)


def a_wrong_expert_count(bundle: Bundle) -> None:
    path = gguf(bundle)
    key = b"qwen3moe.expert_count"
    with path.open("r+b") as file:
        position = file.read(2**16).index(key) + len(key) + 4  # past the value type
        file.seek(position)
        file.write((16).to_bytes(4, "little"))


def a_missing_file(bundle: Bundle) -> None:
    (bundle.gguf / "imatrix.dat").unlink()


def a_wrong_hash(bundle: Bundle) -> None:
    path = bundle.gguf / SUMS_FILE
    lines = [
        "0" * 64 + line[64:] if line.endswith("calibration.txt") else line
        for line in path.read_text().splitlines()
    ]
    path.write_text("\n".join(lines) + "\n")


DAMAGE = [
    (an_expert_missing, "layer 2: up of expert 7 is missing"),
    (a_router_row_too_many, "model.layers.1.mlp.gate.weight: shape [13, 256], expected 12"),
    (a_config_count_off_by_one, "expected 13 experts on its first axis, as config.json says"),
    (two_experts_swapped_in_safetensors, "expert 2 differs from model.layers.0.mlp.experts.2."),
    (two_experts_swapped_in_gguf, "it holds the weights of expert 5"),
    (a_tensor_zeroed, "blk.1.attn_q.weight holds only zeros"),
    (a_nan, "blk.2.attn_k.weight holds NaN"),
    (a_nan_in_safetensors, "model.layers.3.self_attn.v_proj.weight holds NaN"),
    (a_truncated_shard, "model.safetensors: truncated"),
    (a_wrong_expert_count, "qwen3moe.expert_count is 16, expected 12"),
    (a_missing_file, "imatrix.dat is missing"),
    (a_wrong_hash, "calibration.txt has a different SHA-256"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "named"), DAMAGE, ids=[d.__name__ for d, _ in DAMAGE])
def test_damage_is_found_and_named(
    damage: Callable[[Bundle], None], named: str, bundle: Bundle
) -> None:
    damage(bundle)
    if damage not in (a_missing_file, a_wrong_hash):
        fix_hashes(bundle)
    result = CliRunner().invoke(cli, ["verify", str(bundle.gguf)])
    assert result.exit_code == 1, result.output
    assert named in result.output
    assert "violation" in result.output.splitlines()[-1]


@pytest.mark.parametrize(
    "damage", [d for d, _ in DAMAGE if d is not a_wrong_hash], ids=lambda d: d.__name__
)
def test_damage_changes_a_hash(damage: Callable[[Bundle], None], bundle: Bundle) -> None:
    damage(bundle)
    violations = verify_bundle(bundle.gguf, 1, Silent()).violations
    assert any("has a different SHA-256" in v or "is missing" in v for v in violations)


def test_the_bundle_as_built_is_sound(built: Bundle) -> None:
    result = CliRunner().invoke(cli, ["verify", str(built.gguf), str(built.hf)])
    assert result.exit_code == 0, result.output
    assert result.output.endswith("OK: example-GGUF, example verified\n")


def test_json(bundle: Bundle) -> None:
    a_missing_file(bundle)
    result = CliRunner().invoke(cli, ["verify", "--json", str(bundle.gguf)])
    assert result.exit_code == 1
    values = json.loads(result.stdout)
    assert values["violations"] == ["example-GGUF: imatrix.dat is missing"]


def test_a_gguf_folder_alone_is_checked_for_values(bundle: Bundle) -> None:
    a_nan(bundle)
    fix_hashes(bundle)
    bundle.hf.rename(bundle.hf.with_name("elsewhere"))
    violations = verify_bundle(bundle.gguf, 2, Silent()).violations
    assert violations == ("example-BF16.gguf: blk.2.attn_k.weight holds NaN or infinite values",)


def test_an_unknown_file_in_the_bundle_is_named(bundle: Bundle) -> None:
    (bundle.gguf / "stale.gguf").write_bytes(b"")
    violations = verify_bundle(bundle.gguf, 1, Silent()).violations
    (violation,) = violations
    assert violation.startswith("example-GGUF: stale.gguf is not part of the bundle; move it away,")
    assert "reap2gguf add" in violation


def test_a_pair_without_manifest(built: Bundle, bundle: Bundle) -> None:
    assert verify_pair(built.hf, [gguf(built)], 2, Silent()).violations == ()
    change_gguf(gguf(bundle), "blk.0.ffn_up_exps.weight", swap_rows)
    (violation,) = verify_pair(built.hf, [gguf(bundle)], 2, Silent()).violations
    assert "blk.0.ffn_up_exps.weight expert 2 differs" in violation


def test_a_gguf_of_the_unpruned_model_is_no_match(built: Bundle) -> None:
    violations = verify_pair(built.source, [gguf(built)], 2, Silent()).violations
    assert any("expert_count is 12, expected 16" in violation for violation in violations)
    assert any("has shape [12, 256, 256], expected [16, 256, 256]" in v for v in violations)


def test_a_type_other_than_planned(bundle: Bundle) -> None:
    manifest = Manifest.load(bundle.gguf)
    record = manifest.gguf[0]
    wanted = replace(record, tensors=dict(record.tensors) | {"blk.0.attn_q.weight": "Q6_K"})
    replace(manifest, gguf=(wanted, *manifest.gguf[1:])).save(bundle.gguf)
    write_sums(bundle.gguf, 1)
    violations = verify_bundle(bundle.gguf, 1, Silent()).violations
    assert any("blk.0.attn_q.weight is Q4_K, expected Q6_K" in v for v in violations)


def test_paths_that_are_neither(built: Bundle, tmp_path: Path) -> None:
    wrong = (["nowhere"], ["nowhere.gguf"], [str(built.hf), "nowhere.gguf"], [str(tmp_path)])
    for arguments in wrong:
        result = CliRunner().invoke(cli, ["verify", *arguments])
        assert result.exit_code == 2
        assert result.output.startswith("Error: ")


def test_a_folder_with_a_broken_manifest(bundle: Bundle) -> None:
    (bundle.gguf / MANIFEST_FILE).write_text('{"format": 1}')
    (violation,) = verify_paths([bundle.gguf], 1, Silent()).violations
    assert "not a complete manifest" in violation


def test_an_unknown_file_beside_the_safetensors_is_named(bundle: Bundle) -> None:
    (bundle.hf / "modeling.py").write_text("")
    violations = verify_bundle(bundle.gguf, 1, Silent()).violations
    assert violations == ("example: modeling.py is not part of the bundle; move it away",)


def test_a_changed_manifest_is_found(bundle: Bundle) -> None:
    (bundle.hf / MANIFEST_FILE).write_text("{}")
    violations = verify_bundle(bundle.gguf, 1, Silent()).violations
    assert any("not a manifest" in violation for violation in violations)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hf": {"folder": "../elsewhere"}}, "not a plain file name"),
        ({"hf": {"folder": 5}}, "folder is 5, expected str"),
        ({"gguf": [{"file": "a/b.gguf"}]}, "not a plain file name"),
        ({"gguf": [{"tensors": {"output_norm.weight": "ZZ"}}]}, "unknown tensor type"),
        ({"gguf": [{"tensors": [1]}]}, "not a complete manifest"),
    ],
)
def test_a_manifest_that_cannot_be_true(change: dict[str, Any], named: str, bundle: Bundle) -> None:
    path = bundle.gguf / MANIFEST_FILE
    values = json.loads(path.read_text())
    for key, part in change.items():
        target = values[key][0] if isinstance(part, list) else values[key]
        target.update(part[0] if isinstance(part, list) else part)
    path.write_text(json.dumps(values))
    (violation,) = verify_bundle(bundle.gguf, 1, Silent()).violations
    assert named in violation


def test_sums_that_are_no_text(bundle: Bundle) -> None:
    (bundle.gguf / SUMS_FILE).write_bytes(b"\xff\xfe\n")
    violations = verify_bundle(bundle.gguf, 1, Silent()).violations
    assert any("line 1 is not a hash and a name" in violation for violation in violations)


def test_a_changed_token_is_found(bundle: Bundle) -> None:
    path = gguf(bundle)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"<|im_start|>", b"<|IM_start|>"))
    fix_hashes(bundle)
    violations = verify_bundle(bundle.gguf, 1, Silent()).violations
    assert any("tokenizer.ggml.tokens differs from the tokenizer" in v for v in violations)
