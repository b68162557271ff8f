"""The report of ``nemoquant diff`` as data: what its JSON holds. HTML, Markdown and the model card are drawn from it.

NaN and Infinity never occur. A figure that is not a finite number is null: an SQNR where there is no error at all, a
mean over nothing. ``docs/diff.schema.json`` is made from these classes, and a test holds it to them.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from nemoquant.errors import listing
from nemoquant.notebook import html_table
from nemoquant.units import size

VERSION = 1

Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Data(_Part):
    """What was read by the models."""

    source: str
    """Name of the file."""
    rows: int
    seq_len: int
    """Tokens in a row. Each row starts from an empty state."""
    predicted_positions: int
    """rows x (seq_len - 1): the last token of a row predicts nothing that is known."""
    tokens_sha256: str
    """Identity of the tokens, whatever file they came from."""


class Reference(_Part):
    """The source, computed in float32."""

    name: str
    pattern: str
    """The layer schedule: M Mamba-2, E mixture of experts, * attention, - MLP."""
    parameters: int
    bytes: int
    """Tensor data of the checkpoint."""
    bits_per_weight: float
    perplexity: float | None
    """exp of the mean negative log likelihood of the next token, in float64; null where that overflows."""
    mtp_acceptance: Share | None
    """Share of positions at which the first MTP module's likeliest token is the main model's own next choice; null without MTP."""


class Error(_Part):
    """Of a tensor against the reference's, over all rows and positions: float32 differences, float64 sums."""

    relative: NotNegative
    """norm of the difference / norm of the reference."""
    sqnr_db: float | None
    """-20 log10(relative) in dB; null where there is no error."""


class Kl(_Part):
    """KL(reference || candidate) of a position's next-token distribution, in nats, over the whole vocabulary."""

    mean: NotNegative
    median: NotNegative
    p99: NotNegative
    max: NotNegative


class Histogram(_Part):
    """Positions by KL: ``counts[i]`` of them in [edges[i], edges[i + 1]); the first bin holds all below, the last all above."""

    edges: list[float]
    counts: list[int]


class PositionRange(_Part):
    """Mean KL of positions ``first`` to ``last`` of a row (from 0, both included)."""

    first: int
    last: int
    kl: NotNegative


class Logits(_Part):
    """What reaches the user: the next token's distribution."""

    kl: Kl
    perplexity: float | None
    perplexity_ratio: float | None
    """Of the reference's."""
    top1_agreement: Share
    """Share of positions where both have the same likeliest token (ties go to the lower id)."""
    top5_agreement: Share
    """Mean share of the reference's five likeliest tokens that are among the candidate's five."""
    kl_histogram: Histogram
    kl_by_position: list[PositionRange]


class Routing(_Part):
    """Choice of experts in the candidate's own stream, against the reference's in its own."""

    flipped: Share
    """Share of (token, chosen expert) pairs of the reference that the candidate did not choose."""
    tokens_with_flip: Share
    tokens_per_expert: list[int]
    tokens_per_expert_reference: list[int]


class Solved(_Part):
    """How the codes of a module's or layer's weights were found, where its quantize run noted it."""

    methods: dict[str, int]
    """Number of weights by method; fewer have the planned one where a plain one was better, or no token was seen."""
    error_of_plain: NotNegative | None
    """Error in outputs (of all weights together) on the calibration's inputs, over that of the plain method (mse for NVFP4, else max). Null where nothing was seen.
    The SQNR of the weights says less of such codes: it falls while the outputs come nearer."""


class Layer(_Part):
    """One layer, or the embedding before the first, or the final norm and head after the last."""

    name: str
    """``embedding``, the layer's number, or ``head``."""
    kind: str
    """embedding, mamba, moe, attention, mlp or head."""
    elements_by_format: dict[str, int]
    """Weights of the layer by the format that they are stored in."""
    stream: Error
    """Of the residual stream after the layer (of the logits for the head), with the errors inherited from before."""
    alone: Error
    """Of what the block adds to the stream, when the block is fed the reference's input: its own error. For the head: of the logits,
    of at most ``effect_rows`` rows. For the embedding the same as ``stream``."""
    routing: Routing | None
    """MoE layers only."""
    ssm_state: Error | None
    """Mamba-2 layers only: of the scan's state after the last position of the rows, in the candidate's own stream."""
    solved: Solved | None
    """Of all its weights that were solved for; null where there are none."""


class Quantized(_Part):
    """A tensor before and after rounding."""

    sqnr_db: float | None
    """10 log10(signal / error) in dB; null where there is no error, or no signal."""
    saturated: Share
    """Share of values larger than the largest that the tensor's scale can represent, and so clipped. Of inputs: beyond what
    calibration saw."""
    flushed: Share
    """Share of values that are not zero and became zero."""


class Experts(_Part):
    """The routed experts of a layer and projection one by one, by index; inputs are null for an expert that no token reached."""

    weight_sqnr_db: list[float | None]
    input_sqnr_db: list[float | None]
    input_saturated: list[Share | None]
    worst_expert: int | None
    """With the lowest weight SQNR; null where no weight has an error."""


