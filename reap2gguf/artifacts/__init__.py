"""The files that stages hand to each other: observations, importance matrices, GGUF headers."""
