"""``python -m consumers.child JOB RESULT``: one job in an engine's environment, JSON to JSON."""

import importlib
import json
import sys
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    engine = importlib.import_module(f"consumers.on_{job['engine']}")
    result = getattr(engine, job["task"])(**job["arguments"])
    result["versions"] = {"torch": version("torch"), "transformers": version("transformers")}
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
