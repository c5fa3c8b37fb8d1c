"""Pictures of the GGUF files: what quality costs in bytes, and where the bits are."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from reap2gguf.bundle.pictures.canvas import (
    BLUE,
    FAINT,
    MISSING,
    ORANGE,
    PAPER,
    Canvas,
    Place,
    colours,
    plain,
    steps,
)
from reap2gguf.bundle.pictures.sizes import Level, Series, SizePoint, sizes_picture
from reap2gguf.bundle.wording import PRUNED
from reap2gguf.gguf_files.tensor_types import block_of, type_of_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from reap2gguf.bundle.evaluation import Estimate
    from reap2gguf.bundle.wording import Wording

_LEFT = 0.85  # inches
_BITS = (1, 2, 3, 4, 5, 6, 8, 16)  # at which the colours of bits per weight change evenly
MOST_FILES = 12  # in the picture of bits per weight
_ROW = 0.17  # inches, of a role
_LAYER = re.compile(r"blk\.(\d{1,5})\.(.+)\Z")
# how the names of tensors in a layer begin; the first that fits
_ROLES = (
    ("experts: down", ("ffn_down_exps",)),
    ("experts: up, gate", ("ffn_up_exps", "ffn_gate_exps", "ffn_gate_up_exps")),
    ("shared expert", ("ffn_down_shexp", "ffn_up_shexp", "ffn_gate_shexp")),
    ("latent", ("ffn_latent_down.", "ffn_latent_up.")),
    ("dense layer", ("ffn_down.", "ffn_up.", "ffn_gate.")),
    ("router", ("ffn_gate_inp", "exp_probs_b")),
    ("attention", ("attn_",)),
    ("linear attention, Mamba", ("ssm_",)),
    ("convolution", ("shortconv.",)),
    ("MTP", ("nextn.",)),
)
_OUTSIDE = (("embeddings", ("token_embd",)), ("output", ("output.",)))


@dataclass(frozen=True)
class FilePoint:
    """A file by its label, with what was measured of it; None for what was not."""

    label: str
    n_bytes: int
    from_pruned: Estimate | None  # KL divergence
    from_source: Estimate | None


@dataclass(frozen=True)
class FileTypes:
    """A file by its label, with the type of each of its tensors."""

    label: str
    bits_per_weight: float
    tensors: Mapping[str, str]


def quality_picture(
    files: Sequence[FilePoint], pruning: Estimate | None, words: Wording | None = PRUNED
) -> bytes:
    """KL divergence against size: of each file from the pruned model, and from the source.

    `pruning` is the divergence of the pruned model from the source, where anything was pruned;
    `words` say what was done to its experts; None: all are there.
    """
    from_source = _points((one, one.from_source) for one in files)
    what = "quantizing" if words is None else "what you feel"
    series = [Series(f"from the source: {what}", BLUE, from_source, "s")]
    if pruning is not None and words is not None:
        from_pruned = _points((one, one.from_pruned) for one in files)
        series = [
            Series("from the source: what you feel", ORANGE, from_source),
            Series(f"from the {words.model} model: quantizing alone", BLUE, from_pruned, "s"),
        ]
    return sizes_picture(
        "KL divergence against size of the files",
        ["Mean over the tokens of the evaluation, with its standard error; lower is closer."],
        "KL divergence, nats",
        series,
        None if pruning is None or words is None else Level(f"{words.act} alone", pruning),
    )


def _points(files: Iterable[tuple[FilePoint, Estimate | None]]) -> list[SizePoint]:
    """Those that were measured."""
    return [
        SizePoint(plain(one.label), one.n_bytes, value) for one, value in files if value is not None
    ]


def bits_picture(files: Sequence[FileTypes], shapes: Mapping[str, Sequence[int]]) -> bytes:
    """Bits per weight of each file: a row per role, a column per layer, in colours.

    `shapes` are those of the model's tensors. At most MOST_FILES files are drawn.
    """
    shown, left_out = files[:MOST_FILES], len(files) - MOST_FILES
    tables = [_table(one, shapes) for one in shown]
    n_layers = max(_n_layers(shapes), 1)
    roles = list(dict.fromkeys(role for table in tables for role in table)) or ["no matrices"]
    panel = _ROW * len(roles)
    lines = [
        "A block per file, a column per layer; embeddings belong to none. Right: mean of the row.",
    ]
    if left_out > 0:
        lines.append(f"{left_out} more files are not drawn.")
    top = 1.1 + 0.2 * (len(lines) - 1)
    gap = 0.42
    canvas = Canvas(
        top + len(shown) * (panel + gap) + 0.62, "Bits per weight by layer and role", lines
    )
    for number, (one, table) in enumerate(zip(shown, tables, strict=True)):
        place = Place(1.75, top + number * (panel + gap), 7.1, panel)
        canvas.text(0.28, place.top - 0.08, plain(one.label), size=10, weight="bold")
        canvas.text(
            place.left,
            place.top - 0.08,
            f"{one.bits_per_weight:.2f} bits per weight in all",
            size=9,
            color=FAINT,
        )
        axes = canvas.axes(place)
        image = _draw_table(axes, [table.get(role, {}) for role in roles], n_layers)
        axes.set_yticks([row + 0.5 for row in range(len(roles))], roles)
        _row_means(axes, [table.get(role, {}) for role in roles], n_layers)
        is_last = number == len(shown) - 1
        columns = steps(n_layers, 12)
        axes.set_xticks(
            [at + 0.5 for at in columns], [str(at) for at in columns] if is_last else []
        )
        if is_last:
            axes.set_xlabel("layer", color=FAINT, size=9)
    canvas.text(0.28 + 1.47, canvas.height - 0.27, "bits", size=8.5, color=FAINT)
    _bits_scale(canvas, image, Place(2.15, canvas.height - 0.4, 4.2, 0.1))
    canvas.text(6.8, canvas.height - 0.3, "■", size=11, color=MISSING)
    canvas.text(7.0, canvas.height - 0.3, "no such tensor in the layer", size=8.5, color=FAINT)
    return canvas.png()


def _n_layers(shapes: Mapping[str, Sequence[int]]) -> int:
    layers = (match for name in shapes if (match := _LAYER.match(name)))
    return 1 + max((int(match[1]) for match in layers), default=-1)


@dataclass
class _Cell:
    """Bits and weights of the tensors of one role in one layer."""

    bits: float = 0.0
    weights: int = 0


def _table(one: FileTypes, shapes: Mapping[str, Sequence[int]]) -> dict[str, dict[int, _Cell]]:
    """Cells by role and layer; layer -1 for tensors outside the layers. In the order of roles."""
    found: dict[str, dict[int, _Cell]] = {}
    for name, (role, layer) in _placed(shapes):
        if name not in one.tensors:
            continue
        cell = found.setdefault(role, {}).setdefault(layer, _Cell())
        n_weights = math.prod(shapes[name])
        cell.bits += n_weights * _bits_of(one.tensors[name])
        cell.weights += n_weights
    order = [role for role, _ in (*_OUTSIDE[:1], *_ROLES, *_OUTSIDE[1:])]
    return {role: found[role] for role in order if role in found}


def _placed(shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, tuple[str, int]]]:
    """The role and layer of each matrix; norms and other vectors have neither."""
    for name, shape in shapes.items():
        match = _LAYER.match(name)
        rest, layer = (match[2], int(match[1])) if match else (name, -1)
        if math.prod(shape) == max(shape, default=0) or not rest.endswith("weight"):
            continue
        for role, beginnings in _ROLES if match else _OUTSIDE:
            if rest.startswith(beginnings):
                yield name, (role, layer)
                break


def _bits_of(tensor_type: str) -> float:
    block, n_bytes = block_of(type_of_name(tensor_type))
    return float(8 * n_bytes / block)


def _draw_table(axes: Axes, rows: Sequence[Mapping[int, _Cell]], n_layers: int) -> Any:
    from matplotlib.colors import FuncNorm

    values = np.full((len(rows), n_layers), np.nan)
    for number, row in enumerate(rows):
        for layer, cell in row.items():
            values[number, slice(None) if layer < 0 else layer] = cell.bits / cell.weights
    places = np.linspace(0, 1, len(_BITS))
    norm = FuncNorm(
        (lambda bits: np.interp(bits, _BITS, places), lambda at: np.interp(at, places, _BITS)),
        vmin=_BITS[0],
        vmax=_BITS[-1],
        clip=True,
    )
    image = axes.imshow(
        np.ma.masked_invalid(values),
        cmap=colours("viridis_r"),
        norm=norm,
        aspect="auto",
        interpolation="nearest",
        extent=(0, n_layers, len(rows), 0),
    )
    for line in range(1, len(rows)):
        axes.axhline(line, color=PAPER, linewidth=1.4)
    for line in range(1, n_layers) if n_layers <= 100 else ():
        axes.axvline(line, color=PAPER, linewidth=0.5)
    return image


def _row_means(axes: Axes, rows: Sequence[Mapping[int, _Cell]], n_layers: int) -> None:
    for number, row in enumerate(rows):
        if not row:
            continue
        bits = sum(cell.bits for cell in row.values())
        mean = bits / sum(cell.weights for cell in row.values())
        axes.text(
            n_layers * 1.012, number + 0.53, f"{mean:.2f}", size=8.5, color=FAINT, va="center"
        )


def _bits_scale(canvas: Canvas, image: Any, place: Place) -> None:
    axes = canvas.axes(place)
    bar = canvas.figure.colorbar(image, cax=axes, orientation="horizontal", ticks=_BITS)
    bar.outline.set_visible(False)
    axes.set_xticks(_BITS, [str(bits) for bits in _BITS])
    axes.minorticks_off()
    axes.tick_params(length=0, labelsize=8.5, labelcolor=FAINT, pad=3)
