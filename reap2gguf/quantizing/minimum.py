"""How much importance a recipe asks for: what its types need, `min_coverage` and `min_tokens`.

`min_coverage = 0.9` with `min_tokens = 100` asks that, of every tensor of routed experts, nine in
ten experts have seen 100 tokens of the importance matrix. In a rule it is asked of the tensors that
the rule decides about, in place of the recipe's; a tensor that is not of experts counts as one
expert. Tensors whose type no matrix changes are not asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reap2gguf.errors import RecipeError
from reap2gguf.ggml import UNWEIGHTED_TYPES
from reap2gguf.messages import shown
from reap2gguf.models.description import is_of_experts
from reap2gguf.models.roles import spots

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

    from reap2gguf.gguf_files.imatrix import Imatrix
    from reap2gguf.quantizing.resolve import ResolvedRecipe, ResolvedTensor

MINIMUM_KEYS = ("min_coverage", "min_tokens")
_MOST_TOKENS = 10**9


@dataclass(frozen=True)
class Minimum:
    """The least share of a tensor's experts that must have seen so many tokens."""

    share: float
    tokens: int = 1

    @property
    def words(self) -> str:
        """What tables and errors call it."""
        tokens = "any token" if self.tokens == 1 else f"{self.tokens:,} tokens"
        return f"{self.share:.3g} of experts with {tokens}"

    def toml_lines(self) -> Iterator[str]:
        """Its keys, as `read_minimum` reads them."""
        yield f"min_coverage = {self.share!r}"
        if self.tokens > 1:
            yield f"min_tokens = {self.tokens}"


def read_minimum(
    values: Mapping[str, Any], at: Callable[[str], str], base: Minimum | None
) -> Minimum | None:
    """The minimum of a recipe or of one of its rules; `base` holds for what it does not say.

    `at` says where a key stands. Raises RecipeError for a value that is none.
    """
    if not any(key in values for key in MINIMUM_KEYS):
        return base
    share: Any = values.get("min_coverage", None if base is None else base.share)
    if share is None:
        raise RecipeError(
            f"{at('min_tokens')}: min_tokens says nothing without min_coverage, the share of "
            "experts that must have seen them, such as 0.9; add it"
        )
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise RecipeError(
            f"{at('min_coverage')}: min_coverage is {shown(share)}, expected a share of experts "
            "from 0 to 1, such as 0.9"
        )
    tokens: Any = values.get("min_tokens", 1 if base is None else base.tokens)
    if type(tokens) is not int or not 1 <= tokens <= _MOST_TOKENS:
        raise RecipeError(
            f"{at('min_tokens')}: min_tokens is {shown(tokens)}, expected a number of tokens from "
            f"1 to {_MOST_TOKENS:,}, such as 100"
        )
    return Minimum(float(share), tokens)


def check_weighted(
    values: Mapping[str, Any], kind: GGMLQuantizationType, at: Callable[[str], str]
) -> None:
    """Raise RecipeError for a rule with a minimum whose type no importance matrix changes."""
    key = next((key for key in MINIMUM_KEYS if key in values), None)
    if key is not None and kind.name in UNWEIGHTED_TYPES:
        raise RecipeError(
            f"{at(key)}: {key} has no effect, since no importance matrix changes the bytes of "
            f"{kind.name}; remove it"
        )


def check_needed(recipe: ResolvedRecipe, weighted: Collection[str], why: str) -> None:
    """Raise RecipeError for a type that needs importance, of a tensor that has none.

    `weighted` are the names of those that have some; `why` others have none.
    """
    if unweighted := sorted({*recipe.needs_importance()} - set(weighted)):
        entry = next(one for one in recipe.table if one.tensor.name == unweighted[0])
        where = f"recipe {recipe.name}"
        if entry.by is not None:
            where = f"{entry.by.place(recipe.name)}: {entry.by.title}"
        raise RecipeError(
            f"{where}: {entry.tensor.name} gets {entry.tensor_type.name}, which needs an "
            f"importance matrix, and {why}; give it a type of more bits, such as Q4_K, in a rule"
        )


def check_minimum(recipe: ResolvedRecipe, imatrix: Imatrix | None, where: str) -> None:
    """Raise RecipeError if an importance matrix has less than a recipe asks for.

    `where` names the matrix; None is no matrix. The block for multi-token prediction is asked only
    by its own rules where the matrix has nothing of it, as llama-imatrix leaves it out.
    """
    asked = [entry for entry in recipe.table if entry.minimum is not None and entry.minimum.share]
    if not asked:
        return
    if imatrix is None:
        raise RecipeError(
            f"recipe {recipe.name}: min_coverage asks for an importance matrix, and there is none; "
            "pass --imatrix, or take min_coverage out of the recipe"
        )
    places = spots([entry.tensor.name for entry in recipe.table])
    mtp = {name for name, spot in places.items() if "MTP" in spot.roles}
    if not mtp & imatrix.entries.keys():
        asked = [e for e in asked if e.tensor.name not in mtp or (e.by and e.by.minimum)]
    if unknown := next((e for e in asked if _is_unknown(e, imatrix)), None):
        raise RecipeError(
            f"recipe {recipe.name}: min_tokens asks how many tokens the experts of "
            f"{unknown.tensor.name} have seen, which {where} does not say, since .dat files do "
            "not; pass a .gguf matrix, or take min_tokens out of the recipe"
        )
    thin = [one for entry in asked if (one := _thin(entry, imatrix)) is not None]
    if thin:
        raise RecipeError(_too_little(recipe, thin, len(asked), where))


@dataclass(frozen=True)
class _Thin:
    """A tensor with less importance than its minimum."""

    name: str
    minimum: Minimum
    n_experts: int
    n_enough: int
    n_unseen: int

    @property
    def share(self) -> float:
        return self.n_enough / self.n_experts


def _is_unknown(entry: ResolvedTensor, imatrix: Imatrix) -> bool:
    assert entry.minimum is not None
    return entry.minimum.tokens > 1 and not imatrix.chunk_size


def _thin(entry: ResolvedTensor, imatrix: Imatrix) -> _Thin | None:
    assert entry.minimum is not None
    name, minimum = entry.tensor.name, entry.minimum
    n_experts = entry.tensor.n_matrices if is_of_experts(name) else 1
    found = imatrix.entries.get(name)
    if found is None:
        return _Thin(name, minimum, n_experts, 0, n_experts)
    n_enough, n_unseen = int((found.counts >= minimum.tokens).sum()), int((found.counts == 0).sum())
    if n_enough >= minimum.share * len(found.counts):
        return None
    return _Thin(name, minimum, len(found.counts), n_enough, n_unseen)


def _too_little(recipe: ResolvedRecipe, thin: Sequence[_Thin], n_asked: int, where: str) -> str:
    worst = min(thin, key=lambda one: one.share)
    unseen = f", {worst.n_unseen:,} never hit" if worst.n_unseen else ""
    needed = worst.minimum.tokens
    tokens = "any" if needed == 1 else f"{needed:,} tokens"
    return (
        f"recipe {recipe.name}: min_coverage is {worst.minimum.share:g}, but in {where} "
        f"{worst.n_enough:,} of {worst.n_experts:,} experts of {worst.name} have seen {tokens} "
        f"({worst.share:.1%}{unseen}), and {len(thin):,} of {n_asked:,} tensors have too little; "
        "compute the matrix on more text (--imatrix-text, more --samples), add several with "
        "`reap2gguf imatrix merge`, or lower min_coverage or min_tokens in the recipe"
    )
