"""Opens the variants of a model: its source, pruned folders and GGUF files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.errors import EvaluationError, UsageError
from reap2gguf.evaluating.variants import Variant
from reap2gguf.gguf_files.split import read_whole_header
from reap2gguf.gguf_source.weights import GgufWeights
from reap2gguf.hub.opened import open_model
from reap2gguf.models.from_gguf import model_from_gguf
from reap2gguf.models.table import BY_GGUF, describe
from reap2gguf.pruning.view import PrunedView

if TYPE_CHECKING:
    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.hub.opened import OpenModel
    from reap2gguf.progress import Progress
    from reap2gguf.pruning.select import Kept

SOURCE, PRUNED = "source", "pruned"


@dataclass
class OpenVariants:
    """The variants that were opened, and the folder whose tokenizer they have."""

    stack: ExitStack
    progress: Progress
    variants: list[Variant] = field(default_factory=list)
    tokenizer: Path | None = None

    def source(self, name: str, follow_links: bool = False) -> None:
        """Open the model that all others were made from: a folder, or a name on the Hub."""
        self._add(self._open(name, follow_links), SOURCE)

    def folder(self, path: Path) -> None:
        """Open a pruned safetensors folder."""
        opened = self._open(str(path), follow_links=False)
        taken = any(variant.name == PRUNED for variant in self.variants)
        self._add(opened, PRUNED, path.resolve().name if taken else PRUNED)

    def sliced(self, kept: Kept, keep_mtp: bool) -> None:
        """Add the source without some experts: what the files of a bundle were quantized from.

        Raises UsageError if `kept` are not experts of the source.
        """
        (source,) = self.variants
        view = PrunedView(source.weights, describe(source.weights, keep_mtp), kept)
        bits = 8 * view.n_bytes / view.n_parameters
        which = hashlib.sha256(repr((sorted(kept.items()), keep_mtp)).encode()).hexdigest()
        identity = f"{source.identity} {which}"
        self.variants.append(
            Variant(PRUNED, "pruned", view, view.model, view.n_bytes, bits, identity)
        )

    def gguf(self, path: Path, name: str | None = None) -> None:
        """Open a GGUF file; of several parts, the first one. Its name is that of the variant.

        Raises ArtifactError if it is broken, EvaluationError if no variant so far has its shape.
        """
        header = read_whole_header(path)
        weights = self._weights(header)
        n_bytes = sum(info.n_bytes for info in header.tensors.values())
        bits = 8 * n_bytes / weights.n_parameters
        name = self._free_name(path) if name is None else name
        files = [one.path.stat() for one in header.headers]
        stamps = str([(file.st_size, file.st_mtime_ns) for file in files])
        self.variants.append(
            Variant(name, "gguf", weights, weights.model, n_bytes, bits, stamps, path)
        )

    def _weights(self, header: GgufHeader) -> GgufWeights:
        """The weights of a file, under the names that a variant has.

        Beside a source that is a GGUF file too, no folder has those of the pruned model: then they
        come from its own header.
        """
        count = header.metadata.get(f"{header.metadata.get('general.architecture')}.expert_count")
        named = [one for one in self.variants if one.kind != "gguf"]
        is_other = all(one.model.facts.n_experts != count for one in named)
        if is_other and any(one.weights.gguf is not None for one in named):
            found = model_from_gguf(header, BY_GGUF)
            return GgufWeights(header, found.model, found.template)
        template = self._template(header)
        return GgufWeights(header, template.model, template.weights.tensors)

    def _template(self, header: GgufHeader) -> Variant:
        """The variant whose names and shapes a GGUF file has: one with as many experts."""
        count = header.metadata.get(f"{header.metadata.get('general.architecture')}.expert_count")
        for variant in reversed([one for one in self.variants if one.kind != "gguf"]):
            if variant.model.facts.n_experts == count:
                return variant
        known = ", ".join(str(one.model.facts.n_experts) for one in self.variants) or "none"
        raise EvaluationError(
            f"{header.path}: has {count} experts per layer, and the folders that were given have "
            f"{known}; pass the safetensors folder that it was made from too"
        )

    def _free_name(self, path: Path) -> str:
        if any(variant.name == path.name for variant in self.variants):
            raise UsageError(f"{path}: two files are called {path.name}; rename one")
        return path.name

    def _open(self, name: str, follow_links: bool) -> OpenModel:
        opened = self.stack.enter_context(
            open_model(name, self.progress, follow_links=follow_links)
        )
        opened.check_tokenizer()
        return opened

    def _add(self, opened: OpenModel, kind: str, name: str = SOURCE) -> None:
        checkpoint = opened.checkpoint
        self.tokenizer = self.tokenizer or opened.source.folder
        bits = 8 * checkpoint.n_bytes / checkpoint.n_parameters
        variant = Variant(
            name,
            "source" if kind == SOURCE else "pruned",
            checkpoint,
            opened.model,
            checkpoint.n_bytes,
            bits,
            f"{checkpoint.fingerprint()} {checkpoint.stamps()}",
            None if opened.source.snapshot or opened.source.gguf_name else opened.source.folder,
        )
        self.variants.append(variant)


def pairs_of(variants: Sequence[Variant]) -> list[tuple[str, str]]:
    """What is compared: each pruned model and each file with the source, files with the pruned.

    A file is compared with the last pruned model that has as many experts.
    """
    sources = [one for one in variants if one.kind == "source"]
    found: list[tuple[str, str]] = []
    for variant in variants:
        if variant.kind == "source":
            continue
        found += [(source.name, variant.name) for source in sources]
        if variant.kind == "gguf":
            count = variant.model.facts.n_experts
            bases = [
                one.name
                for one in variants
                if one.kind == "pruned" and one.model.facts.n_experts == count
            ]
            found += [(name, variant.name) for name in bases[-1:]]
    return found
