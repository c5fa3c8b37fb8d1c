"""Kimi-K2: its model type, and a setting of YaRN that llama.cpp does not read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from reap2gguf.checkpoint.config import read_json
from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.deepseek2 import DeepseekV3
from reap2gguf.models.from_gguf import model_from_gguf
from reap2gguf.models.loading import load_whole, text_model
from reap2gguf.models.table import ARCHITECTURES, BY_GGUF
from reap2gguf.models.transformers_config import check_with_transformers, transformers_config
from reap2gguf.tokenizer.in_transformers import load_in_transformers
from reap2gguf.tokenizer.tokenizer import Tokenizer
from tests.families.deepseek import KIMI_K2, V2_LITE
from tests.families.mla import FLASH, TinyMla
from tests.models.layouts import stored_of
from tests.models.oracles import mean_kl, of_llama_cpp, of_transformers, planned, pruned
from tests.models.test_from_gguf import header_of

AS_LLAMA_CPP = replace(KIMI_K2, yarn=(("beta_fast", 32.0), *KIMI_K2.yarn[1:]))


def model_of(tiny: TinyMla) -> DeepseekV3:
    config = tiny.config()
    found = ARCHITECTURES[config["architectures"][0]](config, "here/config.json", tiny.tensors())
    assert isinstance(found, DeepseekV3)
    return found


def test_transformers_reads_it_as_deepseek_v3() -> None:
    model = model_of(KIMI_K2)
    check_with_transformers(model)
    theirs = transformers_config(model.config)
    assert theirs.model_type == "deepseek_v3"
    assert theirs.rope_parameters["beta_fast"] == 1
    assert type(text_model(model.config, torch.float32)).__name__ == "DeepseekV3Model"


def test_its_users_are_told() -> None:
    kind, yarn = model_of(KIMI_K2).caveats()
    assert "model_type deepseek_v3, as transformers knows no kimi_k2" in kind
    assert "computes every GGUF file of this model with 32" in yarn
    assert model_of(AS_LLAMA_CPP).caveats() == (kind,)
    assert model_of(replace(KIMI_K2, yarn=())).caveats() == (kind,)
    assert model_of(replace(KIMI_K2, model_type="deepseek_v3")).caveats() == (yarn,)


@pytest.mark.parametrize(
    ("tiny", "beta"), [(KIMI_K2, 16.0), (FLASH, 1.0), (V2_LITE, 1.0)], ids=["16", "GLM", "V2"]
)
def test_other_betas_are_refused(tiny: TinyMla, beta: float) -> None:
    config = tiny.config() | {"rope_scaling": dict(KIMI_K2.yarn) | {"beta_fast": beta}}
    config.pop("rope_parameters", None)
    model = ARCHITECTURES[config["architectures"][0]]
    with pytest.raises(UnsupportedModelError, match="beta_fast is"):
        model(config, "here/config.json", tiny.tensors()).gguf_metadata()


def test_the_header_says_what_the_config_says() -> None:
    """Like that of llama.cpp's converter, which is recorded as Kimi-K2."""
    key = "deepseek2.rope.scaling.yarn_beta_fast"
    found = {v.key: v.value for v in model_of(KIMI_K2).gguf_metadata()}
    assert found[key] == 1.0
    read = model_from_gguf(header_of(model_of(KIMI_K2), stored_of(KIMI_K2.tensors())), BY_GGUF)
    assert read.config["rope_parameters"]["beta_fast"] == 1
    flash = header_of(model_of(AS_LLAMA_CPP), stored_of(KIMI_K2.tensors()))
    with_16 = replace(flash, metadata=flash.metadata | {key: 16.0})
    with pytest.raises(UnsupportedModelError, match="yarn_beta_fast is 16"):
        model_from_gguf(with_16, BY_GGUF)


def published(folder: Path) -> Path:
    """The folder as it is on the Hub: it names Python files, which are not run here."""
    source = KIMI_K2.write(folder)
    auto = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    config = read_json(source / "config.json") | {"auto_map": auto}
    (source / "config.json").write_text(json.dumps(config))
    return source


def test_all_weights_are_loaded(tmp_path: Path) -> None:
    """By another class than the type's own, transformers makes experts at random."""
    source = published(tmp_path / "model")
    loaded, said = load_whole(source, output_loading_info=True)
    assert not any(said.values())
    assert type(loaded) is DeepseekV3ForCausalLM
    theirs = AutoModelForCausalLM.from_pretrained(pruned(source, tmp_path / "pruned"))
    ours = loaded.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.state_dict().items())


def test_a_tokenizer_of_its_own_is_loaded(tmp_path: Path) -> None:
    """Where a tokenizer.json is beside such a config, transformers asks that for a class."""
    found = load_in_transformers(published(tmp_path / "model"))
    assert found.encode("It's") == Tokenizer(tmp_path / "model").encode("It's").tolist()


def test_a_pruned_folder_says_what_it_is(tmp_path: Path) -> None:
    folder = pruned(published(tmp_path / "model"), tmp_path / "pruned", 4)
    written = read_json(folder / "config.json")
    assert (written["model_type"], written["n_routed_experts"]) == ("deepseek_v3", 4)
    assert written["rope_scaling"]["beta_fast"] == 1
    assert "auto_map" not in written
    check_with_transformers(planned(folder))


@pytest.mark.parametrize("tiny", [KIMI_K2, AS_LLAMA_CPP], ids=["as published", "with 32"])
def test_llama_cpp_computes_with_32(tiny: TinyMla, tmp_path: Path) -> None:
    """Its logits are those of transformers where the config has 32, and only there."""
    folder = tiny.write(tmp_path / "model")
    kl = mean_kl(of_transformers(folder, tiny.vocab), of_llama_cpp(folder, tmp_path, tiny.vocab))
    assert kl < 1e-6 if tiny is AS_LLAMA_CPP else 1e-6 < kl < 0.1
