"""Configs of both families whose values are absurd."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.hostile.room import PLAN, Build, Case, Room, change_json, sparse

GONE = object()
Values = dict[str, Any]


def config(model: str, change: Callable[[Values], Any]) -> Build:
    """`plan` of a model whose config is edited."""

    def build(room: Room) -> list[Any]:
        folder = room.copy(model)
        change_json(folder / "config.json", change)
        return ["plan", folder, *PLAN]

    return build


def set_in(part: str | None, key: str, value: Any) -> Callable[[Values], None]:
    def change(values: Values) -> None:
        target = values[part] if part else values
        if value is GONE:
            del target[key]
        else:
            target[key] = value

    return change


def raw(content: bytes) -> Build:
    def build(room: Room) -> list[Any]:
        folder = room.copy("qwen3")
        (folder / "config.json").write_bytes(content)
        return ["plan", folder, *PLAN]

    return build


def text_of(value: Any) -> str:
    shown = "gone" if value is GONE else json.dumps(value)
    return shown if len(shown) < 80 else f"{shown[:30]}~{len(shown)}"


def cases(model: str, part: str | None, table: list[tuple[str, list[Any], str]]) -> list[Case]:
    return [
        Case(f"{model} {part or ''} {key} {text_of(value)}",
             config(model, set_in(part, key, value)), words)
        for key, values, words in table
        for value in values
    ]  # fmt: skip


QWEN3 = [
    ("num_hidden_layers", [0, -1, 2**31 - 1, 2**31, 2**63, 10**400, 2.0, "2", True, [2], {}, GONE],
     "num_hidden_layers"),
    ("num_hidden_layers", [3, 4096], "missing from the checkpoint"),
    ("num_hidden_layers", [1], "has no meaning"),
    ("num_experts", [0, 1, -8, 2**17, 2**31, 8.5, "8", None, GONE], "num_experts"),
    ("num_experts", [7, 9], "expert"),
    ("num_experts", [2**16], "experts"),
    ("num_experts_per_tok", [0, -1, 9, 2**31, 1.5, None], "num_experts_per_tok"),
    ("vocab_size", [0, -1, 2**21, 2**31, 2**70, 4096.0, False], "vocab_size"),
    ("vocab_size", [4095, 2**20], "as config.json says"),
    ("hidden_size", [0, -64, 2**21, 2**40, "64"], "hidden_size"),
    ("head_dim", [0, -1, 2**31, "16", []], "head_dim"),
    ("num_attention_heads", [0, -4, 2**17, 2**31], "num_attention_heads"),
    ("num_attention_heads", [3], "multiple of num_key_value_heads"),
    ("num_key_value_heads", [0, 2**31, 1.0], "num_key_value_heads"),
    ("moe_intermediate_size", [0, 2**31, None], "moe_intermediate_size"),
    ("intermediate_size", [0, -1, "96"], "intermediate_size"),
    ("max_position_embeddings", [0, 2**31, None, 1e30], "max_position_embeddings"),
    ("rms_norm_eps", [-1, 2, 1e300, 10**400, "1e-6", None, [], True], "rms_norm_eps"),
    ("rope_theta", [0, -1, 1e300, "1e4", None, True, []], "rope_theta"),
    ("rope_scaling", [5, [], "linear", {"rope_type": "magic"}, {"rope_type": []},
                      {"rope_type": {"a": 1}}], "rope"),
    ("rope_scaling", [{"type": "linear", "factor": f} for f in (-1, 0, 1e40, "2", None)],
     "factor is"),
    ("rope_scaling", [{"type": "yarn", "factor": 2, "beta_fast": b} for b in ("x", -1, [])],
     "beta_fast is"),
    ("decoder_sparse_step", [0, -1, 2**31, "1"], "decoder_sparse_step"),
    ("decoder_sparse_step", [5], "every layer is dense"),
    ("mlp_only_layers", [[0] * 10**6, [-1], [2], ["0"], [True], 5, {}, [[0]]], "mlp_only_layers"),
    ("mlp_only_layers", [[0, 1]], "every layer is dense"),
    ("norm_topk_prob", [False, "true", 1, None], "norm_topk_prob"),
    ("tie_word_embeddings", ["no", 1, []], "tie_word_embeddings"),
    ("hidden_act", ["gelu", 5, ["silu"], {}], "hidden_act"),
    ("attention_bias", [True, "no", []], "attention_bias"),
    ("use_sliding_window", [True, {}], "use_sliding_window"),
    ("num_labels", [10**9, -1, "2"], "num_labels"),
    ("pad_token_id", [-5], "pad_token_id is"),
    ("model_type", ["llama", 5, []], "model_type"),
    ("architectures", [[], None, "Qwen3MoeForCausalLM", ["Other"], [5], [["a"]], {}, [None],
                       ["a\nb" * 10**5]], "architecture"),
]  # fmt: skip
TEXT35 = [
    ("num_hidden_layers", [0, 2**31 - 1, -1, "2"], "num_hidden_layers"),
    ("num_hidden_layers", [3, 1], "layer_types"),
    ("layer_types", [[], ["full_attention"], [[], []], [1, 2], ["a", "b"], "lf", 5,
                     [{}, {}], ["linear_attention"] * 10**5], "layer_types"),
    ("layer_types", [["full_attention"] * 2], "no layer of layer_types is linear_attention"),
    ("full_attention_interval", [0, -1, "4", 2**31], "full_attention_interval"),
    ("num_experts", [2**31, 0, None], "num_experts"),
    ("linear_num_key_heads", [0, 3, 2**31], "linear_num_"),
    ("linear_num_value_heads", [0, 2**31, "8"], "linear_num_value_heads"),
    ("linear_key_head_dim", [0, 2**31, 7], "linear_"),
    ("linear_value_head_dim", [0, "16", None], "linear_value_head_dim"),
    ("linear_conv_kernel_dim", [0, 2**31, None], "linear_conv_kernel_dim"),
    ("shared_expert_intermediate_size", [0, -1, 2**31], "shared_expert_intermediate_size"),
    ("mtp_num_hidden_layers", [2, "1", []], "mtp_num_hidden_layers"),
    ("mlp_only_layers", [[0]], "mlp_only_layers"),
    ("rope_parameters", [5, [], "x"], "rope"),
    ("rope_parameters", [{"rope_theta": 1e4, "mrope_section": s} for s in (
        ["a"], [1.5], [-1], [2**40], 5, {}, [1] * 5, [[1]])], "mrope_section"),
    ("rope_parameters", [{"rope_theta": 1e4, "partial_rotary_factor": f} for f in (
        "x", -1, 1e300, [], True, 10**400)], "partial_rotary_factor"),
    ("rms_norm_eps", [1e300, "x", -1], "rms_norm_eps"),
    ("head_dim", [0, 2**20 + 1], "head_dim"),
    ("vocab_size", [2**31, 0], "vocab_size"),
]  # fmt: skip
VISION = [
    ("depth", [0, -1, 2**31, "2", None], "depth"),
    ("depth", [4096], "of the vision tower is missing"),
    ("depth", [1], "has no place in the projector"),
    ("hidden_size", [0, 2**31, 31], ""),
    ("patch_size", [0, 2**31, "16"], "patch_size"),
    ("in_channels", [0, 2**31], "in_channels"),
    ("num_heads", [0, 2**31, None], "num_heads"),
    ("num_position_embeddings", [0, 2**62, "x"], "num_position_embeddings"),
    ("spatial_merge_size", [0, 2**31, None], "spatial_merge_size"),
    ("intermediate_size", [0, 2**31], "intermediate_size"),
    ("deepstack_visual_indexes", [[1], 5, {}], "deepstack_visual_indexes"),
    ("hidden_act", [5, []], "hidden_act"),
    ("temporal_patch_size", [3, "2"], "temporal_patch_size"),
]  # fmt: skip


def preprocessor(change: Callable[[Values], Any]) -> Build:
    def build(room: Room) -> list[Any]:
        folder = room.copy("qwen35")
        change_json(folder / "preprocessor_config.json", change)
        return ["plan", folder, *PLAN]

    return build


def no_preprocessor(room: Room) -> list[Any]:
    folder = room.copy("qwen35")
    (folder / "preprocessor_config.json").unlink()
    return ["plan", folder, *PLAN]


def many_experts(values: Values) -> None:
    """Few bytes that stand for a quarter of a billion experts."""
    values |= {"num_hidden_layers": 4096, "num_experts": 2**16, "num_experts_per_tok": 1}


MEANS: list[Any] = [
    None,
    5,
    [0.5],
    [0.5] * 4,
    ["a"] * 3,
    [True] * 3,
    [1e300] * 3,
    [10**400] * 3,
    [[]],
]
CONFIGS = [
    *cases("qwen3", None, QWEN3),
    *cases("qwen35", "text_config", TEXT35),
    *cases("qwen35", "vision_config", VISION),
    *cases("qwen35", None, [("text_config", [5, [], "x", True], "text_config"),
                            ("text_config", [{}, None], "text_config"),
                            ("vision_config", [5, [1], "x"], "vision_config"),
                            ("anything", [{"num_labels": 2**31 - 1}], "num_labels"),
                            ("vision_config", [{}, None, GONE], "out_hidden_size"),
                            ("tie_word_embeddings", [5], "tie_word_embeddings")]),
    *[Case(f"image mean {text_of(mean)}", preprocessor(lambda v, m=mean: v.update(image_mean=m)),
           "image_mean") for mean in MEANS],
    Case("preprocessor a list", preprocessor(lambda values: [1]), "holds a list"),
    Case("preprocessor gone", no_preprocessor, "preprocessor_config.json"),
    Case("layers times experts", config("qwen3", many_experts), "in total"),
    Case("config empty", raw(b""), "not valid JSON"),
    Case("config a list", raw(b"[]"), "holds a list"),
    Case("config null", raw(b"null"), "holds a NoneType"),
    Case("config empty object", raw(b"{}"), "has no experts"),
    Case("config NaN", raw(b'{"rms_norm_eps": NaN}'), "NaN is not JSON"),
    Case("config -Infinity", raw(b'{"rms_norm_eps": -Infinity}'), "is not JSON"),
    Case("config key twice", raw(b'{"a": 1, "a": 2}'), "occurs twice"),
    Case("config not UTF-8", raw(b'{"a": "\xff"}'), "not UTF-8"),
    Case("config UTF-16", raw('{"a": 1}'.encode("utf-16")), "not UTF-8"),
    Case("config with a mark", raw(b"\xef\xbb\xbf{}"), "not valid JSON"),
    Case("config half a character", raw(b'{"a": "\\ud800"}'), "half a character"),
    Case("config deep lists", raw(b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"), "not valid"),
    Case("config deep, parsed", raw(b'{"a": ' + b"[" * 400 + b"]" * 400 + b"}"), "nested deeper"),
    Case("config long number", raw(b'{"a": ' + b"9" * 10**6 + b"}"), "not valid JSON"),
    Case("config of lists", raw(b'{"a": [' + b"[]," * 10**6 + b"1]}"), "has no experts"),
    Case("config of NUL", raw(bytes(1000)), "not valid JSON"),
    Case("config huge", sparse("qwen3", "config.json", 2**38), "expected at most"),
]  # fmt: skip
