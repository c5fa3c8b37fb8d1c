"""What llama.cpp's own converter decodes the quantized variants to, recorded.

    python -m tests.models.converted_quantized LLAMA_CPP_FOLDER

writes tests/data/converted_quantized.json: hashes of all tensors of each variant's file in F32. The
tests compare what this program writes with it, and need no source of llama.cpp.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.families.deepseek import KIMI_K2, V3
from tests.families.glm import TinyGlm4Moe
from tests.families.gpt_oss import TINY as GPT_OSS
from tests.families.minimax import as_published
from tests.models.converted import convert
from tests.quantized import Quantized, as_compressed_fp8, as_fp8, as_mxfp4, as_packed
from tests.tiny import REPOSITORY, TinyQwen3Moe

FILE = REPOSITORY / "tests" / "data" / "converted_quantized.json"
# as the converter's transformers knows it, without the model's own code
_KIMI = replace(KIMI_K2, width=32, model_type="deepseek_v3")
CASES: dict[str, Quantized] = {
    "Qwen3-30B-A3B-FP8": as_fp8(TinyQwen3Moe(), (16, 16)),
    # ragged edges, which the published checkpoint has in `kv_a_proj_with_mqa`
    "DeepSeek-V3": as_fp8(V3, (48, 40)),
    "MiniMax-M2": as_published(block=(24, 40)),
    "GLM-4.5-Air-FP8": as_compressed_fp8(TinyGlm4Moe(width=40), "channel"),
    "Kimi-K2-Thinking": as_packed(_KIMI, 32, only=".mlp.experts."),
    "W4A16": as_packed(TinyQwen3Moe(), 16),
    "gpt-oss": as_mxfp4(GPT_OSS),
}


def record(source: Path, case: Quantized) -> dict[str, str]:
    """The hash of every tensor that llama.cpp's converter writes in F32."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, output = case.write(Path(scratch) / "model"), Path(scratch) / "F32.gguf"
        found = convert(source, folder, "ALL_F32", output, case.config()["architectures"][0])
    return {name: tensor[2] for name, tensor in found["tensors"].items()}


def recorded() -> dict[str, Any]:
    """The records, by case."""
    found: dict[str, Any] = json.loads(FILE.read_text("utf-8"))
    return found


def main() -> None:
    """Record every case."""
    try:
        found = {name: record(Path(sys.argv[1]), case) for name, case in CASES.items()}
    except subprocess.CalledProcessError as error:
        raise SystemExit(error.stderr.decode()[-2000:]) from error
    FILE.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
