"""A checkpoint's tokenizer and chat templates: for calibration, and as GGUF keys.

tokenizer_files   the files, read and checked before another library reads them
tokenizer         texts to token ids, conversations to texts
templates         renders chat templates, in a process of its own: template_worker
gguf_keys         the tokenizer keys of a GGUF header
panics            panics of the tokenizers library as our errors
"""
