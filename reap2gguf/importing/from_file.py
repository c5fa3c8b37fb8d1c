"""The recipe that a GGUF file of any program was made by, found from the types in its header.

Every file type and every recipe of this program is applied to the tensors of the file. The one that
leaves the fewest rules to write is extended by these rules, and the result is applied again: every
tensor gets the type that it has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from gguf import GGMLQuantizationType as Type
from gguf import Keys

from reap2gguf.errors import RecipeError
from reap2gguf.ggml import holds_weights
from reap2gguf.gguf_files.part_names import parse_part_name
from reap2gguf.gguf_files.tensor_types import LOADER, IkType
from reap2gguf.importing.cover import CoverRule, cover
from reap2gguf.messages import one_line
from reap2gguf.models.from_gguf import model_from_gguf
from reap2gguf.models.roles import spots
from reap2gguf.models.table import BY_GGUF
from reap2gguf.quantizing.deciding import fixed_type
from reap2gguf.quantizing.file_types import IK_MIXTURES, MIXTURES
from reap2gguf.quantizing.labels import IK_LABEL, label_fault
from reap2gguf.quantizing.recipe import Recipe, Rule, load_recipe, shipped_recipes
from reap2gguf.quantizing.resolve import resolve
from reap2gguf.quantizing.toml_text import toml_string

if TYPE_CHECKING:
    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.models.description import GgufTensor, ModelFacts

_MOST_BASES = 6  # of which rules are written, to see which needs the fewest
_LABEL = re.compile(r"[-.]((?:UD-)?(?:I?Q\d|TQ\d|MXFP4|NVFP4|BF16|F16|F32)[A-Za-z0-9_.-]{0,40})$")
_MOST_NAMED = 3  # other recipes with the same types
_RECIPE_KEY = "reap2gguf.recipe"  # of this program's own files
_HOW = {True: "with an importance matrix", False: "without an importance matrix"}


@dataclass(frozen=True)
class FoundRecipe:
    """A recipe that gives the tensors of a file the types that they have."""

    file: str  # its name
    base: str  # the file type or the recipe that it extends
    same_as: tuple[str, ...]  # file types and recipes that alone give all tensors their types
    how: str  # "with an importance matrix" or "without ..." if `same_as` is so with that alone
    recipe: Recipe
    rules: tuple[CoverRule, ...]  # its own, with the tensors of each
    tensor_types: Mapping[str, Type]  # GGUF tensor name -> what the file has
    unwritable: Mapping[str, Type]  # those of types that this program reads and does not write
    fixed: Mapping[str, Type]  # those that no recipe decides, and that have another type here
    need_imatrix: tuple[str, ...]  # those that get another type without an importance matrix

    @property
    def n_decided(self) -> int:
        """How many tensors its own rules decide."""
        return sum(len(rule.names) for rule in self.rules)

    @property
    def what(self) -> str:
        """What the file is, in one sentence without a full stop."""
        if self.same_as:
            first, *others = map(_title, self.same_as)
            how = f", {self.how}" if self.how else ""
            more = f" (and of {', '.join(others[:_MOST_NAMED])})" if others else ""
            return f"its types are those of {first}{how}{more}"
        n_tensors = len(self.tensor_types)
        given = n_tensors - self.n_decided - len(self.unwritable) - len(self.fixed)
        verb = "gives" if len(self.rules) == 1 else "give"
        more = f", and {counted(len(self.rules), 'rule')} {verb} {self.n_decided:,} theirs"
        return (
            f"{_title(self.base)} gives {given:,} of {counted(n_tensors, 'tensor')} their types"
            f"{more if self.rules else ''}"
        )

    def notes(self) -> Iterator[str]:
        """What the recipe cannot say, and what it says only with an importance matrix."""
        if self.unwritable:
            kinds = ", ".join(sorted({kind.name for kind in self.unwritable.values()}))
            yield (
                f"{counted(len(self.unwritable), 'tensor')} of {kinds}, such as "
                f"{next(iter(self.unwritable))}: reap2gguf reads this type and does not write it, "
                "so the recipe gives another one"
            )
        if self.fixed:
            name, kind = next(iter(self.fixed.items()))
            yield (
                f"{counted(len(self.fixed), 'tensor')} of a type that no recipe decides, as "
                f"llama.cpp never quantizes them: {name} is {kind.name} in the file"
            )
        if self.need_imatrix:
            yield (
                f"without an importance matrix, {counted(len(self.need_imatrix), 'tensor')} would "
                f"get another type, such as {self.need_imatrix[0]}"
            )

    def as_toml(self) -> str:
        """The recipe as TOML, with comments."""
        return "\n".join(self._lines()) + "\n"

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        return {
            "file": self.file,
            "what": self.what,
            "same_as": list(self.same_as),
            "base": self.base,
            "label": self.recipe.label,
            "file_type": self.recipe.file_type,
            "rules": [
                {
                    "match": rule.selector.match,
                    "layers": rule.selector.layers,
                    "type": rule.tensor_type.name,
                    "tensors": len(rule.names),
                }
                for rule in self.rules
            ],
            "notes": list(self.notes()),
            "types": {name: kind.name for name, kind in self.tensor_types.items()},
            "unwritable": list(self.unwritable),
            "fixed": list(self.fixed),
            "toml": self.as_toml(),
        }

    def _lines(self) -> Iterator[str]:
        yield f"# {self.file}: {self.what}"
        yield from (f"# {note}" for note in self.notes())
        yield f"title = {toml_string(self.recipe.title)}"
        yield f"label = {toml_string(self.recipe.label)}"
        yield f"extends = {toml_string(self.base)}"
        for rule in self.rules:
            yield from ("", f"[[rules]]  # {counted(len(rule.names), 'tensor')}")
            yield f"match = {toml_string(rule.selector.match)}"
            if rule.selector.layers:
                yield f"layers = {toml_string(rule.selector.layers)}"
            yield f"type = {toml_string(rule.tensor_type.name)}"
            if self.unwritable:
                yield "fallback = true"


@dataclass(frozen=True)
class _Base:
    """A file type or a recipe, and how far its types are those of the file."""

    recipe: Recipe
    n_wrong: int
    how: str | None  # None: some are not; else "", or with what all are
    with_imatrix: bool  # whether the file was made with an importance matrix, if this is its base


def counted(number: int, noun: str) -> str:
    """A number of things.

    >>> counted(1, "rule"), counted(1200, "tensor")
    ('1 rule', '1,200 tensors')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _title(name: str) -> str:
    if name == "NVFP4":
        return f"the file type {name}"  # llama-quantize does not make it
    if name in IK_MIXTURES:
        return f"{LOADER}'s {name}"
    return f"llama-quantize's {name}" if name in MIXTURES else f"the recipe {name}"


