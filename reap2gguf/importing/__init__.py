"""Recipes from outside: from the types of a GGUF file, and from commands of other programs."""
