"""``python -m nemoquant``."""

from nemoquant.cli import main

main()