def recipe_of_header(header: GgufHeader, name: str) -> FoundRecipe:
    """The recipe of a GGUF file called `name`, from its header.

    Raises what `model_from_gguf` raises for a file whose model is not known.
    """
    return _Search(header, name).found()


class _Search:
    def __init__(self, header: GgufHeader, name: str) -> None:
        found = model_from_gguf(header, BY_GGUF)
        self._header, self._name = header, one_line(PurePath(name).name or name)
        self._facts: ModelFacts = found.model.facts
        self._tensors: Sequence[GgufTensor] = found.model.gguf_tensors(found.template)
        self._types = {
            tensor.name: header.tensors[tensor.name].tensor_type for tensor in self._tensors
        }
        self._places = spots(list(self._types))
        some = load_recipe("Q4_K_M")
        self._free = {
            tensor.name: self._types[tensor.name]
            for tensor in self._tensors
            if fixed_type(tensor, some) is None and holds_weights(self._types[tensor.name])
        }
        self._with_imatrix = any(key.startswith("quantize.imatrix.") for key in header.metadata)

    @cached_property
    def _file_type(self) -> str:
        """What the header calls the file's mixture; "" if it is none of llama.cpp's."""
        value = self._header.metadata.get(Keys.General.FILE_TYPE)
        both = {**MIXTURES, **IK_MIXTURES}
        known = {int(one.file_type): name for name, one in both.items()}
        return known.get(value, "") if type(value) is int else ""

    def found(self) -> FoundRecipe:
        """The recipe with the fewest rules of its own."""
        bases = sorted(self._bases(), key=self._rank)
        tried = bases[: 1 if bases[0].how is not None else _MOST_BASES]
        extended = [(base, *self._extended(base)) for base in tried]
        base, rules, recipe = min(extended, key=lambda one: len(one[1]))
        fixed = self._fixed(recipe)
        is_whole = not self._unwritable and not fixed
        return FoundRecipe(
            self._name,
            base.recipe.name,
            tuple(one.recipe.name for one in bases if one.how is not None and is_whole),
            base.how or "",
            recipe,
            tuple(rules),
            self._types,
            self._unwritable,
            fixed,
            tuple(sorted(self._wrong(recipe, False))),
        )

    def _fixed(self, recipe: Recipe) -> dict[str, Type]:
        """Tensors that no recipe decides, and of which llama.cpp's type is not the file's."""
        types = resolve(recipe, *self._model, True).tensor_types()
        return {
            name: kind
            for name, kind in self._types.items()
            if name not in self._free and holds_weights(kind) and types[name] is not kind
        }

    @cached_property
    def _unwritable(self) -> dict[str, Type]:
        return {name: kind for name, kind in self._types.items() if not holds_weights(kind)}

    @property
    def _model(self) -> tuple[Sequence[GgufTensor], ModelFacts, int]:
        return self._tensors, self._facts, self._facts.n_experts

    def _wrong(self, recipe: Recipe, has_imatrix: bool) -> set[str]:
        """Tensors that a recipe would give another type."""
        types = resolve(recipe, *self._model, has_imatrix).tensor_types()
        return {name for name, kind in self._free.items() if types[name] is not kind}

    def _needed(self, recipe: Recipe, with_imatrix: bool) -> set[str]:
        """The same, without an importance matrix too, unless the file was made with one."""
        wrong = self._wrong(recipe, True)
        return wrong if with_imatrix else wrong | self._wrong(recipe, False)

    def _bases(self) -> Iterator[_Base]:
        is_ik = any(isinstance(kind, IkType) for kind in self._types.values())
        names = IK_MIXTURES if is_ik else MIXTURES
        plain = [replace(load_recipe(name), name=name) for name in names]
        shipped = [load_recipe(name) for name in shipped_recipes()]
        for recipe in (*plain, *(one for one in shipped if one.rules and one.is_ik is is_ik)):
            try:
                with_, without = self._wrong(recipe, True), self._wrong(recipe, False)
            except RecipeError:
                continue  # one of its rules is not for this model
            how = None
            if not with_ or not without:
                how = "" if with_ == without else _HOW[not with_]
            weighted = self._with_imatrix or how == _HOW[True]
            yield _Base(recipe, len(with_ if weighted else with_ | without), how, weighted)

    def _rank(self, base: _Base) -> tuple[bool, int, bool, bool, bool]:
        """The order in which bases are tried and named."""
        return (
            base.how is None,
            base.n_wrong,
            base.recipe.name != self._header.metadata.get(_RECIPE_KEY),
            base.recipe.file_type != self._file_type,
            base.recipe.name not in (*MIXTURES, *IK_MIXTURES),
        )

    def _extended(self, base: _Base) -> tuple[list[CoverRule], Recipe]:
        """Rules before a recipe's own, with which every tensor gets its type, and the whole.

        Rules change what the file type counts, and so the types of other tensors: those get rules
        in the next round.
        """
        needed = self._needed(base.recipe, base.with_imatrix)
        while True:
            rules = cover(self._places, self._free, needed)
            recipe = self._with_rules(base.recipe, rules)
            if not (wrong := self._needed(recipe, base.with_imatrix)):
                return rules, recipe
            assert not wrong <= needed, f"{self._name}: {sorted(wrong)[0]} did not get its type"
            needed |= wrong

    def _with_rules(self, base: Recipe, rules: Sequence[CoverRule]) -> Recipe:
        # of a tensor whose type cannot be written, the rows may not fill another one's blocks
        loose = len(self._unwritable) > 0
        own = [
            Rule(one.selector.match, one.tensor_type, fallback=loose, layers=one.selector.layers)
            for one in rules
        ]
        inherited = [replace(rule, inherited=True) for rule in base.rules]
        title = f"Types of {self._name}"
        recipe = Recipe(base.name, title, self._label(base), base.file_type, (*own, *inherited), "")
        return replace(recipe, source=recipe.as_toml())

    def _label(self, base: Recipe) -> str:
        """What ends the file's name, if it can be a label."""
        part = parse_part_name(self._name)
        found = _LABEL.search(part.stem if part else self._name.removesuffix(".gguf"))
        label = found[1] if found and not label_fault(found[1]) else base.label
        return f"{IK_LABEL}{label}" if base.is_ik and not label.startswith(IK_LABEL) else label
