"""Small tokenizers with the parts and special tokens that published ones of each family have.

The files beside `tokenizer.json` name the special tokens in the same ways, too. Vocabularies are
those of `small.tokenizer`, so ids begin after its 257 tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reap2gguf.models.tokenizer_families import (
    DEEPSEEK_LLM_STEPS,
    DEEPSEEK_V3_STEPS,
    LLAMA3_STEPS,
    O200K_STEPS,
    TEKKEN_STEPS,
)
from tests.tokenizer.small import QWEN2, SMALL_SIZE, added, byte_level, split, tokenizer

DIGITS = {"type": "Digits", "individual_digits": True}
LAST = byte_level(use_regex=False)
BYTES_AFTER = {**byte_level(), "add_prefix_space": True, "trim_offsets": False}


@dataclass(frozen=True)
class Published:
    """A tokenizer as models of one `model_type` have it."""

    model_type: str
    architecture: str  # of config.json
    pre: str  # llama.cpp's name of the splitting
    steps: list[dict[str, Any]]
    special: list[str]  # texts of added tokens
    ordinary: list[str] = field(default_factory=list)  # of added tokens that are not special
    config: dict[str, Any] = field(default_factory=dict)  # tokenizer_config.json
    ids: dict[str, Any] = field(default_factory=dict)  # of config.json
    normalizer: Any = None
    begins_with: tuple[str, ...] = ()  # tokens that the post-processor puts before a text
    ignore_merges: bool = False

    @property
    def name(self) -> str:
        return f"{self.model_type} {' '.join(self.begins_with)}".strip()

    @property
    def vocab_size(self) -> int:
        return SMALL_SIZE + len(self.special) + len(self.ordinary) + 2  # two ids are unused

    def write(self, folder: Path) -> Path:
        """Write tokenizer.json, tokenizer_config.json and config.json; the folder."""
        tokens = [added(SMALL_SIZE + i, text, special=True) for i, text in enumerate(self.special)]
        tokens += [
            added(SMALL_SIZE + len(self.special) + i, text, normalized=True)
            for i, text in enumerate(self.ordinary)
        ]
        description = tokenizer(added=tokens)
        description["normalizer"] = self.normalizer
        sequence = {"type": "Sequence", "pretokenizers": self.steps}
        description["pre_tokenizer"] = sequence if len(self.steps) > 1 else self.steps[0]
        description["post_processor"] = self._post_processor()
        description["model"]["ignore_merges"] = self.ignore_merges
        config = {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "vocab_size": self.vocab_size,
            **self.ids,
        }
        files = {"tokenizer": description, "tokenizer_config": self.config, "config": config}
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content))
        return folder

    def _post_processor(self) -> dict[str, Any]:
        if not self.begins_with:
            return BYTES_AFTER
        ids = {text: SMALL_SIZE + self.special.index(text) for text in self.begins_with}
        start = [{"SpecialToken": {"id": text, "type_id": 0}} for text in ids]
        one, other = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
        template = {
            "type": "TemplateProcessing",
            "single": [*start, one],
            "pair": [*start, one, other],
            "special_tokens": {
                text: {"id": text, "ids": [index], "tokens": [text]} for text, index in ids.items()
            },
        }
        return {"type": "Sequence", "processors": [BYTES_AFTER, template]}


def plain(value: Any) -> Any:
    """A value of a header as JSON; of a list that begins with the bytes, what follows them."""
    if not isinstance(value, list):
        return value
    texts = [one.decode() if isinstance(one, bytes) else one for one in value]
    if len(texts) < SMALL_SIZE:
        return texts
    return [one if isinstance(one, str) else int(one) for one in texts[SMALL_SIZE:]]


_DEEPSEEK_SPECIAL = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
_DEEPSEEK_CONFIG = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": {"__type": "AddedToken", "content": _DEEPSEEK_SPECIAL[0], "lstrip": False},
    "eos_token": {"__type": "AddedToken", "content": _DEEPSEEK_SPECIAL[1], "lstrip": False},
    "pad_token": {"__type": "AddedToken", "content": _DEEPSEEK_SPECIAL[1], "lstrip": False},
    "unk_token": None,
    "legacy": True,
    "tokenizer_class": "LlamaTokenizerFast",
}
_GLM: dict[str, Any] = {
    "pre": "glm4",
    "steps": [split(LLAMA3_STEPS[0]), LAST],
    "special": [
        "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>",
        "<|user|>", "<|assistant|>", "<|observation|>", "<|code_prefix|>", "<|code_suffix|>",
    ],
    "ordinary": ["<think>", "</think>", "/nothink", "<tool_call>"],
    "config": {
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    },
    "ids": {"eos_token_id": [257, 264, 266], "pad_token_id": 257},
    "ignore_merges": True,
}  # fmt: skip
PUBLISHED = (
    Published("glm4_moe", "Glm4MoeForCausalLM", **_GLM),
    Published("glm4_moe_lite", "Glm4MoeLiteForCausalLM", **_GLM),
    Published("glm4_moe", "Glm4MoeForCausalLM", **_GLM, begins_with=("[gMASK]", "<sop>")),
    Published(
        "gpt_oss",
        "GptOssForCausalLM",
        "gpt-4o",
        [split(O200K_STEPS[0]), LAST],
        ["<|startoftext|>", "<|endoftext|>", "<|reserved_200000|>", "<|return|>", "<|constrain|>",
         "<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|call|>", "<|endofprompt|>"],
        [],
        {
            "bos_token": "<|startoftext|>",
            "eos_token": "<|return|>",
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        {"eos_token_id": 260, "pad_token_id": 258},
    ),
    Published(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        "lfm2",
        [split(LLAMA3_STEPS[0]), LAST],
        ["<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ["<|reserved_0|>"],
        {
            "bos_token": "<|startoftext|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|pad|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        {"bos_token_id": 258, "eos_token_id": 261, "pad_token_id": 257},
        begins_with=("<|startoftext|>",),
        ignore_merges=True,
    ),
    Published(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        "deepseek-v3",
        [*map(split, DEEPSEEK_V3_STEPS), LAST],
        _DEEPSEEK_SPECIAL,
        ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"],
        _DEEPSEEK_CONFIG,
        {"bos_token_id": 257, "eos_token_id": 258},
        normalizer={"type": "Sequence", "normalizers": []},
    ),
    Published(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        "deepseek-llm",
        [*map(split, DEEPSEEK_LLM_STEPS[:-1]), DIGITS, LAST],
        _DEEPSEEK_SPECIAL[:2],
        ["<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>", "User:"],
        _DEEPSEEK_CONFIG,
        {"bos_token_id": 257, "eos_token_id": 258},
        normalizer={"type": "Sequence", "normalizers": []},
    ),
    Published(
        "minimax_m2",
        "MiniMaxM2ForCausalLM",
        "minimax-m2",
        [split(O200K_STEPS[0]), LAST],
        ["]!p~[", "<fim_prefix>", "<reponame>", "]~b]", "[e~[", "]!d~[", "]<]image[>[", "]~!b["],
        ["<minimax:tool_call>", "<think>", "</think>"],
        {
            "add_prefix_space": False,
            "bos_token": "]~!b[",
            "eos_token": "[e~[",
            "unk_token": "]!d~[",
            "tokenizer_class": "GPT2Tokenizer",
        },
    ),
    Published(
        "nemotron_h",
        "NemotronHForCausalLM",
        "tekken",
        [split(TEKKEN_STEPS[0]), LAST],
        ["<unk>", "<s>", "</s>", "[INST]", "[TOOL_CALLS]", "<|im_start|>", "<|im_end|>",
         "<SPECIAL_18>", "<SPECIAL_19>"],
        ["<think>", "</think>", "<tool_call>", "</tool_call>"],
        {
            "add_bos_token": False,
            "bos_token": "<s>",
            "eos_token": "<|im_end|>",
            "unk_token": "<unk>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        {"bos_token_id": 258, "eos_token_id": 259, "pad_token_id": 257},
        ignore_merges=True,
    ),
    Published(
        "olmoe",
        "OlmoeForCausalLM",
        "olmo",
        [byte_level()],
        ["<|endoftext|>", "<|padding|>"],
        ["|||IP_ADDRESS|||", "    ", "  ", "<unused1>"],
        {
            "add_bos_token": False,
            "eos_token": "<|endoftext|>",
            "pad_token": "<|padding|>",
            "tokenizer_class": "GPTNeoXTokenizer",
        },
        {"eos_token_id": 257, "pad_token_id": 258},
        normalizer={"type": "NFC"},
    ),
    Published(
        "granitemoe",
        "GraniteMoeForCausalLM",
        "refact",
        [DIGITS, byte_level()],
        ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>",
         "<reponame>", "<|start_of_role|>"],
        [],
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "GPT2Tokenizer",
        },
        {"bos_token_id": 257, "eos_token_id": 257, "pad_token_id": 257},
    ),
    Published(
        "qwen3_omni_moe",
        "Qwen3OmniMoeForConditionalGeneration",
        "qwen2",
        [split(QWEN2), LAST],
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ["<think>"],
        {
            "add_bos_token": False,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "added_tokens_decoder": {
                str(257 + i): {"content": text, "special": i < 3, "normalized": i == 3}
                for i, text in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"])
            },
            "tokenizer_class": "Qwen2Tokenizer",
        },
        normalizer={"type": "NFC"},
    ),
)  # fmt: skip
