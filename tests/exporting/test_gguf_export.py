from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from reap2gguf.errors import ArtifactError, CheckpointError, OutputError
from reap2gguf.gguf_files.imatrix import Imatrix, load_imatrix
from reap2gguf.quantizing.recipe import Recipe, load_recipe, shipped_recipes
from tests.exporting.files import export_files, gguf_tensors, left, plain, random_imatrix, stored
from tests.tiny import ONE_THREAD, REPOSITORY, TinyQwen3Moe

DATA = REPOSITORY / "tests" / "data"
CONVERTED = json.loads((DATA / "tiny-qwen3-moe.gguf.json").read_text())
TEXTS = (
    "The quick brown fox, 12345 times; it's DON'T or we'll see...\n\n\tdef f(x):\r\n    return x",
    "Grüße aus Köln, à bientôt, señor! Zażółć gęślą jaźń.",
    "Съешь ещё этих мягких французских булок 世界你好,今日はいい天気ですね。안녕하세요",
    "مرحبا بالعالم שלום עולם हिन्दी में नमस्ते ไทย",
    "🙂👩‍👩‍👧‍👦 ∑∫√ ½ ²  \u00a0 \u2003 trailing   ",
)


def expected_tensors(name: str) -> dict[str, tuple[str, str]]:
    found = CONVERTED["BF16"]["tensors"] | CONVERTED[name]["tensors"]
    return {tensor: tuple(entry) for tensor, entry in found.items()}


