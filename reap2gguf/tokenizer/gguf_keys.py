"""The tokenizer keys of a GGUF header, from `tokenizer.json` and the files beside it.

llama.cpp implements each pre-tokenizer again, under a name. The name is found by the tokenizer's
own split patterns, so a fine-tune under any model name gets the right one. llama.cpp's converter
hashes the tokens of a sample text instead, which fails for every new vocabulary. The architecture
says which patterns a model may have, and what llama.cpp calls them (`MoeModel.tokenizers`): one
pattern has several names.

A tokenizer is written only if llama.cpp makes the same token ids of it: its form, its vocabulary
and the files beside it are compared (form, vocabulary, files_beside), and before a plan is made
also the ids of a text (probe).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import GGUFWriter, Keys, SpecialVocab

from reap2gguf.checkpoint.config import read_optional
from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.tokenizer.character_bpe import is_sentencepiece
from reap2gguf.tokenizer.files_beside import check_files_beside
from reap2gguf.tokenizer.form import check_form
from reap2gguf.tokenizer.gemma import SCORE, GemmaVocabulary, read_gemma
from reap2gguf.tokenizer.post_processor import added_by_post_processor, has_step
from reap2gguf.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from reap2gguf.tokenizer.sentencepiece import SpmVocabulary, check_size, read_spm
from reap2gguf.tokenizer.tokenizer_files import (
    loaded_templates,
    read_tokenizer_json,
    tokenizer_path,
)
from reap2gguf.tokenizer.vocabulary import Vocabulary, read_vocabulary

if TYPE_CHECKING:
    from reap2gguf.models.tokenizer_families import TokenizerFamily
    from reap2gguf.tokenizer.added_tokens import AddedToken

SPM_PRE = "default"  # what llama.cpp's converter calls the splitting of a SentencePiece model
GEMMA = "gemma4"  # what llama.cpp calls the tokenizer, and its splitting
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # gguf-py reads `bos_token_id` ...


def add_tokenizer(
    writer: GGUFWriter, folder: Path, vocab_size: int, family: TokenizerFamily
) -> tuple[str, Vocabulary | SpmVocabulary | GemmaVocabulary]:
    """Add the tokenizer of the checkpoint in `folder`: tokens, types, merges, template.

    Returns llama.cpp's name of its pre-tokenizer and its vocabulary. Raises CheckpointError if the
    files are broken or disagree, and UnsupportedModelError if llama.cpp would make other ids.
    """
    path = tokenizer_path(folder)
    tokenizer = read_tokenizer_json(folder)
    has_file = path.name == "tokenizer.json"
    config = read_optional(folder, "tokenizer_config.json")
    pre, vocabulary = _read(tokenizer, folder, config, vocab_size, family)
    before = added_by_post_processor(tokenizer, path, family.prefix)
    puts_space = isinstance(vocabulary, SpmVocabulary) and vocabulary.space_prefix
    if has_file:  # else it is made of the files beside it
        check_files_beside(folder, vocabulary.added, puts_space)
    templates = loaded_templates(folder)
    _check_config_ids(folder)
    _add_kind(writer, pre, vocabulary, config if family.space_prefix else {})
    _add_tokens(writer, vocabulary, has_file)
    try:
        merges = has_file and not isinstance(vocabulary, SpmVocabulary)
        # gguf-py knows where merges and special ids are stored; it prefers other chat templates
        special = SpecialVocab(folder, load_merges=merges, n_vocab=vocab_size)
        special.chat_template = _chat_templates(templates)
        special.add_special_token |= _whether_added(tokenizer, vocabulary, before)
        if len(before) > 1:
            special.special_token_ids["bos"] = before[0]
        special.special_token_ids |= _family_ids(special, family, pre, vocabulary.added, path)
        if family.end_by_name and not has_file:
            special.special_token_ids["eos"] = _end_by_name(config, vocabulary.added, folder)
        special.add_to_gguf(writer, quiet=True)
        if named := writer.kv_data[0].get(Keys.Tokenizer.CHAT_TEMPLATES):
            named.value.sort()
    except (ValueError, TypeError, LookupError, AttributeError, OSError) as error:
        raise CheckpointError(f"{folder}: its tokenizer files are broken ({error!r})") from error
    _check_added_ids(writer, before[:1], pre, folder)
    return pre, vocabulary


def _read(
    tokenizer: dict[str, Any],
    folder: Path,
    config: dict[str, Any],
    vocab_size: int,
    family: TokenizerFamily,
) -> tuple[str, Vocabulary | SpmVocabulary | GemmaVocabulary]:
    """llama.cpp's name of the pre-tokenizer, and the vocabulary of the kind that the family has."""
    path = tokenizer_path(folder)
    if family.sentencepiece and is_sentencepiece(tokenizer):
        return SPM_PRE, read_spm(tokenizer, folder, config, vocab_size)
    if family.gemma and is_sentencepiece(tokenizer):
        check_size(vocab_size, folder)
        return GEMMA, read_gemma(tokenizer, vocab_size, path)
    pre = check_form(tokenizer, path, family.pre_tokenizers)
    return pre, read_vocabulary(tokenizer, vocab_size, path, family.may_overlap)


