"""Models that are published in FP8: their values, pruned folders and GGUF files.

In blocks that do not divide the matrices, as those of DeepSeek-V3's `kv_a_proj_with_mqa` do not.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.models.table import describe
from tests.exporting.files import export_files, plain
from tests.families.deepseek import V3
from tests.families.minimax import as_published
from tests.models.converted import contents
from tests.models.oracles import mean_kl, of_llama_cpp, of_transformers, pruned
from tests.quantized import Quantized, as_fp8
from tests.tiny import save_sharded

_V3 = replace(V3, hidden=192, width=136, dense_width=200)
CASES = {
    "MiniMax-M2": (as_published(block=(24, 40)), "block_sparse_moe.gate."),
    "DeepSeek-V3": (as_fp8(_V3, (128, 128)), "mlp.gate."),
}
every_case = pytest.mark.parametrize("name", CASES)


def decoded_folder(source: Path, target: Path) -> Path:
    """The same model with its decoded values, in float32."""
    target.mkdir()
    with Checkpoint.open(source) as opened:
        values = {n: torch.from_numpy(opened.read_float32(n)).contiguous() for n in opened.tensors}
    for file in source.glob("*.json"):
        if "index" not in file.name:
            (target / file.name).write_text(file.read_text())
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    save_sharded(values, target, 1)
    return target


@every_case
def test_values(name: str, tmp_path: Path) -> None:
    """Code times its scale; router, its bias, norms and both ends are not quantized."""
    case, router = CASES[name]
    stored, (rows, columns) = case.tensors(), case.section["weight_block_size"]
    n_ragged = n_decoded = 0
    with Checkpoint.open(case.write(tmp_path / "model")) as opened:
        assert opened.tensors.keys() == case.plain.tensors().keys()
        describe(opened)
        for one in opened.tensors:
            if f"{one}_scale_inv" not in stored:
                left = (router, "bias", "norm", "lm_head", "embed_tokens", "eh_proj")
                assert any(part in one for part in left)
                continue
            codes, scale = stored[one].float(), stored[f"{one}_scale_inv"]
            wide = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            expected = codes * wide[: codes.shape[0], : codes.shape[1]]
            np.testing.assert_array_equal(opened.read_float32(one), expected.numpy())
            n_decoded += 1
            n_ragged += bool(codes.shape[0] % rows or codes.shape[1] % columns)
    assert n_decoded > 50
    assert n_ragged > 50


@every_case
def test_pruned_folders(name: str, tmp_path: Path) -> None:
    """Codes and scales of the experts that remain are the source's, and it opens again."""
    case, _ = CASES[name]
    n_kept = case.plain.n_experts // 2
    ours = pruned(case.write(tmp_path / "model"), tmp_path / "pruned", n_kept)
    stored = case.tensors()
    with Checkpoint.open(ours) as opened:
        model = describe(opened)
        assert opened.stored.config["quantization_config"] == case.section
        assert model.facts.n_experts == n_kept
        files = {one for one in opened.stored.tensors if ".experts." in one}
        kept = {f".experts.{expert}." for expert in range(n_kept)}
        assert files == {one for one in stored if any(part in one for part in kept)}
        assert any(one.endswith("_scale_inv") for one in files)
        for one in files:
            data = stored[one].contiguous().view(torch.uint8).numpy().tobytes()
            assert opened.stored.read(one).tobytes() == data


@every_case
def test_files_are_those_of_the_decoded_values(name: str, tmp_path: Path) -> None:
    """And llama.cpp computes what transformers does with these values."""
    case, _ = CASES[name]
    source = pruned(case.write(tmp_path / "model"), tmp_path / "pruned", case.plain.n_experts // 2)
    decoded = decoded_folder(source, tmp_path / "decoded")
    kinds = [plain(kind) for kind in ("F32", "BF16", "Q8_0")]
    found = []
    for folder in (source, decoded):
        (target := tmp_path / f"of {folder.name}").mkdir()
        files = export_files(folder, target, kinds)
        found.append({kind: contents(path)["tensors"] for kind, path in files.items()})
    assert found[0] == found[1]
    vocab = case.plain.vocab
    theirs = of_transformers(decoded, vocab)
    assert mean_kl(theirs, of_llama_cpp(source, tmp_path, vocab)) < 1e-6


def test_transformers_loads_a_pruned_minimax(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks that divide the matrices: it refuses others. Experts have the same bfloat16."""
    quantizer = transformers.quantizers.quantizer_finegrained_fp8
    monkeypatch.setattr(quantizer, "is_accelerate_available", lambda: True)  # it needs none of it
    case: Quantized = as_published(block=(16, 32))
    ours = pruned(case.write(tmp_path / "model"), tmp_path / "pruned", n_kept=4)
    theirs, said = transformers.AutoModelForCausalLM.from_pretrained(
        ours, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(said.values())
    with Checkpoint.open(ours) as opened:
        rounded = opened.dequantized()
        for expert in range(4):
            stored = rounded.read(f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight")
            fused = theirs.state_dict()["model.layers.1.mlp.experts.down_proj"][expert]
            np.testing.assert_array_equal(stored.view(np.int16), fused.view(torch.int16).numpy())
