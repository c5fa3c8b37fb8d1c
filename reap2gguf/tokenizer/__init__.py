"""A checkpoint's tokenizer and chat templates: for calibration, and as GGUF keys.

tokenizer_files   the files, read and checked before another library reads them
tokenizer         texts to token ids, conversations to texts
templates         renders chat templates, in a process of its own: template_worker
gguf_keys         the tokenizer keys of a GGUF header
panics            panics of the tokenizers library as our errors

A tokenizer is written only if llama.cpp makes the same token ids of it:

form              the parts of tokenizer.json, compared with known forms
vocabulary        tokens, merges and added tokens
files_beside      other files that transformers reads
probe             ids of a text of hard cases, as transformers and llama.cpp make them
llama_bpe         llama.cpp's algorithm in Python, with its pre_tokenizers
caveats           the differences that remain, for plan and card
"""
