"""The report as Markdown, for a terminal and for pull requests; and the sentence for a model card."""

from collections.abc import Iterable

from nemoquant.evaluate.schema import FIGURES, Candidate, Data, Layer, Module, Report, number
from nemoquant.units import size
from nemoquant.words import in_markdown, markdown_code

WORST_LAYERS = 3


def markdown(report: Report) -> str:
    """The whole summary: figures of all candidates side by side, then the largest errors of each."""
    d, r = report.data, report.reference
    lines = [
        f"# Accuracy of {in_markdown(r.name)}, quantized",
        "",
        f"{d.rows} rows of {d.seq_len:,} tokens of {markdown_code(d.source)}, "
        f"{d.predicted_positions:,} predicted positions; "
        f"bf16 source {size(r.bytes)}, perplexity {number(r.perplexity, '.3f')}; nemoquant "
        f"{report.nemoquant}.",
        "",
        *table(report),
    ]
    for candidate in report.candidates:
        lines += ["", *_candidate(candidate)]
    if warnings := report.all_warnings():
        lines += ["", "## Warnings", "", *(f"- {in_markdown(warning(*w))}" for w in warnings)]
    return "\n".join(lines) + "\n"


def warning(candidate: str, text: str) -> str:
    """A warning of ``Report.all_warnings`` in one line."""
    return f"{candidate}: {text}" if candidate else text


def table(report: Report) -> Iterable[str]:
    """The main figures, one line for each checkpoint."""
    yield "| " + " | ".join(FIGURES) + " |"
    yield "|---" + "|---:" * (len(FIGURES) - 1) + "|"
    for name, *figures in report.figures():
        yield "| " + " | ".join([in_markdown(name), *figures]) + " |"


def _candidate(c: Candidate) -> Iterable[str]:
    yield f"## {in_markdown(c.name)}: what hurts"
    yield ""
    if c.engine is not None:
        yield (
            f"Through {c.engine.engine} {c.engine.version} ({c.engine.compute}, {c.engine.device}): KL "
            f"{c.engine.logits.kl.mean:.5f}, "
            f"{c.engine.kl_from_torch:.2g} from the torch arithmetic; top-1 "
            f"{c.engine.logits.top1_agreement:.2%}."
        )
        yield ""
    if not c.worst_modules:
        yield "Nothing: it computes what the source computes."
        return
    modules = {m.name: m for m in c.modules}
    yield "| module | weight | input | effect | of plain | weight SQNR | input SQNR | inputs clipped |"
    yield "|---|---|---|---:|---:|---:|---:|---:|"
    for name in c.worst_modules:
        yield _module_line(modules[name])
    yield ""
    inner = [layer for layer in c.layers if layer.alone.relative > 0]
    worst = sorted(inner, key=lambda layer: -layer.alone.relative)[:WORST_LAYERS]
    yield f"Layers with the largest error of their own: {', '.join(map(_layer_words, worst))}."
    won = {_of_plain(layer): layer for layer in reversed(c.layers) if layer.solved}
    if won:
        best, least = min(won), max(won)
        yield (
            f"Of plain rounding's error in outputs solving left {best:.0%} (layer {won[best].name}) to "
            f"{least:.0%} (layer {won[least].name})."
        )
    flips = [(layer.routing.flipped, layer.name) for layer in c.layers if layer.routing]
    if flips:
        share, name = max(flips)
        yield f"Expert choices that flipped: {share:.1%} at most, in layer {name}."


def _of_plain(layer: Layer) -> float:
    """Error of its solved weights over that of plain rounding; 1 where no token was seen."""
    left = layer.solved.error_of_plain if layer.solved else None
    return 1.0 if left is None else left


def _module_line(m: Module) -> str:
    worst = (
        ""
        if m.experts is None or m.experts.worst_expert is None
        else f" (lowest SQNR: expert {m.experts.worst_expert})"
    )
    cells = [
        markdown_code(m.name) + worst,
        m.format,
        m.input_format or "-",
        f"{m.effect:.3%}",
        number(m.solved.error_of_plain if m.solved else None, ".0%"),
        number(m.weight.sqnr_db if m.weight else None, ".1f", " dB"),
        number(m.input.sqnr_db if m.input else None, ".1f", " dB"),
        number(m.input.saturated if m.input else None, ".3%"),
    ]
    return "| " + " | ".join(cells) + " |"


def _layer_words(layer: Layer) -> str:
    return f"{layer.name} ({layer.kind}, {layer.alone.relative:.1%})"


def cost_sentence(candidate: Candidate, data: Data, reference_perplexity: float | None) -> str:
    """A model card's line on accuracy."""
    logits = candidate.logits
    change = "" if logits.perplexity_ratio is None else f" ({logits.perplexity_ratio - 1:+.2%})"
    return (
        f"KL {logits.kl.mean:.5f} nats from the bf16 source (median {logits.kl.median:.5f}, 99% "
        f"{logits.kl.p99:.5f}), perplexity "
        f"{number(logits.perplexity, '.3f')} instead of {number(reference_perplexity, '.3f')}{change}, "
        f"the same likeliest token at "
        f"{logits.top1_agreement:.2%} of {data.predicted_positions:,} positions ({data.rows} rows of "
        f"{data.seq_len:,} tokens of "
        f"{markdown_code(data.source)}). Measure it on your task too."
    )
