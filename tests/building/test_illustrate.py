from __future__ import annotations

import json
from dataclasses import replace

import pytest

from reap2gguf.building.illustrate import draw_pictures, file_points
from reap2gguf.bundle.evaluation import Estimate, evaluation_of
from reap2gguf.bundle.layout import HF_PICTURES, PICTURES
from reap2gguf.bundle.manifest import Manifest
from tests import plain_pictures
from tests.conftest import Bundle
from tests.evaluations import EXAMPLE, Q4


@pytest.fixture(scope="module")
def manifest(built: Bundle) -> Manifest:
    """With figures of its first file."""
    found = Manifest.load(built.gguf)
    text = json.dumps(EXAMPLE.as_json()).replace(Q4, found.gguf[0].file)
    return replace(found, evaluation=evaluation_of(json.loads(text)))


def test_a_bundle_holds_what_is_drawn_of_it(built: Bundle) -> None:
    manifest = Manifest.load(built.gguf)
    drawn = draw_pictures(manifest, built.gguf)
    assert (*drawn,) == manifest.pictures
    for name, png in drawn.items():
        assert (built.gguf / name).read_bytes() == png
        if name in HF_PICTURES:
            assert (built.hf / name).read_bytes() == png


def test_figures_bring_a_picture(built: Bundle, manifest: Manifest) -> None:
    assert (*draw_pictures(manifest, built.gguf),) == PICTURES


def test_the_same_inputs_make_the_same_pictures(
    built: Bundle, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_pictures.draw(monkeypatch)
    drawn = draw_pictures(manifest, built.gguf)
    assert (*drawn,) == PICTURES
    assert draw_pictures(manifest, built.gguf) == drawn
    assert all(png.startswith(b"\x89PNG") and len(png) > 10_000 for png in drawn.values())


def test_a_bundle_from_before_there_were_observations(built: Bundle) -> None:
    old = replace(Manifest.load(built.gguf), has_observations=False, pictures=())
    assert (*draw_pictures(old, built.gguf),) == ("bits.png",)


def test_only_measured_files_are_points(manifest: Manifest) -> None:
    (found,) = file_points(manifest)
    assert (found.label, found.n_bytes) == ("IQ4_K_M", manifest.gguf[0].n_bytes)
    assert found.from_pruned == Estimate(0.021, 0.021 / 50)
    assert found.from_source == Estimate(0.14, 0.14 / 50)
    assert file_points(replace(manifest, evaluation=None)) == []
