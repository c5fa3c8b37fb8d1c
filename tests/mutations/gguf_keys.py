"""Group K: damage to the keys of a model's GGUF file, one key after another.

A key is removed from the quantized file, gets another type in the exact one, and another value in
the quantized one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from gguf import GGUFValueType

from tests.mutations.damage import Absent, Copy, Damage
from tests.mutations.gguf_edit import ARRAY, STRING, GgufEdit, Key, read_gguf
from tests.mutations.models import Sound

Edit = Callable[[GgufEdit], None]
_UINT8, _UINT32, _INT32 = GGUFValueType.UINT8, GGUFValueType.UINT32, GGUFValueType.INT32
_FLOAT32, _FLOAT64 = GGUFValueType.FLOAT32, GGUFValueType.FLOAT64
_INT64, _BOOL = GGUFValueType.INT64, GGUFValueType.BOOL
# what a type becomes, where every value still fits
_OTHER_NUMBER = {
    _UINT32: _INT64,
    _INT32: _INT64,
    _FLOAT32: _FLOAT64,
    _BOOL: _UINT8,
    _INT64: _INT32,
    _UINT8: _UINT32,
    _FLOAT64: _FLOAT32,
}


def damages(sound: Sound) -> Iterator[Damage]:
    """For every key that the sound files have, and for some that they do not have."""
    for name in read_gguf(sound.gguf / sound.exact).keys:
        yield _in(name, "another type", sound.exact, _retype(name))
    for name in read_gguf(sound.gguf / sound.quantized).keys:
        yield _in(name, "removed", sound.quantized, _remove(name))
        yield _in(name, "another value", sound.quantized, _alter(name))
    for title, edit in (*_VALUES, *_UNEXPECTED):
        yield Damage("K", title, _apply(sound.quantized, edit))


def _in(name: str, what: str, file: str, edit: Edit) -> Damage:
    return Damage("K", f"{name}: {what}", _apply(file, edit))


def _apply(file: str, edit: Edit) -> Callable[[Copy], None]:
    def apply(copy: Copy) -> None:
        with copy.edit_gguf(copy.gguf / file) as gguf:
            edit(gguf)

    return apply


def _remove(name: str) -> Edit:
    def edit(gguf: GgufEdit) -> None:
        del gguf.keys[name]

    return edit


def _retype(name: str) -> Edit:
    return lambda gguf: gguf.keys.update({name: retyped(gguf.keys[name])})


def _alter(name: str) -> Edit:
    return lambda gguf: gguf.keys.update({name: altered(gguf.keys[name])})


def retyped(key: Key) -> Key:
    """The same value as another type."""
    if key.type is STRING:
        return Key(ARRAY, [key.value], STRING)
    if key.type is not ARRAY:
        return Key(_OTHER_NUMBER[key.type], key.value)
    if key.items is STRING:
        return Key(STRING, "\n".join(key.value))
    assert key.items is not None
    return Key(ARRAY, key.value, _OTHER_NUMBER[key.items])


def altered(key: Key) -> Key:
    """Another value of the same type."""
    return Key(key.type, another(key.value), key.items)


def another(value: Any) -> Any:
    """A value near another one: it fits the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 2 or 1.0
    if isinstance(value, str):
        return value + "x"
    if len(set(value)) > 1:  # exchange two that differ
        at = next(i for i in range(1, len(value)) if value[i] != value[0])
        return [value[at], *value[1:at], value[0], *value[at + 1 :]]
    return [another(value[0]), *value[1:]]


def _change(suffix: str, change: Callable[[Any], Any]) -> Edit:
    """Give a key, named by how it ends, another value."""

    def edit(gguf: GgufEdit) -> None:
        name = next((name for name in gguf.keys if name.endswith(suffix)), None)
        if name is None:
            raise Absent(f"no key {suffix}")
        key = gguf.keys[name]
        gguf.keys[name] = Key(key.type, change(key.value), key.items)

    return edit


def add_keys(*keys: tuple[str, Key]) -> Edit:
    """Add keys; `ARCH` stands for the architecture. A key that is there already is Absent."""

    def edit(gguf: GgufEdit) -> None:
        arch = gguf.keys["general.architecture"].value
        for name, key in keys:
            full = name.replace("ARCH", arch)
            if full in gguf.keys:
                raise Absent(f"has {full}")
            gguf.keys[full] = key

    return edit


