"""A comparison as a whole: what every model is made of, and how good it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reap2gguf.atomic import write_whole
from reap2gguf.models.roles import ROLES, Role

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.bundle.evaluation import Divergence, Estimate, Evaluation
    from reap2gguf.comparing.contents import Contents
    from reap2gguf.comparing.opening import Opened


@dataclass(frozen=True)
class ComparedModel:
    """One of the models."""

    label: str
    kind: str  # gguf or checkpoint
    contents: Contents
    not_evaluated: str = ""  # why it has no figures though the others have


@dataclass(frozen=True)
class ModelComparison:
    """Models side by side, in the order in which they were named."""

    models: Sequence[ComparedModel]
    reference: str = ""  # the label of the model that the others are measured against
    evaluation: Evaluation | None = None  # None: nothing was measured

    @property
    def roles(self) -> list[Role]:
        """The roles that any of the models has."""
        return [role for role in ROLES if any(role in one.contents.roles for one in self.models)]

    @property
    def layers(self) -> range:
        """The layers that any of the models has."""
        return range(max(one.contents.n_blocks for one in self.models))

    def perplexity(self, label: str) -> Estimate | None:
        """Of a model; None if it was not measured."""
        found = self.evaluation and self.evaluation.variant(label)
        return found.perplexity if found else None

    def divergence(self, label: str) -> Divergence | None:
        """How far a model is from the reference; None if it is not known, or the reference."""
        return self.evaluation.divergence(label, self.reference) if self.evaluation else None

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all. Raises OutputError if the disk fails."""
        write_whole(path, json.dumps(self.as_json(), indent=1, ensure_ascii=False) + "\n")

    def as_json(self) -> dict[str, Any]:
        """Plain JSON; `evaluation` is as `reap2gguf evaluate` has it."""
        return {
            "reference": self.reference or None,
            "models": [
                {
                    "name": one.label,
                    "kind": one.kind,
                    "not_evaluated": one.not_evaluated or None,
                    **one.contents.as_json(),
                }
                for one in self.models
            ],
            "evaluation": None if self.evaluation is None else self.evaluation.as_json(),
        }


def compared(
    opened: Sequence[Opened],
    reference: str = "",
    evaluation: Evaluation | None = None,
    problems: Mapping[str, str] | None = None,
) -> ModelComparison:
    """The comparison of models that are open; `problems` says by label why some lack figures."""
    models = [
        ComparedModel(one.label, one.kind, one.contents, (problems or {}).get(one.label, ""))
        for one in opened
    ]
    return ModelComparison(models, reference if evaluation else "", evaluation)
