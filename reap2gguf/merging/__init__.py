"""Merges experts into those that stay, in place of removing the others: REAM and HC-SMoE."""
