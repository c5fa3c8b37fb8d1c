"""Ways to change a tokenizer: harmless ones, and ones that change ids in transformers alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.tiny import EXAMPLE
from tests.tokenizer.small import QWEN2, QWEN35, added, byte_level


@dataclass
class Draft:
    """The files of a tokenizer, before they are written."""

    description: dict[str, Any]  # tokenizer.json
    config: dict[str, Any]  # tokenizer_config.json
    others: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of_example(cls) -> Draft:
        names = ("tokenizer.json", "tokenizer_config.json")
        return cls(*(json.loads((EXAMPLE / name).read_text()) for name in names))

    @property
    def model(self) -> dict[str, Any]:
        return self.description["model"]

    @property
    def added(self) -> list[dict[str, Any]]:
        return self.description["added_tokens"]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return self.description["pre_tokenizer"]["pretokenizers"]

    def add(self, text: str, **flags: bool) -> None:
        """Add a token after all others."""
        self.added.append(added(len(self.model["vocab"]) + len(self.added), text, **flags))

    def write(self, folder: Path) -> None:
        files = {"tokenizer.json": self.description, "tokenizer_config.json": self.config}
        files["config.json"] = json.loads((EXAMPLE / "config.json").read_text())
        for name, content in (files | self.others).items():
            (folder / name).write_text(json.dumps(content))


Mutation = Callable[[Draft, Random], Any]


def some_added(draft: Draft, draw: Random) -> None:
    names = [
        "<tool>",
        "</tool>",
        "[X]",
        "<|u1|>",
        " two words",
        "\n\n\n",
        "中文",
        "<é>",
        "🦙",
        "<a",
        "<aa",
    ]
    for name in draw.sample(names, 4):
        draft.add(name, special=draw.random() < 0.5, normalized=draw.random() < 0.5)


def of_the_vocabulary(draft: Draft, draw: Random) -> None:
    text = draw.choice(["the", "def", "return"])
    draft.added.insert(0, added(draft.model["vocab"][text], text))


def fewer_merges(draft: Draft, draw: Random) -> None:
    merges = draft.model["merges"]
    draft.model["merges"] = [merge for merge in merges if draw.random() < 0.6] or merges


def other_order(draft: Draft, draw: Random) -> None:
    draw.shuffle(draft.model["merges"])


def other_ids(draft: Draft, draw: Random) -> None:
    vocab = draft.model["vocab"]
    ids = list(vocab.values())
    draw.shuffle(ids)
    draft.model["vocab"] = dict(zip(vocab, ids, strict=True))


def text_merges(draft: Draft, draw: Random) -> None:
    draft.model["merges"] = [" ".join(merge) for merge in draft.model["merges"]]


def marks_in_words(draft: Draft, draw: Random) -> None:
    draft.steps[0]["pattern"]["Regex"] = QWEN35


def other_offsets(draft: Draft, draw: Random) -> None:
    draft.steps[-1]["trim_offsets"] = not draft.steps[-1]["trim_offsets"]
    draft.description["post_processor"] = draw.choice([None, byte_level()])


def padded(draft: Draft, draw: Random) -> None:
    truncation = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    draft.description["truncation"] = truncation


def as_transformers_4(draft: Draft, draw: Random) -> None:
    """As transformers 4 saves Qwen's tokenizers."""
    del draft.config["extra_special_tokens"], draft.config["backend"]
    decoder = {
        str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in draft.added
    }
    names = [token["content"] for token in draft.added if token["special"]]
    draft.config |= {
        "tokenizer_class": draw.choice(["Qwen2Tokenizer", "Qwen2TokenizerFast"]),
        "added_tokens_decoder": decoder,
        "additional_special_tokens": names,
        "add_prefix_space": False,
        "split_special_tokens": False,
        "unk_token": None,
        "add_bos_token": False,
    }
    draft.others["added_tokens.json"] = {token["content"]: token["id"] for token in draft.added}
    eos = {"content": "<|endoftext|>", "lstrip": False, "normalized": False, "rstrip": False}
    draft.others["special_tokens_map.json"] = {
        "eos_token": eos,
        "additional_special_tokens": names,
    }


def as_transformers_5(draft: Draft, draw: Random) -> None:
    draft.config |= {
        "tokenizer_class": "TokenizersBackend",
        "extra_special_tokens": draw.choice(
            [["<|im_start|>"], {"image_token": "<|im_start|>", "x_token": "<|im_end|>"}]
        ),
        "is_local": True,
    }


HARMLESS: list[Mutation] = [
    some_added,
    of_the_vocabulary,
    fewer_merges,
    other_order,
    other_ids,
    text_merges,
    marks_in_words,
    other_offsets,
    padded,
    as_transformers_4,
    as_transformers_5,
    lambda draft, draw: draft.description.update(normalizer=None),
    lambda draft, draw: draft.model.update(ignore_merges=True),
    lambda draft, draw: draft.model.update(fuse_unk=True, continuing_subword_prefix=""),
    lambda draft, draw: draft.config.update(fast_tokenizer_files=["tokenizer.json"]),
]


def _step(step: dict[str, Any]) -> Mutation:
    """One more step of the pre-tokenizer, before the others or after them."""
    return lambda draft, draw: draft.steps.insert(draw.choice([0, 1, 2]), step)


def _first_split(**settings: Any) -> Mutation:
    return lambda draft, draw: draft.steps[0].update(settings)


def _bytes(**settings: Any) -> Mutation:
    return lambda draft, draw: draft.steps[-1].update(settings)


def _top(**parts: Any) -> Mutation:
    return lambda draft, draw: draft.description.update(parts)


def _model(**settings: Any) -> Mutation:
    return lambda draft, draw: draft.model.update(settings)


