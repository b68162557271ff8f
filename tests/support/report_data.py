"""Reports for the tests of the HTML page: invented figures of the right shape, made from a layer schedule."""

import math
from typing import Any

from nemoquant.evaluate import schema
from nemoquant.evaluate.schema import (
    Candidate,
    Error,
    Experts,
    Layer,
    Module,
    Quantized,
    Reference,
    Report,
    Routing,
    Solved,
)

KINDS = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
PROJECTIONS = {
    "M": ("mamba.in_proj", "mamba.out_proj"),
    "E": ("experts.up_proj", "experts.down_proj", "shared_experts.up_proj", "shared_experts.down_proj"),
    "*": ("attention.q_proj", "attention.k_proj", "attention.v_proj", "kv_cache", "attention.o_proj"),
    "-": ("mlp.up_proj", "mlp.down_proj"),
}
EDGES = [10 ** (exponent / 4) for exponent in range(-36, 9)]


def error(relative: float) -> Error:
    return Error(relative=relative, sqnr_db=-20 * math.log10(relative) if relative else None)


def report(
    pattern: str = "ME*E-M", scales: tuple[float, ...] = (0.0, 0.01, 0.05), experts: int = 8, **changes: Any
) -> Report:
    """A report with a candidate for each of ``scales``, the size of its errors.

    0 makes a candidate that is identical to the reference.
    """
    reference = Reference(
        name="source",
        pattern=pattern,
        parameters=10**6,
        bytes=2 * 10**6,
        bits_per_weight=16.0,
        perplexity=20.0,
        mtp_acceptance=0.7,
    )
    fields = {
        "schema_version": schema.VERSION,
        "nemoquant": "0.1.0",
        "compute": "float32",
        "device": "cpu",
        "threads": 2,
        "effect_rows": 4,
        "warnings": [],
        "data": schema.Data(
            source="text.jsonl", rows=4, seq_len=64, predicted_positions=252, tokens_sha256="ab" * 32
        ),
        "reference": reference,
        "candidates": [
            candidate(f"candidate-{i}", pattern, scale, experts) for i, scale in enumerate(scales)
        ],
    }
    return Report.model_validate({**fields, **changes})


def candidate(name: str, pattern: str, scale: float, experts: int) -> Candidate:
    modules = [
        module(i, kind, role, scale, experts)
        for i, kind in enumerate(pattern)
        for role in PROJECTIONS[kind]
        if scale
    ]
    worst = sorted(modules, key=lambda m: -m.effect)[:10]
    return Candidate(
        name=name,
        recipe="nvfp4" if scale else None,
        formats={"nvfp4": len(modules), "source": 9},
        kv_cache="source",
        bytes=10**6 if scale else 2 * 10**6,
        compression=2.0 if scale else 1.0,
        bits_per_weight=8.0 + scale if scale else 16.0,
        bits_per_quantized_weight=4.5 if scale else None,
        logits=logits(scale),
        mtp_acceptance=0.7 - scale,
        engine=None,
        layers=layers(pattern, scale, experts),
        modules=modules,
        worst_modules=[m.name for m in worst],
        warnings=[],
    )


def logits(scale: float) -> schema.Logits:
    counts = [0] * (len(EDGES) - 1)
    counts[20 if scale else 0] = 252
    return schema.Logits(
        kl=schema.Kl(mean=scale, median=scale / 2, p99=4 * scale, max=9 * scale),
        perplexity=20 + scale,
        perplexity_ratio=1 + scale / 20,
        top1_agreement=1 - scale,
        top5_agreement=1 - scale,
        kl_histogram=schema.Histogram(edges=EDGES, counts=counts),
        kl_by_position=[
            schema.PositionRange(first=i, last=i + 3, kl=scale * (1 + i / 64)) for i in range(0, 64, 4)
        ],
    )


def layers(pattern: str, scale: float, experts: int) -> list[Layer]:
    blocks = [layer(str(i), KINDS[kind], scale * (1 + i % 7), experts) for i, kind in enumerate(pattern)]
    return [layer("embedding", "embedding", 0.0, experts), *blocks, layer("head", "head", scale, experts)]


