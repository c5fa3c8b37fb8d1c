"""Recipe files: a llama.cpp file type and ordered per-tensor overrides, in TOML.

title = "Unsloth-style 4-bit"
label = "IQ4_K_M"                  # the end of the file name
file_type = "Q4_K_M"               # llama.cpp's mixture; also general.file_type
extends = "q4km"                   # a shipped recipe or a file type, whose rules come last
[[rules]]                          # first match wins; a rule that matches nothing is an error
match = "blk.*.ffn_*_shexp.weight" # glob on the GGUF tensor name, or a role such as shared_expert
type = "Q8_0"
regex = "attn_[qkv]"               # in place of match: searched for in the name (`name_regex.py`)
layers = "0-3"                     # only in these layers
optional = true                    # only some architectures have such a tensor
fallback = true                    # rows that its blocks do not fill get llama.cpp's other type
override = true                    # of --tensor-type: rules below may be left without tensors
inherited = true                   # of the recipe in `extends`: rules above may take all it has
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from reap2gguf.errors import RecipeError, UsageError
from reap2gguf.files import is_plain
from reap2gguf.messages import shown
from reap2gguf.quantizing.file_types import IK_MIXTURES, MIXTURES, REFUSED, Mixture, mixture_named
from reap2gguf.quantizing.labels import IK_LABEL, check_ik_label, label_fault
from reap2gguf.quantizing.minimum import MINIMUM_KEYS, Minimum, check_weighted, read_minimum
from reap2gguf.quantizing.named import RecipeText
from reap2gguf.quantizing.selector import Selector, check_glob, check_layers, check_regex
from reap2gguf.quantizing.toml_text import (
    SourceLines,
    parse_toml,
    read_toml_file,
    toml_pattern,
    toml_string,
)
from reap2gguf.quantizing.type_names import tensor_type_named
from reap2gguf.resources import shipped_folder

MAX_RULES = 1000
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# keys that a recipe and a rule must have, and what each is
_RECIPE_TEXTS = {
    "title": "what the recipe is, in a few words",
    "label": "the end of the file name, such as Q4_K_M",
    "file_type": "llama.cpp's mixture, such as Q4_K_M",
}
_RULE_TEXTS = {
    "match": "a glob on GGUF tensor names, such as blk.*.attn_v.weight, or a role such as experts",
    "type": "a GGML tensor type, such as Q8_0",
}
_RECIPE_KEYS = {*_RECIPE_TEXTS, *MINIMUM_KEYS, "extends", "rules"}
_RULE_FLAGS = ("optional", "fallback", "override", "inherited")
_RULE_KEYS = {*_RULE_TEXTS, *_RULE_FLAGS, *MINIMUM_KEYS, "layers", "regex"}
# llama-quantize takes these names for the medium mixtures as well
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
# what the recipes that are being read extend, from the first on
_extending: ContextVar[tuple[object, ...]] = ContextVar("extending", default=())
CUSTOM = "+custom"  # ends the name of a recipe that has overrides
_MOST_IN_TITLE = 3  # overrides


@dataclass(frozen=True)
class Rule:
    """One exception: tensors that `match` and `layers` select get `tensor_type`.

    With `override` it was put before a recipe's own rules, and may take all tensors of one; with
    `inherited` it is of a recipe that this one extends, and may lose all tensors.
    """

    match: str
    tensor_type: GGMLQuantizationType
    optional: bool = False
    override: bool = False
    fallback: bool = False  # as llama-quantize does with any type: Q5_1 for Q5_K, for example
    layers: str = ""  # "" is all
    inherited: bool = False
    is_regex: bool = False  # `match` is searched for in names
    minimum: Minimum | None = None  # of importance; None: the recipe's
    where: str = field(default="", compare=False)  # file and line, for errors

    @cached_property
    def selector(self) -> Selector:
        """The tensors that the rule is for."""
        return Selector(self.match, self.layers, self.is_regex)

    @property
    def title(self) -> str:
        """What errors call it."""
        if self.override:
            layers = f"@{self.layers}" if self.layers else ""
            option = "--set" if self.selector.is_role else "--tensor-type"
            return f"{option} {self.match}{layers}={self.tensor_type.name}"
        kind = "regex " if self.is_regex else ""
        return f"rule {kind}{self.match!r}" + (f" in layers {self.layers!r}" if self.layers else "")

    def place(self, recipe: str) -> str:
        """How errors about the rule begin: its file and line, or the recipe's name."""
        return self.where or f"recipe {recipe!r}"


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe; `source` is its text, kept for the manifest and the card."""

    name: str
    title: str
    label: str
    file_type: str
    rules: tuple[Rule, ...]
    source: str
    minimum: Minimum | None = None  # of importance of the experts

    @property
    def mixture(self) -> Mixture:
        return mixture_named(self.file_type)

    @property
    def is_ik(self) -> bool:
        """Whether only ik_llama.cpp loads its files."""
        return self.file_type in IK_MIXTURES

    def with_label(self, label: str) -> Recipe:
        """The same recipe for files of another label. Raises RecipeError if it cannot be one."""
        check_label(label, f"recipe {self.name!r}")
        check_ik_label(label, self.is_ik, f"recipe {self.name!r}")
        return replace(self, label=label)

    def with_overrides(self, overrides: Sequence[Rule]) -> Recipe:
        """The same recipe with rules before its own; name, title and source say so."""
        if not overrides:
            return self
        words = [f"{rule.selector.words}={rule.tensor_type.name}" for rule in overrides]
        if (more := len(words) - _MOST_IN_TITLE) > 0:
            words = [*words[:_MOST_IN_TITLE], f"{more} more"]
        changed = replace(
            self,
            name=self.name.removesuffix(CUSTOM) + CUSTOM,
            title=f"{self.title}, with {', '.join(words)}",
            rules=(*overrides, *self.rules),
        )
        return replace(changed, source=changed.as_toml())

    def as_toml(self) -> str:
        """The recipe as TOML that `parse_recipe` reads, without the comments of its source."""
        return "\n".join(self._toml_lines()) + "\n"

    def _toml_lines(self) -> Iterator[str]:
        for key in _RECIPE_TEXTS:
            yield f"{key} = {toml_string(getattr(self, key))}"
        yield from () if self.minimum is None else self.minimum.toml_lines()
        for rule in self.rules:
            yield from ("", "[[rules]]")
            yield f"{rule.selector.key} = {toml_pattern(rule.match)}"
            yield f"type = {toml_string(rule.tensor_type.name)}"
            if rule.layers:
                yield f"layers = {toml_string(rule.layers)}"
            yield from (f"{key} = true" for key in _RULE_FLAGS if getattr(rule, key))
            yield from () if rule.minimum is None else rule.minimum.toml_lines()


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the program, by name."""
    return {path.stem: path for path in sorted(shipped_folder("recipes").glob("*.toml"))}


