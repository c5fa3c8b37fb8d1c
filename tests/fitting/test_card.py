"""What is counted for a context, compared with the buffers that llama.cpp allocates and reports."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from reap2gguf.fitting.card import RESERVE, card_use
from tests.exporting.files import export_files, plain
from tests.families.glm import TinyGlm4Moe
from tests.families.kimi_linear import TinyKimiLinear
from tests.families.lfm2 import TinyLfm2Moe
from tests.families.mixtral import TinyMixtral
from tests.families.mla import TinyMla
from tests.families.nemotron import TinyNemotronH
from tests.families.qwen3_next import TinyQwen3Next
from tests.models.oracles import planned
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

MODELS: dict[str, Any] = {
    "qwen3": TinyQwen3Moe(),
    "qwen3.5": TinyQwen35Moe(),
    "qwen3-next": TinyQwen3Next(),
    "glm4": TinyGlm4Moe(),
    "lfm2": TinyLfm2Moe(),
    "mixtral": TinyMixtral(),
    "mla": TinyMla(),
    "nemotron": TinyNemotronH(pattern="MEM*E", latent=48, mtp=True),
    "kimi-linear": TinyKimiLinear(),
}
_CACHE = re.compile(r"llama_kv_cache: size = +([\d.]+) MiB")
_STATE = re.compile(r"llama_memory_recurrent: size = +([\d.]+) MiB")
_COMPUTE = re.compile(r"compute buffer size = +([\d.]+) MiB")


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: object) -> None:
    """llama.cpp keeps its address, so it lives as long as the process."""


def reported(path: Path, context: int) -> str:
    """What llama.cpp says while it opens a context."""
    said: list[str] = []

    @llama_cpp.llama_log_callback
    def listen(level: int, text: bytes, data: object) -> None:
        said.append(text.decode("utf-8", "replace"))

    model = llama_cpp.llama_model_load_from_file(
        bytes(path), llama_cpp.llama_model_default_params()
    )
    assert model
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = context, 2048, 512
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
    try:
        opened = llama_cpp.llama_init_from_model(model, params)
        assert opened
        llama_cpp.llama_free(opened)
    finally:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_model_free(model)
    return "".join(said)


@pytest.mark.parametrize("name", MODELS)
def test_what_llama_cpp_allocates(name: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    MODELS[name].write(tmp_path / "model")
    model = planned(tmp_path / "model")
    path = export_files(tmp_path / "model", tmp_path, [plain("BF16")])["BF16"]
    for context in (512, 1000, 16384):
        text, use = reported(path, context), card_use(model, 2**34, context)
        sizes = {what: sum(map(float, what.findall(text))) for what in (_CACHE, _STATE)}
        assert sizes[_CACHE] == pytest.approx(use.cache / 2**20, abs=0.006)
        assert sizes[_STATE] == pytest.approx(use.state / 2**20, abs=0.006)
        # a bound, of the right order where the context counts
        needed = max(map(float, _COMPUTE.findall(text)))
        assert needed <= use.compute / 2**20 <= 8 * needed + 8
        assert use.left == 2**34 - use.cache - use.state - use.compute - RESERVE


def test_a_card_without_room_has_less_than_nothing_left(tmp_path: Path) -> None:
    TinyQwen3Moe().write(tmp_path)
    model = planned(tmp_path)
    small = card_use(model, RESERVE, 512)
    assert small.left == -(small.taken - RESERVE) < 0
    assert card_use(model, 2**34, 512).left > 2**33
    assert "context of 512 tokens" in card_use(model, 2**34, 512).words
