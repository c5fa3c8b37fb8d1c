"""Reads both outputs back from disk and compares them with the plan, the source and each other."""
