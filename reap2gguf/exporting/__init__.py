"""Writes GGUF files: header and tokenizer, then every tensor in one pass over the checkpoint."""
