"""What all pictures share: a light card with round corners, its colours, and how it is saved.

The card has its own background, so that a picture reads the same on a dark page and on a light one.
The same inputs make the same bytes with the same matplotlib: its own fonts, no settings of the
user, no date and no version in the file. `matplotlib` is imported when the first picture is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

WIDTH = 10.0  # inches, of every picture
_DPI = 150
PAPER = "#fbfcfe"
_EDGE = "#c8d1dc"
INK = "#1f2328"
FAINT = "#59636e"  # of what is read second
LINES = "#dfe5ec"
# chosen by Okabe and Ito to be told apart by colour-blind people
BLUE, ORANGE, GREEN, RED = "#0072b2", "#d55e00", "#009e73", "#b3123b"
MISSING = "#e3e7ec"  # of a cell without a value
_LONGEST_LABEL = 24  # letters
_MARGIN = 0.28  # inches, of the card
# of matplotlib's settings, those that are not about looks
_NOT_LOOKS = ("backend", "interactive", "toolbar", "webagg", "tk.", "savefig.directory", "date.")


@dataclass(frozen=True)
class Place:
    """Where axes are on a canvas, in inches from its left and upper edge."""

    left: float
    top: float
    width: float
    height: float


class Canvas:
    """A card of some height in inches, with a title."""

    def __init__(self, height: float, title: str, subtitle: Sequence[str]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import FancyBboxPatch

        self.height = height
        self.figure: Figure = Figure(figsize=(WIDTH, height), dpi=_DPI)
        self._agg = FigureCanvasAgg(self.figure)
        self.figure.patch.set_alpha(0)
        self.figure.add_artist(
            FancyBboxPatch(
                (0.04, 0.04),
                WIDTH - 0.08,
                height - 0.08,
                boxstyle="round,pad=0,rounding_size=0.16",
                transform=self.figure.dpi_scale_trans,
                facecolor=PAPER,
                edgecolor=_EDGE,
                linewidth=1,
                zorder=-10,
            )
        )
        self.text(_MARGIN, 0.38, title, size=14, weight="bold")
        for number, line in enumerate(subtitle):
            self.text(_MARGIN, 0.65 + 0.2 * number, line, size=9.5, color=FAINT)

    def text(self, left: float, top: float, text: str, **looks: Any) -> None:
        """Text at a place in inches, on its base line."""
        looks = {"color": INK, **looks}
        self.figure.text(left / WIDTH, 1 - top / self.height, text, va="baseline", **looks)

    def axes(self, place: Place) -> Axes:
        """Axes without a frame; ticks and grid are faint."""
        bottom = 1 - (place.top + place.height) / self.height
        size = (place.width / WIDTH, place.height / self.height)
        axes = self.figure.add_axes((place.left / WIDTH, bottom, *size))
        axes.set_facecolor("none")
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.tick_params(length=0, labelsize=8.5, labelcolor=FAINT, pad=4)
        return axes

    def png(self) -> bytes:
        """The picture as a PNG file."""
        _use_own_fonts(self.figure)
        written = BytesIO()
        looks = {"metadata": {"Software": None}, "pil_kwargs": {"compress_level": 9}}
        self._agg.print_png(written, **looks)  # type: ignore[no-untyped-call]
        return written.getvalue()


def _use_own_fonts(figure: Figure) -> None:
    """Let every text have a font that comes with matplotlib, whatever the machine has."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        properties = text.get_fontproperties().copy()
        is_bold = properties.get_weight() in ("bold", 700)
        properties.set_file(_font("DejaVuSans-Bold.ttf" if is_bold else "DejaVuSans.ttf"))
        text.set_fontproperties(properties)


@cache
def _font(name: str) -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name)


@contextmanager
def own_settings() -> Iterator[None]:
    """Matplotlib's own settings, whatever a user's matplotlibrc says; put back at the end."""
    import matplotlib

    with matplotlib.rc_context():
        for name, value in matplotlib.rcParamsDefault.items():
            if not name.startswith(_NOT_LOOKS):
                matplotlib.rcParams[name] = value
        matplotlib.rcParams["text.parse_math"] = False  # a name of a file may hold two dollars
        yield


def colours(name: str) -> Colormap:
    """A colour map of matplotlib's; a value that is missing is MISSING."""
    import matplotlib

    return matplotlib.colormaps[name].with_extremes(bad=MISSING)


def plain(label: str) -> str:
    """A label as the font can show it, shortened if it is long."""
    text = label.encode("ascii", "replace").decode()
    return text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 3]}..."


def steps(count: int, most: int) -> list[int]:
    """At most about `most` round numbers from 0 to `count` - 1, for ticks."""
    step = next(
        base * 10**power
        for power in range(9)
        for base in (1, 2, 4, 5, 8)
        if base * 10**power * most >= count
    )
    return list(range(0, count, step))
