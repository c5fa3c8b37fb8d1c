"""Recipes of other programs as recipes of this one, and what their rules find in a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from reap2gguf.importing.foreign import EMBEDDING, OUTPUT, ForeignRecipe, ForeignRule
from reap2gguf.importing.from_file import counted
from reap2gguf.messages import one_line
from reap2gguf.models.roles import spots
from reap2gguf.quantizing.deciding import fixed_type
from reap2gguf.quantizing.mixture import type_that_fits
from reap2gguf.quantizing.recipe import Recipe, Rule
from reap2gguf.quantizing.resolve import ResolvedRecipe, resolve
from reap2gguf.quantizing.toml_text import toml_pattern, toml_string

if TYPE_CHECKING:
    from reap2gguf.models.description import GgufTensor, ModelFacts

# what became of a rule
Fate = Literal["kept", "matches nothing", "comes too late", "never quantized", "F32 anyway"]
_LEFT_OUT: dict[Fate, str] = {
    "comes too late": "rules before it take every tensor that it matches",
    "never quantized": "llama.cpp never quantizes what it matches",
    "F32 anyway": "what it matches has this type in every recipe",
}


@dataclass(frozen=True)
class ModelTensors:
    """A model for which a recipe is imported."""

    label: str
    tensors: Sequence[GgufTensor]
    facts: ModelFacts


@dataclass(frozen=True)
class ImportedRule:
    """A rule of another program; the numbers are None without a model."""

    text: str  # as it was written: PATTERN=TYPE
    rule: Rule
    fate: Fate = "kept"
    n_matched: int | None = None  # tensors that it matches; of a kept one, those that may change
    n_decided: int | None = None  # those of them that no rule before it matches
    n_fallback: int = 0  # those of them whose rows do not fill the blocks of its type

    @property
    def is_in_recipe(self) -> bool:
        return self.fate not in _LEFT_OUT

    @property
    def words(self) -> str:
        """What became of it, in a few words; "" if that is not known."""
        if self.fate in _LEFT_OUT:
            return _LEFT_OUT[self.fate]
        if self.fate != "kept":
            return "matches no tensor"
        if self.n_decided is None:
            return ""
        later = (self.n_matched or 0) - self.n_decided
        more = f", {later:,} more before it" if later else ""
        other = f", {self.n_fallback:,} of another type for their rows" if self.n_fallback else ""
        return f"{counted(self.n_decided, 'tensor')}{more}{other}"


@dataclass(frozen=True)
class ImportedRecipe:
    """A recipe that was made of a text for another program."""

    recipe: Recipe
    base: str  # the file type or recipe that it extends
    rules: tuple[ImportedRule, ...]  # all, with those that were left out
    notes: tuple[str, ...]  # what the text says that is no part of a recipe
    model: str | None = None  # for which it was compared
    resolved: ResolvedRecipe | None = None  # the same, applied to the model
    unmatched: tuple[tuple[str, int], ...] = ()  # what is left to the base: names, and how many

    def remarks(self) -> Iterator[str]:
        """What the user should know: what matched nothing, what no rule matched, and notes."""
        for one in self.rules:
            if one.fate != "kept":
                yield f"{one.text}: {one.words}" + ("" if one.is_in_recipe else "; left out")
        if self.unmatched:
            names = ", ".join(f"{name} ({n})" if n > 1 else name for name, n in self.unmatched)
            yield f"no rule matches {names}; {self.base} decides"
        yield from self.notes

    def as_toml(self) -> str:
        """The recipe as TOML, with comments."""
        return "\n".join(self._lines()) + "\n"

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        types = {} if self.resolved is None else self.resolved.tensor_types()
        return {
            "title": self.recipe.title,
            "label": self.recipe.label,
            "file_type": self.recipe.file_type,
            "base": self.base,
            "model": self.model,
            "rules": [
                {
                    "text": one.text,
                    one.rule.selector.key: one.rule.match,
                    "layers": one.rule.layers,
                    "type": one.rule.tensor_type.name,
                    "fate": one.fate,
                    "matches": one.n_matched,
                    "decides": one.n_decided,
                    "fallbacks": one.n_fallback,
                }
                for one in self.rules
            ],
            "unmatched": dict(self.unmatched),
            "notes": list(self.notes),
            "types": {name: kind.name for name, kind in types.items()},
            "toml": self.as_toml(),
        }

    def _lines(self) -> Iterator[str]:
        yield f"# {self.recipe.title}" + (f", compared with {self.model}" if self.model else "")
        yield from (f"# {one_line(remark)}" for remark in self.remarks())
        yield f"title = {toml_string(self.recipe.title)}"
        yield f"label = {toml_string(self.recipe.label)}"
        yield f"extends = {toml_string(self.base)}"
        for one in self.rules:
            if one.is_in_recipe:
                yield from ("", f"[[rules]]  # {one_line(one.text)}" + _after(one.words))
                yield from _keys(one.rule)


def _after(words: str) -> str:
    return f": {words}" if words else ""


def _keys(rule: Rule) -> Iterator[str]:
    yield f"{rule.selector.key} = {toml_pattern(rule.match)}"
    if rule.layers:
        yield f"layers = {toml_string(rule.layers)}"
    yield f"type = {toml_string(rule.tensor_type.name)}"
    yield from (f"{key} = true" for key in ("optional", "fallback") if getattr(rule, key))


def imported(
    foreign: ForeignRecipe, name: str, model: ModelTensors | None = None
) -> ImportedRecipe:
    """The recipe called `name`; with a model, its rules are those that mean something there.

    Raises RecipeError if a type cannot be had by a tensor of the model.
    """
    notes = list(foreign.notes)
    if model is None:
        rules = [ImportedRule(one.text, one.rule) for one in foreign.rules]
        if foreign.tied_output is not None:
            notes.append(
                "in models whose embeddings are the output too, --output-tensor-type also counts "
                f"for {EMBEDDING}; pass MODEL for those"
            )
        recipe = _recipe(foreign, name, rules)
        return ImportedRecipe(recipe, foreign.base.name, tuple(rules), (*notes,))
    is_tied = all(tensor.name != OUTPUT for tensor in model.tensors)
    written = list(foreign.rules)
    if is_tied and foreign.tied_output is not None:
        rule = Rule(EMBEDDING, foreign.tied_output, optional=True, fallback=True)
        written.append(ForeignRule(f"--output-tensor-type {foreign.tied_output.name}", rule))
    rules, unmatched = _compared(foreign.base, written, model)
    recipe = _recipe(foreign, name, rules)
    resolved = resolve(recipe, model.tensors, model.facts, model.facts.n_experts, True)
    return ImportedRecipe(
        recipe, foreign.base.name, tuple(rules), (*notes,), model.label, resolved, unmatched
    )


def _recipe(foreign: ForeignRecipe, name: str, rules: Sequence[ImportedRule]) -> Recipe:
    """The rules that count, before those of the base."""
    base = foreign.base
    own = [one.rule for one in rules if one.is_in_recipe]
    inherited = [replace(rule, inherited=True) for rule in base.rules]
    label = f"{base.label}_MIX" if own else base.label
    title = f"Imported from {foreign.program}"
    recipe = Recipe(name, title, label, base.file_type, (*own, *inherited), "")
    return replace(recipe, source=recipe.as_toml())


def _compared(
    base: Recipe, written: Sequence[ForeignRule], model: ModelTensors
) -> tuple[list[ImportedRule], tuple[tuple[str, int], ...]]:
    """What becomes of each rule, and the names of the tensors that are left to the base."""
    places = spots([tensor.name for tensor in model.tensors])
    matched: list[list[GgufTensor]] = [[] for _ in written]
    decided: list[list[GgufTensor]] = [[] for _ in written]
    left: Counter[str] = Counter()
    for tensor in model.tensors:
        fixed = fixed_type(tensor, base)
        matching = [
            place
            for place, one in enumerate(written)
            if one.rule.selector.fits(places[tensor.name])
        ]
        for place in matching:
            matched[place].append(tensor)
        winners = (place for place in matching if fixed in (None, written[place].rule.tensor_type))
        winner = next(winners, None)
        if winner is not None:
            decided[winner].append(tensor)
        elif fixed is None:
            left[re.sub(r"^blk\.\d+\.", "blk.*.", tensor.name)] += 1
    rules = [_judged(base, *one) for one in zip(written, matched, decided, strict=True)]
    return rules, tuple(left.items())


def _judged(
    base: Recipe,
    written: ForeignRule,
    matched: Sequence[GgufTensor],
    decided: Sequence[GgufTensor],
) -> ImportedRule:
    rule = written.rule
    free = [tensor for tensor in matched if fixed_type(tensor, base) is None]
    fate: Fate = "kept"
    if not matched:
        fate = "matches nothing"
    elif not free:
        fate = "F32 anyway" if decided else "never quantized"
    elif not decided:
        fate = "comes too late"
    n_fallback = 0
    if fate == "kept":
        kind = rule.tensor_type
        n_fallback = sum(type_that_fits(kind, tensor.n_columns) is not kind for tensor in decided)
        rule = replace(rule, optional=False, fallback=rule.fallback and n_fallback > 0)
    n_matched = len(free) if fate == "kept" else len(matched)
    return ImportedRule(written.text, rule, fate, n_matched, len(decided), n_fallback)