def _config(**settings: Any) -> Mutation:
    return lambda draft, draw: draft.config.update(settings)


def _flag(flag: str) -> Mutation:
    return lambda draft, draw: draw.choice(draft.added).update({flag: True})


def _more(*tokens: str, **flags: bool) -> Mutation:
    def mutate(draft: Draft, draw: Random) -> None:
        for token in tokens:
            draft.add(token, **flags)

    return mutate


def token_in_a_normalized_one(draft: Draft, draw: Random) -> None:
    draft.add("<x1>abc", normalized=True)
    draft.add("<x1>")


def same_pair_twice(draft: Draft, draw: Random) -> None:
    merges = draft.model["merges"]
    merges.append(merges[draw.randrange(20)])


def unknown_merge(draft: Draft, draw: Random) -> None:
    draft.model["merges"].insert(draw.randrange(100), ["e", "zqzq"])


def same_id_twice(draft: Draft, draw: Random) -> None:
    one, other = draw.sample(list(draft.model["vocab"]), 2)
    draft.model["vocab"][one] = draft.model["vocab"][other]


def gap_in_ids(draft: Draft, draw: Random) -> None:
    draft.add("<gap>")
    draft.added[-1]["id"] += draw.randint(1, 3)


def added_with_another_id(draft: Draft, draw: Random) -> None:
    draft.add(draw.choice(["the", "return"]))


def no_byte_level_text(draft: Draft, draw: Random) -> None:
    vocab = draft.model["vocab"]
    text = draw.choice([text for text in vocab if len(text) > 3 and text.isalpha()])
    index = vocab.pop(text)
    draft.model["merges"] = [
        pair for pair in draft.model["merges"] if text not in (*pair, "".join(pair))
    ]
    vocab["中文 "] = index


def missing_byte(draft: Draft, draw: Random) -> None:
    vocab, byte = draft.model["vocab"], draw.choice("QZ¡ë")
    vocab["zqzqzq"] = vocab.pop(byte)
    draft.model["merges"] = [pair for pair in draft.model["merges"] if byte not in "".join(pair)]


def special_by_name(draft: Draft, draw: Random) -> None:
    vocab = draft.model["vocab"]
    text = draw.choice([text for text in vocab if len(text) > 5 and text.isalpha()])
    index = vocab.pop(text)
    draft.model["merges"] = [
        pair for pair in draft.model["merges"] if text not in (*pair, "".join(pair))
    ]
    vocab[draw.choice(["<|end|>", "<PRE>"])] = index


def not_among_the_added(draft: Draft, draw: Random) -> None:
    draft.config["pad_token"] = draw.choice(["<pad>", "the", "Ġ"])


def decoder_disagrees(draft: Draft, draw: Random) -> None:
    as_transformers_4(draft, draw)
    decoder = draft.config["added_tokens_decoder"]
    key = draw.choice(list(decoder))
    decoder[key][draw.choice(["special", "normalized", "lstrip"])] ^= True


def decoder_lacks_one(draft: Draft, draw: Random) -> None:
    as_transformers_4(draft, draw)
    decoder = draft.config["added_tokens_decoder"]
    del decoder[draw.choice(list(decoder))]


def adds_a_token_first(draft: Draft, draw: Random) -> None:
    start = {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}
    known = {"id": "<|im_end|>", "ids": [4095], "tokens": ["<|im_end|>"]}
    draft.description["post_processor"]["single"].insert(draw.choice([0, 1]), start)
    draft.description["post_processor"]["special_tokens"] = {"<|im_end|>": known}


def a_word_that_merging_does_not_reach(draft: Draft, draw: Random) -> None:
    draft.model["ignore_merges"] = True
    del draft.model["merges"][draw.randrange(100)]


HARMFUL: list[Mutation] = [
    _bytes(add_prefix_space=True),
    _bytes(use_regex=True),
    _bytes(type="Whitespace"),
    _first_split(behavior="Removed"),
    _first_split(behavior="MergedWithNext"),
    _first_split(invert=True),
    _first_split(pattern={"Regex": QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)}),
    _first_split(pattern={"String": QWEN2}),
    _step({"type": "Punctuation", "behavior": "Isolated"}),
    _step({"type": "Digits", "individual_digits": False}),
    _step({"type": "WhitespaceSplit"}),
    _step({"type": "CharDelimiterSplit", "delimiter": "_"}),
    _step({"type": "UnicodeScripts"}),
    _step({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}),
    _top(normalizer={"type": "NFKC"}),
    _top(normalizer={"type": "Lowercase"}),
    _top(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}),
    _top(decoder=None),
    _top(decoder={"type": "Fuse"}),
    _top(pre_tokenizer=None),
    adds_a_token_first,
    a_word_that_merging_does_not_reach,
    _model(byte_fallback=True),
    _model(unk_token="a"),
    _model(dropout=0.1),
    _model(continuing_subword_prefix="##"),
    _model(end_of_word_suffix="</w>"),
    _flag("lstrip"),
    _flag("rstrip"),
    _flag("single_word"),
    _more("<ab>", "b>cde"),
    _more("<ab>", "b>cd"),
    token_in_a_normalized_one,
    _more("e\u0301clair", normalized=True),
    same_pair_twice,
    unknown_merge,
    same_id_twice,
    gap_in_ids,
    added_with_another_id,
    no_byte_level_text,
    missing_byte,
    special_by_name,
    not_among_the_added,
    decoder_disagrees,
    decoder_lacks_one,
    _config(fast_tokenizer_files=["tokenizer.json", "tokenizer.4.0.0.json"]),
    _config(add_prefix_space=True),
    _config(split_special_tokens=True),
    _config(add_bos_token=True, bos_token="<|im_end|>"),
]
