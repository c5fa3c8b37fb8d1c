"""A checkpoint's tokenizer and chat templates: for calibration, and as GGUF keys.

tokenizer_files   the files, read and checked before another library reads them
tokenizer         texts to token ids, conversations to texts
templates         renders chat templates, in a process of its own: template_worker
gguf_keys         the tokenizer keys of a GGUF header
panics            panics of the tokenizers library as our errors

A tokenizer is written only if llama.cpp makes the same token ids of it:

form              the parts of tokenizer.json, compared with known forms: steps, settings
post_processor    what stands before a text
vocabulary        tokens, merges and added tokens; byte_symbols
files_beside      other files that transformers reads
probe             ids of a text of hard cases, as transformers and llama.cpp make them
llama_bpe         llama.cpp's algorithm in Python, with its pre_tokenizers and special_split
caveats           the differences that remain, for plan and card

Two other kinds of files hold a vocabulary:

sentencepiece     tokenizer.model (piece_model), which llama_spm joins as llama.cpp does
ranks             tiktoken.model, of which a tokenizer.json is made
"""
