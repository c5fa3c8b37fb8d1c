"""The parts of `reap2gguf.json`: what it records of source, pruning, calibration and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from reap2gguf.gguf_files.tensor_types import IkType

_OBSERVATIONS_FILE = "observations.safetensors"  # as bundle/layout.py has it


@dataclass(frozen=True)
class EarlierPruning:
    """What was pruned before, where the source is itself a result of this program.

    The original is the checkpoint before the first pruning, as the source's own manifest names it.
    """

    label: str  # of the original
    revision: str | None
    n_experts: int  # per layer, in the original
    methods: Sequence[str]  # of the earlier prunings, in order
    kept: Mapping[int, Sequence[int]]  # layer -> the original's ids of the experts in this bundle


@dataclass(frozen=True)
class GgufOrigin:
    """A source that is a GGUF file."""

    file: str  # FILE.gguf, or owner/name:FILE.gguf
    n_parameters: int  # of the model in the bundle, which has no safetensors


@dataclass(frozen=True)
class SourceRecord:
    """The checkpoint that was pruned."""

    label: str
    revision: str | None
    fingerprint: str
    architecture: str
    n_parameters: int
    n_bytes: int
    earlier: EarlierPruning | None = None
    gguf: GgufOrigin | None = None  # None: safetensors

    @property
    def name(self) -> str:
        """What --source takes: the folder or repository, or the GGUF file."""
        return self.label if self.gguf is None else self.gguf.file

    @property
    def at_commit(self) -> str | None:
        """The same of a model on the Hub, at its commit; None for what was a folder or a file."""
        if self.revision is None:
            return None
        file = "" if self.gguf is None else f":{self.gguf.file.rpartition(':')[2]}"
        return f"{self.label}@{self.revision}{file}"


@dataclass(frozen=True)
class MtpRecord:
    """What happened to a multi-token-prediction block, and how often its predictions are right.

    Hits are correctly predicted next-next tokens, on the same rows, before and after pruning.
    """

    state: str = "none"  # none, pruned, dropped, or kept where nothing was pruned
    hits_before: int = 0
    hits_after: int = 0
    n_tokens: int = 0
    in_gguf: bool = True  # whether GGUF files of the architecture have such a block

    @property
    def is_there(self) -> bool:
        """Whether the safetensors have the block."""
        return self.state in ("pruned", "kept")

    @property
    def drafts(self) -> bool:
        """Whether the GGUF files have the block."""
        return self.is_there and self.in_gguf


@dataclass(frozen=True)
class CoverageRecord:
    """How many tokens the calibration pass sent to the experts of all pruned layers together."""

    fewest: int  # tokens of the expert with the fewest
    median: int  # tokens
    n_unseen: int  # experts that no token reached
    n_unseen_kept: int
    n_thin: int  # experts with fewer than `thin_below` tokens: their scores are noisy
    n_thin_kept: int
    thin_below: int


@dataclass(frozen=True)
class RepairedLayerRecord:
    """What the repair of a layer came to."""

    alpha: float | None  # the strength of the ridge; None: the layer keeps its weights
    # errors on text that was held out, relative to what the source's layer gives
    error_before: float
    error_after: float
    sha256: str  # of the new tensors with their names, types and shapes; "" if there are none


@dataclass(frozen=True)
class RepairRecord:
    """How the kept experts' `down_proj` was fitted to what all experts gave."""

    what: ClassVar[str] = "repair"
    word: ClassVar[str] = "repaired"  # what was done to the experts

    kind: str  # ridge, or scale: one number per expert
    calibration: str  # the text
    calibration_sha256: str
    n_fitted: int  # tokens of it
    n_held_out: int
    n_tensors: int  # that have new values
    layers: Mapping[int, RepairedLayerRecord]


@dataclass(frozen=True)
class MergedLayerRecord:
    """Which experts of a layer became one."""

    # source ids: of each expert that stays, itself and then those that were merged into it
    groups: Sequence[Sequence[int]]
    shares: Sequence[Sequence[float]]  # of each in the average, in the same order
    sha256: str  # of the new tensors with their names, types and shapes; "" if there are none


@dataclass(frozen=True)
class MergeRecord:
    """How experts were merged into those that stay."""

    what: ClassVar[str] = "merge"
    word: ClassVar[str] = "merged"  # what was done to the experts

    method: str  # ream or hc_smoe
    group_size: int | None  # the most experts of a group; None: the method knows no bound
    calibration: str  # the text
    calibration_sha256: str
    n_rows: int
    n_tokens: int
    n_tensors: int  # that have new values
    layers: Mapping[int, MergedLayerRecord]


@dataclass(frozen=True)
class ImportanceRecord:
    """How many tokens of the importance matrix each expert saw, in the layers that have experts."""

    fewest: int  # tokens of the expert with the fewest
    median: int  # tokens, rounded down
    n_unseen: int  # experts that no token reached, which are quantized with equal weights
    n_few: int  # experts with fewer than `few_below` tokens, the unseen ones included
    few_below: int
    tokens: Mapping[int, Sequence[int]]  # layer -> tokens by expert, in the result's order


