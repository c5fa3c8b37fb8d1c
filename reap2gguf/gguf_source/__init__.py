"""GGUF files as sources: read as checkpoints, and pruned by slicing their blocks."""
