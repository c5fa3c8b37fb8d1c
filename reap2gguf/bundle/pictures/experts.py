"""Pictures of the experts: what each is worth, where the cut is, and how often each is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from reap2gguf.bundle.pictures.canvas import (
    BLUE,
    FAINT,
    INK,
    LINES,
    MISSING,
    ORANGE,
    RED,
    Canvas,
    Place,
    colours,
    steps,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from reap2gguf.checkpoint.weights import Doubles

_LEFT = 0.85  # inches, of the first axes
_MOST_POWERS = 4  # of two, between a layer's median and the ends of the colours
_POWERS = ("1/16", "1/8", "1/4", "1/2", "median", "2 x", "4 x", "8 x", "16 x")


@dataclass(frozen=True)
class ExpertUse:
    """What was observed of the experts of one layer; every array is (E,), but `after`."""

    layer: int
    scores: Doubles  # by which they were ranked
    tokens: npt.NDArray[np.int64]  # routed to each, in the calibration pass
    outputs: Doubles  # sums of gate weight times norm of the output
    kept: Sequence[int]  # ids
    after: npt.NDArray[np.int64] | None = None  # (K,): tokens of the kept ones in the pruned model

    @property
    def order(self) -> npt.NDArray[np.int64]:
        """The ids: the kept ones first, each part from the highest score to the lowest."""
        ranked = np.argsort(-self.scores, kind="stable")
        is_kept = np.isin(ranked, list(self.kept))
        return np.concatenate([ranked[is_kept], ranked[~is_kept]])

    def removed_share(self, amounts: npt.NDArray[Any]) -> float:
        """The share of `amounts` that the removed experts have; 0 if there are none."""
        total = float(amounts.sum())
        return 1 - float(amounts[list(self.kept)].sum()) / total if total > 0 else 0.0


def saliency_picture(layers: Sequence[ExpertUse], method: str) -> bytes:
    """A row per layer, its experts from the highest score to the lowest, with the cut.

    Beside it, what share of the tokens, and of all weighted outputs, went to removed experts.
    """
    n_experts, n_kept = len(layers[0].scores), len(layers[0].kept)
    rows = min(max(0.105 * len(layers), 1.9), 6.6)
    of_layer = "the REAP score" if method == "reap" else f"the score by {method}"
    canvas = Canvas(
        rows + 2.3,
        f"Saliency: {n_kept} of {n_experts} experts are kept in each layer",
        [
            f"Each row is a layer; its experts are sorted by {of_layer}, the highest at the left.",
            "Colours are relative to the median expert of the same layer.",
        ],
    )
    axes = canvas.axes(Place(_LEFT, 1.35, 6.0, rows))
    values = np.stack([_relative(one) for one in layers])
    power = _power(values)
    image = axes.imshow(
        np.ma.masked_invalid(values),
        cmap=colours("viridis"),
        vmin=-power,
        vmax=power,
        aspect="auto",
        interpolation="nearest",
        extent=(0, n_experts, len(layers), 0),
    )
    _mark_cut(axes, n_experts, n_kept, len(layers))
    _layer_ticks(axes, layers, rows)
    axes.set_xticks([at for at in steps(n_experts, 9) if at < 0.94 * n_experts] + [n_experts])
    axes.set_xlabel("experts by rank", color=FAINT, size=9)
    _removed_shares(canvas, Place(7.2, 1.35, 2.35, rows), layers)
    _scale(canvas, image, power, Place(_LEFT, rows + 1.85, 3.6, 0.1))
    return canvas.png()


def _relative(one: ExpertUse) -> Doubles:
    """Powers of two between each score, in order, and the median; NaN for an expert never seen."""
    ordered = one.scores[one.order]
    seen = ordered[ordered > 0]
    median = float(np.median(seen)) if len(seen) else 1.0
    found = np.full(len(ordered), np.nan)
    found[ordered > 0] = np.log2(seen / median)
    return found


def _power(values: Doubles) -> int:
    """How many powers of two the colours reach from the median: nearly all experts."""
    seen = np.abs(values[np.isfinite(values)])
    reach = float(np.percentile(seen, 99)) if len(seen) else 1.0
    return int(np.clip(np.ceil(reach), 1, _MOST_POWERS))


def _mark_cut(axes: Axes, n_experts: int, n_kept: int, n_layers: int) -> None:
    """A line after the last kept expert, and what is on each side of it."""
    axes.plot([n_kept, n_kept], [0, n_layers], color="white", linewidth=3.2, clip_on=False)
    axes.plot([n_kept, n_kept], [0, n_layers], color=RED, linewidth=1.8, clip_on=False)
    looks: dict[str, Any] = {"va": "bottom", "size": 9, "weight": "bold"}
    up = -0.02 * n_layers
    gap = n_experts * 0.012
    is_wide = n_kept < 0.86 * n_experts  # is there room for words right of the line?
    left = n_kept - gap if is_wide else 0.86 * n_experts
    axes.text(left, up, f"{n_kept} kept", ha="right", color=INK, **looks)
    right, side = (n_kept + gap, "left") if is_wide else (n_experts, "right")
    axes.text(right, up, f"{n_experts - n_kept} removed", ha=side, color=RED, **looks)


def _layer_ticks(axes: Axes, layers: Sequence[ExpertUse], height: float) -> None:
    rows = steps(len(layers), max(int(height / 0.24), 2))
    axes.set_yticks([row + 0.5 for row in rows], [str(layers[row].layer) for row in rows])
    axes.set_ylabel("layer", color=FAINT, size=9)


def _removed_shares(canvas: Canvas, place: Place, layers: Sequence[ExpertUse]) -> None:
    axes = canvas.axes(place)
    where = [row + 0.5 for row in range(len(layers))]
    tokens = [100 * one.removed_share(one.tokens) for one in layers]
    outputs = [100 * one.removed_share(one.outputs) for one in layers]
    axes.barh(where, tokens, height=0.8, color="#9cc7e2", label="of the routed tokens")
    looks: dict[str, Any] = {"color": RED, "markersize": min(4.5, 60 * place.height / len(layers))}
    axes.plot(outputs, where, "o", label="of the weighted outputs", **looks)
    axes.set_ylim(len(layers), 0)
    most = max(*tokens, *outputs, 1e-9)
    axes.set_xlim(0, most * 1.08)
    axes.set_yticks([])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.grid(axis="x", color=LINES, linewidth=0.8)
    axes.set_axisbelow(True)
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel("share that removed experts had", color=FAINT, size=9)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.03, 1.0),
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handlelength=1,
        borderpad=0.1,
        labelspacing=0.25,
    )


def _scale(canvas: Canvas, image: Any, power: int, place: Place) -> None:
    """The bar of colours, with what they mean."""
    axes = canvas.axes(place)
    powers = range(-power, power + 1)
    bar = canvas.figure.colorbar(image, cax=axes, orientation="horizontal", ticks=powers)
    bar.outline.set_visible(False)
    names = _POWERS[_MOST_POWERS - power : _MOST_POWERS + power + 1]
    axes.set_xticks(powers, names)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=FAINT, pad=3)
    right, line = place.left + place.width, place.top + 0.1
    canvas.text(right + 0.4, line, "■", size=11, color=MISSING)
    canvas.text(right + 0.6, line, "no token reached it", size=8.5, color=FAINT)


def usage_picture(layers: Sequence[ExpertUse]) -> bytes:
    """How evenly tokens are spread over experts: of all before, and of the kept ones after."""
    n_experts, n_kept = len(layers[0].tokens), len(layers[0].kept)
    measured = all(one.after is not None for one in layers)
    after = "after pruning" if measured else "kept experts, before pruning"
    canvas = Canvas(
        4.4,
        "Expert usage before and after pruning",
        [
            "Left: tokens per expert; 1 is an even share. Line: median of the layers; band: 90 %.",
            "Right: how many experts are in use, by the entropy of their shares; dashed: all.",
        ],
    )
    curves = canvas.axes(Place(_LEFT, 1.15, 4.3, 2.6))
    spread = canvas.axes(Place(5.95, 1.15, 3.6, 2.6))
    used = [
        ("before pruning", [one.tokens for one in layers], BLUE, n_experts),
        (after, [_after(one) for one in layers], ORANGE, n_kept),
    ]
    where = [one.layer for one in layers]
    for name, tokens, colour, count in used:
        _usage_curve(curves, tokens, name, colour)
        marker = "o" if len(where) < 30 else None
        looks: dict[str, Any] = {"color": colour, "linewidth": 1.8, "marker": marker}
        spread.plot(where, [_spread(one) for one in tokens], markersize=3.5, **looks)
        spread.axhline(count, color=colour, linewidth=1, linestyle=(0, (4, 3)), alpha=0.8)
    curves.set_xlim(0, n_experts)
    curves.set_ylim(bottom=0)
    curves.set_xlabel("experts, from the most used to the least", color=FAINT, size=9)
    curves.set_ylabel("tokens, relative to an even share", color=FAINT, size=9)
    curves.legend(frameon=False, fontsize=9, labelcolor=INK, handlelength=1.4)
    spread.set_ylim(0, n_experts * 1.06)
    spread.set_xlabel("layer", color=FAINT, size=9)
    spread.set_ylabel("evenly used experts", color=FAINT, size=9)
    spread.set_xticks([where[row] for row in steps(len(where), 10)])
    for axes in (curves, spread):
        axes.grid(color=LINES, linewidth=0.8)
        axes.set_axisbelow(True)
    return canvas.png()


def _after(one: ExpertUse) -> npt.NDArray[np.int64]:
    """Tokens of the kept experts, in the pruned model if that is known."""
    return one.tokens[list(one.kept)] if one.after is None else one.after


def _usage_curve(
    axes: Axes, tokens: Sequence[npt.NDArray[np.int64]], name: str, colour: str
) -> None:
    """The median over the layers of their sorted shares, and a band with most of them."""
    shares = np.stack([np.sort(one)[::-1] / max(one.mean(), 1e-12) for one in tokens])
    middle = np.arange(shares.shape[1]) + 0.5
    low, median, high = np.percentile(shares, [5, 50, 95], axis=0)
    axes.fill_between(middle, low, high, color=colour, alpha=0.16, linewidth=0)
    axes.plot(middle, median, color=colour, linewidth=2, label=name)


def _spread(tokens: npt.NDArray[np.int64]) -> float:
    """The exponential of the entropy of the shares: the number of experts if all are equal."""
    shares = tokens[tokens > 0] / max(tokens.sum(), 1)
    return float(np.exp(-(shares * np.log(shares)).sum()))
