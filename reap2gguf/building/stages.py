"""The stages of a build up to the export, each declared once: name, outputs, key, function.

To add a stage, write its class, put it into `STAGES` and call it in `pipeline.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from reap2gguf.artifacts.made_with import COMPUTING
from reap2gguf.artifacts.observations import Observations
from reap2gguf.artifacts.texts import ImatrixChunks, ObservationRows, Row, Texts
from reap2gguf.atomic import make_folder, remove
from reap2gguf.building.seals import Seal, read_seals, written_seals
from reap2gguf.building.stage import Run, Stage, needed
from reap2gguf.bundle.front_matter import PrunedFrom, hub_datasets, methods_of
from reap2gguf.bundle.layout import IMATRIX_DAT_FILE, IMATRIX_FILE
from reap2gguf.bundle.manifest import hash_file
from reap2gguf.disk.hashing import Hashes
from reap2gguf.exporting.header_facts import HeaderNames, pruning_values
from reap2gguf.exporting.journal import ExportJournal
from reap2gguf.exporting.memory import export_memory
from reap2gguf.exporting.model_files import WeightedBy, export_model, export_side
from reap2gguf.ggml import load_ggml
from reap2gguf.gguf_files.growing import GrowingEntries
from reap2gguf.gguf_files.imatrix import Imatrix, load_imatrix, save_both
from reap2gguf.gguf_files.imatrix_coverage import layer_hits
from reap2gguf.observing.passes import announced_entries, compute_imatrix, imatrix_of, observe
from reap2gguf.observing.probe import mtp_probe
from reap2gguf.pruning.write import HELD_BYTES, write_pruned
from reap2gguf.quantizing.minimum import check_minimum
from reap2gguf.verifying.exactness import Exactness
from reap2gguf.verifying.gguf_file import ExpectedGguf

if TYPE_CHECKING:
    from reap2gguf.building.text_stage import ReadTexts
    from reap2gguf.models.description import SideFile
    from reap2gguf.options import ComputeOptions
    from reap2gguf.pruning.view import PrunedView
    from reap2gguf.quantizing.resolve import ResolvedRecipe


class Observe(Stage[Observations]):
    """Sums what each expert of the unpruned model does; taken once for every ratio."""

    name = "observe"
    is_shared = True
    is_sweep = True
    libraries = COMPUTING

    def __init__(self, run: Run, texts: ReadTexts) -> None:
        super().__init__(run)
        self._texts = texts

    def make_key(self) -> str:
        return self.run.keys.observe(self._rows)

    @property
    def _rows(self) -> ObservationRows:
        return needed(self._texts.result.rows)

    @property
    def path(self) -> Path:
        return self.run.work.shared_file("observations", self.key)

    @property
    def outputs(self) -> Sequence[Path]:
        return (self.path,)

    def compute(self) -> Mapping[str, Any]:
        run = self.run
        of, options = (run.plan.checkpoint, run.plan.model, self._rows), self.compute_options
        seen = observe(*of, options, run.progress, run.plan.takes_sums)
        if run.is_first:
            run.work.share(seen.save, self.path)
        return {}

    def load(self) -> Observations:
        return Observations.load(self.path)

    def made_with(self) -> Mapping[str, str]:
        return self.result.made_with

    @cached_property
    def sha256(self) -> str:
        """The hash of the observations' file."""
        return hash_file(self.path).sha256


class Prune(Stage[None]):
    """Writes the pruned safetensors."""

    name = "prune"
    undoes = False  # later stages read the source; only `verify` reads its files

    def __init__(self, run: Run, pruned: PrunedView) -> None:
        super().__init__(run)
        self._pruned = pruned

    def make_key(self) -> str:
        return self.run.keys.pruned(self._pruned)

    @property
    def outputs(self) -> Sequence[Path]:
        return (self.run.work.hf,)

    def clear(self) -> None:
        remove(self.run.work.hf)

    @property
    def held_bytes(self) -> int:
        return HELD_BYTES

    def compute(self) -> Mapping[str, Any]:
        run, folder = self.run, self.run.work.hf
        make_folder(folder)
        threads = run.plan.options.compute.threads
        with Hashes() as hashes:
            write_pruned(self._pruned, folder, run.progress, n_threads=threads, hashes=hashes)
            return {"written": written_seals(run.work.root, hashes)}

    def load(self) -> None:
        """Only verification reads its files."""


