"""The stage that reads the calibration texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from reap2gguf.artifacts.made_with import TOKENIZING
from reap2gguf.artifacts.texts import Texts
from reap2gguf.building.stage import Stage, needed
from reap2gguf.calibration.drawing import read_texts
from reap2gguf.choosing.holdout import hold_out
from reap2gguf.repairing.limits import check_rows
from reap2gguf.tokenizer.tokenizer import Tokenizer


class ReadTexts(Stage[Texts]):
    """Tokenizes all text, so that one that is too short is refused before the long work."""

    name = "texts"
    is_shared = True
    libraries = TOKENIZING

    def make_key(self) -> str:
        return self.run.keys.texts

    @property
    def path(self) -> Path:
        return self.run.work.shared_file("texts", self.run.keys.texts)

    @property
    def outputs(self) -> Sequence[Path]:
        return (self.path,)

    def compute(self) -> Mapping[str, Any]:
        self.run.work.share(self.read().save, self.path)
        return {}

    def load(self) -> Texts:
        # a process on another machine may not see the file; the same inputs make the same again
        is_there = self.run.is_first or self.path.is_file()
        return self.divided(Texts.load(self.path) if is_there else self.read())

    def divided(self, texts: Texts) -> Texts:
        """The texts, without the rows that are held out where a method is chosen by them."""
        if texts.rows is None or not self.run.plan.chooses:
            return texts
        split = hold_out(texts.rows)
        return replace(texts, rows=split.seen, held=split.held)

    def read(self) -> Texts:
        """Draw and tokenize all texts. Raises CalibrationError, UsageError for too few rows."""
        plan = self.run.plan
        found = read_texts(
            Tokenizer(plan.source.folder),
            plan.calibration,
            plan.max_length,
            plan.options.imatrix_text,
            self.run.keys.chunk,
            plan.model.facts.vocab_size,
            self.run.progress,
            plan.files,
            plan.options.imatrix_chunks,
            has_rows=plan.reads_rows,
            has_chunks=plan.computes_imatrix,
        )
        if plan.repairs and plan.options.repair != "none":  # `choose` works without a repair
            check_rows(len(needed(found.rows).rows))
        return found

    def made_with(self) -> Mapping[str, str]:
        return self.result.made_with
