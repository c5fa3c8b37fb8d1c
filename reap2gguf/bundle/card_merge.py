"""What a card says of a merge: by which method, on what text, and which experts became one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reap2gguf.bundle.layout import MANIFEST_FILE
from reap2gguf.bundle.markdown import code, ranges, table
from reap2gguf.pruning.methods import method_name

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import Manifest
    from reap2gguf.bundle.records import MergedLayerRecord, MergeRecord

_PAPERS = {
    "ream": "https://arxiv.org/abs/2604.04356",
    "hc_smoe": "https://arxiv.org/abs/2410.08589",
}
MERGED_WEIGHTS = (
    ", but for the\nexperts that others were merged into; nothing was trained by gradients."
)


def merge_sentence(merge: MergeRecord) -> str:
    """How the experts that became one were found."""
    link = f"[{method_name(merge.method)}]({_PAPERS[merge.method]})"
    if merge.method == "hc_smoe":
        return (
            f"By {link}, experts whose outputs are alike on these tokens were clustered (average "
            "linkage, rarely used ones first), and each cluster became its most used expert."
        )
    return (
        f"By {link}, the experts with the highest REAP scores stay. From the highest down, each "
        f"took the experts that are most like it, up to {merge.group_size} with itself, until none "
        "was left; their outputs and the router's logits say how alike experts are."
    )


def merge_section(manifest: Manifest, merge: MergeRecord) -> str:
    """How the weights were changed, and on what text."""
    return f"{_average(merge)} {_text(merge)}{_mtp(manifest)}"


def groups_table(merge: MergeRecord) -> str:
    """Which experts became one in each layer: the one that stays, and those merged into it."""
    rows = [(str(layer), _groups(one)) for layer, one in sorted(merge.layers.items())]
    return table(("layer", "experts, by their numbers in the source: stays ← merged into it"), rows)


def n_merged(merge: MergeRecord) -> int:
    """Experts that are in a group with others, of all layers."""
    groups = (group for one in merge.layers.values() for group in one.groups)
    return sum(len(group) for group in groups if len(group) > 1)


def citation(merge: MergeRecord) -> str:
    """The method's BibTeX entry."""
    number = _PAPERS[merge.method].rpartition("/")[2]
    return f"""\
@misc{{{merge.method},
  title         = {{{{{method_name(merge.method)}}}}},
  eprint        = {{{number}}},
  archivePrefix = {{arXiv}},
  url           = {{{_PAPERS[merge.method]}}}
}}"""


def _average(merge: MergeRecord) -> str:
    if merge.method == "hc_smoe":
        return (
            "Gate, up and down of a merged expert are the averages of its members', each weighted "
            "by the tokens that were routed to it. Routers keep the rows of the experts that stay."
        )
    return (
        "Gate, up and down of a merged expert are the averages of its members', each weighted by "
        "its REAP score. Before that, neurons of the members were brought into the order of those "
        "of the expert that stays, by their activations and weights. Layers were merged one after "
        "another, each by what reaches it in the model merged so far. Routers keep the rows of the "
        "experts that stay."
    )


def _text(merge: MergeRecord) -> str:
    return (
        f"The text was {merge.n_tokens:,} tokens of {code(merge.calibration)}. `{MANIFEST_FILE}` "
        "lists all groups (`pruning.merge.layers`), with the share of each member in the average, "
        "and has the SHA-256 of each layer's new weights."
    )


def _mtp(manifest: Manifest) -> str:
    if manifest.pruning.mtp.state != "pruned":
        return ""
    return " The multi-token-prediction block was pruned by REAP, and merges nothing."


def _groups(one: MergedLayerRecord) -> str:
    """The groups of more than one, by the experts that stay; their members are ascending."""
    found = (
        f"{group[0]} ← {ranges(group[1:])}"
        for group in sorted(one.groups, key=lambda group: group[0])
        if len(group) > 1
    )
    return "; ".join(found) or "none"
