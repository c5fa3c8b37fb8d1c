"""transformers' own reading of a config, and whether it is the one that this program has."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.quantized import without_quantization

if TYPE_CHECKING:
    from reap2gguf.models.contract import MoeModel

INFINITY = {"__float__": "Infinity"}  # as transformers writes it


# A model type that transformers knows in no class of its own -> that of the class that computes it.
# It does the same for the text model of Kimi-K2.5.
_SAME_AS = {"kimi_k2": "deepseek_v3"}


def transformers_config(values: Mapping[str, Any]) -> Any:
    """What `AutoConfig.from_pretrained` makes of a folder whose config.json holds `values`.

    A leftover of quantization is left out. A type that only a model's own code has is taken for the
    one that computes the same. No code that comes with a model is run. Raises
    ValueError for a model type that is unknown to transformers, and whatever its config classes
    raise.
    """
    from transformers import CONFIG_MAPPING

    model_type = values.get("model_type")
    if isinstance(model_type, str) and model_type in _SAME_AS:
        model_type = _SAME_AS[model_type]
        values = {**values, "model_type": model_type}
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"model_type is {shown(model_type)}, expected one that transformers knows")
    # config classes change the values that they are given
    config_class = CONFIG_MAPPING[model_type]
    with warnings.catch_warnings():
        # of keys in an older spelling, which published configs have
        warnings.simplefilter("ignore", FutureWarning)
        return config_class.from_dict(with_infinity(copy.deepcopy(without_quantization(values))))


def config_of_known_type(values: Mapping[str, Any]) -> Any | None:
    """The config of a model whose type transformers knows under another name; None of others.

    It is for `from_pretrained`, which would look for that type; a `quantization_config` is kept.
    """
    known = _SAME_AS.get(str(values.get("model_type")))
    if known is None:
        return None
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[known].from_dict(copy.deepcopy({**values, "model_type": known}))


def with_infinity(value: Any) -> Any:
    """A value of a config.json in which infinity is a number and not transformers' tag of it."""
    if value == INFINITY:
        return math.inf
    if isinstance(value, dict):
        return {key: with_infinity(one) for key, one in value.items()}
    return [with_infinity(one) for one in value] if isinstance(value, list) else value


def check_with_transformers(model: MoeModel) -> None:
    """Refuse a config that transformers refuses, or reads in another way than `model` does.

    transformers is imported. Raises UnsupportedModelError that names the key.
    """
    try:
        with _silenced():
            config = transformers_config(model.config).get_text_config()
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UnsupportedModelError(
            f"{model.reader.where}: transformers cannot read the config ({reason}); correct it"
        ) from error
    _compare(model, config, model.config_values())
    for layer, values in model.config_values_of_layers().items():
        _compare(model, config.per_layer_config[layer], values, f" of layer {layer}")


def _compare(model: MoeModel, config: Any, values: Mapping[str, Any], what: str = "") -> None:
    for key, ours in values.items():
        theirs = getattr(config, key, ours)
        if theirs != ours:
            raise UnsupportedModelError(
                f"{model.reader.where}: {key}{what} is read as {shown(ours)} here and as "
                f"{shown(theirs)} by transformers; state it in config.json where this version of "
                "transformers looks for it"
            )


@contextmanager
def _silenced() -> Iterator[None]:
    """Without transformers' warnings about keys: what matters of them is refused by name."""
    # the import itself sets the level
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
