"""The result of a build: two folders, their manifest, cards, hashes and Modelfile."""
