"""Weights that are changed before they are quantized, so that quantizing them costs less."""
