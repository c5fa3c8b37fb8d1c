"""Models and files of any publisher side by side: what they are made of, and how good they are.

contents   sizes, types and bits per weight of one model, by role and by layer
opening    what the user named -> files that are open
quality    perplexity and KL divergence of all that fit together
compared   the whole comparison, and JSON of it
picture    quality against size
"""
