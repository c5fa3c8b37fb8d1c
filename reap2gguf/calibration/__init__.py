"""Calibration text and samples become rows of tokens."""
