"""Recipe files: a llama.cpp file type and ordered per-tensor overrides, in TOML.

title = "Unsloth-style 4-bit"
label = "IQ4_K_M"                  # the end of the file name
file_type = "Q4_K_M"               # llama.cpp's mixture; also general.file_type
[[rules]]                          # first match wins; a rule that matches nothing is an error
match = "blk.*.ffn_*_shexp.weight" # glob on the GGUF tensor name
type = "Q8_0"
optional = true                    # only some architectures have such a tensor
"""

from __future__ import annotations

import fnmatch
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from reap2gguf.errors import RecipeError, UsageError
from reap2gguf.files import is_plain, plain_size
from reap2gguf.ggml import STORABLE
from reap2gguf.messages import shown
from reap2gguf.quantizing.file_types import Mixture, mixture_named
from reap2gguf.quantizing.labels import label_fault
from reap2gguf.resources import shipped_folder

_MAX_RECIPE_BYTES = 2**18
_MAX_RULES = 1000
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_STARS = 16  # of a glob: each one is tried at every letter of a name
_GLOB = re.compile(r"[A-Za-z0-9_.*?\[\]!-]{1,200}")
# Strings and comments, then keys of many parts: tomllib keeps every beginning of a dotted key, so
# that one of 40 KB would take gigabytes.
_QUOTED = re.compile(
    r"""
    [#][^\n]*+
    | "{3} (?: \\. | [^\\] )*? (?: "{3} | \\?\Z )
    | '{3} .*? (?: '{3} | \Z )
    | " (?: \\. | [^"\\\n] )*+ "?
    | ' [^'\n]*+ '?
    """,
    re.DOTALL | re.VERBOSE,
)
_MANY_PARTS = re.compile(r"(?<![\w-])(?:[\w-]++[ \t]*+\.[ \t]*+){16}")
_RECIPE_KEYS = {"title", "label", "file_type", "rules"}
_RULE_KEYS = {"match", "type", "optional"}