def layer(name: str, kind: str, relative: float, experts: int) -> Layer:
    reference = [1000 + 37 * i % 501 for i in range(experts)]
    shift = round(100 * relative)
    routing = Routing(
        flipped=min(1, relative),
        tokens_with_flip=min(1, 2 * relative),
        tokens_per_expert_reference=reference,
        tokens_per_expert=[tokens + (shift if i % 2 else -shift) for i, tokens in enumerate(reference)],
    )
    return Layer(
        name=name,
        kind=kind,
        elements_by_format={"nvfp4": 9000, "fp8": 600, "source": 400} if relative else {"source": 10000},
        stream=error(relative / 2),
        alone=error(relative),
        routing=routing if kind == "moe" else None,
        ssm_state=error(relative / 3) if kind == "mamba" else None,
        solved=Solved(methods={"gptq": 3}, error_of_plain=0.5) if relative else None,
    )


def module(index: int, kind: str, role: str, scale: float, experts: int) -> Module:
    cache = role == "kv_cache"
    noise = Quantized(sqnr_db=20 + index % 5 - scale, saturated=0.01, flushed=0.02)
    per_expert = [20 + 0.123456 * (i % 13) for i in range(experts)]
    routed = Experts(
        weight_sqnr_db=per_expert,
        input_sqnr_db=[None, *per_expert[1:]],
        input_saturated=[None, *[0.01] * (experts - 1)],
        worst_expert=0,
    )
    return Module(
        name=f"backbone.layers.{index}.mixer.{role if kind == 'E' or cache else role.split('.')[1]}",
        layer=index,
        role=role,
        format="source" if cache else "nvfp4",
        input_format="fp8" if cache else "nvfp4",
        elements=0 if cache else 1000,
        bytes=0 if cache else 600 + index,
        weight=None if cache else noise,
        input=noise,
        effect=scale * (1 + (7 * index) % 11 + len(role) / 100),
        experts=routed if role.startswith("experts.") else None,
        solved=None if cache else Solved(methods={"gptq": max(1, experts)}, error_of_plain=0.5),
    )


def without_mtp() -> Report:
    made = report()
    reference = made.reference.model_copy(update={"mtp_acceptance": None})
    candidates = [c.model_copy(update={"mtp_acceptance": None}) for c in made.candidates]
    return made.model_copy(update={"reference": reference, "candidates": candidates})


def without_perplexity() -> Report:
    made = report()
    reference = made.reference.model_copy(update={"perplexity": None})
    nothing = {"perplexity": None, "perplexity_ratio": None}
    candidates = [
        c.model_copy(update={"logits": c.logits.model_copy(update=nothing)}) for c in made.candidates
    ]
    return made.model_copy(update={"reference": reference, "candidates": candidates})


def hostile() -> Report:
    """Names that are markup, in every place for a name."""
    made = report(scales=(0.05, 0.01))
    modules = [
        m.model_copy(update={"name": SCRIPT, "role": ENTITY}) if i == 1 else m
        for i, m in enumerate(made.candidates[0].modules)
    ]
    first = made.candidates[0].model_copy(
        update={
            "name": IMAGE,
            "recipe": IMAGE,
            "modules": modules,
            "worst_modules": [SCRIPT],
            "warnings": [SCRIPT],
        }
    )
    return made.model_copy(
        update={
            "reference": made.reference.model_copy(update={"name": ENTITY}),
            "data": made.data.model_copy(update={"source": IMAGE}),
            "candidates": [first, made.candidates[1]],
            "warnings": [IMAGE],
        }
    )


SCRIPT, IMAGE, ENTITY = (
    "<script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    "<b>bold</b> &lt;i&gt;",
)

SHAPES = {
    "one candidate": lambda: report(scales=(0.01,)),
    "five candidates": lambda: report(scales=(0.0, 0.001, 0.01, 0.02, 0.05)),
    "only an identical one": lambda: report(scales=(0.0,)),
    "no MoE": lambda: report(pattern="M*-M"),
    "no MTP": without_mtp,
    "no perplexity": without_perplexity,
    "one layer": lambda: report(pattern="M"),
}


def huge() -> Report:
    """A report of the largest size: 88 layers, 512 experts, five candidates."""
    return report(pattern="MEMEMEM*EMEMEMEM*EMEME" * 4, scales=(0.0, 0.004, 0.01, 0.02, 0.05), experts=512)
