"""Which tensors a rule is for: a glob or a regular expression on names, or a role; and layers.

Layers are written as `"3"`, `"0-3"`, `"8:"` (from 8 to the last), `"-4:"` (the last four), `"-1"`
or as a list of these with commas. They count decoder layers; an MTP block has the number after the
last and is meant only where that number is written.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from reap2gguf.errors import RecipeError
from reap2gguf.messages import shown
from reap2gguf.models.roles import ROLE_WORDS, Spot
from reap2gguf.quantizing.name_regex import NameRegex, RegexError

_MAX_STARS = 16  # of a glob: each one is tried at every letter of a name
_GLOB = re.compile(r"[A-Za-z0-9_.*?\[\]!-]{1,200}")
MAX_PARTS = 200  # of a list of layers
_LAYERS = re.compile(r"(?P<first>-?\d{1,5})(?P<more>:|-(?P<last>\d{1,5}))?")


@dataclass(frozen=True)
class Selector:
    """The tensors that a rule is for; `layers` is "" for tensors of all layers and of none."""

    match: str
    layers: str = ""
    is_regex: bool = False

    @property
    def key(self) -> str:
        """What it is called in TOML."""
        return "regex" if self.is_regex else "match"

    @property
    def words(self) -> str:
        """What errors and tables call it."""
        match = f"/{self.match}/" if self.is_regex else self.match
        return f"{match} in layers {self.layers}" if self.layers else match

    @property
    def cost(self) -> int:
        """How much work it is to match a name, where comparing it with one text is 1."""
        if self.is_regex:
            return 1 + self._regex.n_states // 8
        return 1 + self.match.count("*")

    @property
    def is_role(self) -> bool:
        """Whether it finds tensors by their role, not by their name."""
        return not self.is_regex and self.match in ROLE_WORDS

    def fits(self, spot: Spot) -> bool:
        """Whether a tensor is one of those."""
        if self.layers and not (spot.block is not None and self._has_layer(spot)):
            return False
        if self.is_regex:
            return self._regex.found_in(spot.name)
        if (roles := ROLE_WORDS.get(self.match)) is not None:
            return not roles.isdisjoint(spot.roles)
        return self._pattern.fullmatch(spot.name) is not None

    def _has_layer(self, spot: Spot) -> bool:
        assert spot.block is not None
        return any(low <= spot.block <= high for low, high in self._bounds(spot.n_layers))

    def advice(self, spots: Collection[Spot]) -> str:
        """What may be wrong with it if it finds no tensor of a model."""
        anywhere = replace(self, layers="")
        if self.layers and any(anywhere.fits(spot) for spot in spots):
            having = {spot.block for spot in spots if anywhere.fits(spot)} - {None}
            if not having:
                return f"{anywhere.words} is in no layer; remove `layers`"
            return f"the model has {anywhere.words} in layers {layers_text(having)}"
        if not self.is_role and not self.is_regex and "*" not in self.match:
            near = difflib.get_close_matches(self.match, ROLE_WORDS, n=1, cutoff=0.7)
            if near:
                return f"did you mean the role {near[0]}?"
        return ""

    def _bounds(self, n_layers: int) -> Iterator[tuple[int, int]]:
        """The first and the last layer of each range, in a model of `n_layers`."""
        for first, last in self._ranges if self.layers else ():
            high = n_layers - 1 if last is None else last
            yield (
                first if first >= 0 else n_layers + first,
                high if high >= 0 else n_layers + high,
            )

    def ends(self, n_layers: int) -> set[int]:
        """The layers next to where its ranges begin and end, in a model of `n_layers`."""
        bounds = self._bounds(n_layers)
        found = {layer for low, high in bounds for layer in (low - 1, low, high, high + 1)}
        return {layer for layer in found if 0 <= layer < n_layers}

    @cached_property
    def _ranges(self) -> list[tuple[int, int | None]]:
        """First and last layer, of which negative ones count from the end; None: the last one."""
        found: list[tuple[int, int | None]] = []
        for part in self.layers.split(","):
            parsed = _LAYERS.fullmatch(part.strip())
            assert parsed is not None  # `check_layers` was asked
            first, last = int(parsed["first"]), parsed["last"]
            if parsed["more"] == ":":
                found.append((first, None))
            else:
                found.append((first, first if last is None else int(last)))
        return found

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        # fnmatch keeps only so many, and a recipe may have more rules
        return re.compile(fnmatch.translate(self.match))

    @cached_property
    def _regex(self) -> NameRegex:
        return NameRegex(self.match)


def check_glob(match: str, where: str) -> None:
    """Raise RecipeError, which begins with `where`, for a text that no rule can match with."""
    if not _GLOB.fullmatch(match):
        raise RecipeError(
            f"{where} {shown(match)} is not a glob on GGUF tensor names, such as "
            "blk.*.attn_v.weight"
        )
    if (n_stars := match.count("*")) > _MAX_STARS:
        raise RecipeError(
            f"{where} {shown(match)} has {n_stars} stars, expected at most {_MAX_STARS}"
        )


def check_regex(pattern: str, where: str) -> None:
    """Raise RecipeError, which begins with `where`, for a pattern that cannot be searched for."""
    try:
        NameRegex(pattern)
    except RegexError as error:
        raise RecipeError(
            f"{where} {shown(pattern)} is not a regular expression on tensor names: {error}"
        ) from error


def check_layers(layers: str, where: str) -> None:
    """Raise RecipeError, which begins with `where`, for a text that names no layers."""
    parts = layers.split(",")
    if len(parts) > MAX_PARTS:
        raise RecipeError(f"{where} has {len(parts):,} parts, expected at most {MAX_PARTS}")
    for part in parts:
        parsed = _LAYERS.fullmatch(part.strip())
        if parsed is None or (parsed["last"] is not None and parsed["first"].startswith("-")):
            raise RecipeError(
                f'{where} is {shown(layers)}, expected numbers and ranges such as "0-3", "8:" '
                '(from 8 on), "-4:" (the last four) or "0,2,5-7"'
            )
        if parsed["last"] is not None and int(parsed["last"]) < int(parsed["first"]):
            raise RecipeError(
                f"{where} is {shown(layers)}: {part.strip()} ends before it begins; write the "
                "smaller number first"
            )


def layers_text(numbers: Collection[int | None]) -> str:
    """Numbers of layers as a rule writes them.

    >>> layers_text([7, 0, 1, 2, 5])
    '0-2,5,7'
    """
    runs: list[list[int]] = []
    for number in sorted(number for number in numbers if number is not None):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
