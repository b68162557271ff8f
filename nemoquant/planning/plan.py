"""The plan: one frozen row per tensor, and the sizes that follow from the rows.

Later stages read the plan and match no names.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nemoquant.formats import FORMATS, SOLVED, CacheFormat
from nemoquant.model.config import NemotronHConfig
from nemoquant.model.kinds import has_cache, kv_values_per_token, ssm_state_bytes
from nemoquant.notebook import html_table
from nemoquant.planning.recipe import Recipe
from nemoquant.planning.row import Row, row_json
from nemoquant.planning.shown import headline, role_cells, role_data
from nemoquant.planning.solving import Overrides
from nemoquant.units import size

SCHEMA = 1  # of the plan's JSON
SCALAR_BYTES = 4


@dataclass(frozen=True, repr=False)
class Plan:
    """All rows, in file order, with the recipe that made them.

    Attributes:
        assumed: dtypes come from the config alone, not from headers.
        scale_groups: whether rows of a group share their scales.
        warnings: what was put right in the source, or left out, and what a recipe means otherwise here; no
            part of the plan's identity.
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
        return sorted({rule.stored for rule in self.recipe.rules} - {row.format for row in self.rows})

    @property
    def calibrated_for(self) -> str:
        """What calibration is needed for, in words; empty where it is not."""
        needs = [
            ("codes that are solved for", any(row.solved for row in self.quantized)),
            (f"folds ({', '.join(self.recipe.folds)})", bool(self.recipe.folds)),
            (
                "activation scales" + f" (headroom {self.recipe.headroom:g})" * self.has_headroom,
                bool(self.kv_layers) or any(row.calibrated for row in self.rows),
            ),
        ]
        return ", ".join(what for what, is_needed in needs if is_needed)

    @property
    def needs_calibration(self) -> bool:
        """Whether any scale, code or fold depends on activations."""
        return bool(self.kv_layers) or self.needs_inputs or any(row.calibrated for row in self.rows)

    @cached_property
    def needs_inputs(self) -> bool:
        """Whether calibration must see all inputs of GEMMs, and not their maxima alone."""
        return bool(self.recipe.folds) or any(row.solved for row in self.rows)

    @property
    def propagates(self) -> bool:
        """Whether layers are solved on the stream of the quantized layers before them."""
        return self.recipe.solve.propagate == "quantized" and any(row.solved for row in self.quantized)

    @property
    def weighs_outputs(self) -> bool:
        """Whether errors of outputs count by the loss, those of some layer."""
        solve = self.recipe.solve
        return solve.outputs == "loss" and solve.descent > 0 and any(row.weighed for row in self.quantized)

    @cached_property
    def has_headroom(self) -> bool:
        """Whether the recipe asks for headroom, and some input gets it."""
        return self.recipe.headroom != 1 and any(row.input_headroom for row in self.quantized)

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
        """The figures, what each role gets, and every row."""
        return self.summary() | {"roles": role_data(self.rows), "rows": [row_json(row) for row in self.rows]}

    @property
    def headline(self) -> str:
        """What the plan does, in a sentence; every format that it names, some weight has, or the KV cache."""
        return headline(self.rows, self.cache if self.kv_layers else None)

    def sizes(self) -> str:
        """What becomes of the model's size, in a few words."""
        return (
            f"{len(self.quantized):,} of {len(self.rows):,} tensors quantized, {size(self.bytes_in)} -> "
            f"{size(self.bytes_out)}, {self.bits_per_weight:.2f} bits a weight"
        )

    def __repr__(self) -> str:
        return f"Plan({self.recipe.name}: {self.sizes()})"

    def _repr_html_(self) -> str:
        header, cells = role_cells(self.rows)
        return html_table(f"{self.recipe.name}: {self.sizes()}", header, cells, right=(3, 4))


def method_warnings(plan: Plan, given: Overrides) -> list[str]:
    """For a user who asked for something else than the recipe's own: what does not follow it.

    A line for each format whose weights get another method than was asked for, for each option on solving
    where nothing is solved, and for headroom that no input has.
    """
    others = Counter(
        (row.format, row.scale_method)
        for row in plan.quantized
        if given.method not in (None, row.scale_method)
    )
    warnings = [
        f"--method {given.method}: {count:,} {form.upper()} weights get {got}, the nearest that "
        f"{form.upper()} has"
        for (form, got), count in others.items()
    ]
    if not any(row.solved for row in plan.quantized):
        warnings += [
            f"--{option} {value}: has no effect, no weight gets {' or '.join(SOLVED)}"
            for option, value in (
                ("descent", given.descent),
                ("propagate", given.propagate),
                ("outputs", given.outputs),
            )
            if value is not None
        ]
    elif plan.recipe.solve.outputs == "loss" and not plan.weighs_outputs:
        why = "it needs a descent of 1 or more" if not plan.recipe.solve.descent else "no layer is solved"
        warnings.append(f"outputs loss: has no effect, {why}")
    if plan.recipe.headroom != 1 and not plan.has_headroom:
        having = " or ".join(number.short for number in FORMATS.values() if number.input_headroom)
        warnings.append(
            f"headroom {plan.recipe.headroom:g}: has no effect, no GEMM of this model has {having} inputs, "
            f"whose calibrated scales it multiplies"
        )
    return warnings
