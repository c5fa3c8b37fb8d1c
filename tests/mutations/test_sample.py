"""A few damages of each group: what the long tests do, in a few seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations.models import FAMILIES
from tests.mutations.runs import Run, catalog, run_all
from tests.mutations.shares import made

SAMPLE = (
    "G exact, down: two experts swapped",
    "G quantized, gate: a row of an expert zero",
    "G quantized, embedding: two rows swapped",
    "G quantized, router rotated",
    "G quantized, enorm and hnorm exchanged",
    "G quantized, ssm_a without its sign",
    "G exact, down: a low bit flipped",
    "K tokenizer.ggml.eos_token_id: removed",
    "K qwen35moe.block_count: another type",
    "K added: linear RoPE scaling",
    "K merges: the last lost",
    "C text_config.rms_norm_eps: another value",
    "C vision_config.num_heads: another value",
    "F tokenizer.json: two tokens swapped",
    "F chat template: another text",
    "F stray: consolidated.safetensors",
    "S down: two experts swapped",
    "S conv1d backwards",
    "S MTP: both norms exchanged",
    "P clip.vision.patch_size: another value",
    "P queries, keys and values rotated",
    "I imatrix: experts rotated",
    "I Modelfile: FROM another file",
    "M kept: an expert twice",
    "M gguf.1.label: another value",
    "M SHA256SUMS: a name twice, the first wrong",
)
WITH_SOURCE = ("B down: two experts swapped", "B config: another rope_theta")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sample")


@pytest.mark.parametrize(
    ("run", "names"), [(Run.BESIDE, SAMPLE), (Run.SOURCE, WITH_SOURCE)], ids=["beside", "source"]
)
def test_damage_is_caught(run: Run, names: tuple[str, ...], place: Path) -> None:
    model = FAMILIES[1]
    sound = made(model, place)
    damages = {str(one): one for one in catalog(sound)}
    report = run_all(run, sound, [damages[name] for name in names], place)
    assert len(report.outcomes) == len(names)
    assert not report.missed, "\n".join(map(str, report.missed))