@dataclass(frozen=True)
class Rule:
    """One override: tensors whose GGUF name fits `match` get `tensor_type`."""

    match: str
    tensor_type: GGMLQuantizationType
    optional: bool = False

    def fits(self, name: str) -> bool:
        """Whether a GGUF tensor's name is one that the rule is for."""
        return self._pattern.fullmatch(name) is not None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        # fnmatch keeps only so many, and a recipe may have more rules
        return re.compile(fnmatch.translate(self.match))


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe; `source` is its text, kept for the manifest and the card."""

    name: str
    title: str
    label: str
    file_type: str
    rules: tuple[Rule, ...]
    source: str

    @property
    def mixture(self) -> Mixture:
        return mixture_named(self.file_type)

    def with_label(self, label: str) -> Recipe:
        """The same recipe for files of another label. Raises RecipeError if it cannot be one."""
        _check_label(label, f"recipe {self.name!r}")
        return replace(self, label=label)


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the program, by name."""
    return {path.stem: path for path in sorted(shipped_folder("recipes").glob("*.toml"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe given by name or by path; RecipeError lists the known names."""
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    path = Path(os.path.expanduser(name))
    if path.suffix == ".toml" and is_plain(path):
        return path
    raise RecipeError(
        f"no recipe {name!r}; expected a .toml file or one of {', '.join(shipped)} "
        "(see `reap2gguf recipes list`)"
    )


def load_recipe(name: str) -> Recipe:
    """Read and check a recipe by name or path. Raises RecipeError."""
    path = find_recipe(name)
    try:
        if plain_size(path) > _MAX_RECIPE_BYTES:
            raise RecipeError(f"{path}: over {_MAX_RECIPE_BYTES:,} bytes, too large for a recipe")
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from error
    return parse_recipe(source, path.stem, str(path))


def parse_recipe(source: str, name: str, where: str) -> Recipe:
    """A recipe from its text; RecipeError names `where` and the key that is wrong."""
    if _MANY_PARTS.search(_QUOTED.sub("q", source)):
        raise RecipeError(f"{where}: not valid TOML (a key of over 16 parts)")
    try:
        values = tomllib.loads(source)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError
        raise RecipeError(f"{where}: not valid TOML ({error})") from error
    _refuse_unknown(values, _RECIPE_KEYS, where)
    rules = values.get("rules", [])
    if not isinstance(rules, list) or len(rules) > _MAX_RULES:
        raise RecipeError(f"{where}: rules must be at most {_MAX_RULES} [[rules]] tables")
    label = _text(values, "label", where)
    _check_label(label, where)
    file_type = _text(values, "file_type", where)
    try:
        mixture_named(file_type)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
    parsed = tuple(_rule(rule, f"{where}: rule {i + 1}") for i, rule in enumerate(rules))
    return Recipe(name, _text(values, "title", where), label, file_type, parsed, source)


def load_recipes(names: Sequence[str], labels: Mapping[str, str]) -> list[Recipe]:
    """Recipes by name or path; `labels` gives some of them, by the same name, another label.

    Raises RecipeError, and UsageError if `labels` names a recipe that is not among them.
    """
    recipes = {name: load_recipe(name) for name in names}
    for name, label in labels.items():
        found = [key for key, recipe in recipes.items() if name in (key, recipe.name)]
        if not found:
            raise UsageError(
                f"--label {name}={label}: no recipe {name!r} is asked for; expected one of "
                f"{', '.join(recipes)}"
            )
        for key in found:
            recipes[key] = recipes[key].with_label(label)
    return [recipes[name] for name in names]


def _check_label(label: str, where: str) -> None:
    if not _LABEL.fullmatch(label):
        raise RecipeError(
            f"{where}: label {shown(label)}, expected letters, digits, '.', '_' and '-'"
        )
    if fault := label_fault(label):
        raise RecipeError(
            f"{where}: label {label!r} {fault}, expected one such as Q4_K_M; choose another"
        )


def _rule(values: Any, where: str) -> Rule:
    if not isinstance(values, dict):
        raise RecipeError(f"{where}: expected a [[rules]] table")
    _refuse_unknown(values, _RULE_KEYS, where)
    match, tensor_type = _text(values, "match", where), _text(values, "type", where)
    if not _GLOB.fullmatch(match):
        raise RecipeError(
            f"{where}: match {shown(match)} is not a glob on "
            "GGUF tensor names, such as blk.*.attn_v.weight"
        )
    if (n_stars := match.count("*")) > _MAX_STARS:
        raise RecipeError(
            f"{where}: match {shown(match)} has {n_stars} stars, expected at most {_MAX_STARS}"
        )
    optional = values.get("optional", False)
    if not isinstance(optional, bool):
        raise RecipeError(f"{where}: optional is {shown(optional)}, expected true or false")
    known = {storable.name for storable in STORABLE}
    if tensor_type not in known:
        near = tensor_type.upper().replace("-", "_")
        hint = f"; did you mean {near}?" if near in known else _foreign_hint(tensor_type)
        raise RecipeError(f"{where}: type {shown(tensor_type)} is not a GGML tensor type{hint}")
    return Rule(match, GGMLQuantizationType[tensor_type], optional)


def _foreign_hint(tensor_type: str) -> str:
    """File types and ik_llama.cpp's types are what people confuse with tensor types."""
    if re.fullmatch(r"Q\d_K_[SML]", tensor_type):
        return f"; {tensor_type} is a file type, the tensor type is {tensor_type[:4]}"
    if re.fullmatch(r"IQ\d_K[ST]{0,2}", tensor_type):
        return "; it exists only in ik_llama.cpp, and llama.cpp cannot load it"
    return ""


def _text(values: Mapping[str, Any], key: str, where: str) -> str:
    value = values.get(key)
    if not isinstance(value, str) or not value.strip():
        raise RecipeError(f"{where}: {key} is {shown(value)}, expected text")
    return value


def _refuse_unknown(values: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(values.keys() - known):
        raise RecipeError(
            f"{where}: unknown key {shown(unknown[0])}, expected {', '.join(sorted(known))}"
        )
