"""Weights that a checkpoint stores as numbers of few bits and their scales, read as floats."""
