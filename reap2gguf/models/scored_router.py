"""The routers of DeepSeek and GLM: what their configs say, and the keys that llama.cpp reads.

An expert's score is a sigmoid or softmax of its logit; a bias is added for the choice alone; the
chosen scores may be normalised, and are multiplied by a factor (arXiv 2412.19437, section 2.1.2).
llama.cpp's loaders guess the kind of score where the key is absent, so it is always written.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any

from gguf import GGUFValueType, Keys

from reap2gguf.errors import UnsupportedModelError

if TYPE_CHECKING:
    from reap2gguf.checkpoint.config import ConfigReader
    from reap2gguf.models.gguf_keys import GgufKeys
    from reap2gguf.models.shared import Entry

_UINT32, _FLOAT32, _BOOL = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.BOOL
_LEAST_SCALE, _MOST_SCALE = 1e-4, 1e4  # of `routed_scaling_factor`, far from any model's
MOST_SHARED = 2**10
# what pruning does to a softmax over all experts where `norm_topk_prob` is false
NOT_NORMALISED = (
    "the chosen experts' weights are shares of a softmax over all experts and are not normalised "
    "(norm_topk_prob is false): without the pruned experts, the shares of the remaining ones are "
    "larger, so they count for more than before"
)


class Scores(IntEnum):
    """What a router makes of its logits, with llama.cpp's number of it."""

    SOFTMAX = 1
    SIGMOID = 2


def read_n_shared(read: ConfigReader) -> int:
    """How many experts every token goes through, stored as one."""
    return read.integer("n_shared_experts", low=0, high=MOST_SHARED, default=0)


def read_scale(read: ConfigReader, default: float = 1.0) -> float:
    """The factor of the chosen experts' scores; transformers' `default` of an absent key."""
    # llama.cpp takes 0 for no factor
    return read.number("routed_scaling_factor", low=_LEAST_SCALE, high=_MOST_SCALE, default=default)


def read_groups(read: ConfigReader, n_experts: int) -> tuple[int, int]:
    """How many groups of experts a router has, and how many of them it chooses.

    Raises UnsupportedModelError for groups that llama.cpp does not load, or of a single expert.
    """
    groups = read.integer("n_group", low=1, high=n_experts, default=1)
    chosen = read.integer("topk_group", low=1, high=groups, default=1)
    if n_experts < 2 * groups:
        raise UnsupportedModelError(
            f"{read.where}: n_group is {groups}, expected at least two of the {n_experts} experts "
            "in each group: the best two score it"
        )
    if chosen == groups > 1:
        raise UnsupportedModelError(
            f"{read.where}: topk_group is {chosen}, all of n_group, expected fewer: llama.cpp does "
            "not load such a model; to choose all, set both to 1"
        )
    return groups, chosen


def router_entries(
    read: ConfigReader, n_dense: int, scores: Scores, normalises: bool = False
) -> list[Entry]:
    """The keys of a header: shared experts, dense layers first, and how scores are made.

    `normalises`: what an absent `norm_topk_prob` means.
    """
    normalised = read.boolean("norm_topk_prob", default=normalises)
    return [
        (Keys.LLM.EXPERT_SHARED_COUNT, read_n_shared(read), _UINT32),
        (Keys.LLM.LEADING_DENSE_BLOCK_COUNT, n_dense, _UINT32),
        (Keys.LLM.EXPERT_GATING_FUNC, int(scores), _UINT32),
        (Keys.LLM.EXPERT_WEIGHTS_SCALE, read_scale(read), _FLOAT32),
        (Keys.LLM.EXPERT_WEIGHTS_NORM, True if normalised else None, _BOOL),
    ]


def router_config(keys: GgufKeys) -> dict[str, Any]:
    """The config of such a router in a GGUF file, the kind of its scores apart."""
    llm = Keys.LLM
    return {
        "n_shared_experts": keys.integer(llm.EXPERT_SHARED_COUNT, 0, MOST_SHARED, default=0),
        "routed_scaling_factor": keys.number(llm.EXPERT_WEIGHTS_SCALE, 0, _MOST_SCALE, default=1.0),
        "norm_topk_prob": keys.boolean(llm.EXPERT_WEIGHTS_NORM, default=False),
        "n_group": keys.integer(llm.EXPERT_GROUP_COUNT, 1, MOST_SHARED, default=1),
        "topk_group": keys.integer(llm.EXPERT_GROUP_USED_COUNT, 1, MOST_SHARED, default=1),
    }
