"""Evaluation: what pruning cost and what quantizing cost, measured in one streamed sweep."""
