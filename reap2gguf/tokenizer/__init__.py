"""A checkpoint's tokenizer and chat templates: for calibration, and as GGUF keys."""
