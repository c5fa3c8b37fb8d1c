"""Bounds on the numbers of a config: well above any model, and low enough to count up to."""

MAX_LAYERS = 4096
MAX_EXPERTS = 2**16
MAX_WIDTH = 2**20  # of hidden states, experts and heads together
MAX_HEADS = 2**16
MAX_VOCABULARY = 2**20
MAX_EXPERTS_OF_ALL_LAYERS = 2**17