def _add_kind(
    writer: GGUFWriter,
    pre: str,
    vocabulary: Vocabulary | SpmVocabulary | GemmaVocabulary,
    config: dict[str, Any],
) -> None:
    """Add what llama.cpp calls the tokenizer and its splitting, and whether it puts a space first.

    `config` is that of the tokenizer, if the family's converter follows its `add_prefix_space`.
    """
    is_spm = isinstance(vocabulary, SpmVocabulary)
    is_gemma = isinstance(vocabulary, GemmaVocabulary)
    if isinstance(config.get("add_prefix_space"), bool):
        writer.add_add_space_prefix(config["add_prefix_space"])
    elif isinstance(vocabulary, SpmVocabulary) and not vocabulary.space_prefix:
        writer.add_add_space_prefix(False)  # llama.cpp puts one where no key says otherwise
    writer.add_tokenizer_model("llama" if is_spm else GEMMA if is_gemma else "gpt2")
    if not is_gemma:
        writer.add_tokenizer_pre(pre)


def _chat_templates(templates: str | dict[str, str] | None) -> str | list[dict[str, str]] | None:
    """Chat templates as gguf-py takes them."""
    if not isinstance(templates, dict):
        return templates
    # sorted, as gguf-py takes the names in the order of a set, which is no fixed order
    return [{"name": name, "template": text} for name, text in sorted(templates.items())]


def _whether_added(
    tokenizer: dict[str, Any],
    vocabulary: Vocabulary | SpmVocabulary | GemmaVocabulary,
    before: list[int],
) -> dict[str, bool]:
    """Whether llama.cpp is to put BOS before and EOS after a text, where gguf-py finds otherwise.

    `before` are the ids that the post-processor puts before a text.
    """
    found = {}
    if has_step(tokenizer, "ByteLevel"):
        # as later versions of gguf-py, and transformers 5, which do not follow add_bos_token
        has_template = has_step(tokenizer, "TemplateProcessing")
        found = {"eos": False} if has_template else {"bos": False, "eos": False}
    # llama.cpp puts that of Gemma whatever a header says
    if isinstance(vocabulary, GemmaVocabulary) or len(before) > 1:
        found["bos"] = True
    return found


