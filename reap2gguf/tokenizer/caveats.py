"""What a user should know of a tokenizer that is accepted: where programs still make other ids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.checkpoint.config import read_json, read_optional
from reap2gguf.messages import shown
from reap2gguf.models.tokenizer_families import tokenizer_family
from reap2gguf.tokenizer.gemma import GemmaVocabulary
from reap2gguf.tokenizer.post_processor import added_by_post_processor
from reap2gguf.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from reap2gguf.tokenizer.sentencepiece import SpmVocabulary
from reap2gguf.tokenizer.special_names import ENDS_BY_GROUP, ENDS_BY_NAME, ORDINARY_IN_QWEN
from reap2gguf.tokenizer.tokenizer_files import RANKS_FILE, read_tokenizer_json, tokenizer_path

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from reap2gguf.tokenizer.vocabulary import Vocabulary

NFC_CAVEAT = (
    "transformers puts text into Unicode's form NFC first and llama.cpp does not: text in another "
    "form, such as e and U+0301 for é, gets other token ids there"
)
ORDINARY_CAVEAT = (
    f"the text {ORDINARY_IN_QWEN} is one token for llama.cpp, which takes that token of the "
    "vocabulary for a special one, and several tokens for transformers"
)
PREFIX_CAVEAT = (
    "tokenizer.json puts two tokens before a text, [gMASK] and <sop>, and llama.cpp puts only the "
    "first, as calibration does; chat templates write both"
)
BOS_CAVEAT = (
    "tokenizer.json puts no <bos> before a text and leaves that to chat templates; llama.cpp puts "
    "it before every text, and so do calibration and evaluation"
)
NO_BOS_CAVEAT = (
    "tokenizer_config.json asks for bos_token before each text and tokenizer.json puts none there; "
    "transformers 5, llama.cpp's converter, calibration and GGUF follow tokenizer.json, and chat "
    "templates write it; for other texts start llama.cpp's programs with --override-kv "
    "tokenizer.ggml.add_bos_token=bool:true"
)
RANKS_CAVEAT = (
    f"the tokenizer is a {RANKS_FILE}, which transformers reads with Python code of the source: "
    "copy its tokenization_*.py into the pruned checkpoint to load the tokenizer there"
)
# transformers 5 builds these classes from the vocabulary and merges alone, and splits text in the
# class's own way, here by llama.cpp's name of it
_OWN_SPLITTING = {
    "Qwen2Tokenizer": "qwen2",
    "Qwen3_5Tokenizer": "qwen35",
    "GPT2Tokenizer": "olmo",
    "GPTNeoXTokenizer": "olmo",
}
# these do what tokenizer.json says; a Llama one with byte-level text is loaded as the first
_AS_THE_FILE = ("TokenizersBackend", "PreTrainedTokenizer", "PythonBackend", "LlamaTokenizer")
# it takes this class whatever tokenizer_config.json says
_ALWAYS = {
    "qwen3_5_moe": "Qwen3_5Tokenizer",
    "qwen3_5_moe_text": "Qwen3_5Tokenizer",
    "granitemoe": "TokenizersBackend",
    "granitemoeshared": "TokenizersBackend",
    "glm4_moe": "TokenizersBackend",
    "glm4_moe_lite": "TokenizersBackend",
    "minimax_m2": "TokenizersBackend",
}
# keys of llama.cpp by which a user can give it two more tokens that end an answer
_END_KEYS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
_MOST_NAMED = 4
_ENDS_A_MESSAGE = "<|end|>"  # and not the answer, in the vocabularies of gpt-oss and Solar
_WITHOUT_A_NAME = "Qwen2Tokenizer"  # where neither config names a class


def tokenizer_caveats(
    folder: Path,
    pre: str,
    vocabulary: Vocabulary | SpmVocabulary | GemmaVocabulary,
    ends: Collection[int | None] = (),
) -> tuple[str, ...]:
    """Differences that remain, one sentence each.

    `pre` is llama.cpp's name of the pre-tokenizer, `vocabulary` that of tokenizer.json, `ends`
    are the header's ends of text, of turn and of message. Raises CheckpointError if a config
    cannot be read.
    """
    if isinstance(vocabulary, SpmVocabulary):
        found = _spm_caveats(vocabulary)
    elif isinstance(vocabulary, GemmaVocabulary):
        found = _gemma_caveats(folder)
    else:
        found = _bpe_caveats(folder, pre, vocabulary)
    return (*found, *_end_caveats(folder, vocabulary.tokens, ends))


def _gemma_caveats(folder: Path) -> Iterator[str]:
    if not added_by_post_processor(read_tokenizer_json(folder), tokenizer_path(folder)):
        yield BOS_CAVEAT


def _bpe_caveats(folder: Path, pre: str, vocabulary: Vocabulary) -> Iterator[str]:
    if vocabulary.normalizes:
        yield NFC_CAVEAT
    if (differs := PRE_TOKENIZERS[pre].differs) is not None:
        yield differs
        if unreached := len(vocabulary.unreached):
            yield (
                f"no merge leads to {unreached:,} tokens of the vocabulary, so llama.cpp never "
                "makes them: a word that is such a token gets other ids there"
            )
    if vocabulary.overlap is not None:
        first, second = map(shown, vocabulary.overlap)
        yield (
            f"added tokens such as {first} and {second} can overlap in a text, of which "
            "transformers takes the first and llama.cpp the longest: no chat template writes "
            "them so"
        )
    if pre == "glm4" and _puts_two_tokens(folder):
        yield PREFIX_CAVEAT
    if tokenizer_path(folder).name == RANKS_FILE:
        yield RANKS_CAVEAT
        return  # no class of transformers is built from it
    if vocabulary.hides_ordinary:
        yield ORDINARY_CAVEAT
    if _asks_for_bos_in_vain(folder):
        yield NO_BOS_CAVEAT
    yield from _class_caveats(folder, pre)


def _class_caveats(folder: Path, pre: str) -> Iterator[str]:
    """Where the class that transformers loads splits text in another way than tokenizer.json."""
    name = _class_in_transformers(read_optional(folder, "config.json"), folder)
    own = _OWN_SPLITTING.get(name)
    how = f"like {own}" if own else "in a way that is not known here"
    if name not in _AS_THE_FILE and own != pre:
        yield (
            f"transformers 5 loads the tokenizer as {name}, which splits text {how}, but "
            f"tokenizer.json splits it like {pre}; calibration and GGUF follow tokenizer.json; if "
            "that was saved by mistake, use the one of the base model"
        )


def _asks_for_bos_in_vain(folder: Path) -> bool:
    settings = read_optional(folder, "tokenizer_config.json")
    if settings.get("add_bos_token") is not True or settings.get("bos_token") is None:
        return False
    return not added_by_post_processor(read_tokenizer_json(folder), tokenizer_path(folder))


def _puts_two_tokens(folder: Path) -> bool:
    tokenizer, family = read_tokenizer_json(folder), tokenizer_family("glm4_moe")
    where = tokenizer_path(folder)
    return len(added_by_post_processor(tokenizer, where, family.prefix)) > 1


def _spm_caveats(vocabulary: SpmVocabulary) -> Iterator[str]:
    """Where llama.cpp puts a space before a text, and tokenizer.json does not."""
    if not vocabulary.prepends_after_special:
        yield (
            "llama.cpp puts a space before what follows a special token, and tokenizer.json only "
            "before a whole text: after a special token text gets other token ids there"
        )
    if not vocabulary.prepends_always:
        yield (
            "llama.cpp puts a space before each text, and tokenizer.json does not where it begins "
            "with one: such a text has one space more there"
        )


def _end_caveats(folder: Path, tokens: list[str], known: Collection[int | None]) -> Iterator[str]:
    """The tokens at which transformers ends an answer, and llama.cpp does not."""
    name, wanted = _ends_in_transformers(folder)
    ends = _ends_in_llama_cpp(tokens).union(known)
    more = [i for i in dict.fromkeys(wanted) if 0 <= i < len(tokens) and i not in ends]
    if not more:
        return
    named = ", ".join(f"{shown(tokens[index])} (id {index})" for index in more[:_MOST_NAMED])
    others = f" and {len(more) - _MOST_NAMED} more" if len(more) > _MOST_NAMED else ""
    # llama.cpp takes this one out again, whatever its keys say
    helped = [index for index in more if tokens[index] != _ENDS_A_MESSAGE][: len(_END_KEYS)]
    flag = ",".join(f"{key}=int:{i}" for key, i in zip(_END_KEYS, helped, strict=False))
    help_ = f"start its programs with --override-kv {flag}" if flag else "no flag changes that"
    if flag and len(helped) < len(more):
        ids = " and ".join(map(str, helped))
        help_ += f" to end it at {ids}; no flag does so for the others"
    yield (
        f"by the eos_token_id of {name}, transformers ends an answer also at {named}{others}, and "
        f"llama.cpp does not: {help_}"
    )


def _ends_in_transformers(folder: Path) -> tuple[str, list[int]]:
    """The file that says where transformers ends an answer, and the ids."""
    name = "generation_config.json"
    if (folder / name).is_file():
        ids = read_json(folder / name).get("eos_token_id")
    else:  # transformers makes one of the model's config then
        name = "config.json"
        config = read_optional(folder, name)
        text, ids = config.get("text_config"), config.get("eos_token_id")
        if ids is None and isinstance(text, dict):
            ids = text.get("eos_token_id")
    return name, [i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int]


def _ends_in_llama_cpp(tokens: list[str]) -> set[int | None]:
    """The ids at which llama.cpp ends an answer by their texts alone."""
    by_text = {text: index for index, text in enumerate(tokens)}
    names = ENDS_BY_NAME & by_text.keys()
    if names & {"<|call|>", "<|calls|>"} and names & {"<|return|>", "<|flush|>"}:
        names -= {_ENDS_A_MESSAGE}
    for group in ENDS_BY_GROUP:
        there = [text for text in group if text in by_text]
        if len(there) == 1:  # of several llama.cpp takes the one that it happens to meet first
            names |= set(there)
    return {by_text[text] for text in names}


def _class_in_transformers(config: dict[str, Any], folder: Path) -> str:
    """The name of the class that transformers 5 takes for a tokenizer of Qwen's."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in _ALWAYS:
        return _ALWAYS[model_type]
    settings = read_optional(folder, "tokenizer_config.json")
    name = settings.get("tokenizer_class") or config.get("tokenizer_class") or _WITHOUT_A_NAME
    name = str(name).removesuffix("Fast")
    return name if name.isidentifier() else "another class"  # it is printed on the model card
