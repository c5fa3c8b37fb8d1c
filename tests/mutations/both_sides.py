"""Group B: the safetensors are damaged and the GGUF files are made from them, in full agreement.

Only the source shows that. The importance matrix stays, as one computed on such weights would
differ only a little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from reap2gguf.bundle.manifest import Manifest
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.exporting.header_facts import HeaderNames
from reap2gguf.exporting.model_files import WeightedBy, export_model, export_side
from reap2gguf.models.side_values import side_files
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from reap2gguf.quantizing.recipe import parse_recipe
from reap2gguf.quantizing.resolve import resolve
from tests.mutations.damage import Absent, Copy, Damage, Sight
from tests.mutations.gguf_edit import read_gguf
from tests.mutations.hf_files import in_text, rename_token, swap_tokens
from tests.mutations.hf_tensors import (
    Tensors,
    duplicate,
    expert,
    halves,
    in_tensors,
    mtp_swap,
    of,
    on,
    rotate_experts,
    rotate_rows,
    swap,
    swap_rows,
    values,
    whole,
    zero_row,
)
from tests.mutations.models import Sound

Apply = Callable[[Copy], None]


def damages(sound: Sound) -> Iterator[Damage]:
    for title, apply in _DAMAGES:
        yield Damage("B", title, _and_again(apply), Sight.SOURCE)


def _and_again(apply: Apply) -> Apply:
    def both(copy: Copy) -> None:
        apply(copy)
        make_again(copy)

    return both


def make_again(copy: Copy) -> None:
    """Write all GGUF files from the safetensors as they are now, as the build did.

    Keys that do not come from the model, such as those about the pruning, are as before.
    """
    manifest = Manifest.load(copy.sound.gguf)
    files = [copy.gguf / record.file for record in (*manifest.gguf, *manifest.side_files)]
    before = {path: read_gguf(path).keys for path in files}
    for path in files:
        path.unlink()
    with Checkpoint.open(copy.hf) as checkpoint:
        model = describe(checkpoint)
        tensors, facts = model.gguf_tensors(checkpoint.tensors), model.facts
        resolved = {}
        for record in manifest.gguf:
            recipe = parse_recipe(record.recipe_source, record.recipe, record.recipe)
            path = copy.gguf / record.file
            resolved[path] = resolve(recipe, tensors, facts, facts.n_experts, True)
        names = HeaderNames.of(manifest)
        weighted = WeightedBy.of(copy.gguf / "imatrix.gguf")
        export_model(checkpoint, model, names, resolved, weighted, 1, Silent())
        for side in side_files(model, checkpoint):
            export_side(checkpoint, model, names, copy.projector, side, 1, Silent())
    for path in files:
        with copy.edit_gguf(path) as gguf:
            gguf.keys = {name: gguf.keys.get(name, key) for name, key in before[path].items()}


def _config(**changes: Any) -> Apply:
    def apply(copy: Copy) -> None:
        with copy.edit_json(copy.hf / "config.json") as config:
            text = config.get("text_config", config)
            if "rope_theta" in changes and "rope_parameters" in text:
                text = text["rope_parameters"]
            text.update(changes)

    return apply


def _vision(**changes: Any) -> Apply:
    def apply(copy: Copy) -> None:
        with copy.edit_json(copy.hf / "config.json") as config:
            if "vision_config" not in config:
                raise Absent("no tower")
            config["vision_config"].update(changes)

    return apply


def _tokenizer(change: Callable[[Any], object]) -> Apply:
    def apply(copy: Copy) -> None:
        with copy.edit_json(copy.hf / "tokenizer.json") as tokenizer:
            change(tokenizer)

    return apply


def _scale_row(tensors: Tensors) -> None:
    expert(tensors, "up", 3)[4] = expert(tensors, "up", 3)[5]


_DAMAGES: list[tuple[str, Apply]] = [
    ("down: two experts swapped", in_tensors(swap(of("down", 1), of("down", 3)))),
    ("up: experts rotated", in_tensors(rotate_experts("up"))),
    ("gate: an expert twice", in_tensors(duplicate("gate"))),
    ("gate and up of an expert exchanged", in_tensors(swap(of("gate", 2), of("up", 2)))),
    ("down of two layers exchanged", in_tensors(swap(of("down", 2, 0), of("down", 2, 1)))),
    ("up: a row twice", in_tensors(_scale_row)),
    ("router rotated", in_tensors(on("mlp.gate.weight", rotate_rows))),
    ("router times 1.01", in_tensors(on("mlp.gate.weight", values(lambda v: v * 1.01)))),
    ("embedding: a row zero", in_tensors(on("embed_tokens.weight", zero_row))),
    ("embedding: two rows swapped", in_tensors(on("embed_tokens.weight", swap_rows))),
    (
        "k_proj and v_proj exchanged",
        in_tensors(swap(whole("k_proj.weight"), whole("v_proj.weight"))),
    ),
    (
        "norms of a layer exchanged",
        in_tensors(swap(whole("input_layernorm.weight"), whole("post_attention_layernorm.weight"))),
    ),
    ("the last norm plus one", in_tensors(on("model.norm.weight", values(lambda v: v + 1)))),
    ("A_log plus one", in_tensors(on("A_log", values(lambda v: v + 1)))),
    (
        "MTP: both norms exchanged",
        in_tensors(mtp_swap("mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight")),
    ),
    (
        "tower: qkv rotated",
        in_tensors(on("attn.qkv.weight", values(lambda v: np.roll(v, len(v) // 3, axis=0)))),
    ),
    ("out_proj: columns exchanged", in_tensors(on("linear_attn.out_proj.weight", values(halves)))),
    ("config: another rope_theta", _config(rope_theta=20000.0)),
    ("config: another epsilon", _config(rms_norm_eps=1e-5)),
    ("config: an expert per token fewer", _config(num_experts_per_tok=1)),
    ("config: a shorter context", _config(max_position_embeddings=256)),
    ("config: another number of heads in the tower", _vision(num_heads=4)),
    ("tokenizer: two tokens swapped", _tokenizer(swap_tokens)),
    ("tokenizer: a token renamed", _tokenizer(rename_token)),
    (
        "chat template: another text",
        in_text("chat_template.jinja", lambda t: t.replace("im_end", "im_stop")),
    ),
]