class Importance(Stage[Imatrix]):
    """Computes the importance matrix of the pruned model."""

    name = "imatrix"
    is_sweep = True
    libraries: ClassVar[Sequence[str]] = COMPUTING

    def __init__(self, run: Run, pruned: PrunedView, texts: ReadTexts | None) -> None:
        super().__init__(run)
        self._pruned = pruned
        self._texts = texts
        self._growing: Imatrix | None = None  # while it is computed, and after

    @property
    def label(self) -> str:  # in errors
        return f"the importance matrix ({self._chunks.summary})"

    @property
    def matrix(self) -> Imatrix:
        """The matrix, each entry from when it is final: a stage beside this one may read it."""
        return self.result if self._growing is None else self._growing

    @property
    def texts(self) -> Texts:
        """The calibration texts."""
        return Texts(None, None) if self._texts is None else self._texts.result

    @property
    def _chunks(self) -> ImatrixChunks:
        return needed(self.texts.chunks)

    @property
    def _probe(self) -> Sequence[Row]:
        """Rows to ask an MTP block on; none if it was not asked before pruning on the same rows."""
        if self.texts.rows is None or not self.run.plan.asks_mtp:
            return ()
        return mtp_probe(self.run.plan.model, self.texts.rows)

    def make_key(self) -> str:
        pruned = self.run.keys.pruned(self._pruned)
        return self.run.keys.imatrix(pruned, self._chunks, self._probe)

    @property
    def path(self) -> Path:
        return self.run.work.gguf / IMATRIX_FILE

    @property
    def outputs(self) -> Sequence[Path]:
        return (self.path, self.path.with_name(IMATRIX_DAT_FILE))

    @property
    def compute_options(self) -> ComputeOptions:
        """As in any sweep; progress is not saved where the files beside it need the space."""
        options, room = super().compute_options, self.run.room
        is_beside = room.overlaps and options.threads > 1
        if is_beside and not room.keeps_states_beside:
            return replace(options, resume=None)
        return options

    def clear(self) -> None:
        remove(self.run.work.gguf)

    def compute(self) -> Mapping[str, Any]:
        entries = announced_entries(self._pruned, self._pruned.model)
        self._growing = imatrix_of(entries, self._chunks)
        imatrix, report = compute_imatrix(
            self._pruned,
            self._pruned.model,
            self._chunks,
            self.compute_options,
            self.run.progress,
            self._probe,
            entries,
            self.beside,
        )
        if not self.run.is_first:
            return {}
        make_folder(self.run.work.gguf)
        save_both(imatrix, self.path)
        return {
            "mtp_hits": report.mtp_hits,
            "mtp_tokens": report.mtp_tokens,
            "unseen_experts": sum(imatrix.unseen_experts().values()),
            "expert_tokens": layer_hits(imatrix),
            "seals": self.run.seal(self.outputs),
        }

    @property
    def seals(self) -> Mapping[str, Seal]:
        """Both files as they were written."""
        return read_seals(self.facts.get("seals"))

    def is_intact(self) -> bool:
        return bool(self.seals) and not self.run.unsealed(self.seals)

    def load(self) -> Imatrix:
        return load_imatrix(self.path)


