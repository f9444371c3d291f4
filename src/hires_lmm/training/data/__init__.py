"""Data for training and evaluation."""