def find_recipe(name: str) -> Path | str:
    """What a recipe's name means: a shipped recipe's file, a .toml file, or a file type's name.

    Capitals, hyphens and underscores do not count in names. Raises RecipeError with the nearest
    name for an unknown one.
    """
    path = Path(os.path.expanduser(name))
    if path.suffix == ".toml":
        if is_plain(path):
            return path
        raise RecipeError(f"{name}: no such recipe file; `reap2gguf recipes list` prints the names")
    known = _known_names()
    if (found := known.get(_bare(name))) is not None:
        return found
    if os.path.isfile(path):
        raise RecipeError(f"{name}: the name of a recipe's file must end in .toml")
    if why := {_bare(one): why for one, why in REFUSED.items()}.get(_bare(name)):
        raise RecipeError(f"file type {shown(name)} is not supported: {why}")
    raise RecipeError(
        f"no recipe {shown(name)}; {_nearest(name, known)} a .toml file or a name that "
        "`reap2gguf recipes list` prints, such as Q4_K_M"
    )


def _known_names() -> dict[str, Path | str]:
    """What each name without hyphens and underscores means; shipped recipes come first."""
    file_types = {_bare(name): name for name in (*MIXTURES, *IK_MIXTURES)}
    aliases = {_bare(alias): name for alias, name in ALIASES.items()}
    shipped = {_bare(name): path for name, path in shipped_recipes().items()}
    meant = {bare: shipped.get(_bare(name), name) for bare, name in aliases.items()}
    return {**meant, **file_types, **shipped}


def _bare(name: str) -> str:
    return re.sub("[-_]", "", name).lower()


