"""The two folders of a bundle, and the names of the files in them.

OUTPUT/NAME/               the pruned checkpoint: safetensors, config, tokenizer; only if pruned
OUTPUT/NAME/README.md             its card
OUTPUT/NAME/saliency.png, usage.png   pictures of its experts
OUTPUT/NAME/reap2gguf.json        the manifest, the same in both folders
OUTPUT/NAME-GGUF/          everything for llama.cpp
OUTPUT/NAME-GGUF/README.md        its card
OUTPUT/NAME-GGUF/reap2gguf.json
OUTPUT/NAME-GGUF/NAME-LABEL.gguf  one file per recipe
OUTPUT/NAME-GGUF/NAME-LABEL.toml  its recipe, where the build chose the types for a size
OUTPUT/NAME-GGUF/mmproj-NAME-F16.gguf   the vision projector, if the model has one
OUTPUT/NAME-GGUF/imatrix.gguf     the importance matrix, and imatrix.dat for ik_llama.cpp
OUTPUT/NAME-GGUF/calibration.txt  the text it was computed on
OUTPUT/NAME-GGUF/observations.safetensors  of the experts, to prune at other ratios
OUTPUT/NAME-GGUF/saliency.png ... pictures: saliency, usage, quality, bits
OUTPUT/NAME-GGUF/Modelfile        for Ollama
OUTPUT/NAME-GGUF/SHA256SUMS       the hash of every other file in this folder
OUTPUT/.work/              unfinished work; .NAME.lock is held by whoever writes the bundle NAME
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from reap2gguf.atomic import locked, make_folder
from reap2gguf.files import is_plain

GGUF_SUFFIX = "-GGUF"
CARD_FILE = "README.md"
MANIFEST_FILE = "reap2gguf.json"
KEPT_FILE = "kept_experts.json"  # what `prune` on its own leaves beside the weights
SUMS_FILE = "SHA256SUMS"
MODELFILE = "Modelfile"
IMATRIX_FILE = "imatrix.gguf"
IMATRIX_DAT_FILE = "imatrix.dat"
CALIBRATION_FILE = "calibration.txt"
OBSERVATIONS_FILE = "observations.safetensors"
SALIENCY_PICTURE = "saliency.png"
USAGE_PICTURE = "usage.png"
QUALITY_PICTURE = "quality.png"
BITS_PICTURE = "bits.png"
HF_PICTURES = (SALIENCY_PICTURE, USAGE_PICTURE)  # also in the safetensors folder
PICTURES = (*HF_PICTURES, QUALITY_PICTURE, BITS_PICTURE)
MMPROJ_PREFIX = "mmproj"
HUB_FILES = frozenset({".gitattributes"})  # the Hub adds it to every repository
_NOT_MODELS = ("imatrix", MMPROJ_PREFIX)  # how the names of other GGUF files begin


@dataclass(frozen=True)
class BundleFolders:
    """The folders of the bundle `name` in the folder `output`; they need not exist."""

    output: Path
    name: str

    @property
    def hf(self) -> Path:
        """The safetensors folder."""
        return self.output / self.name

    @property
    def gguf(self) -> Path:
        """The GGUF folder."""
        return self.output / gguf_name(self.name)

    @property
    def work(self) -> Path:
        """Where unfinished work is kept, for all bundles of `output`."""
        return self.output / ".work"

    @property
    def push(self) -> Path:
        """What an interrupted push of this bundle needs to resume."""
        return self.work / f".{self.name}.push"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process that would write this bundle out while the context is open.

        The kernel drops the lock when the process ends, however it ends. Raises OutputError if
        another process holds the lock, or if `output` cannot be written.
        """
        make_folder(self.work)
        lock = self.work / f".{self.name}.lock"
        with locked(lock, lock, self._busy, keeps_file=True):
            yield

    def _busy(self, process: str) -> str:
        return (
            f"{self.work / self.name}: another build of {self.name} (or a push) is running "
            f"(process {process}); wait for it, or pass another --name or --output"
        )


def gguf_name(name: str) -> str:
    """The name of the GGUF folder, or repository, that belongs to `name`."""
    return name + GGUF_SUFFIX


def folders_of(folder: Path, hf_name: str | None) -> BundleFolders | None:
    """Both folders of a bundle, found from one of them.

    `hf_name` is the name of the safetensors folder in the manifest; None if it has none. A download
    may have any name: then the other folder is beside it under the matching name. None if `folder`
    is a GGUF folder whose name does not end in -GGUF.
    """
    folder = folder.resolve()
    if hf_name is not None and is_hf_folder(folder, hf_name):
        return BundleFolders(folder.parent, folder.name)
    if folder.name.endswith(GGUF_SUFFIX):
        return BundleFolders(folder.parent, folder.name.removesuffix(GGUF_SUFFIX))
    return None


def is_hf_folder(folder: Path, hf_name: str) -> bool:
    """Whether a bundle's folder is the safetensors one, by its name or else by its contents.

    The Hub's cache names a download after its commit.
    """
    if folder.resolve().name == hf_name:
        return True
    return is_plain(folder / "config.json") and not any(folder.glob("*.gguf"))


def model_file(name: str, label: str) -> str:
    """The name of the GGUF file for the quant type `label`."""
    return f"{name}-{label}.gguf"


def side_file(prefix: str, name: str) -> str:
    """The name of a GGUF file beside the models, such as the vision projector."""
    return f"{prefix}-{name}-F16.gguf"


def may_be_model(file_name: str) -> bool:
    """Whether a GGUF file's name is not that of an importance matrix or a vision projector."""
    return not file_name.startswith(_NOT_MODELS)


def vision_projector(gguf_folder: Path) -> Path | None:
    """The vision projector in a GGUF folder, if there is one."""
    return next(iter(sorted(gguf_folder.glob(f"{MMPROJ_PREFIX}*.gguf"))), None)
