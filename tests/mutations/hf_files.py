"""Group F: the other files of the safetensors folder: tokenizer, template, card, index."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from reap2gguf.checkpoint.index import INDEX_NAME
from tests.mutations.damage import Absent, Copy, Damage, Sight
from tests.mutations.models import Sound

Apply = Callable[[Copy], None]


def damages(sound: Sound) -> Iterator[Damage]:
    for title, sight, apply in (*_TOKENIZER, *_CONFIGS, *_TEMPLATES, *_INDEX):
        yield Damage("F", title, apply, sight)
    for name, sight in _LOST.items():
        yield Damage("F", f"{name} lost", _lose(name), sight)


def _json(name: str, change: Callable[[Any], object]) -> Apply:
    def apply(copy: Copy) -> None:
        with copy.edit_json(copy.hf / name) as values:
            change(values)

    return apply


def _lose(name: str) -> Apply:
    def apply(copy: Copy) -> None:
        if not (copy.hf / name).is_file():
            raise Absent(f"no {name}")
        os.unlink(copy.hf / name)

    return apply


def in_text(name: str, change: Callable[[str], str]) -> Apply:
    def apply(copy: Copy) -> None:
        path = copy.hf / name
        if not path.is_file():
            raise Absent(f"no {name}")
        copy.put(path, change(path.read_text()))

    return apply


def add_file(name: str, contents: str | bytes, to_gguf: bool = False) -> Apply:
    def apply(copy: Copy) -> None:
        path = (copy.gguf if to_gguf else copy.hf) / name
        assert not path.exists(), path
        path.parent.mkdir(exist_ok=True)
        copy.put(path, contents)

    return apply


def swap_tokens(values: Any) -> None:
    vocab = values["model"]["vocab"]
    first, second = (token for token, number in vocab.items() if number in (400, 401))
    vocab[first], vocab[second] = vocab[second], vocab[first]


def rename_token(values: Any) -> None:
    """The last token, of which no merge makes another."""
    vocab = values["model"]["vocab"]
    added = {token["id"] for token in values["added_tokens"]}
    name = max((n for n in vocab if vocab[n] not in added), key=lambda n: vocab[n])
    vocab[name + "x"] = vocab.pop(name)


def _pattern(values: Any) -> None:
    def steps(step: Any) -> Iterator[Any]:
        yield step
        for inner in step.get("pretokenizers", ()):
            yield from steps(inner)

    found = [step for step in steps(values["pre_tokenizer"]) if step["type"] == "Split"]
    if not found:
        raise Absent("no regex")
    found[0]["pattern"]["Regex"] = found[0]["pattern"]["Regex"].replace("{1,3}", "{1,2}") + "|x"


_BOS = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {
        "<|endoftext|>": {"id": "<|endoftext|>", "ids": [509], "tokens": ["<|endoftext|>"]}
    },
}
_TRUNCATION = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
_BESIDE, _SOURCE = Sight.BESIDE, Sight.SOURCE
_TOKENIZER: list[tuple[str, Sight, Apply]] = [
    ("tokenizer.json: two tokens swapped", _BESIDE, _json("tokenizer.json", swap_tokens)),
    ("tokenizer.json: a token renamed", _BESIDE, _json("tokenizer.json", rename_token)),
    (
        "tokenizer.json: a merge lost",
        _BESIDE,
        _json("tokenizer.json", lambda v: v["model"]["merges"].pop()),
    ),
    (
        "tokenizer.json: merges swapped",
        _BESIDE,
        _json("tokenizer.json", lambda v: v["model"]["merges"].reverse()),
    ),
    (
        "tokenizer.json: an added token not special",
        _BESIDE,
        _json("tokenizer.json", lambda v: v["added_tokens"][0].update(special=False)),
    ),
    (
        "tokenizer.json: an added token lost",
        _BESIDE,
        _json("tokenizer.json", lambda v: v["added_tokens"].pop()),
    ),
    (
        "tokenizer.json: an added token spelled otherwise",
        _BESIDE,
        _json("tokenizer.json", lambda v: v["added_tokens"][0].update(content="<|other|>")),
    ),
    (
        "tokenizer.json: an added token takes spaces",
        _SOURCE,
        _json("tokenizer.json", lambda v: v["added_tokens"][0].update(lstrip=True)),
    ),
    ("tokenizer.json: another regex", _BESIDE, _json("tokenizer.json", _pattern)),
    (
        "tokenizer.json: no pre-tokenizer",
        _BESIDE,
        _json("tokenizer.json", lambda v: v.update(pre_tokenizer=None)),
    ),
    (
        "tokenizer.json: NFKC",
        _BESIDE,
        _json("tokenizer.json", lambda v: v.update(normalizer={"type": "NFKC"})),
    ),
    (
        "tokenizer.json: lower case",
        _BESIDE,
        _json("tokenizer.json", lambda v: v.update(normalizer={"type": "Lowercase"})),
    ),
    (
        "tokenizer.json: truncation",
        _SOURCE,
        _json("tokenizer.json", lambda v: v.update(truncation=_TRUNCATION)),
    ),
    (
        "tokenizer.json: a first token added",
        _BESIDE,
        _json("tokenizer.json", lambda v: v.update(post_processor=_BOS)),
    ),
    (
        "tokenizer.json: another decoder",
        _SOURCE,
        _json("tokenizer.json", lambda v: v.update(decoder={"type": "Fuse"})),
    ),
    (
        "tokenizer.json: dropout",
        _BESIDE,
        _json("tokenizer.json", lambda v: v["model"].update(dropout=0.5)),
    ),
    (
        "tokenizer.json: ignore_merges",
        _SOURCE,
        _json("tokenizer.json", lambda v: v["model"].update(ignore_merges=True)),
    ),
    (
        "tokenizer.json: another model",
        _BESIDE,
        _json("tokenizer.json", lambda v: v["model"].update(type="WordPiece")),
    ),
    ("tokenizer.json: cut off", _BESIDE, in_text("tokenizer.json", lambda t: t[:-1000])),
]
_CONFIGS: list[tuple[str, Sight, Apply]] = [
    (
        "tokenizer_config: another eos_token",
        _BESIDE,
        _json("tokenizer_config.json", lambda v: v.update(eos_token="<|im_end|>")),
    ),
    (
        "tokenizer_config: eos_token lost",
        _BESIDE,
        _json("tokenizer_config.json", lambda v: v.pop("eos_token")),
    ),
    (
        "tokenizer_config: another pad_token",
        _BESIDE,
        _json("tokenizer_config.json", lambda v: v.update(pad_token="<|im_end|>")),
    ),
    (
        "tokenizer_config: a bos_token",
        _BESIDE,
        _json("tokenizer_config.json", lambda v: v.update(bos_token="<|im_start|>")),
    ),
    (
        "tokenizer_config: add_bos_token",
        _BESIDE,
        _json("tokenizer_config.json", lambda v: v.update(add_bos_token=True)),
    ),
    (
        "tokenizer_config: a chat template too",
        _BESIDE,
        _json("tokenizer_config.json", lambda v: v.update(chat_template="{{ messages }}")),
    ),
    (
        "tokenizer_config: auto_map",
        _BESIDE,
        _json(
            "tokenizer_config.json", lambda v: v.update(auto_map={"AutoTokenizer": ["x.X", None]})
        ),
    ),
    (
        "tokenizer_config: another class",
        _SOURCE,
        _json("tokenizer_config.json", lambda v: v.update(tokenizer_class="LlamaTokenizer")),
    ),
    (
        "tokenizer_config: another length",
        _SOURCE,
        _json("tokenizer_config.json", lambda v: v.update(model_max_length=16)),
    ),
    (
        "tokenizer_config: another file of tokens",
        _SOURCE,
        _json(
            "tokenizer_config.json",
            lambda v: v.update(fast_tokenizer_files=["tokenizer.other.json"]),
        ),
    ),
    (
        "generation_config: another eos_token_id",
        _BESIDE,
        _json("generation_config.json", lambda v: v.update(eos_token_id=[5])),
    ),
    (
        "generation_config: another temperature",
        _BESIDE,
        _json("generation_config.json", lambda v: v.update(temperature=1.9)),
    ),
    (
        "generation_config: a length",
        _SOURCE,
        _json("generation_config.json", lambda v: v.update(max_new_tokens=3)),
    ),
    (
        "preprocessor: another image_mean",
        _BESIDE,
        _json("preprocessor_config.json", lambda v: v.update(image_mean=[0.1, 0.2, 0.3])),
    ),
    (
        "preprocessor: another image_std",
        _BESIDE,
        _json("preprocessor_config.json", lambda v: v.update(image_std=[0.1, 0.2, 0.3])),
    ),
    (
        "preprocessor: another patch_size",
        _SOURCE,
        _json("preprocessor_config.json", lambda v: v.update(patch_size=14)),
    ),
    (
        "preprocessor: another class",
        _SOURCE,
        _json("preprocessor_config.json", lambda v: v.update(image_processor_type="X")),
    ),
    (
        "added: special_tokens_map.json",
        _BESIDE,
        add_file("special_tokens_map.json", '{"eos_token": "<|im_end|>"}'),
    ),
    ("added: added_tokens.json", _BESIDE, add_file("added_tokens.json", '{"<|more|>": 512}')),
    ("added: vocab.json", _SOURCE, add_file("vocab.json", "{}")),
]
_TEMPLATES: list[tuple[str, Sight, Apply]] = [
    (
        "chat template: another text",
        _BESIDE,
        in_text("chat_template.jinja", lambda t: t.replace("im_end", "im_stop")),
    ),
    ("chat template: a line more", _BESIDE, in_text("chat_template.jinja", lambda t: t + "\n")),
    ("chat template: cut off", _BESIDE, in_text("chat_template.jinja", lambda t: t[:-9])),
    ("chat template: empty", _BESIDE, in_text("chat_template.jinja", lambda t: "")),
    (
        "added: chat_template.json",
        _BESIDE,
        add_file("chat_template.json", '{"chat_template": "{{ messages }}"}'),
    ),
    (
        "added: a template for tools",
        _BESIDE,
        add_file("additional_chat_templates/tool_use.jinja", "{{ messages }}"),
    ),
    (
        "the safetensors' card: another licence",
        _SOURCE,
        in_text("README.md", lambda t: t.replace("apache-2.0", "mit")),
    ),
    (
        "the safetensors' card: another count",
        _BESIDE,
        in_text("README.md", lambda t: t.replace("6 of 8", "7 of 8")),
    ),
    (
        "the safetensors' card: a link more",
        _BESIDE,
        in_text("README.md", lambda t: t + "\n[more](http://example.com)\n"),
    ),
    ("the safetensors' card: empty", _BESIDE, in_text("README.md", lambda t: "")),
    ("LICENSE: another text", _SOURCE, in_text("LICENSE", lambda t: "All rights reserved.\n")),
]


def _index(change: Callable[[Any], object]) -> Apply:
    return _json(INDEX_NAME, change)


def _to_another_shard(values: Any) -> None:
    name = "model.norm.weight"
    shards = sorted(set(values["weight_map"].values()))
    values["weight_map"][name] = next(s for s in shards if s != values["weight_map"][name])


def _rename_shards(copy: Copy) -> None:
    """Names that the numbers of shards do not fit."""
    with copy.edit_json(copy.hf / INDEX_NAME) as index:
        for name, shard in index["weight_map"].items():
            index["weight_map"][name] = shard.replace("-of-0000", "-of-0001")
    for file in list(copy.hf.glob("model-*.safetensors")):
        file.rename(file.with_name(file.name.replace("-of-0000", "-of-0001")))


def _exchange_shards(copy: Copy) -> None:
    files = sorted(copy.hf.glob("model-*.safetensors"))
    if len(files) < 2:
        raise Absent("one shard")
    raw = [file.read_bytes() for file in files[:2]]
    for file, other in zip(files[:2], reversed(raw), strict=True):
        copy.put(file, other)


def _lose_shard(copy: Copy) -> None:
    os.unlink(sorted(copy.hf.glob("*.safetensors"))[-1])


def _index_for_one(copy: Copy) -> None:
    """An index beside the one file, which names another."""
    if (copy.hf / INDEX_NAME).exists():
        raise Absent("has an index")
    weight_map = {"model.norm.weight": "model-00001-of-00002.safetensors"}
    copy.put(copy.hf / INDEX_NAME, json.dumps({"metadata": {}, "weight_map": weight_map}))


_INDEX: list[tuple[str, Sight, Apply]] = [
    ("index: a tensor in another shard", _BESIDE, _index(_to_another_shard)),
    ("index: a tensor lost", _BESIDE, _index(lambda v: v["weight_map"].pop("model.norm.weight"))),
    (
        "index: a tensor too many",
        _BESIDE,
        _index(
            lambda v: v["weight_map"].update({"model.x.weight": "model-00001-of-00003.safetensors"})
        ),
    ),
    (
        "index: a shard that is not there",
        _BESIDE,
        _index(
            lambda v: v["weight_map"].update(
                {"model.norm.weight": "model-00009-of-00009.safetensors"}
            )
        ),
    ),
    (
        "index: a path",
        _BESIDE,
        _index(lambda v: v["weight_map"].update({"model.norm.weight": "../x.safetensors"})),
    ),
    ("index: another total_size", _BESIDE, _index(lambda v: v["metadata"].update(total_size=1))),
    (
        "index: another total_parameters",
        _BESIDE,
        _index(lambda v: v["metadata"].update(total_parameters=1)),
    ),
    ("index: no metadata", _BESIDE, _index(lambda v: v.pop("metadata"))),
    ("index added to a single file", _BESIDE, _index_for_one),
    ("shards exchanged", _BESIDE, _exchange_shards),
    ("shards renamed", _BESIDE, _rename_shards),
    ("a shard lost", _BESIDE, _lose_shard),
]
_LOST = {
    "config.json": _BESIDE,
    "tokenizer.json": _BESIDE,
    "tokenizer_config.json": _BESIDE,
    "chat_template.jinja": _BESIDE,
    "generation_config.json": _BESIDE,
    "preprocessor_config.json": _BESIDE,
    "README.md": _BESIDE,
    "LICENSE": _SOURCE,
    INDEX_NAME: _BESIDE,
}