def _nearest(name: str, known: Mapping[str, Path | str]) -> str:
    bare = _bare(name)[:100]
    near = [one for one in known if len(bare) > 2 and one.startswith(bare)]
    near = near or difflib.get_close_matches(bare, known, n=1)
    if not near:
        return "pass"
    found = known[near[0]]
    return f"did you mean {found if isinstance(found, str) else found.stem}? Pass"


def load_recipe(name: str | RecipeText) -> Recipe:
    """Read and check a recipe: by name, by path, or from its text. Raises RecipeError."""
    if isinstance(name, RecipeText):
        recipe = parse_recipe(name.text, name.name, f"recipe {shown(name.name)}")
        return recipe if name.label is None else recipe.with_label(name.label)
    found = find_recipe(name)
    if isinstance(found, str):
        return _of_file_type(found)
    return parse_recipe(read_toml_file(found, "recipe", RecipeError), found.stem, str(found))


def _of_file_type(name: str) -> Recipe:
    """llama.cpp's own mixture, without exceptions."""
    label, title = name, f"{name}, llama.cpp's own mixture"
    if name in IK_MIXTURES:
        label, title = f"{IK_LABEL}{name}", f"{name}, which only ik_llama.cpp loads"
    recipe = Recipe(name, title, label, name, (), "")
    return replace(recipe, source=recipe.as_toml())


def parse_recipe(source: str, name: str, where: str) -> Recipe:
    """A recipe from its text; RecipeError names `where`, the line and the key that is wrong.

    With `extends`, the rules of that recipe follow, and the `source` holds them, so that it means
    the same wherever it is read.
    """
    values = parse_toml(source, where, RecipeError)
    if not values:
        raise RecipeError(
            f"{where}: is empty, expected a recipe; `reap2gguf recipes show q4km --toml` prints "
            "one to begin with"
        )
    lines = SourceLines(source, "rules")

    def at(key: str) -> str:
        return f"{where}, line {lines.top[key]}" if key in lines.top else where

    _refuse_unknown(values, _RECIPE_KEYS, at)
    rules = values.get("rules", [])
    if not isinstance(rules, list) or len(rules) > MAX_RULES:
        raise RecipeError(f"{where}: rules must be at most {MAX_RULES} [[rules]] tables")
    base = None
    if "extends" in values:
        base = _extended(_text(values, "extends", at, {}), at("extends"))
        values = {"label": base.label, "file_type": base.file_type, **values}
    title, label, file_type = (_text(values, key, at, _RECIPE_TEXTS) for key in _RECIPE_TEXTS)
    check_label(label, at("label"))
    try:
        mixture_named(file_type)
    except RecipeError as error:
        raise RecipeError(f"{at('file_type')}: {error}") from error
    minimum = read_minimum(values, at, None if base is None else base.minimum)
    known = lines if lines.has_all(len(rules)) else None
    is_ik = file_type in IK_MIXTURES
    check_ik_label(label, is_ik, at("label"))
    parsed = tuple(_rule(rule, i, where, known, minimum, is_ik) for i, rule in enumerate(rules))
    if base is None:
        return Recipe(name, title, label, file_type, parsed, source, minimum)
    inherited = tuple(replace(rule, inherited=True) for rule in base.rules)
    recipe = Recipe(name, title, label, file_type, (*parsed, *inherited), "", minimum)
    return replace(recipe, source=recipe.as_toml())


def _extended(name: str, where: str) -> Recipe:
    """The recipe that `extends` names."""
    if name.endswith(".toml"):
        raise RecipeError(
            f"{where}: extends is {shown(name)}, expected a name that `reap2gguf recipes list` "
            "prints; copy the rules of other files"
        )
    earlier = _extending.get()
    try:
        meant = _identity(name)
        if meant in earlier:
            raise RecipeError(f"{shown(name)} is extended by itself in the end; remove `extends`")
        here = _extending.set((*earlier, meant))
        try:
            return load_recipe(name)
        finally:
            _extending.reset(here)
    except RecipeError as error:
        raise RecipeError(f"{where}: extends: {error}") from error


