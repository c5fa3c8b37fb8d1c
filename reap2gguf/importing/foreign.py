"""Recipes of other programs: what their texts say, before it is compared with a model.

As in llama.cpp (`tools/quantize`, `src/llama-quant.cpp`) and ik_llama.cpp, a pattern is searched
for in the name of a tensor and the first that is found counts; llama-quantize makes the letters of
the patterns of `--tensor-type` small. `--token-embedding-type` and `--output-tensor-type` come
before all patterns, `--leave-output-tensor` before these. No pattern counts in a file type that
quantizes nothing, and with `--pure` no `--custom-q`. A type whose blocks do not fill the rows of a
tensor is replaced by a smaller one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gguf import GGMLQuantizationType as Type

from reap2gguf.errors import RecipeError
from reap2gguf.files import is_gguf, plain_size
from reap2gguf.importing.command_line import Command, is_command, read_command
from reap2gguf.importing.foreign_types import (
    check_base,
    plain_name,
    read_file_type,
    read_type,
    refuse_only_ik,
    usual_file_type,
)
from reap2gguf.importing.patterns import selector_of
from reap2gguf.messages import shown
from reap2gguf.quantizing.recipe import MAX_RULES, Rule, load_recipe
from reap2gguf.quantizing.selector import check_regex

if TYPE_CHECKING:
    from reap2gguf.quantizing.recipe import Recipe

MOST_BYTES = 2**18  # of a text
_UNQUANTIZED = ("F32", "F16", "BF16")
OUTPUT, EMBEDDING = "output.weight", "token_embd.weight"


@dataclass(frozen=True)
class ForeignRule:
    """A rule as it was written, and as this program writes it."""

    text: str  # PATTERN=TYPE, or an option and its value
    rule: Rule


@dataclass(frozen=True)
class ForeignRecipe:
    """What a text says."""

    program: str  # what reads such texts
    base: Recipe  # of the file type, for tensors that no rule matches
    rules: tuple[ForeignRule, ...]
    tied_output: Type | None = None  # of the embeddings, where they are the output too
    notes: tuple[str, ...] = ()


@dataclass
class _Read:
    """What has been read of a text so far."""

    where: str
    notes: list[str] = field(default_factory=list)
    items: list[tuple[str, str, str]] = field(default_factory=list)  # pattern, type, place

    def add(self, item: str, place: str, lower: bool) -> None:
        """A PATTERN=TYPE, which is cut at its first `=`."""
        pattern, equals, name = item.partition("=")
        if not equals or not pattern or not name:
            raise RecipeError(
                f"{self.where}{place}: {shown(item)} is not PATTERN=TYPE, such as attn_v=q8_0"
            )
        plain = plain_name(name)
        if plain != name:
            self.notes.append(
                f"{name} became {plain}: the same values, which ik_llama.cpp loads in another order"
            )
        self.items.append((pattern.lower() if lower else pattern, plain, place))
        if len(self.items) > MAX_RULES:
            raise RecipeError(f"{self.where}: over {MAX_RULES:,} rules, which no recipe has")

    def rules(self) -> list[ForeignRule]:
        """The rules; all types that only ik_llama.cpp has are named in one error."""
        refuse_only_ik((name for _, name, _ in self.items), self.where)
        found = []
        for pattern, name, place in self.items:
            at = f"{self.where}{place}"
            kind = read_type(name, f"{at}: {pattern}")
            check_regex(pattern, f"{at}: pattern")
            match, layers, is_regex = selector_of(pattern)
            rule = Rule(
                match,
                kind,
                optional=True,
                fallback=True,
                layers=layers,
                is_regex=is_regex,
                where=at,
            )
            found.append(ForeignRule(f"{pattern}={name}", rule))
        return found


def read_foreign(text: str, where: str, base: str | None = None) -> ForeignRecipe:
    """The recipe in a text of another program, called `where` in errors.

    `base` names the file type or recipe for tensors that no rule matches, in place of the text's.
    Raises RecipeError.
    """
    if len(text.encode("utf-8", "replace")) > MOST_BYTES:
        raise RecipeError(f"{where}: over {MOST_BYTES:,} bytes, too large for a recipe")
    if is_command(text):
        return _of_command(read_command(text, where), where, base)
    if "=" not in text and len(words := text.split()) == 1:
        raise RecipeError(
            f"{where}: {shown(words[0])} is neither a file, nor a llama-quantize command, "
            "nor PATTERN=TYPE, such as attn_v=q8_0"
        )
    read = _Read(where)
    for number, line in enumerate(text.splitlines(), start=1):
        for item in list_items(line):
            read.add(item, f", line {number}", lower=False)
    if not read.items:
        raise RecipeError(
            f"{where}: has no rule; expected a llama-quantize command, or lines PATTERN=TYPE"
        )
    rules = read.rules()
    usual = usual_file_type([one.rule.tensor_type for one in rules])
    if base is None:
        read.notes.append(
            f"the list names no file type; {usual} is for tensors that no rule matches (--base is "
            "another one)"
        )
    found = base_named(base or usual)
    check_base([one.rule.tensor_type for one in rules], found, where)
    return ForeignRecipe("a list", found, tuple(rules), notes=tuple(dict.fromkeys(read.notes)))


def list_items(line: str) -> Iterator[str]:
    """The PATTERN=TYPE in a line of a list; what follows a # is a comment, blanks around = none."""
    plain = re.sub(r"\s*=\s*", "=", re.sub(r"(^|\s)#.*", "", line))
    yield from (item for item in re.split(r"[\s,]+", plain) if item)


