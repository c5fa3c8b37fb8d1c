"""What a card says of a repair: which weights were changed, how, on what text, and by how much."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reap2gguf.bundle.layout import MANIFEST_FILE
from reap2gguf.bundle.markdown import code, table

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import Manifest
    from reap2gguf.bundle.records import RepairedLayerRecord, RepairRecord


def repair_summary(manifest: Manifest) -> str:
    """A sentence for the head of a card; "" without a repair."""
    repair = manifest.pruning.repair
    if repair is None:
        return ""
    what = "fitted" if repair.kind == "ridge" else "scaled"
    return (
        f" Weights were changed: the `down_proj` of the remaining experts was {what} to make up "
        "for the removed ones."
    )


def changed_weights(manifest: Manifest) -> str:
    """The end of the sentence that says what the other weights are."""
    if manifest.pruning.repair is None:
        return ": nothing was retrained."
    return (
        ", but for the\n`down_proj` of the remaining experts, which was repaired; nothing was "
        "trained by gradients."
    )


def repair_section(manifest: Manifest) -> str:
    """How the weights were changed, and by how much, layer by layer; "" without a repair."""
    repair = manifest.pruning.repair
    if repair is None:
        return ""
    parts = [f"{_method(repair)} {_text(repair)} {_figures(repair)}{_mtp(manifest)}"]
    rows = [
        (str(layer), _alpha(one), f"{one.error_before:.4f}", f"{one.error_after:.4f}")
        for layer, one in sorted(repair.layers.items())
    ]
    found = table(("layer", "alpha", "error before", "error after"), rows)
    summary = "<summary>Repair of each layer</summary>"
    parts.append(f"<details>\n{summary}\n\n{found}\n\n</details>")
    return "\n\n".join(parts)


def _method(repair: RepairRecord) -> str:
    if repair.kind == "scale":
        return (
            "The repair multiplies the `down_proj` of each remaining expert by one number. Layer "
            "by layer, the numbers are the least squares between what the experts give with the "
            "new routing and what the layer of the source gives on the same input."
        )
    return (
        "The repair moves the `down_proj` of the remaining experts, layer by layer, by ridge "
        "regression from the weights of the source: to what the layer of the source gives on the "
        "pruned model's input, with the new routing. Routers and the other matrices of the experts "
        "are those of the source."
    )


def _text(repair: RepairRecord) -> str:
    return (
        f"It was fitted on {repair.n_fitted:,} tokens of the calibration text "
        f"{code(repair.calibration)}; {repair.n_held_out:,} more were held out to choose its "
        "strength (alpha)."
    )


def _figures(repair: RepairRecord) -> str:
    layers = repair.layers.values()
    before = sum(one.error_before for one in layers) / len(layers)
    after = sum(one.error_after for one in layers) / len(layers)
    n_kept = sum(one.alpha is None for one in layers)
    kept = f" {n_kept} of {len(layers)} layers kept their weights: no repair was better there."
    return (
        f"On the text that was held out, the mean error of the layers' experts, relative to what "
        f"they give in the source, went from {before:.4f} to {after:.4f}.{kept if n_kept else ''} "
        f"`{MANIFEST_FILE}` has the SHA-256 of each layer's new weights."
    )


def _mtp(manifest: Manifest) -> str:
    if manifest.pruning.mtp.state != "pruned":
        return ""
    return " The multi-token-prediction block was pruned and not repaired."


def _alpha(one: RepairedLayerRecord) -> str:
    return "weights kept" if one.alpha is None else f"{one.alpha:g}"