def uint(value: int) -> Key:
    return Key(_UINT32, value)


def _float(value: float) -> Key:
    return Key(_FLOAT32, value)


def text(value: str) -> Key:
    return Key(STRING, value)


def flag(value: bool) -> Key:
    return Key(_BOOL, value)


def _one_more(items: list[Any]) -> list[Any]:
    return [*items, items[-1]]


def _twice(gguf: GgufEdit) -> None:
    name = next(name for name in gguf.keys if name.endswith(".expert_used_count"))
    gguf.extra_keys.append((name, uint(1)))


def _with_alias(gguf: GgufEdit) -> None:
    """A token that another one spells too."""
    tokens = gguf.keys["tokenizer.ggml.tokens"].value
    tokens[400] = tokens[399]


def _as_numbers(gguf: GgufEdit) -> None:
    key = gguf.keys["tokenizer.ggml.token_type"]
    gguf.keys["tokenizer.ggml.token_type"] = Key(ARRAY, key.value, _FLOAT32)


def _as_float(suffix: str) -> Edit:
    """A whole number as a float of the same value."""

    def edit(gguf: GgufEdit) -> None:
        name = next(name for name in gguf.keys if name.endswith(suffix))
        gguf.keys[name] = _float(float(gguf.keys[name].value))

    return edit


def _as_byte(suffix: str) -> Edit:
    def edit(gguf: GgufEdit) -> None:
        name = next(name for name in gguf.keys if name.endswith(suffix))
        gguf.keys[name] = Key(_UINT8, gguf.keys[name].value)

    return edit


def _reorder(gguf: GgufEdit) -> None:
    first, *others = gguf.keys.items()
    gguf.keys = dict([first, *reversed(others)])


def _rename(old: str, new: str) -> Edit:
    def edit(gguf: GgufEdit) -> None:
        gguf.keys = {new if name == old else name: key for name, key in gguf.keys.items()}

    return edit