def _of_command(command: Command, where: str, base: str | None) -> ForeignRecipe:
    read = _Read(where, list(command.notes))
    if command.leaves_output:
        read.notes.append(
            "--leave-output-tensor keeps the type of the file that is read: taken for BF16"
        )
    types: dict[str, Type] = {}
    for option, value in command.options:
        if option == "--tensor-type":
            read.add(value, f": {option}", lower=True)
        elif option == "--tensor-type-file":
            for item in text_of_file(Path(value), f"{where}: {option} ").split():
                read.add(item, f": {option} {value}", lower=True)
        elif option == "--custom-q" and command.is_pure:
            read.notes.append("with --pure, ik_llama.cpp ignores --custom-q: left out")
        elif option == "--custom-q":
            for line in value.splitlines():
                for item in list_items(line):
                    read.add(item, f": {option}", lower=False)
        else:
            types[option] = read_type(plain_name(value), f"{where}: {option}")
    found = _base(command, where, base)
    if found.file_type in _UNQUANTIZED and read.items:
        read.notes.append(
            f"no pattern counts in a file of {found.file_type}, as in llama-quantize: "
            f"{len(read.items):,} left out"
        )
        read.items.clear()
    rules = [*_first(command, types, found), *read.rules()]
    check_base([one.rule.tensor_type for one in rules], found, where)
    if command.is_pure:
        rules.append(_pure(found))
    tied = types.get("--output-tensor-type")
    if command.is_pure or "--token-embedding-type" in types or found.file_type in _UNQUANTIZED:
        tied = None
    notes = tuple(dict.fromkeys(read.notes))
    return ForeignRecipe("a llama-quantize command", found, tuple(rules), tied, notes)


def _first(command: Command, types: dict[str, Type], base: Recipe) -> Iterator[ForeignRule]:
    """Rules that come before all patterns."""
    if command.leaves_output:
        yield ForeignRule("--leave-output-tensor", Rule(OUTPUT, Type.BF16, optional=True))
    elif (found := types.get("--output-tensor-type")) is not None:
        rule = Rule(OUTPUT, found, optional=True)
        yield ForeignRule(f"--output-tensor-type {found.name}", rule)
    if (found := types.get("--token-embedding-type")) is not None:
        yield ForeignRule(f"--token-embedding-type {found.name}", Rule(EMBEDDING, found))


def _pure(base: Recipe) -> ForeignRule:
    kind = Type.MXFP4 if base.file_type == "MXFP4_MOE" else base.mixture.base
    return ForeignRule("--pure", Rule("*", kind, optional=True, fallback=True))


def _base(command: Command, where: str, base: str | None) -> Recipe:
    """The recipe of the command's file type: a word that is its name, else its number."""
    if base is not None:
        return base_named(base)
    words = command.words
    for word in (*(one for one in words if not one.isdigit()), *words[1:]):
        if (name := read_file_type(word, where)) is not None:
            return base_named(name)
    raise RecipeError(
        f"{where}: names no file type such as Q4_K_M, which a llama-quantize command ends with; "
        "write it at the end, or pass --base"
    )


def base_named(name: str) -> Recipe:
    """The recipe that another one may extend. Raises RecipeError for a file."""
    if name.endswith(".toml"):
        raise RecipeError(
            f"--base {name}: expected a name that `reap2gguf recipes list` prints, not a file"
        )
    recipe = load_recipe(name)
    return recipe if recipe.rules else replace(recipe, name=recipe.file_type)


def text_of_file(path: Path, what: str = "") -> str:
    """The text of a file; RecipeError, which begins with `what`, if it cannot be read."""
    try:
        if is_gguf(path):
            raise RecipeError(
                f"{what}{path}: a GGUF file; `reap2gguf recipes of {path}` prints its recipe"
            )
        if plain_size(path) > MOST_BYTES:
            raise RecipeError(f"{what}{path}: over {MOST_BYTES:,} bytes, too large for a recipe")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{what}{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{what}{path}: cannot be read ({error})") from error
