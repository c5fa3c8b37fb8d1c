"""What decoders share whose layers all have full attention that rotates whole heads.

llama.cpp's loaders of these architectures know nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gguf import Keys

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.facts import FACT_KEYS, WIDTH_KEY, read_n_layers
from reap2gguf.models.rope import check_rotary_width

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reap2gguf.models.description import ModelFacts
    from reap2gguf.models.shared import DecoderModel, Entry

# configs of experts as wide as `intermediate_size`: that is what may not be null
UNIFORM_FACT_KEYS = tuple("intermediate_size" if key == WIDTH_KEY else key for key in FACT_KEYS)
_HEAD_KEYS = (Keys.Attention.KEY_LENGTH, Keys.Attention.VALUE_LENGTH)


def refuse_other_types(model: DecoderModel) -> None:
    """Refuse a config of another model type than the architecture's."""
    if (found := model.config.get("model_type")) != model.model_type:
        raise UnsupportedModelError(
            f"{model.reader.where}: model_type is {shown(found)}, expected "
            f"'{model.model_type}': transformers chooses the architecture by it"
        )


def refuse_partial_attention(model: DecoderModel, facts: ModelFacts) -> None:
    """Refuse, by name, layers of another kind, and heads that are rotated in part."""
    why = f"llama.cpp's {model.gguf_arch} has full attention"
    model.text.expect("layer_types", ["full_attention"] * facts.n_layers, why=why)
    why = f"llama.cpp's {model.gguf_arch} rotates whole heads"
    model.rope.values.expect("partial_rotary_factor", 1, why=why)
    check_rotary_width(model.rope, facts.head_dim, facts.head_dim)


def refuse_other_widths(model: DecoderModel, facts: ModelFacts) -> None:
    """Refuse heads that are not, together, as wide as the hidden states."""
    width = facts.n_heads * facts.head_dim
    if width != facts.hidden_size:
        raise UnsupportedModelError(
            f"{model.reader.where}: num_attention_heads is {facts.n_heads} and head_dim "
            f"{facts.head_dim}, together {width}, expected hidden_size, {facts.hidden_size}: "
            f"llama.cpp's {model.gguf_arch} loads nothing else"
        )


def refuse_tied(model: DecoderModel, facts: ModelFacts) -> None:
    """Refuse a model whose head is the token embedding."""
    if facts.tied_embeddings:
        raise UnsupportedModelError(
            f"{model.reader.where}: the output matrix is the token embedding "
            f"(tie_word_embeddings), but llama.cpp's {model.gguf_arch} needs one of its own; "
            "store a copy as lm_head.weight and set tie_word_embeddings to false"
        )


def without_derived_sizes(model: DecoderModel, entries: Sequence[Entry]) -> list[Entry]:
    """A header without the size of a head where the config has none, as the converter writes it.

    transformers and llama.cpp then give each head its share of the hidden size.
    """
    is_derived = model.text.values.get("head_dim") is None
    return [entry for entry in entries if not (is_derived and entry[0] in _HEAD_KEYS)]


def uniform_header(model: DecoderModel, entries: Sequence[Entry]) -> list[Entry]:
    """A header of experts as wide as `intermediate_size`, which is the length of all layers."""
    return [
        entry
        for entry in without_derived_sizes(model, entries)
        if entry[0] != Keys.LLM.EXPERT_FEED_FORWARD_LENGTH
    ]


def read_uniform_facts(model: DecoderModel) -> ModelFacts:
    """The facts of a model whose layers are all alike: full attention, and experts.

    Refuses, by name, what is otherwise.
    """
    refuse_other_types(model)
    model.refuse_common()
    why = f"llama.cpp's {model.gguf_arch} has full attention"
    model.text.expect("sliding_window", why=why)
    facts = model.common_facts(range(read_n_layers(model.text)))
    refuse_partial_attention(model, facts)
    return facts
