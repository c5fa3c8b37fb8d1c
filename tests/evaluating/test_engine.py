"""Streamed scores against whole models."""
