"""The transforms against loops over heads, each head placed by its two numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from reap2gguf.models.deltanet import DeltaNet, PackedDeltaNet

NETS = {
    "two values a key": DeltaNet(4, 8, 3, 3),
    "three values a key": DeltaNet(2, 6, 5, 2),
    "equal heads": DeltaNet(3, 3, 2, 4),
    "one key": DeltaNet(1, 4, 2, 2),
}


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest) -> DeltaNet:
    return NETS[request.param]


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).normal(size=shape).astype(np.float32)


def tiled(net: DeltaNet) -> list[tuple[int, int]]:
    """(place in GGUF, stored place) of every value head."""
    per_key = net.n_value_heads // net.n_key_heads
    places = []
    for key in range(net.n_key_heads):
        for value in range(per_key):
            places.append((value * net.n_key_heads + key, key * per_key + value))
    return places


def move_rows(net: DeltaNet, values: np.ndarray, width: int) -> np.ndarray:
    """Heads of `width` rows, one after another."""
    found = np.full_like(values, np.nan)
    for place, stored in tiled(net):
        for row in range(width):
            found[place * width + row] = values[stored * width + row]
    return found


def test_the_order_of_the_docstring() -> None:
    # [k0v0 k0v1 k1v0 k1v1] -> [k0v0 k1v0 k0v1 k1v1]
    assert DeltaNet(2, 4, 1, 1).value_order(1).tolist() == [0, 2, 1, 3]
    assert DeltaNet(2, 4, 1, 2).value_order(2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_equal_heads_stay_where_they_are() -> None:
    net = NETS["equal heads"]
    assert net.value_order(4).tolist() == list(range(12))
    values = random(net.n_value_heads, 7)
    np.testing.assert_array_equal(net.heads(values), values)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_the_order_is_a_permutation(net: DeltaNet, width: int) -> None:
    order = net.value_order(width)
    assert sorted(order.tolist()) == list(range(net.n_value_heads * width))


def test_widths(net: DeltaNet) -> None:
    assert net.key_width == net.n_key_heads * net.key_dim
    assert net.value_width == net.n_value_heads * net.value_dim


@pytest.mark.parametrize("columns", [(), (6,)], ids=["vector", "matrix"])
def test_one_row_a_head(net: DeltaNet, columns: tuple[int, ...]) -> None:
    values = random(net.n_value_heads, *columns)
    np.testing.assert_array_equal(net.heads(values), move_rows(net, values, 1))


def test_the_output_gate(net: DeltaNet) -> None:
    values = random(net.value_width, 6)
    np.testing.assert_array_equal(net.gates(values), move_rows(net, values, net.value_dim))


def mixed_by_hand(net: DeltaNet, values: np.ndarray) -> np.ndarray:
    found = values.copy()
    first = 2 * net.n_key_heads * net.key_dim
    for place, stored in tiled(net):
        for row in range(net.value_dim):
            found[first + place * net.value_dim + row] = values[
                first + stored * net.value_dim + row
            ]
    return found


def test_queries_and_keys_stay_while_values_move(net: DeltaNet) -> None:
    values = random(2 * net.key_width + net.value_width, 6)
    np.testing.assert_array_equal(net.mixed(values), mixed_by_hand(net, values))


def test_the_convolution_loses_its_axis_of_one(net: DeltaNet) -> None:
    values = random(2 * net.key_width + net.value_width, 1, 4)
    found = net.convolution(values)
    assert found.shape == (len(values), 4)
    np.testing.assert_array_equal(found, mixed_by_hand(net, values[:, 0]))


def test_the_columns_of_the_output_projection(net: DeltaNet) -> None:
    values = random(5, net.value_width)
    found = net.outputs(values)
    expected = np.full_like(values, np.nan)
    for row in range(5):
        expected[row] = move_rows(net, values[row], net.value_dim)
    np.testing.assert_array_equal(found, expected)
    assert found.flags.c_contiguous


def test_the_decay_is_minus_the_exponential(net: DeltaNet) -> None:
    values = random(net.n_value_heads)
    found = net.decay(values)
    assert found.dtype == np.float32
    for place, stored in tiled(net):
        assert found[place] == pytest.approx(-math.exp(values[stored]), rel=1e-6)


def test_the_gate_still_meets_its_value(net: DeltaNet) -> None:
    """Reordering rows, gates and columns together changes no output."""
    values, gates = random(net.value_width), random(net.value_width) + 3
    weight = random(5, net.value_width)
    before = weight @ (values * gates)
    after = net.outputs(weight) @ (net.gates(values) * net.gates(gates))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("keys", "per_key", "width"), [(2, 3, 4), (3, 1, 2), (1, 4, 2)])
def test_the_packed_projection(keys: int, per_key: int, width: int) -> None:
    """Each row is a number that says what it is: kind, head, and place within the head."""
    packed: list[tuple[str, int, int]] = []
    for key in range(keys):
        packed += [("q", key, row) for row in range(width)]
        packed += [("k", key, row) for row in range(width)]
        values = [(key * per_key + value, row) for value in range(per_key) for row in range(width)]
        packed += [("v", head, row) for head, row in values]
        packed += [("z", head, row) for head, row in values]
    net = PackedDeltaNet(keys, keys * per_key, width, width)
    numbers = np.arange(len(packed), dtype=np.float32)[:, None]

    def heads(kind: str, count: int) -> list[tuple[str, int, int]]:
        return [(kind, head, row) for head in range(count) for row in range(width)]

    mixed = [packed[int(row)] for row in net.packed_mixed(numbers)[:, 0]]
    assert mixed == [*heads("q", keys), *heads("k", keys), *heads("v", keys * per_key)]
    gates = [packed[int(row)] for row in net.packed_gates(numbers)[:, 0]]
    assert gates == heads("z", keys * per_key)


def test_value_heads_of_a_packed_net_stay_where_they_are() -> None:
    net = PackedDeltaNet(2, 6, 3, 3)
    assert net.value_order(3).tolist() == list(range(18))
    values = random(2 * net.key_width + net.value_width, 1, 4)
    np.testing.assert_array_equal(net.convolution(values), values[:, 0])
