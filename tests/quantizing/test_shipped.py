"""Every shipped recipe and every file type, on every family and on the published sizes.

A recipe fits a model if none of its rules is idle there, every type fills the rows that it is for,
and what needs importance will have it: what a plan checks of a recipe. Sizes are read from names
and shapes alone, without a file.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from itertools import pairwise
from typing import Any

import pytest

from reap2gguf.checkpoint.safetensors_header import StoredTensor
from reap2gguf.ggml import holds_weights
from reap2gguf.gguf_files.tensor_types import block_of, is_ik
from reap2gguf.models.contract import MoeModel
from reap2gguf.models.description import GgufTensor
from reap2gguf.models.table import ARCHITECTURES
from reap2gguf.quantizing.deciding import fixed_type
from reap2gguf.quantizing.file_types import IK_MIXTURES, MIXTURES
from reap2gguf.quantizing.recipe import Recipe, load_recipe, parse_recipe, shipped_recipes
from reap2gguf.quantizing.resolve import ResolvedRecipe, resolve
from tests.building.builds import options
from tests.models.layouts import CASES, Case
from tests.tiny import EXAMPLE, REPOSITORY

sys.path.append(str(REPOSITORY / "bench"))
SHAPES: Mapping[str, Any] = import_module("sparse_checkpoint").SHAPES
NAMES = (*shipped_recipes(), *MIXTURES, *IK_MIXTURES)
# of each way of storing experts and attention, the smallest; all others take a minute together
FAST = ("qwen3.5-35b-a3b", "mixtral-8x7b", "granite-3.1-1b-a400m", "lfm2-8b-a1b", "moonlight-16b")
# names that promise more bits than the one before
ORDERS = (
    ("small-iq2", "small-iq3", "small-iq4"),
    ("q8-attention-3bit", "q8-attention-4bit", "q8-attention-5bit"),
    [f"unsloth-q{bits}kxl" for bits in (2, 3, 4, 5, 6)],
    ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "BF16", "F32"),
    ("IQ1_S", "IQ2_XXS", "IQ3_XXS", "IQ4_XS"),
    ("IQ2_K", "IQ3_K", "IQ4_K", "IQ5_K", "IQ6_K"),
)


@cache
def recipes() -> Sequence[Recipe]:
    return [load_recipe(name) for name in NAMES]


def lint(recipe: Recipe, model: MoeModel, tensors: Sequence[GgufTensor]) -> ResolvedRecipe:
    """The recipe applied, after everything that a plan asks of it."""
    facts = model.facts
    found = resolve(recipe, tensors, facts, facts.n_experts, has_imatrix=True)
    for entry in found.table:
        block = block_of(entry.tensor_type)[0]
        assert entry.tensor.n_columns % block == 0, (recipe.name, entry)
        assert holds_weights(entry.tensor_type)
        assert recipe.is_ik or not is_ik(entry.tensor_type)
        if (whole := fixed_type(entry.tensor, recipe)) is not None:
            assert entry.tensor_type is whole
    assert {*found.needs_importance()} <= {*model.weighted_matrices()}, recipe.name
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_fit_every_family(case: Case) -> None:
    tensors = case.model.gguf_tensors(case.stored)
    for recipe in recipes():
        lint(recipe, case.model, tensors)


def of_size(name: str) -> tuple[MoeModel, Sequence[GgufTensor]]:
    """A published model by its config and its stored shapes; one in MXFP4 as it is in BF16."""
    config, shapes = SHAPES[name]
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    stored = {one: StoredTensor(one, "BF16", tuple(shape)) for one, shape in shapes(config)}
    (architecture,) = config["architectures"]
    model = ARCHITECTURES[architecture](config, f"{name}/config.json", stored.keys(), True)
    model.check_tensors(stored)
    return model, model.gguf_tensors(stored)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in SHAPES]
)
def test_all_fit_the_published_sizes(name: str) -> None:
    model, tensors = of_size(name)
    found = [lint(recipe, model, tensors).bits_per_weight for recipe in recipes()]
    bits = dict(zip(NAMES, found, strict=True))
    # where rows fill no blocks (gpt-oss), types with other blocks take their place in all of them
    for order in ORDERS:
        for smaller, larger in pairwise(order):
            assert bits[smaller] <= 1.001 * bits[larger], (smaller, larger)


def test_every_rule_is_for_some_family() -> None:
    """A rule that decides nothing in any model is a mistake, even if it is optional."""
    used: set[tuple[str, str, str]] = set()
    for case in CASES:
        tensors = case.model.gguf_tensors(case.stored)
        for recipe in recipes():
            for entry in lint(recipe, case.model, tensors).table:
                if entry.by is not None:
                    used.add((recipe.name, entry.by.match, entry.by.layers))
    rules = {(one.name, rule.match, rule.layers) for one in recipes() for rule in one.rules}
    assert used == rules
    assert len(rules) > 50


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_is_written_for_any_model(name: str) -> None:
    recipe = load_recipe(name)
    assert parse_recipe(recipe.as_toml(), name, name).rules == recipe.rules
    for rule in recipe.rules:
        assert rule.fallback, f"{rule.where}: rows of other models may not fill the blocks"
        assert not rule.override
        assert not rule.inherited


@pytest.mark.parametrize("name", [*shipped_recipes(), "IQ1_S", "Q2_K_S", "MXFP4_MOE", "IQ2_KL"])
def test_all_plan_on_the_example(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from reap2gguf.building.plan import make_plan
    from reap2gguf.quantizing.ik import workers

    monkeypatch.setattr(workers, "is_installed", lambda: True)  # a plan quantizes nothing
    plan = make_plan(options(EXAMPLE, REPOSITORY / "build", recipes=(name,)))
    (recipe,) = plan.recipes
    assert recipe.n_bytes > 0
