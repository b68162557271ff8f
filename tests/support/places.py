"""Paths in the repository that tests read."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
SUPPORT = TESTS / "support"
PACKAGE = ROOT / "nemoquant"
PLUGINS = ROOT / "plugins"
CALIB = ROOT / "calib"
DEMO = CALIB / "demo_model"
NANO_MODEL = CALIB / "nano_model"
CONFIGS = TESTS / "configs"
NANO = CONFIGS / "nano-30b-a3b.json"
SUPER = CONFIGS / "super-120b-a12b.json"
