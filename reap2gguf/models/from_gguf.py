"""A model from the header of its GGUF file alone: its config, and the names of its tensors.

So a file of any publisher can be computed without the checkpoint that it was made from. The config
is the one from which this program, or llama.cpp's converter, would write the same header. Numbers
of a header are not trusted: they are bounded before a loop runs over them, and its tensors must be
those of the model that it describes. Memory: a name and a shape for each expert's matrices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gguf import Keys

from reap2gguf.checkpoint.safetensors_header import StoredTensor
from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.description import (
    MAX_EXPERTS,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_VOCABULARY,
    MAX_WIDTH,
    experts_of,
)
from reap2gguf.models.gguf_keys import GgufKeys, block_of
from reap2gguf.models.rope import NOTHING

if TYPE_CHECKING:
    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.models.contract import MoeModel

_LARGEST = 2**31 - 1
_THETA = 10_000.0  # llama.cpp's, of a header without one
# what YaRN is computed with in these architectures, and transformers' names of it
_YARN_FIXED = {
    Keys.Rope.SCALING_YARN_EXT_FACTOR: ("extrapolation_factor", 1.0),
    Keys.Rope.SCALING_YARN_BETA_FAST: ("beta_fast", 32.0),
    Keys.Rope.SCALING_YARN_BETA_SLOW: ("beta_slow", 1.0),
}
_SCORES = {1: "a softmax", 2: "sigmoids"}  # of its logits
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class GgufModel:
    """What a GGUF file holds, in the terms of a checkpoint."""

    config: dict[str, Any]  # a config.json that transformers reads
    template: Mapping[str, StoredTensor]  # every stored tensor, in float32, one per expert
    model: MoeModel


def model_from_gguf(
    header: GgufHeader,
    architectures: Mapping[str, Sequence[type[MoeModel]]],
    keep_mtp: bool = True,
) -> GgufModel:
    """The model in a GGUF file; `architectures` are the known ones by `general.architecture`.

    Where several classes have one, the first whose file it is.

    Without `keep_mtp`, a multi-token-prediction block is left out. Raises UnsupportedModelError for
    an architecture that is not known and for numbers that are not possible, CheckpointError for a
    tensor that is missing, unexpected or of another shape.
    """
    keys = GgufKeys(header.metadata, header.tensors, header.path)
    if keys.arch not in architectures:
        raise UnsupportedModelError(
            f"{keys.where}: architecture {shown(keys.arch)} is not implemented, expected one of "
            f"{', '.join(sorted(architectures))}"
        )
    architecture = next((one for one in architectures[keys.arch] if one.is_in_gguf(keys)), None)
    if architecture is None:
        known = ", ".join(one.model_type for one in architectures[keys.arch])
        raise UnsupportedModelError(
            f"{keys.where}: the header of a {keys.arch} that is not implemented, expected one of "
            f"{known}"
        )
    config = architecture.config_from_gguf(keys)
    names = architecture.names_from_gguf(keys, keep_mtp)
    model = architecture(config, keys.where, names, keep_mtp)
    _check_experts(header, model)
    template = stored_template(model)
    try:
        model.check_tensors(template)
    except CheckpointError as error:
        raise UnsupportedModelError(
            f"{keys.where}: its header contradicts itself: {error}"
        ) from error
    n_layers, n_mtp = trunk_layers(keys)
    dropped = range(n_layers, n_layers + (0 if keep_mtp else n_mtp))
    _check_tensors(header, model, template, dropped)
    return GgufModel(config, template, model)


def stored_template(model: MoeModel) -> dict[str, StoredTensor]:
    """The tensors of a model as a checkpoint in float32 stores them, one per expert's matrix."""
    shapes = dict(model.shapes())
    if model.facts.tied_embeddings:
        shapes.pop(model.own_head_name, None)
    for layer in model.facts.moe_layers:
        shapes |= model.expert_shapes(layer)
    return {name: StoredTensor(name, "F32", shape) for name, shape in shapes.items()}


def _check_experts(header: GgufHeader, model: MoeModel) -> None:
    """Refuse a number of experts that a tensor does not have, before names are made for each."""
    for name, info in header.tensors.items():
        found = experts_of(name, info.shape)
        if found is not None and found != model.facts.n_experts:
            raise CheckpointError(
                f"{header.path}: tensor {shown(name)} has {found:,} experts, expected "
                f"{model.facts.n_experts:,}, as expert_count says"
            )


