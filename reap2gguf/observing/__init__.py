"""Runs rows through a model one layer at a time and watches what its experts do."""