def _add_tokens(
    writer: GGUFWriter, vocabulary: Vocabulary | SpmVocabulary | GemmaVocabulary, has_file: bool
) -> None:
    """Add tokens, scores and types, and the merges of a tokenizer that has no tokenizer.json."""
    writer.add_token_list(vocabulary.tokens)
    if isinstance(vocabulary, SpmVocabulary):
        writer.add_token_scores(vocabulary.scores)
    if isinstance(vocabulary, GemmaVocabulary):
        writer.add_token_scores([SCORE] * len(vocabulary.tokens))
        writer.add_add_space_prefix(False)
    writer.add_token_types(vocabulary.types)
    if isinstance(vocabulary, Vocabulary) and not has_file:
        writer.add_token_merges([" ".join(pair) for pair in vocabulary.merges])


def _family_ids(
    special: SpecialVocab,
    family: TokenizerFamily,
    pre: str,
    added: list[AddedToken],
    path: Path,
) -> dict[str, int]:
    """The ids of special tokens that the family names, beside or in place of those of the files."""
    ids = {token.text: token.index for token in added}
    found = {}
    for kind, text in family.added_special.get(pre, {}).items():
        if text not in ids:
            raise CheckpointError(
                f"{path}: no token {shown(text)} among the added tokens, expected the one that "
                f"llama.cpp takes as {kind} for {pre}; use the tokenizer.json of the base model"
            )
        if kind not in special.special_token_ids:
            found[kind] = ids[text]
    replaced = family.replaced_special.items()
    return found | {kind: ids[text] for kind, text in replaced if text in ids}


def _end_by_name(config: dict[str, Any], added: list[AddedToken], folder: Path) -> int:
    """The id of the token that tokenizer_config.json names as the end; as its class, [EOS]."""
    value = config.get("eos_token", "[EOS]")
    text = value.get("content") if isinstance(value, dict) else value
    found = next((token.index for token in added if token.text == text), None)
    if found is None:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: eos_token is {shown(value)}, expected one of the "
            "special tokens in added_tokens_decoder"
        )
    return found


def _check_config_ids(folder: Path) -> None:
    """Refuse ids of special tokens that gguf-py and llama.cpp's converter stop at."""
    path, config = folder / "config.json", read_optional(folder, "config.json")
    text = config.get("text_config")
    for values in (config, text if isinstance(text, dict) else {}):
        for key in (f"{name}_token_id" for name in _SPECIAL):
            index = values.get(key)
            if isinstance(index, bool) or (isinstance(index, int) and index < 0):
                raise CheckpointError(
                    f"{path}: {key} is {shown(index)}, expected the id of a token; llama.cpp has "
                    "no such id; delete the key"
                )


def _check_added_ids(writer: GGUFWriter, before: list[int], pre: str, folder: Path) -> None:
    """Refuse a header by which llama.cpp would add other ids to a text than the post-processor."""
    usual = pre in (SPM_PRE, GEMMA) or PRE_TOKENIZERS[pre].adds_bos
    adds_bos = header_value(writer, Keys.Tokenizer.ADD_BOS, usual)
    bos = [header_value(writer, Keys.Tokenizer.BOS_ID)] if adds_bos else []
    if pre == GEMMA and bos == [None]:
        raise CheckpointError(
            f"{folder}: no bos_token among the added tokens and no bos_token_id in config.json, "
            "expected one: llama.cpp puts it before every text; set bos_token in "
            "tokenizer_config.json"
        )
    if pre == GEMMA and not before:
        before = bos  # as calibration does; the user is told
    adds_eos = header_value(writer, Keys.Tokenizer.ADD_EOS, False)
    if bos != before or adds_eos:
        raise UnsupportedModelError(
            f"{folder}: the post_processor of tokenizer.json puts the ids {before} before a "
            "text, and by bos_token, add_bos_token and add_eos_token llama.cpp would put "
            f"{bos} before it{' and EOS after it' if adds_eos else ''}, "
            "expected the same; correct tokenizer_config.json, or save the tokenizer with "
            "transformers' save_pretrained()"
        )


def header_value(writer: GGUFWriter, key: str, default: Any = None) -> Any:
    """The value of a key in a header that is being written."""
    entry = writer.kv_data[0].get(key)
    return default if entry is None else entry.value
