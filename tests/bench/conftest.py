"""bench/ can be imported; the host libraries are those of the plugins' tests, built once for all."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

sys.path[:0] = [str(ROOT), str(ROOT / "tests/plugins")]
