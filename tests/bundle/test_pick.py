"""Which file of a bundle is meant."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from reap2gguf.bundle.manifest import Manifest
from reap2gguf.bundle.pick import pick
from reap2gguf.errors import ArtifactError, UsageError
from tests.conftest import Bundle


def test_every_way_to_name_a_bundle_finds_its_first_file(built: Bundle) -> None:
    expected = built.gguf / "example-IQ4_K_M.gguf"
    for given in (built.gguf, built.hf, built.output, built.output / "example"):
        found = pick(given, None)
        assert found.path == expected
        assert found.name == "example-IQ4_K_M"
        assert found.others == ("BF16",)
    assert pick(expected, None).path == expected


@pytest.mark.parametrize("wanted", ["BF16", "bf16", "example-BF16.gguf", "example-BF16"])
def test_a_file_is_chosen_by_label_recipe_or_name(built: Bundle, wanted: str) -> None:
    found = pick(built.gguf, wanted)
    assert found.path == built.gguf / "example-BF16.gguf"
    assert found.others == ()


def test_what_is_not_there_is_told(built: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file 'Q8_0'; it has IQ4_K_M, BF16"):
        pick(built.gguf, "Q8_0")
    with pytest.raises(UsageError, match="no such file or folder; build one"):
        pick(tmp_path / "none", None)
    with pytest.raises(UsageError, match="holds no GGUF file; pass a NAME-GGUF folder"):
        pick(tmp_path, None)
    with pytest.raises(UsageError, match="--file chooses among the files of a bundle"):
        pick(built.gguf / "imatrix.gguf", "BF16")
    for name in ("a-GGUF", "b-GGUF"):
        shutil.copytree(built.gguf, tmp_path / name)
    with pytest.raises(UsageError, match="several bundles; pass one of them: a-GGUF, b-GGUF"):
        pick(tmp_path, None)


def test_a_bundle_of_which_one_file_was_fetched(bundle: Bundle) -> None:
    (bundle.gguf / "example-IQ4_K_M.gguf").unlink()
    assert pick(bundle.gguf, None).path.name == "example-BF16.gguf"
    (bundle.gguf / "example-BF16.gguf").rename(bundle.gguf / "example-BF16-00001-of-00002.gguf")
    found = pick(bundle.gguf, None)
    assert found.path.name == "example-BF16-00001-of-00002.gguf"
    assert found.name == pick(found.path, None).name == "example-BF16", "a part is no name"
    (bundle.gguf / "example-BF16-00001-of-00002.gguf").unlink()
    with pytest.raises(UsageError, match="none of the bundle's GGUF files is here"):
        pick(bundle.gguf, None)


def test_a_folder_without_a_manifest_and_one_with_a_broken_one(tmp_path: Path) -> None:
    for name in ("imatrix", "mmproj-x-F16", "m-00001-of-00002", "m-00002-of-00002", "x-Q8_0"):
        (tmp_path / f"{name}.gguf").write_text("")
    found = pick(tmp_path, None)
    assert found.path.name == "m-00001-of-00002.gguf"
    assert found.others == ("x-Q8_0.gguf",)
    assert found.mmproj == tmp_path / "mmproj-x-F16.gguf"
    (tmp_path / "reap2gguf.json").write_text("{")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        pick(tmp_path, None)


def test_a_file_that_llama_cpp_loads_comes_first(
    built: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a bundle whose first file only ik_llama.cpp loads, by itself the next one is taken."""
    manifest = Manifest.load(built.gguf)
    first, *others = manifest.gguf
    name = next(iter(first.tensors))
    strange = replace(first, tensors={**first.tensors, name: "IQ4_K"})
    changed = replace(manifest, gguf=(strange, *others))
    monkeypatch.setattr(Manifest, "load", lambda folder: changed)
    found = pick(built.gguf, None)
    assert found.path == built.gguf / "example-BF16.gguf"
    assert found.others == ("IQ4_K_M",)
    assert pick(built.gguf, "IQ4_K_M").path == built.gguf / "example-IQ4_K_M.gguf"
