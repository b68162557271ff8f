"""The report as one HTML page that opens offline: style, script, plotly.js and data are inside.

Jinja writes the words: header, summary, warnings, how to read it. ``report.js`` draws all that can be
selected, sorted or hovered, from data in the page as JSON.

1. Everything in a report is untrusted text (names of folders, tensors, recipes). Jinja escapes; the JSON
   cannot end its element; the script writes text nodes only; and a Content-Security-Policy runs nothing but
   the two scripts whose hashes it names.
2. The data is reduced to what the page shows, so that a model of 88 layers and 512 experts stays below 6 MB,
   plotly.js included: floats have six digits, experts become their worst and their median, expert load is the
   difference from the reference's.
3. The same report gives the same bytes: no time, no random ids.
"""

import base64
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nemoquant.evaluate.schema import Candidate, Experts, Layer, Module, Quantized, Reference, Report
from nemoquant.formats import CACHE_FORMATS, FORMATS
from nemoquant.model.kinds import KINDS
from nemoquant.units import size

HERE = Path(__file__).parent
DIGITS = 6  # of a float in the page; nothing is shown with more
SERIES = 6  # colours of checkpoints in report.css; the seventh has the first one's
NAMES = {name: number.short for name, number in FORMATS.items()}  # report.css has a colour for each
WORDS = {role: words for kind in KINDS.values() for role, words in kind.linear.items()} | {
    "kv_cache": "the KV cache"
}


