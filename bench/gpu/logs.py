"""The ends of text files as one JSON object.

python -m bench.gpu.logs OUT.json NAME=FILE...
"""

import argparse
import json
from pathlib import Path

KEPT = 8000  # characters of each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("files", nargs="+", metavar="NAME=FILE")
    options = parser.parse_args()
    files = dict(pair.split("=", 1) for pair in options.files)
    kept = {name: Path(file).read_text(errors="replace")[-KEPT:] for name, file in files.items()}
    options.out.write_text(json.dumps(kept, indent=0))


if __name__ == "__main__":
    main()
