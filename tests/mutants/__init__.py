"""Faults put into the kernels on purpose, each of which some test must see: ``python -m tests.mutants``."""