class Module(_Part):
    """A tensor, all experts of a layer and projection, or an attention layer's KV cache, that is not as the source has it."""

    name: str
    layer: int | None
    role: str
    format: str
    """Of the weight: source or a number format; ``changed`` if it is stored unquantized but with other values."""
    input_format: str | None
    """Of the GEMM's input (of keys and values for the cache) at run time; null if it stays as it is."""
    elements: int
    bytes: int
    """As stored, scales included."""
    weight: Quantized | None
    """Null for a KV cache."""
    input: Quantized | None
    """On the reference's input to the layer (of the head: on ``effect_rows`` rows). Null where it is not rounded, or no token reached it.
    Inf counts as saturated: an engine clips it."""
    effect: NotNegative
    """Measured effect: relative error of the residual stream after the layer (of the logits for the final norm and head) when only this
    module is the candidate's, fed the reference's input; on the first ``effect_rows`` rows."""
    experts: Experts | None
    solved: Solved | None
    """Null where the codes follow from the weight alone, or another tool wrote them."""


class EngineRun(_Part):
    """The same rows through another runtime than the diff's own torch arithmetic."""

    engine: str
    version: str
    device: str
    compute: str
    """Dtype of activations."""
    logits: Logits
    """Of the engine's logits, against the reference's."""
    kl_from_torch: NotNegative
    """Mean KL(torch || engine) of the same checkpoint: what another order of sums does. About 1e-12 where inputs are not rounded. Where
    they are, codes flip by it and the flips travel on: up to a tenth of the checkpoint's own KL on the demo model's rows of 512 tokens."""


class Candidate(_Part):
    """One checkpoint that was compared."""

    name: str
    recipe: str | None
    """Name of the recipe, if nemoquant wrote it."""
    formats: dict[str, int]
    """Modules by format, ``source`` included."""
    kv_cache: str
    """fp8 or source."""
    bytes: int
    compression: float
    """The reference's bytes / this one's."""
    bits_per_weight: float
    """8 x bytes / elements of the source, all tensors."""
    bits_per_quantized_weight: float | None
    """The same over quantized modules alone, scales included; null without any."""
    logits: Logits
    mtp_acceptance: Share | None
    engine: EngineRun | None
    """Null where no engine was asked for."""
    layers: list[Layer]
    modules: list[Module]
    """In file order. Modules that are as the source has them are left out: they have no error."""
    worst_modules: list[str]
    """Names of the ten with the largest effect, the largest first."""
    warnings: list[str]

    def __repr__(self) -> str:
        return f"Candidate({self.name!r}: {self._figures()})"

    def _figures(self) -> str:
        logits = self.logits
        return f"KL {logits.kl.mean:.5f}, top-1 {logits.top1_agreement:.2%}, {self.bits_per_weight:.2f} bits a weight"

    __str__ = __repr__


class Report(_Part):
    """Everything that one ``nemoquant diff`` found out."""

    schema_version: int
    nemoquant: str
    """Version that made it."""
    data: Data
    compute: str
    """Dtype of the arithmetic outside the quantized formats."""
    device: str
    """Where the models were computed: cpu or cuda. Sums in another order flip codes that lie on the edge; see ``kl_from_torch``."""
    threads: int
    effect_rows: int
    reference: Reference
    candidates: list[Candidate]
    warnings: list[str]

    def dump(self) -> str:
        """The JSON text."""
        return self.model_dump_json(indent=1) + "\n"

    def all_warnings(self) -> list[tuple[str, str]]:
        """All warnings, each with the name of the candidate that it is about, or "" where it is of the whole."""
        return [("", text) for text in self.warnings] + [
            (c.name, text) for c in self.candidates for text in c.warnings
        ]

    def figures(self) -> list[list[str]]:
        """The main figures as text under ``FIGURES``: a line for the reference, then one for each candidate."""
        r = self.reference
        own = ["bf16", "", "", "", number(r.perplexity, ".3f"), "", "", "", number(r.mtp_acceptance, ".1%")]
        lines = [[*own, f"{r.bits_per_weight:.2f}", size(r.bytes), ""]]
        for c in self.candidates:
            logits, kl = c.logits, c.logits.kl
            change = None if logits.perplexity_ratio is None else logits.perplexity_ratio - 1
            lines.append(
                [
                    c.name,
                    f"{kl.mean:.5f}",
                    f"{kl.median:.5f}",
                    f"{kl.p99:.5f}",
                    number(logits.perplexity, ".3f"),
                    number(change, "+.2%"),
                    f"{logits.top1_agreement:.2%}",
                    f"{logits.top5_agreement:.2%}",
                    number(c.mtp_acceptance, ".1%"),
                    f"{c.bits_per_weight:.2f}",
                    size(c.bytes),
                    f"{c.compression:.2f} x",
                ]
            )
        return lines

    def __repr__(self) -> str:
        shown = [f"{c.name!r} {c._figures()}" for c in self.candidates]
        return f"Report({listing(shown, 3)}; {self.data.predicted_positions:,} positions of {self.reference.name!r})"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        d = self.data
        caption = f"{self.reference.name}, {d.rows:,} rows of {d.seq_len:,} tokens of {d.source}"
        return html_table(caption, FIGURES, self.figures(), right=range(1, len(FIGURES)))


FIGURES = (
    "",
    "KL mean",
    "median",
    "99%",
    "perplexity",
    "change",
    "top-1",
    "top-5",
    "MTP accepts",
    "bits",
    "size",
    "smaller",
)


def number(value: float | None, form: str, unit: str = "") -> str:
    """A figure as text; ``-`` where there is none."""
    return "-" if value is None else format(value, form) + unit