def render(report: Report) -> str:
    """The whole page."""
    scripts = [
        (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8"),
        (HERE / "report.js").read_text(),
    ]
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["size"] = size
    return environment.get_template("report.html.j2").render(
        report=report,
        summaries=[summary(candidate, report.reference) for candidate in report.candidates],
        kinds=KINDS.values(),
        series=SERIES,
        names={"source": "as source"} | NAMES,
        caches=CACHE_FORMATS,
        percent=percent,
        perplexity=perplexity,
        warnings=report.all_warnings(),
        style=Markup((HERE / "report.css").read_text()),
        scripts=[Markup(script) for script in scripts],
        hashes=Markup(" ".join(f"'sha256-{_sha256(script)}'" for script in scripts)),
        page=Markup(script_json(page_data(report))),
    )


def _sha256(script: str) -> str:
    """The hash for a Content-Security-Policy: of the text between the tags."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def script_json(value: object) -> str:
    """JSON for a script element: json escapes everything outside ASCII (U+2028 too), this function markup."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# Words


def summary(candidate: Candidate, reference: Reference) -> tuple[str, str]:
    """The candidate in plain words: a headline, and a few sentences."""
    if identical(candidate):
        return "Identical to the reference", "Every weight is the same, and so is every prediction."
    logits = candidate.logits
    run = candidate.engine
    through = f" Through {run.engine} {run.version} KL is {run.logits.kl.mean:.5f}." if run else ""
    parts = [
        f"Agrees on the next token {percent(logits.top1_agreement)} of the time",
        _perplexity(candidate, reference),
        f"{candidate.bits_per_weight:.2f} bits a weight, {_smaller(candidate.compression)}",
    ]
    if candidate.mtp_acceptance is not None and reference.mtp_acceptance is not None:
        parts.append(
            f"MTP acceptance {percent(candidate.mtp_acceptance)} instead of "
            f"{percent(reference.mtp_acceptance)}"
        )
    worst = next((m for m in candidate.modules if m.name in candidate.worst_modules[:1]), None)
    rest = "; ".join(parts) + "." + (f" The largest error comes from {place(worst)}." if worst else "")
    return f"{figure(logits.kl.mean)} nats from bf16 on average", rest + through


def identical(candidate: Candidate) -> bool:
    """Whether no module and no prediction differs from the reference's."""
    return not candidate.modules and candidate.logits.kl.max == 0


def _perplexity(candidate: Candidate, reference: Reference) -> str:
    new, old, ratio = candidate.logits.perplexity, reference.perplexity, candidate.logits.perplexity_ratio
    if new is None or old is None or ratio is None:
        return "perplexity is beyond what a float64 holds"
    change = round(ratio - 1, 4) + 0.0  # no -0.00%
    return f"perplexity {perplexity(new)} instead of {perplexity(old)} ({change:+.2%})"


def _smaller(compression: float) -> str:
    if 0.995 < compression < 1.005:
        return "as large as the reference"
    return f"{compression:.3g} times smaller" if compression > 1 else f"{1 / compression:.3g} times larger"


def place(module: Module) -> str:
    """Where a module is, in words: routed experts' up projection in layer 1."""
    words = WORDS.get(module.role, module.name)
    return words if module.layer is None or words == module.name else f"{words} in layer {module.layer}"


def figure(value: float) -> str:
    """Three digits, tiny values with an exponent: 0.0134, 1.2e-7."""
    return f"{value:.3g}".replace("e-0", "e-")


def perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1e5 else f"{value:.3e}"


def percent(share: float) -> str:
    """92.4%; a value is never rounded to 0% or 100%."""
    value = 100 * share
    if 0 < value < 0.001:
        return "under 0.001%"
    if 99 < value < 100:
        return f"{value:.2f}%" if value < 99.995 else "over 99.99%"
    if value >= 100 or value == 0:
        return f"{value:.0f}%"
    return f"{value:.1f}%" if value >= 10 else f"{value:.3g}%"


# Data


def page_data(report: Report) -> dict[str, Any]:
    """The data that the script needs, and no more."""
    return {
        "series": SERIES,
        "formats": {"source": "bf16"} | NAMES,
        "kinds": {name: {"letter": kind.letter, "title": kind.title} for name, kind in KINDS.items()},
        "mtp": _round(report.reference.mtp_acceptance),
        "loads": [
            layer.routing and layer.routing.tokens_per_expert_reference
            for layer in report.candidates[0].layers
        ],
        "candidates": [_candidate(candidate) for candidate in report.candidates],
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    logits = candidate.logits
    scalars = {
        "kl": logits.kl.mean,
        "kl_median": logits.kl.median,
        "kl_p99": logits.kl.p99,
        "kl_max": logits.kl.max,
        "perplexity": logits.perplexity,
        "ratio": logits.perplexity_ratio,
        "top1": logits.top1_agreement,
        "top5": logits.top5_agreement,
        "mtp": candidate.mtp_acceptance,
        "bits": candidate.bits_per_weight,
        "compression": candidate.compression,
    }
    return {
        "name": candidate.name,
        "identical": identical(candidate),
        "bytes": candidate.bytes,
        **_rounded(scalars),
        "histogram": {
            "edges": [_round(edge) for edge in logits.kl_histogram.edges],
            "counts": logits.kl_histogram.counts,
        },
        "positions": [[part.first, part.last, _round(part.kl)] for part in logits.kl_by_position],
        "layers": packed([_layer(layer) for layer in candidate.layers]),
        "modules": packed([_module(module) for module in candidate.modules]),
        "worst": candidate.worst_modules,
    }


def _layer(layer: Layer) -> dict[str, Any]:
    routing, state = layer.routing, layer.ssm_state
    figures = {
        "stream": layer.stream.relative,
        "alone": layer.alone.relative,
        "state": state.relative if state else None,
        "of_plain": layer.solved.error_of_plain if layer.solved else None,
        "flipped": routing.flipped if routing else None,
        "flipped_tokens": routing.tokens_with_flip if routing else None,
    }
    pairs = (
        zip(routing.tokens_per_expert, routing.tokens_per_expert_reference, strict=True) if routing else ()
    )
    return {
        "name": layer.name,
        "kind": layer.kind,
        "formats": layer.elements_by_format,
        **_rounded(figures),
        "load_change": [new - old for new, old in pairs],
    }


def _module(module: Module) -> dict[str, Any]:
    of_plain = module.solved.error_of_plain if module.solved else None
    figures = {"effect": module.effect, "of_plain": of_plain}
    figures |= {**_noise("weight", module.weight), **_noise("input", module.input)}
    return {
        "name": module.name,
        "layer": module.layer,
        "role": module.role,
        "format": module.format,
        "input_format": module.input_format,
        "bytes": module.bytes,
        **_rounded(figures),
        **_experts(module.experts),
    }


def _noise(prefix: str, noise: Quantized | None) -> dict[str, float | None]:
    names = (f"{prefix}_db", f"{prefix}_saturated", f"{prefix}_flushed")
    return (
        dict(zip(names, (noise.sqnr_db, noise.saturated, noise.flushed), strict=True))
        if noise
        else dict.fromkeys(names)
    )


def _experts(experts: Experts | None) -> dict[str, Any]:
    """Hundreds of experts as the worst one, its SQNR, and the median SQNR of weights."""
    if experts is None or experts.worst_expert is None:
        return dict.fromkeys(("expert", "expert_db", "expert_median_db"))
    known = [value for value in experts.weight_sqnr_db if value is not None]
    return {
        "expert": experts.worst_expert,
        "expert_db": _round(min(known)),
        "expert_median_db": _round(statistics.median(known)),
    }


def packed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows with the same keys; the keys are written once."""
    return {"keys": list(rows[0]) if rows else [], "rows": [list(row.values()) for row in rows]}


def _rounded(values: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: _round(value) for name, value in values.items()}


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")
