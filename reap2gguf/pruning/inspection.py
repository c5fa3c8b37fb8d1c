"""What observations say before experts are removed, and what a bundle's pruning has kept.

The share that stays is the sum of the scores of the experts that stay, divided by the sum of all
scores of that layer, by the same criterion that chooses them. Scores of different layers differ in
size, so shares are averaged over layers, and scores are not. A router's groups, which each keep the
same number, are not known from observations: there the shares are upper bounds.

Memory: one number per expert and criterion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reap2gguf.errors import ArtifactError
from reap2gguf.pruning.coverage import Coverage, coverage
from reap2gguf.pruning.select import CRITERIA, kept_at

if TYPE_CHECKING:
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.bundle.manifest import Manifest
    from reap2gguf.pruning.select import Scores

RATIOS = (0.125, 0.25, 0.375, 0.5)
SHARES = (0.95, 0.9)  # of which the smallest number of experts is looked for


@dataclass(frozen=True)
class LayerInspection:
    """One layer: how many tokens its experts got, and what stays at each ratio."""

    layer: int
    coverage: Coverage
    shares: tuple[float, ...]  # of the layer's scores, for each ratio; 0 to 1


@dataclass(frozen=True)
class Enough:
    """The fewest experts per layer that keep a share of the scores, on average over layers."""

    share: float
    n_kept: int
    ratio: float  # of experts that are removed


@dataclass(frozen=True)
class ObservationsInspection:
    """What each layer keeps at several ratios, and how well its experts are known."""

    observations: Observations = field(repr=False)
    method: str
    ratios: tuple[float, ...]  # shares of the experts that are removed
    layers: tuple[LayerInspection, ...]
    coverage: Coverage  # of all layers together
    enough: tuple[Enough, ...]  # empty where layers have different numbers of experts

    @property
    def means(self) -> tuple[float, ...]:
        """The share that stays at each ratio, on average over layers."""
        return tuple(float(np.mean(shares)) for shares in self._by_ratio())

    @property
    def lowest(self) -> tuple[float, ...]:
        """The share that stays at each ratio in the layer that loses the most."""
        return tuple(min(shares) for shares in self._by_ratio())

    def _by_ratio(self) -> list[tuple[float, ...]]:
        return list(zip(*(layer.shares for layer in self.layers), strict=True))


@dataclass(frozen=True)
class KeptLayer:
    """One layer of a bundle: what it keeps of the source's experts."""

    layer: int
    n_experts: int
    n_kept: int
    share: float | None = None  # of the layer's scores; None without the observations
    n_unseen_kept: int | None = None


@dataclass(frozen=True)
class BundleInspection:
    """What was pruned in a bundle, by its manifest and, where they are known, its observations."""

    manifest: Manifest = field(repr=False)
    method: str
    layers: tuple[KeptLayer, ...]
    observations: Observations | None = field(default=None, repr=False)

    @property
    def mean(self) -> float | None:
        """The share of the scores that stays, on average over layers."""
        shares = [layer.share for layer in self.layers if layer.share is not None]
        return float(np.mean(shares)) if shares else None


def inspect_observations(
    observations: Observations, method: str, ratios: Sequence[float]
) -> ObservationsInspection:
    """What stays of every layer if a share of its experts is removed, for each of `ratios`.

    Raises ArtifactError if there is no layer in them.
    """
    curves = {layer: _curve(observations, layer, method) for layer in sorted(observations.layers)}
    if not curves or min(map(len, curves.values())) < 2:
        raise ArtifactError("the observations hold no experts; run `reap2gguf observe` again")
    layers = tuple(
        LayerInspection(
            layer,
            coverage(observations, [layer]),
            tuple(float(curve[kept_at(ratio, len(curve) - 1)]) for ratio in ratios),
        )
        for layer, curve in curves.items()
    )
    return ObservationsInspection(
        observations, method, tuple(ratios), layers, coverage(observations), _enough(curves)
    )


def _curve(observations: Observations, layer: int, method: str) -> npt.NDArray[np.float64]:
    """The share of a layer's scores that stays with 0, 1, ... of its experts: (E + 1,)."""
    scores = _scaled(CRITERIA[method](observations.layers[layer]))
    sums = np.concatenate([[0.0], np.cumsum(-np.sort(-scores))])
    return sums / sums[-1] if len(sums) and sums[-1] > 0 else np.zeros_like(sums)


def _scaled(scores: Scores) -> Scores:
    """Scores as shares of the highest, so that no sum of them overflows."""
    highest = scores.max(initial=0.0)
    return scores / highest if highest > 0 else scores


def _enough(curves: Mapping[int, npt.NDArray[np.float64]]) -> tuple[Enough, ...]:
    """The fewest experts for each of SHARES."""
    if len({len(curve) for curve in curves.values()}) != 1:
        return ()
    means = np.mean(list(curves.values()), axis=0)
    total = len(means) - 1
    # a layer in which nothing was seen keeps a share of zero with all its experts
    kept = {share: int(np.argmax(means >= share)) for share in SHARES if means[-1] >= share}
    return tuple(Enough(share, n, 1 - n / total) for share, n in kept.items())


def inspect_bundle(
    manifest: Manifest, observations: Observations | None, method: str | None = None
) -> BundleInspection:
    """What a bundle keeps; shares by `method`, or by the bundle's own, if there are observations.

    Raises ArtifactError if the observations do not fit the manifest.
    """
    pruning = manifest.pruning
    chosen = pruning.method if method is None else method
    layers = []
    for layer, kept in sorted(pruning.kept.items()):
        share = n_unseen = None
        if observations is not None:
            if chosen not in CRITERIA:
                raise ArtifactError(f"the manifest names the unknown method {chosen!r}")
            seen = observations.layers.get(layer)
            if seen is None or len(seen.count) != pruning.n_experts:
                raise ArtifactError(
                    f"layer {layer} of the observations does not have the {pruning.n_experts} "
                    "experts of the manifest; pass the bundle that was made of them"
                )
            ids = list(kept)
            scores = _scaled(CRITERIA[chosen](seen))
            share = float(scores[ids].sum() / scores.sum()) if scores.any() else 0.0
            n_unseen = int((seen.count[ids] == 0).sum())
        layers.append(KeptLayer(layer, pruning.n_experts, len(kept), share, n_unseen))
    return BundleInspection(manifest, chosen, tuple(layers), observations)
