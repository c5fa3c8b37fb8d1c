"""Trying a bundle where it was made: in process, or with the user's own llama.cpp."""
