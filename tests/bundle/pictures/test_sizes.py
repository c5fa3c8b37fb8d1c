from __future__ import annotations

import pytest
from matplotlib.axes import Axes

from reap2gguf.bundle.evaluation import Estimate
from reap2gguf.bundle.pictures import sizes
from reap2gguf.bundle.pictures.canvas import own_settings
from reap2gguf.bundle.pictures.sizes import Level, Series, SizePoint, sizes_picture
from tests.bundle.pictures.test_experts import opened

MIB = 2**20


def points(*heights: float, error: float = 0.001, name: str = "x-Q4_K_M") -> list[SizePoint]:
    return [
        SizePoint(f"{name}{number}", (10 + number) * MIB, Estimate(height, error))
        for number, height in enumerate(heights)
    ]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of every picture that is drawn."""
    found: list[Axes] = []
    axes_of = sizes.Canvas.axes

    def kept(canvas: sizes.Canvas, place: sizes.Place) -> Axes:
        found.append(axes_of(canvas, place))
        return found[-1]

    monkeypatch.setattr(sizes.Canvas, "axes", kept)
    return found


@pytest.mark.parametrize("is_log", [True, False])
@pytest.mark.parametrize(
    "heights", [(0.1,), (0.1, 0.1), (0.0, 5.0), (-1.0, 1e9), tuple(n / 7 for n in range(40))]
)
def test_any_figures_are_drawn(heights: tuple[float, ...], is_log: bool) -> None:
    series = [Series("a", "#000000", points(*heights)), Series("b", "#0072b2", [])]
    with own_settings():
        opened(sizes_picture("t", ["s"], "h", series, is_log=is_log))
        level = Level("level", Estimate(0.05, 0.001))
        opened(sizes_picture("t", ["s"], "h", series, level, is_log))


def test_names_and_bars_are_within_the_picture_and_apart(drawn: list[Axes]) -> None:
    long = points(0.303, 0.304, 0.321, error=0.01, name="Qwen3-30B-A3B-REAP-0.25-Q4_K_M-")
    with own_settings():
        sizes_picture("t", ["s"], "h", [Series("", "#000000", long)], is_log=False)
    (axes,) = drawn
    low, high = axes.get_ylim()
    assert low < 0.293
    assert high > 0.331
    assert axes.get_legend() is None
    texts = [text for text in axes.texts if text.get_text().startswith("Qwen3")]
    boxes = [text.get_window_extent() for text in texts]
    assert [text.get_text() for text in texts] == [point.name for point in long]
    assert not any(one.overlaps(two) for n, one in enumerate(boxes) for two in boxes[:n])
    assert min(box.x0 for box in boxes) >= axes.get_window_extent().x0
    assert max(box.x1 for box in boxes) <= axes.figure.get_window_extent().x1
    for box in boxes:  # and no name lies on a point
        for point in long:
            x, y = axes.transData.transform((point.n_bytes / MIB, point.height.value))
            assert not box.contains(x, y)
