"""Whether the output matrix is the token embedding: the stored tensors decide, not the config.

transformers ties the two only where the config says so and no different `lm_head.weight` is stored.
Of a nested config, Qwen3_5MoeForConditionalGeneration reads the top and Qwen3_5MoeForCausalLM the
text model's section, so both must state the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reap2gguf.checkpoint.config import ConfigReader

KEY = "tie_word_embeddings"


@dataclass(frozen=True)
class TyingKeys:
    """How the configs of a family say that the output matrix is the token embedding."""

    default: bool = False  # transformers' value of an absent key
    alias: str | None = None  # another spelling, which decides where it is present

    def read(self, level: ConfigReader) -> bool | None:
        """What one level of a config says; None if nothing."""
        for key in (self.alias, KEY):
            if key is not None and key in level.values:
                return level.boolean(key, default=self.default)
        return None


@dataclass(frozen=True)
class Tying:
    """Whether the output matrix is the token embedding, and what its reader must know."""

    tied: bool
    caveat: str = ""


def read_tying(
    outer: ConfigReader,
    text: ConfigReader,
    has_head: bool,
    head_is_copy: Callable[[], bool],
    keys: TyingKeys = TyingKeys(),
) -> Tying:
    """Decide from the config's two levels, which may be one, and from the stored head.

    `head_is_copy` compares a stored head with the embedding; it is called only if the config says
    that they are tied.
    """
    said = [keys.read(reader) for reader in (outer, text)]
    levels = [keys.default if one is None else one for one in said]
    # as transformers reads a nested config; without the key at the top, the section decides
    says_tied = levels[1] if said[0] is None else levels[0]
    if not has_head:
        caveat = ""
        if levels[0] is not levels[1]:
            where = "at the top" if levels[0] else "in the text model's section"
            caveat = (
                f"no lm_head.weight is stored and config.json says {KEY} only {where}, which not "
                "every class of transformers reads; the pruned config.json says it at both levels"
            )
        return Tying(any(levels), caveat)
    if not any(levels) or head_is_copy():
        return Tying(says_tied)
    return Tying(
        False,
        f"config.json says {KEY}, but a different lm_head.weight is stored: it is kept as the "
        f"output matrix, as in transformers, and the pruned config.json says {KEY} false",
    )


def with_tying(
    config: dict[str, Any], sections: Sequence[str], tied: bool, keys: TyingKeys = TyingKeys()
) -> dict[str, Any]:
    """A config, changed in place, that states the truth at every level that some loader reads.

    `sections` lead to the text model's section. A level without a key says the family's default.
    """
    level = config
    for key in ("", *sections):
        level = level[key] if key else level
        alias = keys.alias if keys.alias in level else None
        if alias is not None:
            level[alias] = tied
        if KEY in level or (alias is None and tied is not keys.default):
            level[KEY] = tied
    return config
