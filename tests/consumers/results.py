"""What came out, as ``results.json``, and what of it is a problem.

    engines       by engine: version, torch, transformers
    checkpoints   by name, then by engine: of a folder that was loaded (``..., draft``: its drafting module)
        quantization, least_sm     the engine's name for it, and the least SM by its own answer
        modules, algorithms        how many were compared, and which algorithms they have in the file
        algorithm_differs, values_differ, input_scales_differ, kv_scales_differ
                                   [name, the file's, the engine's]
        processed_differ           SGLang: the same of what it makes after loading
        unset                      parameters with bytes that no tensor wrote: [name, shape, bytes]
        kept                       parameters without a tensor, by their last name: the engine's default
        others, parameters         tensors beside modules that were compared; parameters of the model
        cache_scales, caches       K and V scales as loaded; dtypes of the KV cache and the scan's state
        backends                   by SM: the kernels that the engine's own selection takes
    configs       by name, then by engine: of a bare config, every module's algorithm against the plan's
    commands      by engine: [{sm, words, became or refused}]

A row that failed has ``failed``, a sentence, instead. ``inputs`` is the identity of what a row was made of.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).parent / "results.json"
DIFFERENCES = (
    "algorithm_differs",
    "values_differ",
    "input_scales_differ",
    "kv_scales_differ",
    "processed_differ",
    "unset",
)
MARLIN = "marlin"  # SGLang's only experts with whole inputs


class Known(NamedTuple):
    """A fault of an engine that nemoquant tells its users (``layouts/``): it is shown, and fails nothing."""

    engine: str
    algorithm: str
    name: str
    text: str


KNOWN = (
    Known("sglang", "W4A16_NVFP4", ".in_proj", "its global scale comes from memory that nothing wrote"),
    *(
        Known(engine, "W8A16_FP8", ".input_scale", "it has a scale of inputs, which no tensor wrote")
        for engine in ("vllm", "sglang")
    ),
)


def is_known(engine: str, row: dict[str, Any], difference: list[Any]) -> bool:
    """Whether a difference of a row is one of ``KNOWN``."""
    return any(
        known.engine == engine and known.algorithm in row["algorithms"] and known.name in difference[0]
        for known in KNOWN
    )


def problems(engine: str, row: dict[str, Any]) -> list[str]:
    """What is not as it should be in a row, a sentence each."""
    if "failed" in row:
        return [row["failed"]]
    found = []
    for kind in DIFFERENCES:
        rows = [each for each in row.get(kind, []) if not is_known(engine, row, each)]
        if rows:
            found.append(f"{len(rows)} {kind.replace('_', ' ')}: {' '.join(map(str, rows[0]))}")
    if engine == "sglang" and "W4A16_NVFP4" in row.get("expert_algorithms", []):
        others = [
            f"{answers.get('experts', answers)} on SM {sm}"
            for sm, answers in row["backends"].items()
            if answers.get("experts") != MARLIN
        ]
        if others:
            found.append(f"weights-only experts run by {', '.join(others)}")
    return found


def command_problems(rows: list[dict[str, Any]]) -> list[str]:
    return [f"SM {row['sm']}: {' '.join(row['words'])}: {row['refused']}" for row in rows if "refused" in row]


def any_problem(data: dict[str, Any]) -> bool:
    """Whether anything in the results is a problem."""
    rows = [
        (engine, row)
        for kind in ("checkpoints", "configs")
        for engines in data[kind].values()
        for engine, row in engines.items()
    ]
    return any(problems(*each) for each in rows) or any(map(command_problems, data["commands"].values()))


def read() -> dict[str, Any]:
    """The results that are there; empty ones if there are none."""
    if not FILE.exists():
        return {"engines": {}, "checkpoints": {}, "configs": {}, "commands": {}}
    data: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return data


def write(data: dict[str, Any]) -> None:
    FILE.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def table(data: dict[str, Any]) -> str:
    """A line for each row and engine, with what was compared and its problems."""
    lines = ["| what | engine | modules | algorithms | problems |", "|---|---|---:|---|---|"]
    for kind in ("checkpoints", "configs"):
        for name, engines in sorted(data[kind].items()):
            for engine, row in sorted(engines.items()):
                algorithms = ", ".join(f"{n} {what}" for what, n in sorted(row.get("algorithms", {}).items()))
                text = "; ".join(problems(engine, row)) or known_text(engine, row) or "none"
                lines.append(f"| {name} | {engine} | {row.get('modules', '')} | {algorithms} | {text} |")
    for engine, rows in sorted(data["commands"].items()):
        refused = command_problems(rows)
        lines.append(f"| commands | {engine} | {len(rows)} | | {len(refused)} refused |")
        lines += [f"    {text}" for text in refused]
    return "\n".join(lines)


def known_text(engine: str, row: dict[str, Any]) -> str:
    """What is different and known, in words."""
    seen = {
        known.text
        for known in KNOWN
        for kind in DIFFERENCES
        for each in row.get(kind, [])
        if known.engine == engine and known.name in each[0]
    }
    return "known: " + "; ".join(sorted(seen)) if seen else ""