_SPLIT = [("split.count", Key(GGUFValueType.UINT16, 2)), ("split.no", Key(GGUFValueType.UINT16, 0))]
_VALUES: list[tuple[str, Edit]] = [
    ("block_count as a float", _as_float(".block_count")),
    ("expert_used_count as a byte", _as_byte(".expert_used_count")),
    ("token types as floats", _as_numbers),
    ("expert_used_count one less", _change(".expert_used_count", lambda n: n - 1)),
    ("freq_base a little larger", _change(".rope.freq_base", lambda x: x * 1.0001)),
    ("epsilon of another model", _change(".layer_norm_rms_epsilon", lambda x: 1e-5)),
    ("epsilon by its last digit", _change(".layer_norm_rms_epsilon", lambda x: x * 1.0000002)),
    ("context_length doubled", _change(".context_length", lambda n: n * 2)),
    ("head counts per layer", _change(".attention.key_length", lambda n: n // 2)),
    (
        "a token spelled otherwise",
        _change("ggml.tokens", lambda t: [*t[:400], "x" + t[400], *t[401:]]),
    ),
    ("a token spelled as another", _with_alias),
    ("tokens: one fewer", _change("ggml.tokens", lambda t: t[:-1])),
    ("tokens: one more", _change("ggml.tokens", _one_more)),
    ("tokens rotated", _change("ggml.tokens", lambda t: [*t[1:], t[0]])),
    ("merges: the last lost", _change("ggml.merges", lambda t: t[:-1])),
    ("merges reversed", _change("ggml.merges", lambda t: t[::-1])),
    (
        "merges: two in the middle swapped",
        _change("ggml.merges", lambda t: [*t[:99], t[100], t[99], *t[101:]]),
    ),
    ("token_type: control tokens as normal", _change("token_type", lambda t: [1] * len(t))),
    ("token_type: one fewer", _change("token_type", lambda t: t[:-1])),
    ("pre of another model", _change("tokenizer.ggml.pre", lambda t: "llama-bpe")),
    ("chat template without its last part", _change("chat_template", lambda t: t[:-20])),
    ("chat template empty", _change("chat_template", lambda t: "")),
    ("chat template with a space more", _change("chat_template", lambda t: t + " ")),
    ("eos_token_id of another token", _change("eos_token_id", lambda n: 5)),
    ("kept_experts: one fewer", _change("kept_experts", lambda t: t[:-1])),
    ("kept_experts: another expert", _change("kept_experts", lambda t: [t[0] ^ 1, *t[1:]])),
    ("general.type is adapter", _change("general.type", lambda t: "adapter")),
    ("file_type of another mixture", _change("general.file_type", lambda n: 2)),
    ("a key twice", _twice),
    ("keys in another order", _reorder),
    ("a key renamed", _rename("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eos_token_ids")),
]
_UNEXPECTED: list[tuple[str, Edit]] = [
    (
        "added: linear RoPE scaling",
        add_keys(
            ("ARCH.rope.scaling.type", text("linear")), ("ARCH.rope.scaling.factor", _float(4))
        ),
    ),
    (
        "added: YaRN",
        add_keys(("ARCH.rope.scaling.type", text("yarn")), ("ARCH.rope.scaling.factor", _float(2))),
    ),
    ("added: a RoPE factor of old files", add_keys(("ARCH.rope.scale_linear", _float(4)))),
    ("added: rope.dimension_count", add_keys(("ARCH.rope.dimension_count", uint(32)))),
    (
        "added: rope.dimension_sections",
        add_keys(("ARCH.rope.dimension_sections", Key(ARRAY, [8, 8, 8, 8], _INT32))),
    ),
    ("added: a sliding window", add_keys(("ARCH.attention.sliding_window", uint(4)))),
    ("added: attention.scale", add_keys(("ARCH.attention.scale", _float(0.5)))),
    ("added: logit_scale", add_keys(("ARCH.logit_scale", _float(0.5)))),
    ("added: final_logit_softcapping", add_keys(("ARCH.final_logit_softcapping", _float(5)))),
    ("added: expert_weights_norm", add_keys(("ARCH.expert_weights_norm", flag(False)))),
    ("added: expert_weights_scale", add_keys(("ARCH.expert_weights_scale", _float(2.5)))),
    ("added: expert_gating_func", add_keys(("ARCH.expert_gating_func", uint(2)))),
    ("added: expert_group_count", add_keys(("ARCH.expert_group_count", uint(2)))),
    ("added: leading_dense_block_count", add_keys(("ARCH.leading_dense_block_count", uint(1)))),
    ("added: attention.causal", add_keys(("ARCH.attention.causal", flag(False)))),
    ("added: pooling_type", add_keys(("ARCH.pooling_type", uint(1)))),
    ("added: vocab_size", add_keys(("ARCH.vocab_size", uint(500)))),
    ("added: nextn_predict_layers", add_keys(("ARCH.nextn_predict_layers", uint(1)))),
    ("added: add_bos_token", add_keys(("tokenizer.ggml.add_bos_token", flag(True)))),
    ("added: add_eos_token", add_keys(("tokenizer.ggml.add_eos_token", flag(True)))),
    ("added: add_space_prefix", add_keys(("tokenizer.ggml.add_space_prefix", flag(True)))),
    ("added: eot_token_id", add_keys(("tokenizer.ggml.eot_token_id", uint(10)))),
    ("added: unknown_token_id", add_keys(("tokenizer.ggml.unknown_token_id", uint(10)))),
    (
        "added: precompiled_charsmap",
        add_keys(("tokenizer.ggml.precompiled_charsmap", Key(ARRAY, [1, 2], _UINT8))),
    ),
    ("added: scores", add_keys(("tokenizer.ggml.scores", Key(ARRAY, [0.0, 1.0], _FLOAT32)))),
    (
        "added: a second chat template",
        add_keys(
            ("tokenizer.chat_template.tool_use", text("{{ messages }}")),
            ("tokenizer.chat_templates", Key(ARRAY, ["tool_use"], STRING)),
        ),
    ),
    ("added: a tokenizer of transformers", add_keys(("tokenizer.huggingface.json", text("{}")))),
    ("added: default sampling", add_keys(("general.sampling.temp", _float(5)))),
    ("added: split keys", add_keys(*_SPLIT)),
    (
        "added: a LoRA's alpha",
        add_keys(("adapter.lora.alpha", _float(16)), ("adapter.type", text("lora"))),
    ),
    ("added: a control vector", add_keys(("controlvector.model_hint", text("x")))),
]
