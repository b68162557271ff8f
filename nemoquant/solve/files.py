"""Names of the files that tell of solved weights; apart, because pydantic and numpy are slow to import."""

SOLVED = "nemoquant_solved.json"
FOLDS = "nemoquant_folds.st"
