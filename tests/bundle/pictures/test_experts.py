from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest

from reap2gguf.bundle.pictures.canvas import own_settings
from reap2gguf.bundle.pictures.experts import ExpertUse, saliency_picture, usage_picture


def uses(
    n_layers: int, n_experts: int, n_kept: int, *, after: bool = True, unseen: int = 0
) -> list[ExpertUse]:
    """Made-up observations."""
    random = np.random.default_rng(n_layers)
    found = []
    for layer in range(n_layers):
        tokens = random.integers(1, 5000, n_experts)
        scores = random.lognormal(0, 0.6, n_experts)
        tokens[:unseen], scores[:unseen] = 0, 0
        kept = tuple(sorted(np.argsort(-scores)[:n_kept].tolist()))
        counts = tokens[list(kept)] if after else None
        found.append(ExpertUse(layer, scores, tokens, scores * tokens, kept, counts))
    return found


def opened(png: bytes) -> np.ndarray:
    """The pixels (height, width, RGBA) of a picture, from 0 to 1."""
    from matplotlib.image import imread

    return imread(BytesIO(png), format="png")


@pytest.mark.parametrize(
    ("n_layers", "n_experts", "n_kept"), [(1, 2, 1), (4, 16, 12), (94, 512, 500)]
)
def test_any_shape_is_drawn(n_layers: int, n_experts: int, n_kept: int) -> None:
    layers = uses(n_layers, n_experts, n_kept)
    with own_settings():
        pictures = [saliency_picture(layers, "reap"), usage_picture(layers)]
    for png in pictures:
        image = opened(png)
        height, width, _ = image.shape
        assert width == 1500
        assert 400 < height < 1600
        assert len(png) < 400_000
        assert image[0, 0, 3] == 0  # outside the card's round corner
        assert image[height // 2, 30].min() > 0.94  # the card itself


def test_the_same_numbers_make_the_same_bytes_whatever_a_user_has_set() -> None:
    import matplotlib

    layers = uses(3, 8, 6, unseen=1)
    with own_settings():
        first = saliency_picture(layers, "reap"), usage_picture(layers)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "font.family": "serif"}):
        with own_settings():
            assert (saliency_picture(layers, "reap"), usage_picture(layers)) == first
        assert matplotlib.rcParams["font.size"] == 30


def test_nothing_observed_is_drawn_too() -> None:
    layers = uses(2, 8, 4, unseen=8)
    with own_settings():
        opened(saliency_picture(layers, "frequency"))
        opened(usage_picture(layers))


def test_kept_experts_come_first_and_then_the_rest() -> None:
    scores = np.array([0.1, 0.9, 0.5, 0.7])
    one = ExpertUse(0, scores, np.array([10, 40, 20, 30]), scores, (0, 1))  # not the best two
    assert one.order.tolist() == [1, 0, 3, 2]
    assert one.removed_share(one.tokens) == pytest.approx(0.5)
    assert one.removed_share(np.zeros(4)) == 0


def test_the_numbers_change_the_picture() -> None:
    with own_settings():
        pictures = {
            usage_picture(uses(3, 8, 6)),
            usage_picture(uses(3, 8, 5)),
            usage_picture(uses(3, 8, 6, after=False)),
        }
    assert len(pictures) == 3