def summary(value: Any) -> Any:
    """A long list or text as its length and hash, as the data file gives them."""
    if isinstance(value, list) and len(value) > 16:
        text = json.dumps(value, ensure_ascii=False)
        return {"length": len(value), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return value


def metadata(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def recipe_named(name: str) -> Recipe:
    return load_recipe(name) if name in shipped_recipes() else plain(name)


@pytest.fixture(scope="module")
def imatrix(wide: Path) -> Imatrix:
    return random_imatrix(gguf_tensors(wide))


@pytest.fixture(scope="module")
def files(example: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The example in every file type that llama.cpp's own tools made for the data file."""
    imatrix = load_imatrix(DATA / "tiny-qwen3-moe.imatrix.gguf")
    recipes = [recipe_named(name) for name in CONVERTED]
    return export_files(example, tmp_path_factory.mktemp("files"), recipes, imatrix)


@pytest.fixture(scope="module")
def llama(files: dict[str, Path]) -> Iterator[llama_cpp.Llama]:
    loaded = llama_cpp.Llama(
        str(files["BF16"]), n_ctx=256, logits_all=True, verbose=False, **ONE_THREAD
    )
    yield loaded
    loaded.close()


@pytest.mark.parametrize("name", CONVERTED)
def test_the_example_is_what_llama_cpp_makes_of_it(files: dict[str, Path], name: str) -> None:
    found = {
        tensor: (kind, hashlib.sha256(raw).hexdigest())
        for tensor, (kind, raw) in stored(files[name]).items()
    }
    assert found == expected_tensors(name)


def test_the_bf16_header_is_the_converters(files: dict[str, Path]) -> None:
    expected = CONVERTED["BF16"]["metadata"]
    found = {key: summary(value) for key, value in metadata(files["BF16"]).items()}
    assert {key: found.get(key) for key in expected} == expected
    own = {key for key in found.keys() - expected.keys() if not key.startswith("GGUF.")}
    # the converter was given no card
    card = {"general.license", "general.languages", "general.tags"}
    assert own == {"general.name", "reap2gguf.recipe", *card}
    assert [found[key] for key in sorted(card)] == [
        ["en"],
        "apache-2.0",
        ["moe", "tiny", "text-generation"],
    ]


@pytest.mark.parametrize("name", [name for name in CONVERTED if name != "BF16"])
def test_a_quantized_header_says_file_type_and_imatrix(files: dict[str, Path], name: str) -> None:
    found = metadata(files[name])
    assert found["general.file_type"] == CONVERTED[name]["file_type"]
    assert found["general.quantization_version"] == 2
    imatrix = {key: value for key, value in found.items() if key.startswith("quantize.imatrix.")}
    # Q8_0 is quantized without importance
    assert (
        imatrix == {}
        if name == "Q8_0"
        else {
            "quantize.imatrix.file": "imatrix.gguf",
            "quantize.imatrix.dataset": "calib.txt",
            "quantize.imatrix.entries_count": 32,
            "quantize.imatrix.chunks_count": 241,
        }
    )


@pytest.mark.parametrize(
    ("name", "limit"), [("BF16", 0.0), ("Q8_0", 0.01), ("Q4_K_M", 0.12), ("IQ4_XS", 0.12)]
)
def test_gguf_py_dequantizes_the_files_close_to_the_checkpoint(
    files: dict[str, Path], example: Path, name: str, limit: float
) -> None:
    shards = [load_file(path) for path in example.glob("*.safetensors")]
    source = {key: value.float().numpy() for shard in shards for key, value in shard.items()}
    down = [source[f"model.layers.1.mlp.experts.{e}.down_proj.weight"] for e in range(16)]
    expected = {
        "blk.1.ffn_down_exps.weight": np.stack(down),
        "blk.2.attn_q.weight": source["model.layers.2.self_attn.q_proj.weight"],
        "blk.3.ffn_gate_inp.weight": source["model.layers.3.mlp.gate.weight"],
        "token_embd.weight": source["model.embed_tokens.weight"],
    }
    found = {tensor.name: tensor for tensor in GGUFReader(files[name]).tensors}
    for tensor, values in expected.items():
        back = quants.dequantize(found[tensor].data, found[tensor].tensor_type)
        assert back.shape == values.shape
        assert np.linalg.norm(back - values) <= limit * np.linalg.norm(values)


@pytest.mark.parametrize("text", TEXTS)
def test_llama_cpp_tokenizes_as_transformers_does(
    llama: llama_cpp.Llama, example: Path, text: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(example)
    chat = f"<|im_start|>user\n{text}<|im_end|>"
    for special, sample in ((False, text), (True, chat)):
        found = llama.tokenize(sample.encode(), add_bos=False, special=special)
        assert found == tokenizer(sample, add_special_tokens=False)["input_ids"]


def test_llama_cpp_predicts_as_transformers_does(llama: llama_cpp.Llama, example: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(example, dtype=torch.float32)
    tokens = llama.tokenize(b"The following function returns the name of the file", add_bos=False)
    llama.reset()
    llama.eval(tokens)
    found = torch.from_numpy(llama.scores[: len(tokens)].copy()).log_softmax(-1)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    assert (
        torch.nn.functional.kl_div(found, expected, log_target=True, reduction="batchmean") < 0.01
    )


@pytest.mark.parametrize("name", ["unsloth-iq4km", "IQ4_XS"])
def test_llama_cpp_generates_from_a_quantized_file(files: dict[str, Path], name: str) -> None:
    llama = llama_cpp.Llama(str(files[name]), n_ctx=128, verbose=False, **ONE_THREAD)
    try:
        answer = llama("The following options are", max_tokens=12, temperature=0)
    finally:
        llama.close()
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["choices"][0]["text"].strip()


def test_2d_and_3d_storage_give_the_same_files(tmp_path: Path) -> None:
    shape = TinyQwen3Moe(dense_layers=(0,))
    paths = []
    for fused in (False, True):
        folder = tmp_path / f"fused-{fused}"
        replace(shape, fused=fused).write(folder / "model")
        paths.append(export_files(folder / "model", folder, [plain("Q4_K_M"), plain("BF16")]))
    for name in ("Q4_K_M", "BF16"):
        assert paths[0][name].read_bytes() == paths[1][name].read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_source_types_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = TinyQwen3Moe(dtype=dtype).write(tmp_path / "model")
    raw = stored(export_files(folder, tmp_path, [plain("F32")])["F32"])["blk.1.attn_k.weight"][1]
    weight = load_file(folder / "model.safetensors")["model.layers.1.self_attn.k_proj.weight"]
    assert raw == weight.float().numpy().tobytes()


def test_an_imatrix_of_another_expert_count_is_refused(tmp_path: Path) -> None:
    folder = TinyQwen3Moe(n_experts=6).write(tmp_path / "model")
    other = TinyQwen3Moe(n_experts=8).write(tmp_path / "other")
    imatrix = random_imatrix(gguf_tensors(other))
    message = r"imatrix: blk\.0\.ffn_gate_exps\.weight has 512 values, expected 6 x 64"
    with pytest.raises(ArtifactError, match=message):
        export_files(folder, tmp_path, [plain("Q4_K_M")], imatrix)
    assert left(tmp_path) == []


@pytest.mark.parametrize("keep", [0, 5])
def test_a_missing_imatrix_entry_is_refused_before_any_work(
    wide: Path, imatrix: Imatrix, tmp_path: Path, keep: int
) -> None:
    entries = dict(list(imatrix.entries.items())[:keep])
    part = replace(imatrix, entries=entries) if keep else None
    (tmp_path / "IQ2_XS.gguf").write_text("an earlier file")
    with pytest.raises(ArtifactError, match=r"no entry for blk\.\d\.\w+\.weight, but IQ2"):
        export_files(wide, tmp_path, [plain("Q8_0"), plain("IQ2_XS")], part)
    assert left(tmp_path) == ["IQ2_XS.gguf"]
    assert (tmp_path / "IQ2_XS.gguf").read_text() == "an earlier file"


@pytest.mark.parametrize("keep", [0, 5])
def test_q2_k_s_without_importance_is_refused_before_any_work(
    wide: Path, imatrix: Imatrix, tmp_path: Path, keep: int
) -> None:
    entries = dict(list(imatrix.entries.items())[:keep])
    part = replace(imatrix, entries=entries) if keep else None
    message = r"no entry for blk\.\d\.\w+\.weight, but Q2_K in a file of type Q2_K_S needs one"
    with pytest.raises(ArtifactError, match=message):
        export_files(wide, tmp_path, [plain("Q2_K"), plain("Q2_K_S")], part)
    assert left(tmp_path) == []


def test_a_header_has_no_imatrix_that_weighted_nothing(
    wide: Path, imatrix: Imatrix, tmp_path: Path
) -> None:
    made = export_files(wide, tmp_path, [plain("MXFP4_MOE"), plain("Q4_1")], imatrix)
    keys = {
        name: [one for one in metadata(file) if "imatrix" in one] for name, file in made.items()
    }
    assert "imatrix" not in keys["MXFP4_MOE"]
    assert "quantize.imatrix.entries_count" in keys["Q4_1"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.experts.7.up_proj.weight"]
)
def test_a_source_that_is_not_finite_is_refused(tmp_path: Path, name: str, value: float) -> None:
    folder = damaged(tmp_path, name, value)
    with pytest.raises(CheckpointError, match=f"'{name}' holds NaN or infinite values"):
        export_files(folder, tmp_path, [plain("Q4_K_M"), plain("BF16")])
    assert left(tmp_path) == []


@pytest.mark.parametrize(("file_type", "value"), [("F16", 1e6), ("Q8_0", 1e8), ("Q4_0", 1e8)])
def test_a_value_beyond_the_types_range_is_refused(
    tmp_path: Path, file_type: str, value: float
) -> None:
    folder = damaged(tmp_path, "model.layers.0.self_attn.q_proj.weight", value)
    with pytest.raises(CheckpointError, match=r"q_proj"):
        export_files(folder, tmp_path, [plain(file_type)])
    assert left(tmp_path) == []


def test_a_full_disk_is_reported_before_the_work(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OutputError, match=r"no room for [\d,]+ bytes \(No space left on device\)"):
        export_files(tiny, tmp_path, [plain("Q8_0")])
    assert left(tmp_path) == []


def test_a_disk_that_fills_during_the_work_is_reported(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def pwrite(descriptor: int, data: memoryview, position: int) -> int:
        written.append(len(data))
        if len(written) == 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(data)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OutputError, match="No space left on device"):
        export_files(tiny, tmp_path, [plain("Q8_0")])
    assert left(tmp_path) == []


def test_a_disk_that_fails_at_the_end_is_reported(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputError, match="Input/output error"):
        export_files(tiny, tmp_path, [plain("Q8_0")])
    assert left(tmp_path) == []


def test_short_writes_are_continued(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = export_files(tiny, tmp_path, [plain("Q8_0")])["Q8_0"].read_bytes()
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:100_003], at))
    assert export_files(tiny, tmp_path, [plain("Q8_0")])["Q8_0"].read_bytes() == expected


def test_tensors_are_aligned_and_the_file_ends_with_them(tiny: Path, tmp_path: Path) -> None:
    path = export_files(tiny, tmp_path, [plain("Q4_K_M")])["Q4_K_M"]
    tensors = GGUFReader(path).tensors
    assert all(tensor.data_offset % 32 == 0 for tensor in tensors)
    last = max(tensors, key=lambda tensor: tensor.data_offset)
    assert path.stat().st_size == -(-(last.data_offset + last.n_bytes) // 32) * 32
    kinds = {tensor.tensor_type for tensor in tensors}
    assert GGMLQuantizationType.Q5_0 in kinds


def damaged(folder: Path, name: str, value: float) -> Path:
    """A tiny checkpoint with one value replaced."""
    model = TinyQwen3Moe().write(folder / "model")
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model
