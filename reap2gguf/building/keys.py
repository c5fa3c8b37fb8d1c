"""The keys of a build's stages: hashes of everything that goes into them.

A stage that was done with the same key is not done again. Threads and where hidden states wait are
in no key: results do not depend on them. Nor are memory and the number of processes, which may
change last bits (`sweep.py`) and are no reason to do hours of work again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from reap2gguf import __version__
from reap2gguf.building.marks import stage_key
from reap2gguf.building.plan import Plan
from reap2gguf.bundle.card import CARD_FILE
from reap2gguf.bundle.manifest import hash_file
from reap2gguf.calibration.corpus import calibration_files
from reap2gguf.calibration.rows import Row
from reap2gguf.calibration.texts import ImatrixChunks, ObservationRows
from reap2gguf.errors import CalibrationError, CheckpointError, Reap2ggufError
from reap2gguf.ggml import load_ggml
from reap2gguf.pruning.select import Kept
from reap2gguf.pruning.write import companion_files


@dataclass(frozen=True)
class BuildKeys:
    """The keys of one plan; each stage's holds those before it that it depends on."""

    plan: Plan

    @cached_property
    def fingerprint(self) -> str:
        """Of the source's config and weights."""
        return self.plan.checkpoint.fingerprint()

    @cached_property
    def _companions(self) -> list[tuple[str, str]]:
        """Hashes of tokenizer, template and licence files, which a bundle carries as well."""
        folder = self.plan.source.folder
        # not published, but the tokenizer may choose one of them for samples with tools
        named = sorted(folder.glob("*chat_templates/*.jinja"))
        return _hashes([*companion_files(folder), *named], CheckpointError)

    @property
    def _source(self) -> tuple[str, list[tuple[str, int, int | str]]]:
        return self.fingerprint, self.plan.checkpoint.stamps()

    @property
    def _card(self) -> list[tuple[str, str]]:
        """Of the source's own card, whose front matter goes on in the bundle's."""
        card = self.plan.source.folder / CARD_FILE
        return _hashes([card] if card.is_file() else [], CheckpointError)

    @cached_property
    def texts(self) -> str:
        """Of the text files as they are, the tokenizer, and how both become rows.

        Of a dataset on the Hub, only what was asked for: its rows, once drawn, are kept with the
        commit that they are of, so that a build goes on without a network, and on the same rows
        whatever is committed there. `owner/name@revision` pins a commit; --fresh draws anew.
        """
        calibration, text = self.plan.calibration, self.plan.options.imatrix_text
        files = [*calibration_files(calibration), *([text.expanduser()] if text else [])]
        return stage_key(
            __version__, version("transformers"), version("tokenizers"), version("jinja2"),
            self._companions, calibration.spec, calibration.label,
            _hashes(files, CalibrationError), str(text), calibration.samples, calibration.seed,
            calibration.pack, self.plan.max_length, self.chunk, self.plan.model.facts.vocab_size,
        )  # fmt: skip

    @property
    def chunk(self) -> int:
        """Tokens a chunk of the importance matrix, within the model's context."""
        return min(self.plan.options.chunk, self.plan.model.facts.context_length)

    def observe(self, rows: ObservationRows) -> str:
        calibration = self.plan.calibration
        return sweep_key(
            self._source, rows.label, rows.sha256, self.plan.max_length,
            calibration.samples, calibration.seed, *self._computing, self.plan.mtp,
        )  # fmt: skip

    def prune(self, kept: Kept) -> str:
        kept_experts = sorted(kept.items())
        return stage_key(__version__, self._source, kept_experts, self._companions, self.plan.mtp)

    def imatrix(self, prune: str, chunks: ImatrixChunks, probe: Sequence[Row]) -> str:
        asked = [row.tolist() for row in probe]
        return sweep_key(
            prune, chunks.label, chunks.tokens_sha256, chunks.chunk_size, asked, *self._computing
        )

    def export(self, imatrix: str) -> str:
        plan = self.plan
        return export_key(imatrix, plan.name, plan.source.label, plan.options.method, self._recipes)

    @property
    def inputs(self) -> str:
        """Of everything that goes into a bundle."""
        plan = self.plan
        return stage_key(
            sweep_key(), export_key(), self._source, self.texts, self._card, plan.name,
            plan.source.label, plan.source.revision, plan.options.method, plan.target.n_kept,
            plan.mtp, self._recipes, *self._computing,
        )  # fmt: skip

    @property
    def _recipes(self) -> list[tuple[str, str]]:
        return [(recipe.recipe.name, recipe.recipe.source) for recipe in self.plan.recipes]

    @property
    def _computing(self) -> tuple[str, str]:
        compute = self.plan.options.compute
        return compute.likely_device, compute.likely_dtype


def sweep_key(*inputs: object) -> str:
    """Of a sweep: no two versions of a library share one."""
    try:
        kernels = version("flash-linear-attention")
    except PackageNotFoundError:
        kernels = ""  # transformers' own take their place
    return stage_key(__version__, version("torch"), version("transformers"), kernels, *inputs)


def export_key(*inputs: object) -> str:
    """Of an export: no two versions of a library share one."""
    ggml = load_ggml()
    # two builds of one version may round differently; wheels of one version are one file
    own = [hash_file(ggml.path).sha256] if ggml.is_own else []
    return stage_key(__version__, ggml.version, *own, version("gguf"), *inputs)


def _hashes(files: Iterable[Path], kind: type[Reap2ggufError]) -> list[tuple[str, str]]:
    """Names and SHA-256; an error of `kind` if a file cannot be read."""
    found: list[tuple[str, str]] = []
    for file in files:
        try:
            found.append((file.name, hash_file(file).sha256))
        except OSError as error:
            raise kind(f"{file}: cannot be read ({error.strerror or error})") from error
    return found
