"""A checkpoint's tokenizer and chat templates: for calibration, and as GGUF keys.

tokenizer_files   the files, read and checked before another library reads them
tokenizer         texts to token ids, conversations to texts
templates         renders chat templates, in a process of its own: template_worker
pieces            a long text in pieces that are encoded in threads
in_transformers   the same tokenizer as transformers loads it
identity          whether two models have the same tokens
gguf_keys         the tokenizer keys of a GGUF header
from_gguf         the other way: a tokenizer.json of a GGUF header
panics            panics of the tokenizers library as our errors

A tokenizer is written only if llama.cpp makes the same token ids of it:

form              the parts of tokenizer.json, compared with known forms: steps, settings
post_processor    what stands before a text
first_token       what llama.cpp puts before a text where only templates do
vocabulary        tokens, merges and added_tokens; byte_symbols, special_names
files_beside      other files that transformers reads
probe             ids of a text of hard cases, as transformers and llama.cpp make them
llama_bpe         llama.cpp's algorithm in Python, with its pre_tokenizers and special_split
check             all of it together, when a plan is made; advice for what is refused
caveats           the differences that remain, for plan and card

Other kinds of vocabularies:

sentencepiece     tokenizer.model (piece_model), which llama_spm joins as llama.cpp does
ranks             tiktoken.model, of which a tokenizer.json is made
character_bpe     a tokenizer.json of BPE on characters: gemma, which llama_gemma joins
"""
