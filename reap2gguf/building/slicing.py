"""Cuts an importance matrix of the unpruned model to the experts that a pruned one keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from reap2gguf.errors import ArtifactError
from reap2gguf.gguf_files.imatrix_coverage import ImatrixCoverage, coverage
from reap2gguf.gguf_files.imatrix_fit import cut, fit, n_experts_in, with_experts

if TYPE_CHECKING:
    from reap2gguf.building.pruned_models import PrunedModel
    from reap2gguf.gguf_files.imatrix import Imatrix


@dataclass(frozen=True)
class SlicedImatrix:
    """An importance matrix in the names and shapes of a pruned model."""

    imatrix: Imatrix
    coverage: ImatrixCoverage
    n_before: int | None  # experts per layer in the file; None: it has no entries of experts
    n_after: int | None
    left_out: tuple[str, ...] = ()  # entries of tensors that the model does not have


def slice_to(imatrix: Imatrix, model: PrunedModel, where: str) -> SlicedImatrix:
    """The matrix cut to the experts that a pruned model keeps; one of that model is only renamed.

    Raises ArtifactError if it is of another model.
    """
    n_before, n_after = n_experts_in(imatrix, model.shapes, where), model.n_experts
    if n_before is None or n_before == n_after:
        fitted = fit(imatrix, model.shapes, where)
        found = fitted.imatrix
    else:
        origin = next((one for one in model.origins if one.has(n_before)), None)
        if origin is None:
            known = [str(one.n_experts) for one in model.origins if one.n_experts is not None]
            expected = f"{' or '.join(known) or 'more'} (before pruning) or {n_after} (after)"
            raise ArtifactError(
                f"{where}: has {n_before} experts per layer, expected {expected}; it is of another "
                "model"
            )
        fitted = fit(imatrix, with_experts(model.shapes, n_before), where)
        found = cut(fitted.imatrix, origin.kept, where)
    covered = coverage(found, model.shapes, model.mtp_block)
    return SlicedImatrix(found, covered, n_before, n_after, fitted.left_out)
