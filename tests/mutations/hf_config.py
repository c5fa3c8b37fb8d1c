"""Group C: config.json, one field after another: another value, and removed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from tests.mutations.damage import Absent, Copy, Damage, Sight
from tests.mutations.gguf_keys import another
from tests.mutations.models import Sound

Path_ = tuple[str, ...]
# Fields that nothing else in a bundle tells: training's, a processor's, ids that a tokenizer may
# contradict, what has no effect beside another field, and names that transformers overrides.
_ALONE = {
    "attention_dropout", "initializer_range", "output_router_logits", "router_aux_loss_coef",
    "transformers_version", "use_cache", "deepstack_visual_indexes", "image_token_id",
    "video_token_id", "vision_start_token_id", "vision_end_token_id", "in_channels",
    "eos_token_id", "pad_token_id", "sliding_window", "mrope_interleaved",
    "text_config.model_type", "vision_config.model_type",
}  # fmt: skip
# Fields whose default is the value that they have here, or that another field repeats: removed,
# they change nothing.
_AS_DEFAULT = {
    "attention_bias", "decoder_sparse_step", "hidden_act", "mlp_only_layers", "use_sliding_window",
    "full_attention_interval", "mtp_use_dedicated_embeddings", "rope_type", "temporal_patch_size",
    "partial_rotary_factor", "tie_word_embeddings", "rope_theta",
}  # fmt: skip


def damages(sound: Sound) -> Iterator[Damage]:
    config = json.loads((sound.hf / "config.json").read_text())
    for path, value in _leaves(config):
        title = ".".join(path)
        alone = title in _ALONE or path[-1] in _ALONE
        sight = Sight.SOURCE if alone else Sight.BESIDE
        yield Damage("C", f"{title}: another value", _set(path, _another(value)), sight)
        if path[-1] in _AS_DEFAULT and _is_default(path[-1], value):
            sight = Sight.SOURCE
        if title == "head_dim":  # transformers divides the hidden size, as the source did
            sight = Sight.SOURCE
        yield Damage("C", f"{title}: removed", _drop(path), sight)
    for title, sight, change in _MORE:
        yield Damage("C", title, _change(change), sight)


def _leaves(values: dict[str, Any], above: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*above, name))
        else:
            yield (*above, name), value


def _is_default(name: str, value: Any) -> bool:
    """Whether a value is transformers' own, for the fields of which models have others."""
    return value == {"tie_word_embeddings": False, "rope_theta": 10000.0}.get(name, value)


def _another(value: Any) -> Any:
    if value is None:
        return 1
    if value == []:
        return [0]
    return another(value)


def _within(values: dict[str, Any], path: Path_) -> dict[str, Any]:
    for name in path[:-1]:
        values = values[name]
    return values


def _set(path: Path_, value: Any) -> Callable[[Copy], None]:
    return _change(lambda config: _within(config, path).update({path[-1]: value}))


def _drop(path: Path_) -> Callable[[Copy], None]:
    return _change(lambda config: _within(config, path).pop(path[-1]))


def _change(change: Callable[[dict[str, Any]], object]) -> Callable[[Copy], None]:
    def apply(copy: Copy) -> None:
        with copy.edit_json(copy.hf / "config.json") as config:
            change(config)

    return apply


def _text(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("text_config", config)


def _part(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def part(config: dict[str, Any]) -> dict[str, Any]:
        if name not in config:
            raise Absent(f"no {name}")
        return config[name]

    return part


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
_MORE: list[tuple[str, Sight, Callable[[dict[str, Any]], object]]] = [
    ("added: rope_scaling", Sight.BESIDE, lambda c: _text(c).update(rope_scaling=_YARN)),
    ("added: rope_parameters", Sight.BESIDE, lambda c: _text(c).update(rope_parameters=_YARN)),
    ("added: quantization_config", Sight.BESIDE, lambda c: c.update(quantization_config=_FP8)),
    ("added: auto_map", Sight.BESIDE, lambda c: c.update(auto_map={"AutoModel": "modeling_x.X"})),
    (
        "added: a second count of experts",
        Sight.BESIDE,
        lambda c: _text(c).update(num_local_experts=8),
    ),
    ("added: an unknown field", Sight.SOURCE, lambda c: c.update(unknown_field=1)),
    (
        "added: final_logit_softcapping",
        Sight.SOURCE,
        lambda c: _text(c).update(final_logit_softcapping=5.0),
    ),
    ("the number of experts as text", Sight.BESIDE, lambda c: _text(c).update(num_experts="6")),
    (
        "experts per token above the number of experts",
        Sight.BESIDE,
        lambda c: _text(c).update(num_experts_per_tok=7),
    ),
    (
        "layers left out of the experts",
        Sight.BESIDE,
        lambda c: _text(c).update(mlp_only_layers=[1]),
    ),
    (
        "vision_config removed",
        Sight.BESIDE,
        lambda c: _part("vision_config")(c) and c.pop("vision_config"),
    ),
    (
        "text_config removed",
        Sight.BESIDE,
        lambda c: _part("text_config")(c) and c.pop("text_config"),
    ),
]
