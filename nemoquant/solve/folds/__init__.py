"""Folds: weights changed so that the model computes the same, and loses less to quantization."""
