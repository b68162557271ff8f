"""The plan: one frozen row per tensor, and the sizes that follow from the rows.

Later stages read the plan and match no names.
"""

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from nemoquant.checkpoint.header import ITEM_SIZE
from nemoquant.formats import (
    FORMATS,
    SOLVED,
    CacheFormat,
    Format,
    FormatName,
    Method,
    ScaleMethod,
    SolvedMethod,
)
from nemoquant.model.config import NemotronHConfig
from nemoquant.model.kinds import has_cache, kv_values_per_token, ssm_state_bytes
from nemoquant.notebook import html_table
from nemoquant.planning.recipe import Recipe
from nemoquant.units import size

SCHEMA = 1  # of the plan's JSON
SCALAR_BYTES = 4


@dataclass(frozen=True)
class Row:
    """What becomes of one tensor of the source.

    ``format`` is ``source`` (kept bit for bit) or a number format. ``activation_format`` is the format of
    the GEMM's input at run time, None if it is not quantized. Rows that share ``weight_group`` share their
    per-tensor weight scale, rows that share ``input_group`` their input scale; None means a scale of its own.
    ``reason`` names the recipe's rule.
    """

    name: str
    role: str
    layer: int | None
    expert: int | None
    shape: tuple[int, ...]
    source_dtype: str
    format: Literal["source", FormatName]
    scale_method: Method | None
    activation_format: FormatName | None
    weight_group: str | None
    input_group: str | None
    reason: str

    @property
    def module(self) -> str:
        """Name of the module that the tensor belongs to."""
        return self.name.removesuffix(".weight")

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes_in(self) -> int:
        return self.elements * ITEM_SIZE[self.source_dtype]

    @property
    def number(self) -> Format | None:
        """The number format of a quantized row; None of one that is kept."""
        return None if self.format == "source" else FORMATS[self.format]

    @property
    def calibrated(self) -> bool:
        """Whether the GEMM's input has a scale that comes from calibration."""
        return self.activation_format is not None and FORMATS[self.activation_format].calibrated

    @property
    def solved(self) -> bool:
        """Whether its codes are solved for with the GEMM's inputs."""
        return self.scale_method in SOLVED

    @property
    def solved_method(self) -> SolvedMethod:
        """The method of a row that is solved."""
        return next(known for known in SOLVED if known == self.scale_method)

    @property
    def plain_method(self) -> ScaleMethod:
        """The method of a quantized row that needs the weight alone; see :meth:`Format.alone`."""
        assert self.number is not None and self.scale_method is not None
        return self.number.alone(self.scale_method)

    def parts(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """The tensors that are written for this row: (kind, safetensors dtype, shape).

        ``kind`` is one of ``source``, ``codes``, ``block_scales``, ``global_scale``, ``input_scale``.
        """
        if self.number is None:
            return [("source", self.source_dtype, self.shape)]
        parts: list[tuple[str, str, tuple[int, ...]]] = list(
            self.number.packed_tensors((self.shape[0], self.shape[1]))
        )
        return parts + [("input_scale", "F32", ())] * self.calibrated

    @property
    def bytes_out(self) -> int:
        return sum(math.prod(shape) * ITEM_SIZE[dtype] for _, dtype, shape in self.parts())


@dataclass(frozen=True, repr=False)
class Plan:
    """All rows, in file order, with the recipe that made them.

    Attributes:
        assumed: dtypes come from the config alone, not from headers.
        scale_groups: whether rows of a group share their scales.
        warnings: what was put right in the source, or left out; no part of the plan's identity.
    """

    recipe: Recipe
    config: NemotronHConfig
    rows: tuple[Row, ...]
    assumed: bool
    scale_groups: bool
    warnings: tuple[str, ...] = ()

    @property
    def cache(self) -> CacheFormat | None:
        """Format of the KV cache; None where it stays as the source has it."""
        return self.recipe.cache

    @property
    def kv_layers(self) -> list[int]:
        """Layers whose K and V caches are quantized and therefore get scales."""
        if self.cache is None:
            return []
        return [i for i, kind in enumerate(self.config.layers) if has_cache(self.config, kind)]

    @cached_property
    def quantized(self) -> list[Row]:
        return [row for row in self.rows if row.format != "source"]

    @property
    def unused_formats(self) -> list[str]:
        """Formats that the recipe names but no tensor has, because this model lacks the roles."""
        return sorted({rule.format for rule in self.recipe.rules} - {row.format for row in self.rows})

    @property
    def needs_calibration(self) -> bool:
        """Whether any scale, code or fold depends on activations."""
        return bool(self.kv_layers) or self.needs_inputs or any(row.calibrated for row in self.rows)

    @cached_property
    def needs_inputs(self) -> bool:
        """Whether calibration must see all inputs of GEMMs, and not their maxima alone."""
        return bool(self.recipe.folds) or any(row.solved for row in self.rows)

    @cached_property
    def tensors_out(self) -> int:
        return sum(len(row.parts()) for row in self.rows) + 2 * len(self.kv_layers)

    @cached_property
    def bytes_in(self) -> int:
        return sum(row.bytes_in for row in self.rows)

    @cached_property
    def bytes_out(self) -> int:
        """Bytes of tensor data in the output, headers not counted."""
        return sum(row.bytes_out for row in self.rows) + 2 * SCALAR_BYTES * len(self.kv_layers)

    @property
    def bits_per_weight(self) -> float:
        """8 * bytes out / number of elements of the source."""
        return 8 * self.bytes_out / sum(row.elements for row in self.rows)

    @property
    def bits_per_quantized_weight(self) -> float | None:
        """The same over quantized modules alone, their scales included; None when there are none."""
        elements = sum(row.elements for row in self.quantized)
        return 8 * sum(row.bytes_out for row in self.quantized) / elements if elements else None

    def kv_cache_bytes_per_token(self) -> dict[str, int]:
        """Bytes of K and V in all attention layers of the main model; the source's cache is bf16."""
        values = kv_values_per_token(self.config)
        bits = 16 if self.cache is None else self.cache.bits
        return {"source": 2 * values, "planned": values * bits // 8}

    def ssm_state_bytes_per_sequence(self) -> dict[str, int]:
        """Bytes of the scan states of all Mamba layers, in the config's ``mamba_ssm_cache_dtype``.

        The plan does not change it.
        """
        size = ssm_state_bytes(self.config)
        return {"source": size, "planned": size}

    @cached_property
    def sha256(self) -> str:
        """Identity of the plan: the recipe, the grouping and every row."""
        digest = hashlib.sha256(
            json.dumps([SCHEMA, self.recipe.dump(), self.scale_groups], sort_keys=True).encode()
        )
        encode = json.JSONEncoder(sort_keys=True).encode
        for row in self.rows:
            digest.update(encode(vars(row)).encode())
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """The figures, without rows, as JSON data."""
        formats: dict[str, int] = {}
        for row in self.rows:
            formats[row.format] = formats.get(row.format, 0) + 1
        return {
            "schema": SCHEMA,
            "recipe": self.recipe.name,
            "sha256": self.sha256,
            "source_dtypes": "assumed" if self.assumed else "headers",
            "tensors_in": len(self.rows),
            "bytes_in": self.bytes_in,
            "tensors_out": self.tensors_out,
            "bytes_out": self.bytes_out,
            "compression": self.bytes_in / self.bytes_out,
            "bits_per_weight": self.bits_per_weight,
            "bits_per_quantized_weight": self.bits_per_quantized_weight,
            "kv_cache_bytes_per_token": self.kv_cache_bytes_per_token(),
            "ssm_state_bytes_per_sequence": self.ssm_state_bytes_per_sequence(),
            "formats": formats,
            "needs_calibration": self.needs_calibration,
        }

    def to_json(self) -> dict[str, Any]:
        """The figures and every row."""
        return self.summary() | {"rows": [row_json(row) for row in self.rows]}

    def sizes(self) -> str:
        """What becomes of the model's size, in a few words."""
        return (
            f"{len(self.quantized):,} of {len(self.rows):,} tensors quantized, {size(self.bytes_in)} -> "
            f"{size(self.bytes_out)}, {self.bits_per_weight:.2f} bits a weight"
        )

    def __repr__(self) -> str:
        return f"Plan({self.recipe.name}: {self.sizes()})"

    def _repr_html_(self) -> str:
        return html_table(f"{self.recipe.name}: {self.sizes()}", ROLE_HEADER, role_table(self), right=(3, 4))


def method_warnings(plan: Plan, method: Method | None) -> list[str]:
    """For a user who asked for one method for all weights: which got another, a line a format."""
    others = Counter(
        (row.format, row.scale_method) for row in plan.quantized if method not in (None, row.scale_method)
    )
    return [
        f"--method {method}: {count:,} {form.upper()} weights get {got}, the nearest that {form.upper()} has"
        for (form, got), count in others.items()
    ]


ROLE_HEADER = ("role", "weights", "GEMM inputs", "tensors", "bytes")


def role_table(plan: Plan) -> list[tuple[str, str, str, int, int]]:
    """(role, weights, inputs, tensors, bytes out) by role and format, in file order."""
    totals: dict[tuple[str, str, str], list[int]] = {}
    for row in plan.rows:
        weights = row.format if row.scale_method in (None, "max") else f"{row.format} ({row.scale_method})"
        entry = totals.setdefault((row.role, weights, row.activation_format or "-"), [0, 0])
        entry[0] += 1
        entry[1] += row.bytes_out
    return [
        (role, weights, inputs, count, total) for (role, weights, inputs), (count, total) in totals.items()
    ]


def row_json(row: Row) -> dict[str, Any]:
    """A row as JSON data, with both scale groups under one key."""
    data: dict[str, Any] = {**vars(row), "shape": list(row.shape)}
    data["scale_group"] = {"weight": data.pop("weight_group"), "input": data.pop("input_group")}
    return data
