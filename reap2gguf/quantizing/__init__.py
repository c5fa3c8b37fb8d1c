"""From a recipe to one GGML type per tensor, before any tensor is read."""
