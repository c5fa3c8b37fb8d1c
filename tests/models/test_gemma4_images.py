"""An image in llama.cpp and in transformers: what the projector of Gemma-4 gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import Keys
from llama_cpp import mtmd_cpp

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.exporting.header_facts import HeaderNames
from reap2gguf.exporting.model_files import export_side
from reap2gguf.models import gemma_vision
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from tests.exporting.files import export_files, plain
from tests.families.gemma import GEMMA4, TinyGemma4
from tests.models import test_qwen3_vl_images as images
from tests.models.oracles import loaded

PATCH = 4
WIDTH, HEIGHT = 192, 132  # pixels: whole runs of pooled patches, so that nothing is resized
N_TOKENS = WIDTH * HEIGHT // (3 * PATCH) ** 2


def of_llama_cpp(folder: Path, target: Path, tiny: TinyGemma4) -> np.ndarray:
    """What enters the text model for the image, (tokens, H)."""
    path = export_files(folder, target, [plain("F32")])["F32"]
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        (side,) = model.side_files(folder, checkpoint.tensors)
        names = HeaderNames("tiny")
        export_side(checkpoint, model, names, target / "mmproj.gguf", side, 2, Silent())
    chunks = images.Chunks(path, target / "mmproj.gguf")
    try:
        _, image, _ = chunks.parts()
        assert mtmd_cpp.mtmd_input_chunk_get_n_tokens(image) == N_TOKENS
        assert mtmd_cpp.mtmd_encode_chunk(chunks.tower, image) == 0
        output = mtmd_cpp.mtmd_get_output_embd(chunks.tower)
        return np.ctypeslib.as_array(output, (N_TOKENS, tiny.hidden)).copy()
    finally:
        chunks.close()


def of_transformers(folder: Path) -> np.ndarray:
    pixels = torch.from_numpy(images.an_image()).float() / 255
    rows, columns = HEIGHT // PATCH, WIDTH // PATCH
    patches = (
        pixels.view(rows, PATCH, columns, PATCH, 3).transpose(1, 2).reshape(1, -1, PATCH**2 * 3)
    )
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)[None]
    with torch.inference_mode():
        found = loaded(folder).model.get_image_features(patches, places).pooler_output
    return torch.cat([*found]).numpy()


def relative(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("standardize", [False, True])
def test_an_image_is_seen_as_in_transformers(
    standardize: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the precision of F16, in which llama.cpp computes; and not without the key of GELU."""
    monkeypatch.setattr(images, "WIDTH", WIDTH)
    monkeypatch.setattr(images, "HEIGHT", HEIGHT)
    tiny = replace(GEMMA4, dtype=torch.float16, standardize=standardize)  # as the file has it
    folder = tiny.write(tmp_path / "model")
    theirs = of_transformers(folder)
    assert relative(of_llama_cpp(folder, tmp_path, tiny), theirs) < 2e-3
    header = gemma_vision._header

    def without(*arguments: Any) -> Any:
        return tuple(one for one in header(*arguments) if one.key != Keys.ClipVision.USE_GELU)

    monkeypatch.setattr(gemma_vision, "_header", without)
    assert relative(of_llama_cpp(folder, tmp_path, tiny), theirs) > 4e-3
