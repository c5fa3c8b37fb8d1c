"""ggml's quantizers, compiled for many rows side by side: the same bytes, many times faster."""
