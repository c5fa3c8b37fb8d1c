"""Choosing a type for every tensor, so that a file has a given size and loses least."""