def _check_tensors(
    header: GgufHeader,
    model: MoeModel,
    template: Mapping[str, StoredTensor],
    dropped: range,
) -> None:
    """Refuse a file whose tensors are not those of the model that its keys describe.

    `dropped` are the blocks that the model was asked to leave out.
    """
    expected = {tensor.name: tensor.shape for tensor in model.gguf_tensors(template)}
    for name, shape in expected.items():
        if name not in header.tensors:
            raise CheckpointError(f"{header.path}: tensor {shown(name)} is missing")
        found = header.tensors[name].shape
        if _without_ones(found) != _without_ones(shape):
            raise CheckpointError(
                f"{header.path}: tensor {shown(name)} has the shape {list(found)}, expected "
                f"{list(shape)}"
            )
    for name in header.tensors:
        if name not in expected and block_of(name) not in dropped:
            raise UnsupportedModelError(
                f"{header.path}: tensor {shown(name)} is not one of {model.facts.gguf_arch} as "
                "implemented here; another converter or a newer llama.cpp has written it"
            )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape as GGML compares it: leading sizes of one are the same as none."""
    first = next((i for i, size in enumerate(shape) if size != 1), len(shape) - 1)
    return shape[first:]


# What the families share.


def trunk_layers(keys: GgufKeys) -> tuple[int, int]:
    """How many decoder layers there are, and how many blocks for multi-token prediction follow."""
    n_blocks = keys.integer(Keys.LLM.BLOCK_COUNT, 1, MAX_LAYERS)
    n_mtp = keys.integer(Keys.LLM.NEXTN_PREDICT_LAYERS, 0, 1, default=0)
    if n_mtp >= n_blocks:
        raise UnsupportedModelError(
            f"{keys.where}: {keys.arch}.block_count is {n_blocks}, expected a decoder layer before "
            "the block for multi-token prediction"
        )
    return n_blocks - n_mtp, n_mtp


def common_config(
    keys: GgufKeys,
    scores: int = 1,
    n_kv_heads: int | None = None,
    epsilon_key: str = Keys.Attention.LAYERNORM_RMS_EPS,
) -> dict[str, Any]:
    """The values of a config that most decoders have, rotary embedding included.

    `scores` is llama.cpp's number of what the router makes of its logits: 1 is a softmax.
    `n_kv_heads`: where not all layers have attention (`kv_heads_by_layer`). `epsilon_key` has what
    norms add.
    """
    attention = Keys.Attention
    found = headless_config(keys, scores, epsilon_key)
    n_heads = found["num_attention_heads"]
    # llama.cpp's values of absent keys
    share = max(1, found["hidden_size"] // n_heads)
    head_dim = keys.integer(attention.KEY_LENGTH, 1, MAX_WIDTH, default=share)
    keys.expect(attention.VALUE_LENGTH, head_dim, why="keys and values have one size")
    if n_kv_heads is None:
        n_kv_heads = keys.integer(attention.HEAD_COUNT_KV, 1, MAX_HEADS, default=n_heads)
    return {**found, "head_dim": head_dim, "num_key_value_heads": n_kv_heads}


def headless_config(
    keys: GgufKeys,
    scores: int = 1,
    epsilon_key: str = Keys.Attention.LAYERNORM_RMS_EPS,
    unread: Mapping[str, float] = NOTHING,
) -> dict[str, Any]:
    """The same values but for the sizes of heads, and the number of those of keys and values.

    `unread`: settings of YaRN that the model has, though llama.cpp reads no key for them.
    """
    llm, attention = Keys.LLM, Keys.Attention
    n_experts = keys.integer(llm.EXPERT_COUNT, 2, MAX_EXPERTS)
    vocab = keys.rows(EMBEDDING)
    if vocab > MAX_VOCABULARY:
        raise UnsupportedModelError(
            f"{keys.where}: {EMBEDDING} has {vocab:,} rows, expected at most {MAX_VOCABULARY:,}"
        )
    keys.expect(llm.VOCAB_SIZE, vocab, why=f"{EMBEDDING} has as many rows")
    keys.expect(llm.EXPERT_GATING_FUNC, scores, why=f"this router makes {_SCORES[scores]}")
    return {
        "attention_bias": False,
        "dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": keys.integer(llm.EMBEDDING_LENGTH, 1, MAX_WIDTH),
        "max_position_embeddings": keys.integer(llm.CONTEXT_LENGTH, 1, _LARGEST),
        "moe_intermediate_size": expert_width(keys),
        "num_attention_heads": keys.integer(attention.HEAD_COUNT, 1, MAX_HEADS),
        "num_experts": n_experts,
        "num_experts_per_tok": keys.integer(llm.EXPERT_USED_COUNT, 1, n_experts),
        "num_hidden_layers": trunk_layers(keys)[0],
        "rms_norm_eps": keys.number(epsilon_key, 0, 1),
        "rope_parameters": rope_values(keys, unread),
        "tie_word_embeddings": OUTPUT not in keys.tensors,
        "vocab_size": vocab,
    }


def kv_heads_by_layer(keys: GgufKeys) -> tuple[tuple[bool, ...], int]:
    """Which layers have attention, in a header with a number per layer; and their number.

    Raises UnsupportedModelError if it differs among them, or none has any.
    """
    key = Keys.Attention.HEAD_COUNT_KV
    found = keys.integers(key, 0, MAX_HEADS, trunk_layers(keys)[0])
    counts = set(found) - {0}
    if len(counts) != 1:
        raise UnsupportedModelError(
            f"{keys.where}: {key.format(arch=keys.arch)} is {shown(list(found))}, expected 0 or "
            "one number of heads"
        )
    return tuple(count > 0 for count in found), counts.pop()


def full_attention_config(keys: GgufKeys) -> dict[str, Any]:
    """The same of a model whose layers all have full attention that rotates whole heads."""
    config = common_config(keys)
    keys.expect(Keys.Rope.DIMENSION_COUNT, config["head_dim"], why="whole heads are rotated")
    if not keys.has(Keys.Attention.KEY_LENGTH):
        del config["head_dim"]  # transformers takes the same share of the hidden size
    return config


def uniform_config(keys: GgufKeys) -> dict[str, Any]:
    """The same where `intermediate_size` is an expert's width, and all layers have experts."""
    config = full_attention_config(keys)
    del config["moe_intermediate_size"]
    width = keys.integer(Keys.LLM.FEED_FORWARD_LENGTH, 1, MAX_WIDTH)
    return {**config, "intermediate_size": width}


