"""Repairs what pruning broke: the kept experts' `down_proj`, layer by layer, in closed form."""
