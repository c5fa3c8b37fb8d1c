"""The facts of a model, in the keys that most configs have them under."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.description import (
    MAX_EXPERTS,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_VOCABULARY,
    MAX_WIDTH,
    ModelFacts,
)
from reap2gguf.models.tying import KEY as TIE_KEY

if TYPE_CHECKING:
    from reap2gguf.checkpoint.config import ConfigReader

# how configs of any architecture spell their number of routed experts
COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
WIDTH_KEY = "moe_intermediate_size"  # most configs' name of an expert's width
CHOSEN_KEY = "num_experts_per_tok"  # and of the number of experts that a token goes through
CONTEXT_KEY = "max_position_embeddings"  # and of the longest context
DTYPE_KEYS = ("dtype", "torch_dtype")
_NO_OTHERS: Mapping[str, Sequence[str]] = {}
# what decides weights or logits in every family, and may not be null
FACT_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    CONTEXT_KEY,
    "rms_norm_eps",
    "attention_bias",
    WIDTH_KEY,
    CHOSEN_KEY,
)
# the same, where null is the same as absent
OPTIONAL_KEYS = (
    *COUNT_KEYS,
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "partial_rotary_factor",
    "layer_types",
    "mlp_only_layers",
)


def read_n_layers(read: ConfigReader) -> int:
    return read.integer("num_hidden_layers", low=1, high=MAX_LAYERS)


def read_epsilon(read: ConfigReader, key: str = "rms_norm_eps", default: float = 1e-6) -> float:
    # `default`: transformers' value of an absent key, here of Qwen3MoeConfig and
    # Qwen3_5MoeTextConfig
    return read.number(key, low=0, high=1, default=default)


def read_facts(
    read: ConfigReader,
    count_keys: Sequence[str],
    defaults: Mapping[str, int],
    width_key: str = WIDTH_KEY,
    chosen_key: str = CHOSEN_KEY,
    spellings: Mapping[str, Sequence[str]] = _NO_OTHERS,
    **decided: Any,
) -> ModelFacts:
    """The facts that a text model's config states, and those that are `decided` elsewhere.

    `count_keys` are spellings of the number of experts, `defaults` transformers' values of absent
    keys, `width_key` names an expert's width, `chosen_key` the experts per token; `spellings` are
    others of that key and of the context's. Raises UnsupportedModelError for numbers out of range.
    """
    chosen, context = ((*spellings.get(k, ()), k) for k in (chosen_key, CONTEXT_KEY))
    n_experts = read.integer(*count_keys, low=2, high=MAX_EXPERTS)
    hidden = read.integer("hidden_size", low=1, high=MAX_WIDTH)
    n_heads = read.integer("num_attention_heads", low=1, high=MAX_HEADS)
    n_kv_heads = defaults.get("num_key_value_heads", n_heads)
    head_dim = defaults.get("head_dim", hidden // n_heads)
    return ModelFacts(
        n_layers=read_n_layers(read),
        hidden_size=hidden,
        expert_width=read.integer(width_key, low=1, high=MAX_WIDTH),
        n_experts=n_experts,
        experts_per_token=read.integer(*chosen, low=1, high=n_experts),
        n_heads=n_heads,
        n_kv_heads=read.integer("num_key_value_heads", low=1, high=MAX_HEADS, default=n_kv_heads),
        head_dim=read.integer("head_dim", low=1, high=MAX_WIDTH, default=head_dim),
        vocab_size=read.integer("vocab_size", low=1, high=MAX_VOCABULARY),
        context_length=read.integer(*context, low=1),
        **decided,
    )


def config_values(facts: ModelFacts, chosen_key: str = CHOSEN_KEY) -> dict[str, Any]:
    """Facts under transformers' names of them, number and width of experts left out."""
    return {
        "num_hidden_layers": facts.n_layers,
        "hidden_size": facts.hidden_size,
        chosen_key: facts.experts_per_token,
        "num_attention_heads": facts.n_heads,
        "num_key_value_heads": facts.n_kv_heads,
        "head_dim": facts.head_dim,
        "vocab_size": facts.vocab_size,
        CONTEXT_KEY: facts.context_length,
    }


def refuse_contradictions(
    outer: ConfigReader, text: ConfigReader, section: str, fact_keys: Sequence[str]
) -> None:
    """Refuse a config that states a fact twice with different values, or as null.

    `section` is the name of the text model's section, empty where the config is flat. Raises
    UnsupportedModelError that names the keys.
    """
    text.refuse_nulls((*fact_keys, TIE_KEY))
    for reader in (outer, text):
        reader.refuse_spellings(COUNT_KEYS)
        reader.refuse_spellings(DTYPE_KEYS)
    if not section:
        return
    outer.refuse_nulls((TIE_KEY,))
    for key in (*fact_keys, *OPTIONAL_KEYS):
        text.refuse_difference(
            f"{section}.{key}", text.values.get(key), f"{key} beside it", outer.values.get(key)
        )


def refuse_hidden_effects(read: ConfigReader, has_layer_sizes: bool = False) -> None:
    """Refuse keys by which transformers changes any model, whatever its architecture.

    `has_layer_sizes`: the family reads what the config says of single layers.
    """
    read.expect("is_causal", True, why="every token attends to those before it")
    if not has_layer_sizes:
        read.expect("per_layer_config", {}, why="all layers have the same sizes")
    read.expect("attention_chunk_size", why="every token attends to all before it")
    read.expect("transformers_weights", why="transformers would load weights from that file")
    read.expect("fusion_config", why="transformers would load another module for it")
    read.refuse_nulls(("return_dict",))
    read.expect("return_dict", True, why="transformers' classes do not run without")
    for key in ("output_hidden_states", "output_attentions"):
        read.boolean(key, default=False)


def refuse_model_types(outer: ConfigReader, text: ConfigReader, nested: str) -> None:
    """Refuse a config whose model type and nesting disagree: transformers goes by the type.

    `nested` is the type of a config with a section `text_config`, whose own type, and that of a
    flat config, ends in `_text`. Raises UnsupportedModelError.
    """
    flat, is_nested = f"{nested}_text", text is not outer
    found = outer.values.get("model_type")
    if found not in (flat, nested):
        raise UnsupportedModelError(
            f"{outer.where}: model_type is {shown(found)}, expected '{nested}' or '{flat}'"
        )
    if is_nested is not (found == nested):
        has = "has a" if is_nested else "has no"
        raise UnsupportedModelError(
            f"{outer.where}: model_type is {found}, but the config {has} text_config; "
            f"expected {nested} with one, or {flat} without"
        )
    if is_nested:
        text.expect("model_type", flat, why="it is the type of the text model")
    # with null, transformers does not find the names of the weights
    for section in ("text_config", "vision_config"):
        outer.with_values(outer.section(section)).refuse_nulls(("model_type",))


def rewritten(
    config: Mapping[str, Any], sections: tuple[str, ...], changes: Mapping[str, Any]
) -> dict[str, Any]:
    """A config with other values under the keys that it has, those of its sections included."""
    # auto_map names Python files of the source's folder, which are neither run nor copied
    found = {key: changes.get(key, value) for key, value in config.items() if key != "auto_map"}
    if sections and isinstance(found.get(sections[0]), Mapping):
        found[sections[0]] = rewritten(found[sections[0]], sections[1:], changes)
    return found
