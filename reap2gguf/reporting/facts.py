"""What a report is made of: the manifest, and what lies beside it in the bundle's folders.

A bundle may be there in part: someone who downloads one GGUF file has no observations. What is
missing is None or left out here, and the page says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from reap2gguf.bundle.layout import IMATRIX_FILE, SUMS_FILE, folders_of
from reap2gguf.bundle.sums import read_sums
from reap2gguf.bundle.wording import wording
from reap2gguf.errors import ArtifactError
from reap2gguf.files import is_plain
from reap2gguf.gguf_files.imatrix import load_imatrix
from reap2gguf.gguf_files.split import read_whole_header
from reap2gguf.messages import shown
from reap2gguf.pruning.select import CRITERIA

if TYPE_CHECKING:
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.bundle.evaluation import Comparison, Evaluation
    from reap2gguf.bundle.manifest import GgufRecord, Manifest
    from reap2gguf.bundle.wording import Wording

Counts = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]
Damage = Literal["pruning", "quantizing", "both"]
_NO_LAYER = -1


@dataclass(frozen=True)
class TensorSize:
    """How large a tensor is in one file."""

    n_weights: int
    n_bytes: int


@dataclass(frozen=True)
class ReportFacts:
    """All that a page shows."""

    manifest: Manifest
    observations: Observations | None = None
    used_after: Mapping[int, Counts] = field(default_factory=dict)
    # layer -> tokens of each kept expert, on the text of the importance matrix; may be empty
    sizes: Mapping[str, Mapping[str, TensorSize]] = field(default_factory=dict)
    # file -> tensor -> size; only of files that are there
    hashes: Mapping[str, str] = field(default_factory=dict)  # SHA-256 by file of the GGUF folder

    @property
    def is_pruned(self) -> bool:
        return self.manifest.pruning.n_kept < self.manifest.pruning.n_experts

    @property
    def is_cut(self) -> bool:
        """Whether files have the blocks of a GGUF file as they are, without some experts."""
        of_gguf = self.is_pruned and self.manifest.source.gguf is not None
        return of_gguf and all(one.adopted for one in self.manifest.gguf)

    @property
    def words(self) -> Wording:
        """What was done to the experts, in words."""
        return wording(self.manifest.pruning)

    @property
    def evaluation(self) -> Evaluation | None:
        return self.manifest.evaluation

    def variant_of(self, record: GgufRecord) -> str | None:
        """The name under which a file was evaluated; None if it was not."""
        if self.evaluation is None:
            return None
        names = {one.name for one in self.evaluation.variants}
        names |= {one.variant for one in self.evaluation.tasks}
        names |= {one.variant for one in self.evaluation.speeds}
        return next((name for name in (record.file, record.first) if name in names), None)

    def label(self, variant: str) -> str:
        """A short name of a variant: of a file its label, where no other file has the same."""
        labels = [record.label for record in self.manifest.gguf]
        for record in self.manifest.gguf:
            if variant in (record.file, record.first) and labels.count(record.label) == 1:
                return record.label
        return self.words.name(variant)

    def damage(self, comparison: Comparison) -> Damage:
        """What lies between the two variants of a comparison."""
        names = (comparison.reference, comparison.variant)
        variants = () if self.evaluation is None else self.evaluation.variants
        kinds = [one.kind for name in names for one in variants if one.name == name]
        if kinds == ["source", "pruned"]:
            return "pruning"
        if kinds != ["source", "gguf"] or not self.is_pruned:
            return "quantizing"
        return "pruning" if self.is_cut else "both"

    def scores(self) -> dict[int, Doubles]:
        """The score of every expert by layer, by the bundle's own method; empty if not known.

        Raises ArtifactError if the observations do not fit the manifest.
        """
        pruning = self.manifest.pruning
        if self.observations is None or pruning.method not in CRITERIA:
            return {}
        found = {}
        for layer in sorted(pruning.kept):
            seen = self.observations.layers.get(layer)
            if seen is None or len(seen.count) != pruning.n_experts:
                raise ArtifactError(
                    f"layer {layer} of the observations does not have the {pruning.n_experts} "
                    "experts of the manifest; the bundle was made of others"
                )
            found[layer] = CRITERIA[pruning.method](seen)
        return found

    def used_before(self) -> dict[int, Counts]:
        """Tokens of every expert of the source by layer, on the calibration rows; may be empty."""
        if self.observations is None:
            return {}
        layers = self.observations.layers
        return {layer: layers[layer].count for layer in sorted(self.manifest.pruning.kept)}


def read_facts(manifest: Manifest, folder: Path, observations: Observations | None) -> ReportFacts:
    """What lies in the folders of a bundle, found from one of them.

    Reads headers of GGUF files, the hashes, and the importance matrix, which is in memory for a
    while. Raises ArtifactError if a file is broken, or is not the one that the manifest records.
    """
    folders = folders_of(folder, None if manifest.hf is None else manifest.hf.folder)
    gguf = folder if folders is None else folders.gguf
    sums = read_sums(gguf)[0] if is_plain(gguf / SUMS_FILE) else {}
    sizes = {
        record.file: _sizes(gguf / record.first, record)
        for record in manifest.gguf
        if all(is_plain(gguf / part) for part in record.files)
    }
    return ReportFacts(
        manifest, observations, _used_after(gguf / IMATRIX_FILE, manifest), sizes, sums
    )


def _sizes(path: Path, record: GgufRecord) -> dict[str, TensorSize]:
    header = read_whole_header(path)
    types = {name: info.tensor_type.name for name, info in header.tensors.items()}
    if types != dict(record.tensors):
        raise ArtifactError(
            f"{path}: its tensors are not those that reap2gguf.json records; run `reap2gguf verify`"
        )
    return {
        name: TensorSize(int(np.prod(info.shape, dtype=np.int64)), info.n_bytes)
        for name, info in header.tensors.items()
    }


def _used_after(path: Path, manifest: Manifest) -> dict[int, Counts]:
    if not is_plain(path) or manifest.calibration.imatrix_file is not None:
        return {}  # a matrix that was given may not count tokens
    found = {}
    for entry in load_imatrix(path).expert_entries():
        layer = layer_of(entry.name)
        if layer not in manifest.pruning.kept:
            continue
        if len(entry.counts) != manifest.pruning.n_kept:
            raise ArtifactError(
                f"{path}: {shown(entry.name)} has {len(entry.counts)} experts, expected "
                f"{manifest.pruning.n_kept}; run `reap2gguf verify`"
            )
        found[layer] = entry.counts
    return dict(sorted(found.items()))


def layer_of(tensor: str) -> int:
    """The number in `blk.NUMBER.`; -1 for a tensor of no layer."""
    words = tensor.split(".", 2)
    is_block = len(words) == 3 and words[0] == "blk" and words[1].isascii() and words[1].isdigit()
    return int(words[1]) if is_block and len(words[1]) <= 5 else _NO_LAYER


def in_layer(tensor: str) -> str:
    """A tensor's name without its layer and ending, such as `ffn_down_exps`."""
    name = tensor.split(".", 2)[2] if layer_of(tensor) != _NO_LAYER else tensor
    return name.removesuffix(".weight")


# what tensors do, by a part of their names; the first that fits
_ROLES = (
    ("experts, down", ("ffn_down_exps",)),
    ("experts, gate and up", ("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps")),
    ("shared expert", ("shexp",)),
    ("router", ("ffn_gate_inp", "exp_probs_b")),
    ("norms", ("norm",)),
    ("linear attention, Mamba", ("ssm_", "attn_qkv", "attn_gate")),
    ("attention", ("attn_",)),
    ("convolution", ("shortconv",)),
    ("latent", ("ffn_latent",)),
    ("dense layers", ("ffn_",)),
    ("MTP block", ("nextn",)),
    ("embedding", ("token_embd",)),
    ("output", ("output",)),
)
OTHER_ROLE = "other"
ROLES: Sequence[str] = (*(role for role, _ in _ROLES), OTHER_ROLE)


def role_of(tensor: str) -> str:
    """What a tensor of a GGUF file does, in words."""
    name = in_layer(tensor)
    return next((role for role, parts in _ROLES if any(p in name for p in parts)), OTHER_ROLE)
