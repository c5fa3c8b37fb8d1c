"""A build whose files are damaged before it verifies them catches all of it.

What is damaged after that, and before the files get their final names, must not pass either.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations.models import FAMILIES
from tests.mutations.runs import Run, catalog, run_all
from tests.mutations.shares import MODELS, check, made

AFTER = (
    "G quantized, down: two experts swapped",
    "G exact, down: a low bit flipped",
    "G quantized, output_norm plus one",
    "K general.file_type: removed",
    "P post_ln minus one",
    "S router rotated",
    "S embedding: a row zero",
    "C text_config.rms_norm_eps: another value",
    "F tokenizer.json: two tokens swapped",
    "F generation_config: another temperature",
    "F stray: consolidated.safetensors",
    "F stray: another GGUF",
    "I imatrix: all sums doubled",
    "I imatrix.dat: a value changed",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("build")


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_damage_is_caught(model: str, place: Path) -> None:
    check(Run.BUILD, model, place, 1.0)


@pytest.mark.slow
def test_damage_after_the_verification_is_caught(place: Path) -> None:
    sound = made(FAMILIES[1], place)
    damages = [one for one in catalog(sound) if str(one) in AFTER]
    assert len(damages) == len(AFTER), set(AFTER) - set(map(str, damages))
    report = run_all(Run.PUBLISH, sound, damages, place)
    assert len(report.outcomes) == len(damages)
    assert not report.missed, "\n".join(map(str, report.missed))
