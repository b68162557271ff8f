"""Names of the files that are written for every checkpoint, besides its shards and the copied files."""

from nemoquant.calibrate.scales import FILE as SCALES_FILE
from nemoquant.checkpoint import manifest
from nemoquant.checkpoint.reader import INDEX
from nemoquant.layouts.modelopt import LEGACY
from nemoquant.solve.files import FOLDS, SOLVED

WRITTEN = (INDEX, "config.json", LEGACY, manifest.CARD, manifest.FILE, SCALES_FILE, SOLVED, FOLDS)
