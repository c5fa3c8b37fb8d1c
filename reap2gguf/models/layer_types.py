"""Which layers of a model have experts, and which have full attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.facts import read_n_layers

if TYPE_CHECKING:
    from reap2gguf.checkpoint.config import ConfigReader

FULL, LINEAR, MOE = "full_attention", "linear_attention", "moe"
DENSE, SPARSE = "dense", "sparse"
MLP_TYPES = "mlp_layer_types"
_INTERVAL = "full_attention_interval"
_DEFAULT_INTERVAL = 4  # transformers', and llama.cpp's


def read_layer_types(read: ConfigReader) -> tuple[tuple[str, ...], int | None]:
    """The type of every layer of the trunk, and the interval of full attention.

    The interval is None if the layers with full attention are not every n-th one. Raises
    UnsupportedModelError for unknown types, for a model without one of them, and if
    `layer_types` and `full_attention_interval` contradict each other.
    """
    n_layers = read_n_layers(read)
    given = read.values.get(_INTERVAL) is not None
    step = read.integer(_INTERVAL, low=1, default=_DEFAULT_INTERVAL)
    types = read.values.get("layer_types")
    if types is None:
        types = _regular(n_layers, step)
    if (
        not isinstance(types, list)
        or len(types) != n_layers
        or any(one not in (FULL, LINEAR) for one in types)
    ):
        raise UnsupportedModelError(
            f"{read.where}: layer_types is {shown(types)}, expected {n_layers} of "
            f"{FULL} and {LINEAR}"
        )
    if given and types != _regular(n_layers, step):
        raise UnsupportedModelError(
            f"{read.where}: {_INTERVAL} is {step}, but layer_types, which transformers reads, is "
            f"{shown(types)}; correct or delete one of them"
        )
    for one in (FULL, LINEAR):
        if one not in types:
            raise UnsupportedModelError(
                f"{read.where}: no layer of layer_types is {one}, expected layers of both kinds, "
                "as llama.cpp does"
            )
    interval = types.index(FULL) + 1
    is_regular = types == _regular(n_layers, interval)
    return tuple(types), interval if is_regular else None


def types_of(is_linear: Sequence[bool]) -> list[str]:
    """The names of the types of layers, of which each has linear attention or not."""
    return [LINEAR if one else FULL for one in is_linear]


def moe_layers_by_step(read: ConfigReader) -> tuple[int, ...]:
    """Every `decoder_sparse_step`-th layer, `mlp_only_layers` left out."""
    n_layers = read_n_layers(read)
    dense = set(read.integers("mlp_only_layers", 0, n_layers - 1))
    step = read.integer("decoder_sparse_step", low=1, default=1)
    return tuple(i for i in range(n_layers) if i not in dense and (i + 1) % step == 0)


def moe_layers_after_dense(read: ConfigReader, key: str) -> tuple[int, ...]:
    """All layers after the first dense ones: `mlp_layer_types` names each, or `key` counts those.

    Raises UnsupportedModelError if neither is there, or a layer is neither dense nor sparse.
    """
    n_layers = read_n_layers(read)
    types = read.values.get(MLP_TYPES)
    if types is None:
        return moe_layers_counted(read, key)
    known = (DENSE, SPARSE)
    if not isinstance(types, list) or len(types) != n_layers or any(t not in known for t in types):
        raise UnsupportedModelError(
            f"{read.where}: mlp_layer_types is {shown(types)}, expected {n_layers} of dense and "
            "sparse"
        )
    return tuple(layer for layer, one in enumerate(types) if one == SPARSE)


def moe_layers_counted(read: ConfigReader, key: str, default: int | None = None) -> tuple[int, ...]:
    """All layers after the first dense ones, which `key` counts; `default` of them without it."""
    n_layers = read_n_layers(read)
    return tuple(range(read.integer(key, high=n_layers, default=default), n_layers))


def dense_first(n_dense: int, n_layers: int) -> list[str]:
    """The `mlp_layer_types` of a model with dense layers first."""
    return [DENSE] * n_dense + [SPARSE] * (n_layers - n_dense)


def _regular(n_layers: int, step: int) -> list[str]:
    return [LINEAR if (layer + 1) % step else FULL for layer in range(n_layers)]
