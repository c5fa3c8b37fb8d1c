"""Small real files to start from: `python tests/fuzz/seeds.py FOLDER` writes a folder a target."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from safetensors.numpy import save_file

from reap2gguf.gguf_files.imatrix import Imatrix, ImatrixEntry, save_dat, save_gguf


def write_seeds(folder: Path) -> None:
    """Files of each format that its own library wrote."""
    for name in ("safetensors", "gguf", "imatrix-gguf", "imatrix-dat"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    _write_safetensors(folder / "safetensors")
    _write_gguf(folder / "gguf")
    for n_experts in (1, 3):
        imatrix = _imatrix(n_experts)
        save_gguf(imatrix, folder / "imatrix-gguf" / f"seed-{n_experts}")
        save_dat(imatrix, folder / "imatrix-dat" / f"seed-{n_experts}")


def _write_safetensors(folder: Path) -> None:
    tensors = {
        "a.weight": np.ones((2, 3), np.float16),
        "b.weight": np.zeros((0, 4), np.int64),
        "c": np.array(1.5, np.float32),
        "d": np.ones(3, np.bool_),
    }
    save_file(tensors, folder / "seed-many", {"format": "pt"})
    save_file({"w": np.ones(2, np.float32)}, folder / "seed-one")
    save_file({}, folder / "seed-empty")


def _write_gguf(folder: Path) -> None:
    writer = GGUFWriter(folder / "seed-keys", "qwen3moe")
    for kind in GGUFValueType:
        if kind is GGUFValueType.STRING:
            writer.add_key_value("text", "größe", kind)
            writer.add_key_value("texts", ["a", "ü", ""], GGUFValueType.ARRAY, kind)
        elif kind is not GGUFValueType.ARRAY:
            writer.add_key_value(f"one.{kind.name}", 1, kind)
            writer.add_key_value(f"many.{kind.name}", [1, 0], GGUFValueType.ARRAY, kind)
    writer.add_custom_alignment(32)
    _finish(writer)
    writer = GGUFWriter(folder / "seed-tensors", "qwen3moe")
    raw = np.zeros((2, 34), np.uint8)
    writer.add_tensor("q", raw, raw_shape=raw.shape, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("f", np.ones((2, 3), np.float32))
    writer.add_tensor("i", np.ones(1, np.int8))
    _finish(writer)


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _imatrix(n_experts: int) -> Imatrix:
    sums = np.arange(n_experts * 3, dtype=np.float32).reshape(n_experts, 3)
    counts = np.arange(n_experts, dtype=np.int64) * 40 + 1
    names = [f"blk.0.{part}.weight" for part in ("attn_q", "ffn_up_exps")]
    return Imatrix({n: ImatrixEntry(n, sums, counts) for n in names}, "text.txt", 2, 32)


if __name__ == "__main__":
    write_seeds(Path(sys.argv[1]))
