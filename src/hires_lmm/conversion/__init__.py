"""Checkpoints in and out: one key table a format, read in both directions."""
