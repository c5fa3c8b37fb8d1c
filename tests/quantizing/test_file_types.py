"""Types and bytes of every file type are those that llama-quantize makes of whole models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.gguf_files.imatrix import Imatrix, load_imatrix
from reap2gguf.models.table import describe
from reap2gguf.quantizing.file_types import MIXTURES
from reap2gguf.quantizing.recipe import Recipe, Rule, load_recipe, shipped_recipes
from reap2gguf.quantizing.resolve import ResolvedRecipe, resolve
from tests.exporting.files import (
    export_files,
    llama_quantize,
    mean_squares,
    plain,
    stored,
    types_of_llama_cpp,
)
from tests.part_of_example import part_of_config, part_of_tensors
from tests.tiny import EXAMPLE, REPOSITORY, TinyQwen35Moe, save_sharded

DATA = REPOSITORY / "tests" / "data"
OF_40_LAYERS = json.loads((DATA / "qwen35moe-40-layers.types.json").read_text())
IMATRIX = DATA / "tiny-qwen3-moe.imatrix.gguf"  # llama-imatrix's, of the example
BY_LLAMA_QUANTIZE = [name for name in MIXTURES if name != "NVFP4"]  # which it refuses to make
# the others need a second or more each; random models of all of them are compared elsewhere
QUICK = ("Q8_0", "Q4_K_M", "MXFP4_MOE", "TQ1_0", "TQ2_0")
# libggml 0.20.2 of libggml-python and 0.25.3 of llama-cpp-python make other bytes
OF_ONE_BUILD = "IQ1_M"


def resolved(folder: Path, recipe: Recipe, has_imatrix: bool) -> ResolvedRecipe:
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        tensors = model.gguf_tensors(checkpoint.tensors)
        return resolve(recipe, tensors, model.facts, model.facts.n_experts, has_imatrix)


def kinds(found: ResolvedRecipe) -> dict[str, str]:
    return {name: kind.name for name, kind in found.tensor_types().items()}


def unfold(table: dict[str, dict[str, dict]]) -> dict[str, str]:
    """Tensor name to type, from the compact form of the data file: every layer's own tensors."""
    found = dict(table["outer"])
    for rest, one in table["layer"].items():
        linear = rest.startswith(("ssm_", "attn_gate", "attn_qkv"))
        full = rest.startswith("attn_") and not linear and rest != "attn_norm.weight"
        for layer in range(40):
            if not ((linear and layer % 4 == 3) or (full and layer % 4 != 3)):
                found[f"blk.{layer}.{rest}"] = one["most"]
        for kind, layers in one.get("layers", {}).items():
            found |= {f"blk.{layer}.{rest}": kind for layer in layers}
    return found


@pytest.fixture(scope="module")
def forty_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of Qwen3.5's kinds of layers, as the reference has them, with rows that fill blocks."""
    tiny = TinyQwen35Moe(
        layers="lllf" * 10, hidden=256, width=256, n_experts=4, n_heads=4, n_kv_heads=2,
        head_dim=64, linear_dim=32, mtp=False, vision=False,
    )  # fmt: skip
    return tiny.write(tmp_path_factory.mktemp("forty") / "model")


@pytest.mark.parametrize("name", OF_40_LAYERS)
def test_types_of_40_layers_are_llama_quantizes(name: str, forty_layers: Path) -> None:
    recipe = load_recipe(name) if name in shipped_recipes() else plain(name)
    # llama-quantize was run without an imatrix, on a model of two query heads per key-value head
    assert kinds(resolved(forty_layers, recipe, False)) == unfold(OF_40_LAYERS[name])


@pytest.fixture(scope="module")
def imatrix() -> Imatrix:
    return load_imatrix(IMATRIX)


def test_types_of_the_example_are_those_llama_cpp_chooses(tmp_path: Path, imatrix: Imatrix) -> None:
    bf16 = export_files(EXAMPLE, tmp_path, [plain("BF16")])["BF16"]
    for name in BY_LLAMA_QUANTIZE:
        theirs = types_of_llama_cpp(bf16, MIXTURES[name].file_type, mean_squares(imatrix))
        assert kinds(resolved(EXAMPLE, plain(name), True)) == theirs, name


@dataclass(frozen=True)
class Part:
    """Some trained weights: of the example two layers, four experts and the whole vocabulary.

    A block is quantized for itself, so a block of every other expert would only take longer.
    """

    folder: Path
    bf16: Path
    imatrix: Imatrix


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory, imatrix: Imatrix) -> Part:
    folder = tmp_path_factory.mktemp("part")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(EXAMPLE / name, folder / name)
    (folder / "config.json").write_text(json.dumps(part_of_config(n_layers=2, n_experts=4)))
    save_sharded(part_of_tensors(n_layers=2, n_experts=4), folder, 1)
    bf16 = export_files(folder, tmp_path_factory.mktemp("example"), [plain("BF16")])["BF16"]
    entries = {
        name: replace(one, sums=one.sums[:4], counts=one.counts[:4])
        for name, one in imatrix.entries.items()
        if name.startswith(("blk.0.", "blk.1."))
    }
    return Part(folder, bf16, replace(imatrix, entries=entries))


@pytest.fixture
def both(part: Part, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """One file of the part by this program, and one by llama.cpp."""

    def make(recipe: Recipe, file_type: str, rules: Recipe | None = None) -> tuple[Path, Path]:
        (ours,) = export_files(part.folder, tmp_path, [recipe], part.imatrix).values()
        theirs = tmp_path / "theirs.gguf"
        number = MIXTURES[file_type].file_type
        assert llama_quantize(part.bf16, theirs, number, mean_squares(part.imatrix), rules)
        return ours, theirs

    return make


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in BY_LLAMA_QUANTIZE
        if name != OF_ONE_BUILD
    ],
)
def test_bytes_of_the_example(name: str, both: Callable[..., tuple[Path, Path]]) -> None:
    ours, theirs = both(plain(name), name)
    assert stored(ours) == stored(theirs)


@pytest.mark.slow
def test_bytes_of_iq1_m_differ_rarely(both: Callable[..., tuple[Path, Path]]) -> None:
    ours, theirs = (stored(path) for path in both(plain(OF_ONE_BUILD), OF_ONE_BUILD))
    assert {name: kind for name, (kind, _) in ours.items()} == {
        name: kind for name, (kind, _) in theirs.items()
    }
    for name, (kind, raw) in theirs.items():
        found = np.frombuffer(ours[name][1], np.uint8)
        differ = np.count_nonzero(found != np.frombuffer(raw, np.uint8))
        assert differ < (len(raw) / 1000 if kind == OF_ONE_BUILD else 1)


def test_nvfp4_is_what_llama_quantize_makes_by_rule(
    both: Callable[..., tuple[Path, Path]],
) -> None:
    """It has no file type for it, and takes it with `--tensor-type`."""
    experts = Recipe(
        "n", "n", "n", "Q8_0", (Rule("blk.*_exps.weight", GGMLQuantizationType.NVFP4),), ""
    )
    ours, theirs = both(plain("NVFP4"), "Q8_0", experts)
    assert stored(ours) == stored(theirs)
    assert stored(ours)["blk.0.ffn_up_exps.weight"][0] == "NVFP4"
