"""Prune a Mixture-of-Experts checkpoint with REAP; publish it as verified GGUF and safetensors."""

__version__ = "0.1.0"