@dataclass(frozen=True)
class PruningRecord:
    """Which experts were kept, and the observations that decided it.

    Where all experts were kept there are no observations, and the method is NO_METHOD.
    `observations_file` is the name of a file that was given; None if the build observed.
    """

    method: str
    n_experts: int
    n_kept: int
    experts_per_token: int
    kept: Mapping[int, Sequence[int]]  # layer -> source ids
    observations_sha256: str
    n_rows: int
    n_tokens: int
    n_dropped_rows: int
    mtp: MtpRecord = MtpRecord()
    coverage: CoverageRecord | None = None  # None where nothing was observed, or not recorded
    observations_file: str | None = None
    repair: RepairRecord | None = None  # None: the kept experts are not fitted to anything
    merge: MergeRecord | None = None  # None: no experts became one
    # layer -> source ids of experts that stay whatever they score: named ones, and super experts
    protected: Mapping[int, Sequence[int]] = field(default_factory=dict)
    super_experts: Mapping[int, Sequence[int]] = field(default_factory=dict)

    @property
    def change(self) -> RepairRecord | MergeRecord | None:
        """What gave experts other weights than the source's; a bundle has one at most."""
        return self.merge if self.merge is not None else self.repair


@dataclass(frozen=True)
class ComponentRecord:
    """How much of one dataset, file or folder was used; its commit if it is on the Hub."""

    name: str
    subset: str | None
    split: str | None
    revision: str | None
    rows: int
    tokens: int
    samples: int  # that the rows were made of; 0 if rows were cut from one text
    skipped: int = 0  # samples that were empty or could not be used

    @property
    def title(self) -> str:
        """The name with subset and split; the default split `train` is left out."""
        subset = f"[{self.subset}]" if self.subset is not None else ""
        split = f"({self.split})" if self.split not in (None, "train") else ""
        return f"{self.name}{subset}{split}"


@dataclass(frozen=True)
class CalibrationRecord:
    """The calibration texts, and how they were cut into rows; None for what is not known.

    That is so for what a build did not do itself: observations and an importance matrix may be
    given as files. `imatrix_file` is the name of the file that was given; one of the model before
    pruning was cut from `imatrix_cut_from` experts per layer to those that were kept. One that was
    taken in the pass that ranks the experts has the name of the observations' file.
    """

    spec: str | None
    sha256: str | None
    max_length: int | None
    seed: int | None
    packed: bool | None  # several samples per row, as REAP does; otherwise one sample per row
    imatrix_text: str | None
    imatrix_sha256: str | None  # of the text; None: it is not in the bundle
    imatrix_chunks: int | None
    imatrix_chunk_size: int | None  # 0: the file of the matrix does not say it
    components: Sequence[ComponentRecord] = ()
    imatrix_text_chunks: int = 0  # of the whole text, of which chunks are some; 0: not recorded
    imatrix_unseen: int = 0  # experts, of all layers, that no token of the chunks reached
    imatrix_file: str | None = None
    imatrix_cut_from: int | None = None
    imatrix_coverage: ImportanceRecord | None = None  # None: tokens per expert are not known

    @property
    def is_of_observations(self) -> bool:
        """Whether the importance matrix came with the observations, of all experts."""
        return self.imatrix_file == _OBSERVATIONS_FILE

    def asked_from(self, keeps_all: bool) -> tuple[str, ...]:
        """What --imatrix-from may have been; with all experts, the source is what is quantized."""
        if keeps_all:
            return ("pruned", "source")
        return ("source",) if self.is_of_observations else ("pruned",)


@dataclass(frozen=True)
class FileRecord:
    """A file as it was when the bundle was finished."""

    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class FolderRecord:
    """The pruned safetensors."""

    folder: str
    n_shards: int
    n_parameters: int
    n_bytes: int
    files: Mapping[str, FileRecord]


@dataclass(frozen=True)
class GgufRecord:
    """One GGUF file: the text of its recipe, and the type that each tensor got.

    `parts` are the files that replace it if it was too large for the Hub. A file that another
    command or program made and that was added to the bundle is `adopted`: it has no recipe.
    """

    file: str
    recipe: str
    title: str
    label: str
    file_type: str
    recipe_source: str
    n_bytes: int
    bits_per_weight: float
    tensors: Mapping[str, str]  # GGUF name -> tensor type
    parts: Sequence[str] = ()
    made_by: Mapping[str, str] = field(default_factory=dict)  # versions, if not the bundle's
    adopted: bool = False
    source_blocks: int = 0  # tensors that have the blocks of the GGUF file that is the source
    has_toml: bool = False  # whether the recipe lies beside it: its types were chosen for a size

    @property
    def toml_file(self) -> str:
        """The recipe's file."""
        return f"{self.file.removesuffix('.gguf')}.toml"

    @property
    def is_ik(self) -> bool:
        """Whether only ik_llama.cpp loads it."""
        return not IkType.__members__.keys().isdisjoint(self.tensors.values())

    @property
    def first(self) -> str:
        """The file to open: programs find the other parts from the first."""
        return self.parts[0] if self.parts else self.file

    @property
    def files(self) -> tuple[str, ...]:
        """All parts, or the one file."""
        return tuple(self.parts) or (self.file,)


@dataclass(frozen=True)
class SideRecord:
    """A GGUF file beside the model's own, such as a vision projector."""

    file: str
    title: str
    n_bytes: int
    tensors: Mapping[str, str]  # GGUF name -> tensor type
