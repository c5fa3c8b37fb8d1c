"""Sums of observations, against one sweep over all rows."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

import reap2gguf
from reap2gguf.artifacts.observations import LayerObservation, Observations
from reap2gguf.artifacts.observations_merge import merge_observed
from reap2gguf.artifacts.observed_sums import MatrixSums, ObservedSums
from reap2gguf.errors import ArtifactError, OutputError, UsageError
from reap2gguf.observing.saliency import SaliencyObserver
from reap2gguf.pruning.methods import OBSERVED
from reap2gguf.pruning.select import CRITERIA
from tests.artifacts.test_observations import OLD_PARTS, old, sample
from tests.observing.sweeps import rows_of, run_sweep
from tests.tiny import TinyQwen3Moe

ROWS = rows_of(40, 23, 37, 12, 5)


def observed(folder: Path, rows: list[np.ndarray], name: str) -> Observations:
    observer, report = run_sweep(SaliencyObserver, folder, rows)
    counts = report.n_rows, report.n_tokens, report.n_dropped_rows
    return Observations(dict(observer.layers), "model", name, name * 8, *counts)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Observations, ...]:
    """Of two texts, of a third, and of all three together."""
    folder = TinyQwen3Moe().write(tmp_path_factory.mktemp("merge") / "model")
    return (
        observed(folder, ROWS[:2], "one"),
        observed(folder, ROWS[2:4], "two"),
        observed(folder, ROWS[4:], "three"),
        observed(folder, ROWS, "all"),
    )


def test_the_sum_is_what_one_pass_finds(parts: tuple[Observations, ...]) -> None:
    *some, whole = parts
    merged = merge_observed([(one.calibration, one) for one in some])
    assert (merged.n_rows, merged.n_tokens) == (whole.n_rows, whole.n_tokens) == (5, 117)
    assert merged.calibration == "one + two + three"
    for layer, expected in whole.layers.items():
        found = merged.layers[layer]
        assert found.is_complete
        np.testing.assert_array_equal(found.count, expected.count)
        for part in fields(LayerObservation):
            one, other = (getattr(layer, part.name) for layer in (found, expected))
            # batches of other sizes: the last bits of float32 products differ
            np.testing.assert_allclose(one, other, rtol=1e-5, err_msg=part.name)


def test_sums_are_exact(parts: tuple[Observations, ...]) -> None:
    one, two, *_ = parts
    merged = merge_observed([("one", one), ("two", two)])
    for layer, found in merged.layers.items():
        for part in fields(LayerObservation):
            a, b = (getattr(seen.layers[layer], part.name) for seen in (one, two))
            expected = np.maximum(a, b) if part.name.endswith("_max") else a + b
            np.testing.assert_array_equal(getattr(found, part.name), expected)


def test_a_merged_file_chooses_experts(parts: tuple[Observations, ...], tmp_path: Path) -> None:
    one, two, *_ = parts
    for seen, name in ((one, "a"), (two, "b")):
        seen.save(tmp_path / f"{name}.safetensors")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    merged = reap2gguf.merge_observations(files, tmp_path / "c.safetensors")
    loaded = Observations.load(tmp_path / "c.safetensors")
    assert replace(loaded, layers={}) == replace(merged, layers={})
    for method in OBSERVED:
        for layer, seen in merged.layers.items():
            np.testing.assert_array_equal(
                CRITERIA[method](loaded.layers[layer]), CRITERIA[method](seen)
            )
    again = reap2gguf.merge_observations([one, files[1]])
    assert replace(again, layers={}) == replace(merged, layers={})


def test_what_an_older_file_lacks_the_sum_lacks() -> None:
    other = replace(old(sample()), calibration_sha256="aa" * 32)
    merged = merge_observed([("new", sample()), ("old", other)])
    for layer, found in merged.layers.items():
        assert not found.is_complete
        for part in OLD_PARTS:
            one = getattr(sample().layers[layer], part)
            expected = one if part.endswith("_max") else one * 2
            np.testing.assert_array_equal(getattr(found, part), expected)


def test_versions_and_rows() -> None:
    other = replace(
        sample(), calibration_sha256="aa" * 32, made_with={"torch": "2.14.0", "x": "1"}, n_rows=9
    )
    merged = merge_observed([("one", sample()), ("other", other)])
    assert merged.made_with == {"reap2gguf": "0.1.0", "torch": "2.13.0, 2.14.0", "x": "1"}
    assert (merged.n_rows, merged.n_dropped_rows, merged.n_tokens) == (16, 2, 2**41)
    assert merged.calibration_sha256 not in (sample().calibration_sha256, "aa" * 32)


def with_sums(seen: Observations, factor: float, names: str = "ab") -> Observations:
    entries = {
        name: MatrixSums(name, np.full((2, 4), factor, np.float32), np.array([3, 5]))
        for name in names
    }
    return replace(seen, imatrix=ObservedSums(entries, 7, int(factor)))


def test_sums_of_an_importance_matrix(tmp_path: Path) -> None:
    one, two = with_sums(sample(), 1.5), with_sums(changed(), 100.25)
    merged = merge_observed([("one", one), ("two", two)])
    assert merged.imatrix is not None
    assert (merged.imatrix.n_chunks, merged.imatrix.chunk_size) == (14, 100)
    for entry in merged.imatrix.entries.values():
        np.testing.assert_array_equal(entry.sums, np.full((2, 4), 101.75, np.float32))
        np.testing.assert_array_equal(entry.counts, [6, 10])
    merged.save(tmp_path / "merged.safetensors")
    loaded = Observations.load(tmp_path / "merged.safetensors")
    assert loaded.imatrix is not None
    assert loaded.imatrix.entries.keys() == {"a", "b"}
    assert merge_observed([("one", one), ("plain", changed())]).imatrix is None
    with pytest.raises(ArtifactError, match="other: has other sums of the importance matrix"):
        merge_observed([("one", one), ("other", with_sums(changed(), 1, "ac"))])
    with pytest.raises(ArtifactError, match="other: has other sums of the importance matrix"):
        merge_observed([("one", one), ("other", with_sums(changed(), 1, "abc"))])
    with pytest.raises(ArtifactError, match="overflow float32"):
        merge_observed([("a", with_sums(sample(), 3e38)), ("b", with_sums(changed(), 3e38))])


def changed(**values: object) -> Observations:
    return replace(sample(), calibration_sha256="aa" * 32, **values)  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    one = ("one", sample())
    layers = dict(sample().layers)
    short = {**layers, 3: replace(layers[3], **{
        part.name: getattr(layers[3], part.name)[:2] for part in fields(LayerObservation)
    })}  # fmt: skip
    many = {**layers, 3: replace(layers[3], count=layers[3].count + 2**53)}
    huge = {**layers, 3: replace(layers[3], reap_sum=np.full(4, 1.7e308))}
    for other, message in (
        (changed(model_fingerprint="ffff"), "other: is of another checkpoint"),
        (changed(layers={1: layers[1]}), r"other: has layers \[1\], and one has \[1, 3, 12\]"),
        (changed(layers=short), "other: layer 3 has 2 experts, and one has 4"),
        (changed(layers=many), "layer 3: the merged sums are larger"),
    ):
        with pytest.raises(ArtifactError, match=message):
            merge_observed([one, ("other", other)])
    both = replace(changed(layers=huge), calibration_sha256="bb" * 32)
    with pytest.raises(ArtifactError, match="layer 3: the merged sums are larger"):
        merge_observed([("a", changed(layers=huge)), ("b", both)])
    with pytest.raises(UsageError, match="again: was observed on the same rows as one"):
        merge_observed([one, ("again", sample())])
    for few in ([], [sample()]):
        with pytest.raises(UsageError, match="expected two or more"):
            reap2gguf.merge_observations(few)
    path = tmp_path / "a.safetensors"
    sample().save(path)
    with pytest.raises(UsageError, match="would replace the input"):
        reap2gguf.merge_observations([path, changed()], path)
    with pytest.raises(ArtifactError, match="gone"):
        reap2gguf.merge_observations([path, tmp_path / "gone"])
    with pytest.raises(OutputError):
        reap2gguf.merge_observations([path, changed()], tmp_path / "none" / "c.safetensors")
