"""Generative tasks: models write programs, and tests say whether these are right."""