def expert_width(keys: GgufKeys) -> int:
    """The width of an expert; without its key, llama.cpp's: a share of a dense layer's."""
    llm = Keys.LLM
    if keys.has(llm.EXPERT_FEED_FORWARD_LENGTH):
        return keys.integer(llm.EXPERT_FEED_FORWARD_LENGTH, 1, MAX_WIDTH)
    dense = keys.integer(llm.FEED_FORWARD_LENGTH, 1, MAX_WIDTH)
    return max(1, dense // keys.integer(llm.EXPERT_USED_COUNT, 1, MAX_EXPERTS))


def rope_values(keys: GgufKeys, unread: Mapping[str, float] = NOTHING) -> dict[str, Any]:
    """`rope_parameters` of a header: llama.cpp's scaling, the way transformers says it.

    `unread`: as `headless_config` has it.
    """
    rope = Keys.Rope
    theta = keys.number(rope.FREQ_BASE, 0, _LARGEST, default=_THETA)
    # llama.cpp's value of an absent key is linear, with no factor
    kind = keys.text(rope.SCALING_TYPE, "linear")
    factor_key = rope.SCALING_FACTOR
    if not keys.has(factor_key) and keys.has("{arch}.rope.scale_linear"):
        factor_key = "{arch}.rope.scale_linear"  # of old files
    factor = keys.number(factor_key, 0, _LARGEST, default=1.0) or 1.0
    found: dict[str, Any] = {"rope_theta": theta}
    if kind == "none" or (kind == "linear" and not keys.has(factor_key)):
        return {**found, "rope_type": "default"}
    if kind == "linear":
        return {**found, "rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise UnsupportedModelError(
            f"{keys.where}: {keys.arch}.rope.scaling.type is {shown(kind)}, expected none, linear "
            "or yarn"
        )
    for key, (name, fixed) in _YARN_FIXED.items():
        value = unread.get(name, fixed)
        keys.expect(key, value, why="YaRN is computed with this in this architecture")
        if keys.has(key):
            found[name] = value
    implied = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0
    context = keys.integer(Keys.LLM.CONTEXT_LENGTH, 1, _LARGEST)
    original = rope.SCALING_ORIG_CTX_LEN
    return {
        **found,
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.integer(original, 1, _LARGEST, default=context),
        # llama.cpp multiplies its own factor by this key
        "attention_factor": implied * keys.number(rope.SCALING_ATTN_FACTOR, 0, 2**20, default=1.0),
    }