class Export(Stage[None]):
    """Writes every GGUF file, in one pass over the pruned model."""

    name = "export"

    def __init__(self, run: Run, pruned: PrunedView, importance: Importance) -> None:
        super().__init__(run)
        self._pruned = pruned
        self._importance = importance

    def make_key(self) -> str:
        return self.run.keys.export(self._importance.key, self._datasets, self.run.plan.recipes)

    @property
    def files(self) -> Mapping[Path, ResolvedRecipe]:
        plan, folder = self.run.plan, self.run.work.gguf
        return {folder / plan.gguf_name(recipe): recipe for recipe in plan.recipes}

    @property
    def sides(self) -> Mapping[Path, SideFile]:
        plan, folder = self.run.plan, self.run.work.gguf
        return {folder / plan.side_name(side): side for side in plan.side_files}

    @property
    def outputs(self) -> Sequence[Path]:
        return (*self.files, *self.sides)

    @property
    def held_bytes(self) -> int:
        compute, recipes = self.run.plan.options.compute, self.run.plan.recipes
        has_gpu = compute.likely_device == "cuda"
        where = compute.device, compute.threads, has_gpu
        return export_memory(self._pruned, recipes, *where).ram

    @property
    def after(self) -> Sequence[Stage[Any]]:
        """A recipe that asks for importance must know all of it before anything is written."""
        asks = any(recipe.asks_importance for recipe in self.run.plan.recipes)
        return (self._importance,) if asks else ()

    def clear(self) -> None:
        folder = self.run.work.gguf
        for file in folder.iterdir() if folder.is_dir() else ():
            if file.name not in (IMATRIX_FILE, IMATRIX_DAT_FILE):
                remove(file)

    def compute(self) -> Mapping[str, Any]:
        for recipe in self.run.plan.recipes if self.after else ():
            check_minimum(recipe, self._importance.matrix, self._importance.label)
        make_folder(self.run.work.gguf)
        with Hashes() as hashes:
            self._write(hashes)
            # the files hold this matrix: they are not finished before it is
            self.wait_for(self._importance)
            entries = self._importance.matrix.entries
            if isinstance(entries, GrowingEntries):
                self.seconds_waited += entries.seconds_idle
            return {"written": written_seals(self.run.work.root, hashes)}

    def _write(self, hashes: Hashes) -> None:
        plan, progress = self.run.plan, self.run.progress
        threads, model, names = plan.options.compute.threads, self._pruned.model, self.names()
        for path, side in self.sides.items():  # needs no importance
            journal = self._journal(f"export-{side.prefix}")
            export_side(self._pruned, model, names, path, side, threads, progress, journal, hashes)
        export_model(
            self._pruned,
            model,
            names,
            self.files,
            WeightedBy(self._importance.matrix),
            threads,
            progress,
            self._journal("export"),
            hashes,
            plan.options.compute.device,
            plan.options.compute.check_quants.share,
        )

    def names(self) -> HeaderNames:
        """What the headers say of the model."""
        plan = self.run.plan
        kept = self._pruned.kept
        earlier = None if plan.history is None else plan.history.after(kept)
        own = pruning_values(
            plan.source.label, plan.method, plan.target.n_experts, kept, earlier=earlier
        )
        pruned = PrunedFrom(
            plan.source.label,
            plan.model.facts.architecture,
            bool(plan.side_files),
            self._datasets,
            methods_of(plan.method, earlier),
            plan.target.prunes,
            plan.repairs,
        )
        return HeaderNames(plan.name, pruned, tuple(own))

    @property
    def _datasets(self) -> tuple[str, ...]:
        rows = self._importance.texts.rows
        return () if rows is None else hub_datasets(rows.components)

    def expected(self, recipe: ResolvedRecipe) -> ExpectedGguf:
        """What the header of a recipe's file must say."""
        return ExpectedGguf(
            recipe.tensor_types(),
            self._pruned.n_kept,
            recipe.llama_file_type.value,
            self.names(),
            recipe.name,
        )

    def exactness(self, every_type: bool) -> Exactness:
        """How to compare its files, which were made with the same libggml."""
        return Exactness(every_type, self._importance.result, load_ggml().label)

    def compared(self) -> tuple[list[str], list[str]] | None:
        """Violations and what was checked, if the files are not to be quantized again for that."""
        return None

    def _journal(self, name: str) -> ExportJournal:
        return ExportJournal(self.run.work.root / f"{name}.json", self.key)

    def load(self) -> None:
        """Only verification reads its files."""
