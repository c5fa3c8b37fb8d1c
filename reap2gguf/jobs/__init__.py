"""Builds on rented machines: what they need, how one is started, and how their work is saved."""
