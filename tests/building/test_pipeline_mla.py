"""Whole builds with latent attention: groups of experts, MTP blocks, given importance matrices."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from reap2gguf.building import pipeline
from reap2gguf.errors import UsageError
from reap2gguf.gguf_files.imatrix import load_imatrix, save_both
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.models.table import ARCHITECTURES
from reap2gguf.progress import Silent
from reap2gguf.verifying.bundle import verify_bundle
from reap2gguf.verifying.context import Strictness
from reap2gguf.verifying.opening import open_source
from tests.building.builds import build
from tests.exporting.files import stored
from tests.families.deepseek import V3
from tests.families.mla import FLASH

RECIPES = ("q4km", "f32")
LAST = 3  # the MTP block's layer
# whole blocks of 256 in some rows, as much as the types need
WIDE = {"hidden": 256, "width": 96, "rank": 64, "nope": 32, "value": 32}
SOURCES = {"flash": replace(FLASH, own_ends=True, **WIDE), "v3": replace(V3, **WIDE)}


@dataclass(frozen=True)
class Built:
    """A finished build and its source."""

    source: Path
    result: pipeline.BuildResult

    def file(self, label: str) -> Path:
        return next(self.result.gguf_folder.glob(f"*{label}.gguf"))

    def violations(self) -> tuple[str, ...]:
        with open_source(str(self.source), Silent()) as source:
            strict = Strictness(is_exact=True, source=source)
            return verify_bundle(self.result.gguf_folder, 2, Silent(), strict).violations


@pytest.fixture(scope="module", params=SOURCES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp(request.param)
    source = SOURCES[request.param].write(folder / request.param)
    return Built(source, build(source, folder / "out", compression=0.5, recipes=RECIPES))


def test_the_bundle_is_sound(built: Built) -> None:
    assert built.violations() == ()


def test_the_mtp_block_is_pruned_where_it_is(built: Built) -> None:
    """llama.cpp's converter makes tensors of GLM's, and none of DeepSeek's."""
    tiny = SOURCES[built.source.name]
    config = json.loads((built.result.hf_folder / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1
    tensors = load_file(built.result.hf_folder / "model.safetensors")
    assert tensors[f"model.layers.{LAST}.mlp.gate.weight"].shape[0] == tiny.n_experts // 2
    in_gguf = ARCHITECTURES[config["architectures"][0]].mtp_in_gguf
    header = read_gguf_header(built.file("F32"))
    assert (f"blk.{LAST}.nextn.eh_proj.weight" in header.tensors) is in_gguf
    assert header.metadata["deepseek2.block_count"] == LAST + in_gguf
    mtp = built.result.manifest.pruning.mtp
    assert (mtp.state, mtp.in_gguf, mtp.n_tokens > 0) == ("pruned", in_gguf, True)
    card = (built.result.gguf_folder / "README.md").read_text()
    assert ("draft-mtp" in card) is in_gguf


def test_each_group_keeps_as_many(built: Built) -> None:
    tiny = SOURCES[built.source.name]
    size = tiny.n_experts // tiny.n_groups
    for kept in built.result.manifest.pruning.kept.values():
        counts = np.bincount(np.array(kept) // size, minlength=tiny.n_groups)
        assert set(counts.tolist()) == {size // 2}


def test_a_count_that_groups_cannot_share_is_refused(tmp_path: Path) -> None:
    source = V3.write(tmp_path / "v3")
    with pytest.raises(UsageError, match="a multiple of 4 from 8 to 16"):
        build(source, tmp_path / "out", keep_experts=10)


@pytest.mark.parametrize("form", ["gguf", "dat", "a count for each head"])
def test_a_given_matrix_makes_the_same_file(built: Built, form: str, tmp_path: Path) -> None:
    """Also one of an old llama-imatrix, which counted for each head."""
    given = tmp_path / "given.gguf"
    matrix = load_imatrix(built.result.gguf_folder / "imatrix.gguf")
    heads = {
        n: e for n, e in matrix.entries.items() if n.endswith(("attn_k_b.weight", "v_b.weight"))
    }
    assert {e.sums.shape[0] for e in heads.values()} == {1}
    changed: dict[str, Any] = {}
    if form.startswith("a count"):
        n_heads = SOURCES[built.source.name].n_heads
        for name, entry in heads.items():
            sums, counts = entry.sums.reshape(n_heads, -1), np.repeat(entry.counts, n_heads)
            changed[name] = replace(entry, sums=sums, counts=counts)
    save_both(replace(matrix, entries={**matrix.entries, **changed}), given)
    path = given.with_suffix(".dat") if form == "dat" else given
    result = build(built.source, tmp_path / "out", compression=0.5, recipes=("q4km",), imatrix=path)
    again = Built(built.source, result)
    ours, theirs = stored(again.file("Q4_K_M")), stored(built.file("Q4_K_M"))
    # a .dat file holds means times a number of chunks, which changes the last bits
    different = {name for name in theirs if ours[name] != theirs[name]}
    assert different == set() or form == "dat"
    assert {n: t for n, (t, _) in ours.items()} == {n: t for n, (t, _) in theirs.items()}
    assert again.violations() == ()
