"""The names of all ways to rank experts.

This module is loaded with every command, so it imports no numpy; `select.py` computes the scores.
"""

from __future__ import annotations

OBSERVED = (
    "reap",
    "frequency",
    "ean_sum",
    "ean_mean",
    "weighted_ean_sum",
    "weighted_frequency",
)
METHODS = OBSERVED
