from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reap2gguf.artifacts.observations import Observations
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.errors import ArtifactError
from reap2gguf.gguf_files.imatrix import load_imatrix
from reap2gguf.pruning.usage import expert_use
from tests.conftest import Bundle


@pytest.fixture(scope="module")
def manifest(built: Bundle) -> Manifest:
    return Manifest.load(built.gguf)


def test_it_is_what_the_bundles_files_say(built: Bundle, manifest: Manifest) -> None:
    found = expert_use(manifest, built.gguf)
    seen = Observations.load(built.gguf / "observations.safetensors").layers
    imatrix = load_imatrix(built.gguf / "imatrix.gguf").entries
    assert [one.layer for one in found] == [0, 1, 2, 3]
    for one in found:
        expected = seen[one.layer]
        np.testing.assert_array_equal(one.tokens, expected.count)
        np.testing.assert_array_equal(one.outputs, expected.reap_sum)
        np.testing.assert_allclose(
            one.scores, expected.reap_sum / np.maximum(expected.count, 1), rtol=1e-12
        )
        assert one.kept == manifest.pruning.kept[one.layer]
        counts = imatrix[f"blk.{one.layer}.ffn_down_exps.weight"].counts
        assert one.after is not None
        np.testing.assert_array_equal(one.after, counts)
        assert {*one.order[:12].tolist()} == {*one.kept}


def test_the_observations_in_the_bundle_are_those_of_the_build(
    built: Bundle, manifest: Manifest
) -> None:
    (path,) = (built.output / ".work" / "observations").glob("*.safetensors")
    assert (built.gguf / "observations.safetensors").read_bytes() == path.read_bytes()
    assert manifest.has_observations


def test_a_matrix_that_was_given_counts_nothing(built: Bundle, manifest: Manifest) -> None:
    given = replace(manifest.calibration, imatrix_file="other.dat")
    found = expert_use(replace(manifest, calibration=given), built.gguf)
    assert [one.after for one in found] == [None] * 4


def test_what_does_not_fit_is_left_out(built: Bundle, manifest: Manifest) -> None:
    pruning = manifest.pruning
    assert expert_use(replace(manifest, has_observations=False), built.gguf) == []
    for strange in (
        replace(pruning, method="none"),
        replace(pruning, n_experts=17),
        replace(pruning, n_kept=11),
        replace(pruning, kept={**pruning.kept, 9: pruning.kept[0]}),
    ):
        assert expert_use(replace(manifest, pruning=strange), built.gguf) == []


def test_broken_observations_are_refused(built: Bundle, manifest: Manifest, tmp_path: Path) -> None:
    shutil.copy(built.gguf / "imatrix.gguf", tmp_path)
    (tmp_path / "observations.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ArtifactError):
        expert_use(manifest, tmp_path)
