"""An image in llama.cpp and in transformers: the projector's output, and the logits after it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
from llama_cpp import mtmd_cpp
from transformers import Qwen2VLImageProcessor

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.exporting.header_facts import HeaderNames
from reap2gguf.exporting.model_files import export_side
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from tests.exporting.files import export_files, plain
from tests.families.qwen_vl import VL, TinyQwen3Vl
from tests.models.oracles import loaded

N_TOKENS = 24  # of the image: a quarter of its patches
HEIGHT, WIDTH = 128, 192  # pixels, so that nothing is resized
WORDS = b"Hello " + mtmd_cpp.mtmd_default_marker() + b" and more"


@dataclass
class Seen:
    """What a program makes of a text with an image in it."""

    embeddings: np.ndarray  # (tokens of the image, widths of all that enters the text model)
    logits: torch.Tensor  # after the last token


def an_image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


class Chunks:
    """The text and the image in llama.cpp."""

    def __init__(self, model: Path, projector: Path) -> None:
        parameters = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(model).encode(), parameters)
        assert self.model is not None
        settings = mtmd_cpp.mtmd_context_params_default()
        settings.use_gpu, settings.warmup, settings.n_threads = False, False, 1
        self.tower = mtmd_cpp.mtmd_init_from_file(str(projector).encode(), self.model, settings)
        assert self.tower is not None
        self.pixels = an_image()
        data = self.pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        image = mtmd_cpp.mtmd_bitmap_init(WIDTH, HEIGHT, data)
        text = mtmd_cpp.mtmd_input_text()
        text.text, text.text_len = WORDS, len(WORDS)
        text.add_special = text.parse_special = True
        self.chunks = mtmd_cpp.mtmd_input_chunks_init()
        images = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(image)
        where = ctypes.byref(text)
        assert mtmd_cpp.mtmd_tokenize(self.tower, self.chunks, where, images, 1) == 0

    def parts(self) -> tuple[list[int], Any, list[int]]:
        """The tokens before the image, the image, and the tokens after it."""
        n_chunks = mtmd_cpp.mtmd_input_chunks_size(self.chunks)
        assert n_chunks == 3
        before, image, after = (
            mtmd_cpp.mtmd_input_chunks_get(self.chunks, i) for i in range(n_chunks)
        )
        return self._tokens(before), image, self._tokens(after)

    @staticmethod
    def _tokens(chunk: Any) -> list[int]:
        count = ctypes.c_size_t()
        found = mtmd_cpp.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
        return [found[i] for i in range(count.value)]

    def seen(self, width: int, vocab: int) -> Seen:
        _, image, _ = self.parts()
        assert mtmd_cpp.mtmd_input_chunk_get_n_tokens(image) == N_TOKENS
        assert mtmd_cpp.mtmd_encode_chunk(self.tower, image) == 0
        output = mtmd_cpp.mtmd_get_output_embd(self.tower)
        embeddings = np.ctypeslib.as_array(output, (N_TOKENS, width)).copy()
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = 128
        settings.n_threads = settings.n_threads_batch = 1
        context = llama_cpp.llama_init_from_model(self.model, settings)
        past = ctypes.byref(ctypes.c_int32(0))
        assert not mtmd_cpp.mtmd_helper_eval_chunks(
            self.tower, context, self.chunks, 0, 0, 128, True, past
        )
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (vocab,))
        found = Seen(embeddings, torch.tensor(logits.copy()))
        llama_cpp.llama_free(context)
        return found

    def close(self) -> None:
        mtmd_cpp.mtmd_input_chunks_free(self.chunks)
        mtmd_cpp.mtmd_free(self.tower)
        llama_cpp.llama_model_free(self.model)


def of_llama_cpp(folder: Path, target: Path, tiny: TinyQwen3Vl) -> tuple[Seen, list[int]]:
    """What llama.cpp makes of it; and the ids of its tokens, those of the image as -1."""
    path = export_files(folder, target, [plain("F32")])["F32"]
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        (side,) = model.side_files(folder, checkpoint.tensors)
        names = HeaderNames("tiny")
        export_side(checkpoint, model, names, target / "mmproj.gguf", side, 2, Silent())
    chunks = Chunks(path, target / "mmproj.gguf")
    before, _, after = chunks.parts()
    width = tiny.hidden * (1 + len(tiny.deepstack))
    try:
        return chunks.seen(width, tiny.vocab), [*before, *[-1] * N_TOKENS, *after]
    finally:
        chunks.close()


def of_transformers(folder: Path, ids: list[int], image_id: int) -> Seen:
    half = [0.5, 0.5, 0.5]
    size = {"shortest_edge": 1024, "longest_edge": 10**7}
    processor = Qwen2VLImageProcessor(patch_size=16, image_mean=half, image_std=half, size=size)
    image = processor(images=[an_image()], return_tensors="pt")
    model = loaded(folder)
    with torch.inference_mode():
        found = model.model.get_image_features(image["pixel_values"], image["image_grid_thw"])
        parts = [found.pooler_output, *found.deepstack_features]
        wide = torch.cat([torch.cat([*part]).view(N_TOKENS, -1) for part in parts], dim=-1)
        rows = torch.tensor([[image_id if index < 0 else index for index in ids]])
        kinds = torch.tensor([[int(index < 0) for index in ids]])
        logits = model(
            input_ids=rows, attention_mask=torch.ones_like(rows), mm_token_type_ids=kinds, **image
        ).logits
    return Seen(wide.numpy(), logits[0, -1])


@pytest.mark.parametrize("deepstack", [(), (0, 2), (2, 0)], ids=str)
def test_an_image_is_seen_as_in_transformers(deepstack: tuple[int, ...], tmp_path: Path) -> None:
    tiny = replace(VL, deepstack=deepstack, dtype=torch.float16)  # as the projector's file has it
    folder = tiny.write(tmp_path / "model")
    ours, ids = of_llama_cpp(folder, tmp_path, tiny)
    theirs = of_transformers(folder, ids, tiny.config()["image_token_id"])
    assert np.abs(theirs.embeddings).max() > 0.1
    np.testing.assert_allclose(ours.embeddings, theirs.embeddings, rtol=0, atol=2e-3)
    expected, found = theirs.logits.double().log_softmax(-1), ours.logits.double().log_softmax(-1)
    assert float((expected.exp() * (expected - found)).sum()) < 1e-5
