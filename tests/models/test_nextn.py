"""An MTP block that is one more decoder layer: its tensors, and llama.cpp's logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reap2gguf.errors import CheckpointError, UnknownTensorError, UnsupportedModelError
from reap2gguf.models.contract import MoeModel
from reap2gguf.models.description import Dropped, Plain
from reap2gguf.models.from_gguf import model_from_gguf
from reap2gguf.models.glm4_moe import Glm4Moe
from reap2gguf.models.nextn import NextnDecoder
from reap2gguf.models.table import BY_GGUF
from tests.families.glm import GLM45, GLM46, TinyGlm4Moe
from tests.models.layouts import stored_of
from tests.models.oracles import mean_kl, mtp_of_both, pruned
from tests.models.test_from_gguf import header_of

LAYER = "model.layers.3."
OWN = ("embed_tokens.weight", "shared_head.head.weight")
KEY = "num_nextn_predict_layers"


def model_of(
    tiny: TinyGlm4Moe = GLM45, keep_mtp: bool = True, without: tuple[str, ...] = (), **changes: Any
) -> NextnDecoder:
    """The model of a layout, with other values in its config; `...` leaves a key out."""
    config = {k: v for k, v in (tiny.config() | changes).items() if v is not ...}
    names = [name for name in tiny.tensors() if not name.endswith(without or ("no such",))]
    return Glm4Moe(config, "here/config.json", names, keep_mtp)


def nextn_of(model: MoeModel, tiny: TinyGlm4Moe) -> dict[str, tuple[int, ...]]:
    stored = {n: s for n, s in stored_of(tiny.tensors()).items() if n in model.names}
    model.check_tensors(stored)
    made = model.gguf_tensors(stored)
    return {t.name: t.shape for t in made if ".nextn." in t.name}


def test_an_embedding_and_a_head_of_its_own() -> None:
    model = model_of()
    own = {
        "blk.3.nextn.embed_tokens.weight": (GLM45.vocab, 64),
        "blk.3.nextn.shared_head_head.weight": (GLM45.vocab, 64),
    }
    shared = {
        "blk.3.nextn.eh_proj.weight": (64, 128),
        **{f"blk.3.nextn.{n}.weight": (64,) for n in ("enorm", "hnorm", "shared_head_norm")},
    }
    assert nextn_of(model, GLM45) == shared | own
    assert model.mtp_embedding_name == LAYER + OWN[0]
    assert model.mtp_head_name == LAYER + OWN[1]
    assert {model.role(LAYER + name) for name in OWN} == {Plain(None)}
    assert not any("nextn.e" in n and n in own for n in model.weighted_matrices())
    # each alone, and none
    for name, gguf_name in zip(OWN, own, strict=True):
        alone = model_of(without=(LAYER + name,))
        assert nextn_of(alone, GLM45) == {n: s for n, s in (shared | own).items() if n != gguf_name}
        with pytest.raises(UnknownTensorError, match=name):
            alone.check_tensors(stored_of(GLM45.tensors()))
    none = model_of(replace(GLM45, own_ends=False))
    assert nextn_of(none, replace(GLM45, own_ends=False)) == shared
    assert (none.mtp_embedding_name, none.mtp_head_name) == (
        "model.embed_tokens.weight",
        "lm_head.weight",
    )
    tied = model_of(replace(GLM45, own_ends=False, tied=True))
    assert tied.mtp_head_name == tied.mtp_embedding_name == "model.embed_tokens.weight"


def test_the_tensors_decide() -> None:
    """transformers saves such a model without its block, and with the config that counts it."""
    lost = model_of(replace(GLM45, mtp=False), num_nextn_predict_layers=1)
    assert not lost.facts.has_mtp
    assert lost.facts.n_blocks == 3
    assert lost.config_at_odds() == f"config.json says {KEY} 1, but the checkpoint has no MTP block"
    assert "an MTP block that the checkpoint does not contain" in "".join(lost.caveats())
    keys = {value.key: value.value for value in lost.gguf_metadata()}
    assert keys["glm4moe.block_count"] == 3
    assert "glm4moe.nextn_predict_layers" not in keys
    assert lost.pruned_config(4)[KEY] == 0
    denied = model_of(GLM45, num_nextn_predict_layers=0)
    assert denied.facts.has_mtp
    assert denied.config_at_odds() == (
        f"config.json says {KEY} 0, but the checkpoint has an MTP block"
    )
    assert denied.pruned_config(4)[KEY] == 1


def test_every_spelling_of_the_count_is_corrected() -> None:
    other = {KEY: ..., "num_mtp_layers": 1}
    assert model_of(GLM45, **other).pruned_config(4)["num_mtp_layers"] == 1
    dropped = model_of(GLM45, keep_mtp=False, **other).pruned_config(4)
    assert dropped["num_mtp_layers"] == 0
    assert KEY not in dropped
    both = model_of(GLM45, keep_mtp=False, num_mtp_layers=1).pruned_config(4)
    assert (both[KEY], both["num_mtp_layers"]) == (0, 0)
    # without a key, llama.cpp's converter takes no block
    silent = model_of(GLM45, **{KEY: ...})
    assert silent.config_at_odds() is not None
    assert silent.pruned_config(4)[KEY] == 1
    assert KEY not in model_of(replace(GLM45, mtp=False), **{KEY: ...}).pruned_config(4)


def test_a_block_that_is_dropped() -> None:
    model = model_of(keep_mtp=False)
    assert (model.facts.has_mtp, model.facts.moe_layers) == (False, (1, 2))
    names = [name for name in GLM45.tensors() if name.startswith(LAYER)]
    assert {model.role(name) for name in names} == {Dropped()}
    assert not model.caveats()
    assert nextn_of(model, GLM45) == {}
    assert model.mtp_head_name == model.head_name


@pytest.mark.parametrize("name", ["enorm.weight", "shared_head.norm.weight", "mlp.gate.weight"])
def test_half_a_block_is_refused(name: str) -> None:
    tensors = {n: t for n, t in GLM45.tensors().items() if n != LAYER + name}
    model = Glm4Moe(GLM45.config(), "here/config.json", tensors.keys())
    with pytest.raises(CheckpointError, match=rf"{name}.* is missing"):
        model.check_tensors(stored_of(tensors))


def test_a_second_block_is_unknown() -> None:
    name = "model.layers.4.enorm.weight"
    with pytest.raises(UnknownTensorError, match=name):
        model_of().check_tensors(stored_of(GLM45.tensors() | {name: torch.ones(64)}))


def test_the_block_is_built_like_the_last_layer() -> None:
    class Dense(Glm4Moe):
        def _moe_layers(self) -> range:
            return range(1, 2)

    with pytest.raises(UnsupportedModelError, match="layer 2, the last one, is dense"):
        Dense(GLM45.config(), "here/config.json", GLM45.tensors().keys())


@pytest.mark.parametrize("tiny", [GLM45, GLM46], ids=["own ends", "shared ends"])
def test_a_gguf_file_without_the_block_that_it_counts(tiny: TinyGlm4Moe) -> None:
    """So llama.cpp's converter writes what transformers has saved."""
    model = model_of(tiny)
    found = header_of(model, stored_of(tiny.tensors()))
    block = f"blk.{tiny.n_layers}."
    trunk = {n: i for n, i in found.tensors.items() if not n.startswith(block)}
    alone = model_from_gguf(replace(found, tensors=trunk), BY_GGUF)
    assert (alone.model.facts.has_mtp, alone.model.facts.n_layers) == (False, tiny.n_layers)
    assert alone.template.keys() == {n for n in tiny.tensors() if f"rs.{tiny.n_layers}." not in n}
    whole = model_from_gguf(found, BY_GGUF)
    assert whole.template.keys() == tiny.tensors().keys()
    assert (whole.model.mtp_embedding_name, whole.model.mtp_head_name) == (
        model.mtp_embedding_name,
        model.mtp_head_name,
    )
    dropped = model_from_gguf(found, BY_GGUF, keep_mtp=False)
    assert dropped.template.keys() == alone.template.keys()


ENDS = {
    "own ends": GLM45,
    "shared ends": GLM46,
    "own ends, tied": replace(GLM45, tied=True),
    "shared ends, tied": replace(GLM46, tied=True),
}


@pytest.mark.parametrize("is_pruned", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("ends", ENDS)
def test_the_block_predicts_what_llama_cpps_does(
    ends: str, is_pruned: bool, tmp_path: Path
) -> None:
    tiny = ENDS[ends]
    folder = tiny.write(tmp_path / "model")
    if is_pruned:
        folder = pruned(folder, tmp_path / "pruned", 4)
    theirs, ours = mtp_of_both(folder, tmp_path, tiny.vocab)
    assert theirs.std() > 1
    assert mean_kl(theirs, ours) < 1e-6