def load_recipes(
    names: Sequence[str | RecipeText],
    labels: Mapping[str, str],
    overrides: Sequence[Rule] = (),
) -> list[Recipe]:
    """Recipes by name, path or text, each once, with `overrides` before the rules of each.

    `labels` gives some of them, by any of their names, another label. Raises RecipeError, and
    UsageError if `labels` names a recipe that is not among them.
    """
    # the same recipe by two spellings is one
    asked = {_identity(name): name for name in reversed(names)}
    recipes = {identity: load_recipe(name) for identity, name in reversed(asked.items())}
    for name, label in labels.items():
        found = [key for key, recipe in recipes.items() if _is_named(name, key, recipe)]
        if not found:
            raise UsageError(
                f"--label {name}={label}: no recipe {name!r} is asked for; expected one of "
                f"{', '.join(recipe.name for recipe in recipes.values())}"
            )
        for key in found:
            recipes[key] = recipes[key].with_label(label)
    return [recipe.with_overrides(overrides) for recipe in recipes.values()]


def _identity(name: str | RecipeText) -> object:
    """The same for two names of one recipe."""
    found = name if isinstance(name, RecipeText) else find_recipe(name)
    return os.path.realpath(found) if isinstance(found, Path) else found


def _is_named(name: str, identity: object, recipe: Recipe) -> bool:
    """Whether a name means a recipe that is asked for: its own name, or another spelling."""
    if name.removesuffix(CUSTOM) == recipe.name.removesuffix(CUSTOM):
        return True
    try:
        return _identity(name) == identity
    except RecipeError:
        return False  # the caller reports it


def check_label(label: str, where: str) -> None:
    """Raise RecipeError for a label that cannot end the name of a GGUF file."""
    if not _LABEL.fullmatch(label):
        raise RecipeError(
            f"{where}: label {shown(label)}, expected letters, digits, '.', '_' and '-'"
        )
    if fault := label_fault(label):
        raise RecipeError(
            f"{where}: label {label!r} {fault}, expected one such as Q4_K_M; choose another"
        )


def _rule(
    values: Any,
    position: int,
    where: str,
    lines: SourceLines | None,
    of_recipe: Minimum | None,
    is_ik: bool,
) -> Rule:
    def at(key: str | None = None) -> str:
        line = "" if lines is None else f", line {lines.of_table(position, key)}"
        return f"{where}{line}: rule {position + 1}"

    if not isinstance(values, dict):
        raise RecipeError(f"{at()}: expected a [[rules]] table")
    _refuse_unknown(values, _RULE_KEYS, at)
    is_regex = "regex" in values
    if is_regex and "match" in values:
        raise RecipeError(f"{at('regex')}: has both match and regex; remove one of them")
    key = "regex" if is_regex else "match"
    match, tensor_type = (_text(values, one, at, _RULE_TEXTS) for one in (key, "type"))
    (check_regex if is_regex else check_glob)(match, f"{at(key)}: {key}")
    layers = ""
    if "layers" in values:
        layers = _text(values, "layers", at, {})
        check_layers(layers, f"{at('layers')}: layers")
    flags = {key: values.get(key, False) for key in _RULE_FLAGS}
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise RecipeError(f"{at(key)}: {key} is {shown(value)}, expected true or false")
    kind = tensor_type_named(tensor_type, f"{at('type')}: type", is_ik)
    check_weighted(values, kind, at)
    own = read_minimum(values, at, of_recipe) if values.keys() & {*MINIMUM_KEYS} else None
    place = "" if lines is None else f"{where}, line {lines.of_table(position)}"
    return Rule(match, kind, **flags, layers=layers, is_regex=is_regex, minimum=own, where=place)


def _text(
    values: Mapping[str, Any], key: str, at: Callable[[str], str], known: Mapping[str, str]
) -> str:
    """A text of a table; `at` says where a key stands, and `known` what it is."""
    if key not in values:
        raise RecipeError(f"{at(key)}: missing key `{key}`, {known[key]}")
    value = values[key]
    if not isinstance(value, str) or not value.strip():
        raise RecipeError(f"{at(key)}: {key} is {shown(value)}, expected text")
    return value


def _refuse_unknown(values: Mapping[str, Any], known: set[str], at: Callable[[str], str]) -> None:
    if unknown := sorted(values.keys() - known):
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RecipeError(
            f"{at(unknown[0])}: unknown key {shown(unknown[0])}, expected "
            f"{', '.join(sorted(known))}{hint}"
        )
