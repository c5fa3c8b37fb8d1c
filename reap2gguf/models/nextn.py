"""Models whose MTP block is stored as one more decoder layer: DeepSeek-V3, and GLM-4.5 and later.

Below `model.layers.N.`, with N the number of the trunk's layers, is a whole decoder layer with
experts, beside `eh_proj` and three norms; in some checkpoints also an embedding and a head of the
block's own. transformers loses these tensors when it saves a model, and its config still counts
them: so the tensors decide, and what is written says what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from gguf import Keys

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.facts import read_n_layers
from reap2gguf.models.rules import NEXTN, MtpLayout, TensorRule
from reap2gguf.models.shared import UINT32, DecoderModel, Entry

if TYPE_CHECKING:
    from reap2gguf.models.description import ModelFacts
    from reap2gguf.models.gguf_keys import GgufKeys

# the count of such blocks: published configs have the first, transformers' classes both
NEXTN_KEYS = ("num_nextn_predict_layers", "num_mtp_layers")


class NextnDecoder(DecoderModel):
    """A model that may have such a block; `read_facts` calls `facts_with_block`."""

    mtp: ClassVar[MtpLayout | None] = NEXTN

    @classmethod
    def names_from_gguf(cls, keys: GgufKeys, keep_mtp: bool) -> tuple[str, ...]:
        found = super().names_from_gguf(keys, keep_mtp)
        # not by the header's count: llama.cpp's converter also counts a block that is not there
        there = tuple(
            f"model.layers.{block}.{rule.stored}"
            for rule in NEXTN.rules
            for block in sorted(keys.blocks_with(rule.gguf))
        )
        return (*found, *there) if keep_mtp else found

    @cached_property
    def stores_block(self) -> bool:
        """Whether the checkpoint has tensors of the block, kept or not."""
        return any(self.in_mtp(name) for name in self.names)

    def rules_beside(self, layer: int) -> tuple[TensorRule, ...]:
        found = super().rules_beside(layer)
        prefix, names = self.mtp_prefix, self.names
        return tuple(r for r in found if not r.replaces or prefix + r.stored in names)

    def _own(self, what: str) -> str | None:
        """The stored name of the block's own embedding or head."""
        beside = self.rules_beside(self.facts.n_layers)
        return next((self.mtp_prefix + r.stored for r in beside if r.replaces == what), None)

    @property
    def mtp_embedding_name(self) -> str:
        return self._own("embedding") or self.embedding_name

    @property
    def mtp_head_name(self) -> str:
        return self._own("head") or self.head_name

    def refuse_blocks(self) -> None:
        """Refuse, by name, a count of blocks that llama.cpp does not compute."""
        self.text.refuse_spellings(NEXTN_KEYS)
        for key in NEXTN_KEYS:
            self.text.expect(key, 0, 1, why=f"llama.cpp's {self.gguf_arch} has one MTP block")

    def facts_with_block(self, moe_layers: Sequence[int]) -> ModelFacts:
        """`common_facts` of a trunk with these MoE layers, and of the block if there is one.

        Raises UnsupportedModelError if the trunk's last layer has no experts: the block's layer is
        built like that one.
        """
        self.refuse_blocks()
        n_layers = read_n_layers(self.text)
        if not (self.keep_mtp and self.stores_block):
            return self.common_facts(moe_layers)
        if n_layers - 1 not in moe_layers:
            raise UnsupportedModelError(
                f"{self.text.where}: layer {n_layers - 1}, the last one, is dense, expected one "
                "with experts, as the MTP block after it has them"
            )
        return self.common_facts((*moe_layers, n_layers), has_mtp=True)

    def header(self) -> list[Entry]:
        block: Entry = (Keys.LLM.NEXTN_PREDICT_LAYERS, 1, UINT32)
        is_there = self.n_gguf_blocks > self.facts.n_layers
        return [*super().header(), *([block] if is_there else [])]

    @property
    def claimed_blocks(self) -> int:
        """How many blocks the config says there are; llama.cpp's converter takes absent for 0."""
        return self.text.integer(*NEXTN_KEYS, default=0)

    def pruned_config(self, n_experts: int) -> dict[str, Any]:
        config = super().pruned_config(n_experts)
        level = config
        for section in self.text_sections if self.is_nested else ():
            level = level[section]
        spelled = [key for key in NEXTN_KEYS if key in level]
        if self.facts.has_mtp and not spelled:
            spelled = [NEXTN_KEYS[0]]
        level.update(dict.fromkeys(spelled, int(self.facts.has_mtp)))
        return config

    def config_at_odds(self) -> str | None:
        claimed = self.claimed_blocks
        if bool(claimed) is self.facts.has_mtp:
            return super().config_at_odds()
        found = "an" if self.facts.has_mtp else "no"
        return (
            f"config.json says {NEXTN_KEYS[0]} {claimed}, but the checkpoint has {found} MTP block"
        )

    def caveats(self) -> tuple[str, ...]:
        found = super().caveats()
        if self.claimed_blocks and not self.stores_block:
            lost = "the config names an MTP block that the checkpoint does not contain"
            return (*found, lost)
        return found
