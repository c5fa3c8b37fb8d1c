"""What to do about a tokenizer that is refused: the ends of messages."""

from __future__ import annotations

HELP = (
    "llama.cpp would tokenize differently from the model, so nothing is written; use the "
    "tokenizer.json of the model that this one was made from"
)
RESAVE = (
    "load the tokenizer with transformers, correct it and save it with save_pretrained(), or use "
    "the tokenizer.json of the model that this one was made from"
)
RESAVE_ALL = "use the tokenizer files of the model that this one was made from"
