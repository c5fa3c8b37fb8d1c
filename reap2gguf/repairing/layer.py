"""The repair of one layer: how far its kept experts move, and whether they move at all.

The method is ridge regression towards the original weights. With D0 the stored `down_proj` of the
kept experts, T what all original experts give on the pruned model's input and E = T - Phi D0 what
pruning took away,

    D = D0 + (Phi^T Phi + lambda I)^-1 Phi^T E,    lambda = alpha * mean(diag(Phi^T Phi))

which is (Phi^T Phi + lambda I)^-1 (Phi^T T + lambda D0). An eighth of the rows is held out, and the
error is that of weights rounded as they are stored, on these rows. From the strongest alpha of a
short list to the weakest, they are tried until one is worse than the one before it. Of those tried,
the strongest is taken whose error falls nearly as far as the best one's: it moves the weights less,
and what is lost on text of the calibration's kind is little beside what is won on other text. A
layer whose error does not fall keeps its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from reap2gguf.repairing.fit import LayerFit
from reap2gguf.repairing.gram import gram_of

if TYPE_CHECKING:
    from reap2gguf.repairing.features import Features, RoutedRows

RepairKind = Literal["ridge", "scale"]
ALPHAS = (1.0, 0.3, 0.1, 0.03)  # the strongest ridge first
NEARLY = 0.95  # of the best fall of the squared error: as good (figures: bench/RESULTS.md)
_SCALE_ALPHA = 1e-3  # keeps the number of an expert that no token reaches at 1
_PIECE = 2048  # rows whose outputs of all their experts are formed at once


Round = Callable[[Tensor], Tensor]  # weights (E F, H) as they will be stored


@dataclass(frozen=True)
class _Tried:
    """Weights (E F, H) of one alpha, and their squared error on the rows that are held out."""

    alpha: float
    error: float
    weights: Tensor


def fit_layer(
    fitted: Features,
    held_out: Features,
    original: Tensor,
    stored: Round,
    kind: RepairKind,
    way: str,
) -> tuple[LayerFit, Tensor | None]:
    """How a layer is repaired, and its new weights D (E F, H), or None where it keeps its own.

    original: D0 (E F, H)    way: one of `gram_size.WAYS`; `scale` needs none
    Raises ObservationError if there are no rows.
    """
    before = held_out.squared_error(None)
    good: list[_Tried] = []  # nearly as good as the best, strongest first
    last = float("inf")
    for alpha, change in _candidates(fitted, original, kind, way):
        weights = stored(original + change.to(original.dtype))
        error = held_out.squared_error((weights - original).to(fitted.work))
        if error > last:
            break
        last = error
        if error < before:
            limit = before - NEARLY * (before - error)  # the best so far: errors do not rise
            good = [one for one in good if one.error <= limit] + [_Tried(alpha, error, weights)]
    scale = held_out.rows.target_square
    taken = good[0] if good else None
    fit = LayerFit(
        None if taken is None else taken.alpha,
        _relative(before, scale),
        _relative(before if taken is None else taken.error, scale),
        fitted.n_rows,
        held_out.n_rows,
    )
    return fit, None if taken is None else taken.weights


def _relative(error: float, scale: float) -> float:
    return float(np.sqrt(error / scale)) if scale > 0 else 0.0


def _candidates(
    features: Features, original: Tensor, kind: RepairKind, way: str
) -> Iterator[tuple[float, Tensor]]:
    """Each alpha, and how much D changes (E F, H)."""
    if kind == "scale":
        numbers = scales(features, original)
        by_column = numbers.repeat_interleave(features.experts.width)
        yield _SCALE_ALPHA, (by_column - 1)[:, None] * original.to(features.work)
        return
    gram = gram_of(features, way)
    mean, start = gram.diagonal_mean, None
    for alpha in ALPHAS:
        change = gram.solve(alpha * mean, start) if mean > 0 else None
        if change is None:  # nor can a weaker one be solved
            return
        start = change
        yield alpha, change


@torch.inference_mode()
def scales(features: Features, original: Tensor) -> Tensor:
    """The factor of each expert's output, (E,), that brings the sums closest to their targets.

    The least squares of |E - sum_e (s_e - 1) w_e y_e|^2, with a ridge too weak to matter. The sums
    over rows are made on the host, in one order: the same bits each time.
    """
    count = features.experts.n_experts
    gram, right = np.zeros((count, count)), np.zeros(count)
    for rows in features.on_device():
        for products, with_errors, ids in _pair_products(features, rows, original):
            flat = (ids[:, :, None] * count + ids[:, None, :]).ravel()
            gram += np.bincount(flat, products.ravel(), count * count).reshape(count, count)
            right += np.bincount(ids.ravel(), with_errors.ravel(), count)
    shift = _SCALE_ALPHA * float(np.trace(gram)) / count
    if shift <= 0:
        return torch.ones(count, dtype=features.work, device=features.device)
    found = 1 + np.linalg.solve(gram + shift * np.eye(count), right)
    return torch.from_numpy(found).to(features.device, features.work)


def _pair_products(
    features: Features, rows: RoutedRows, original: Tensor
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of pieces of rows: products of their experts' outputs (n, K, K), with E (n, K), and ids."""
    top_k, hidden = rows.gates.shape[1], original.shape[1]
    outputs = torch.zeros(len(rows) * top_k, hidden, dtype=torch.float32, device=features.device)
    ids = torch.zeros(len(rows) * top_k, dtype=torch.int64, device=features.device)
    for expert in range(features.experts.n_experts):
        begin = rows.ends[expert - 1] if expert else 0
        places = rows.order[begin : rows.ends[expert]]
        chosen, gates = rows.pairs(expert)
        weights = original[features.columns(expert)].to(rows.inputs.dtype)
        values = features.experts.activations(expert, rows.inputs[chosen]) @ weights
        outputs[places] = values.float() * gates[:, None].float()
        ids[places] = expert
    for first in range(0, len(rows), _PIECE):
        piece = slice(first, first + _PIECE)
        parts = outputs.view(-1, top_k, hidden)[piece].to(features.work)
        errors = rows.errors[piece].to(features.work)
        yield (
            (parts @ parts.transpose(1, 2)).double().cpu().numpy(),
            (parts @ errors[:, :, None])[:, :, 0].double().cpu().numpy(),
            ids.view(-1, top_k)[piece].cpu().numpy(),
        )
