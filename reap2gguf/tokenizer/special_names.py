"""Texts by which llama.cpp knows special tokens, whatever their type in a header."""

from __future__ import annotations

# Texts that llama.cpp makes special tokens of, whatever their type in the header: ends of turns
# and of texts, fill-in-the-middle, and gpt-oss's channels.
_ENDS = """
    <|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn>
    <|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance>
    <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~[
"""
ENDS_BY_NAME = frozenset(_ENDS.split())
# one of each group ends an answer too: fill-in-the-middle's padding, repository and file
ENDS_BY_GROUP = (
    ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    ("<|file_sep|>",),
)
_OTHER_NAMES = """
    <|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>
    <|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>
    <|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>
    <|channel|> <|message|> <|start|> <|constrain|>
"""
SPECIAL_BY_NAME = ENDS_BY_NAME.union(_OTHER_NAMES.split(), *ENDS_BY_GROUP)
# All of Qwen's vocabularies have this as an ordinary token, which no text reaches in transformers:
# it is split into `</`, `s` and `>` before. For llama.cpp it is a special one.
ORDINARY_IN_QWEN = "</s>"
# Where one of these is in the vocabulary, llama.cpp makes `</s>` an ordinary token.
HIDES_S = ("<|tool_response>", "<|plamo:eos|>")
