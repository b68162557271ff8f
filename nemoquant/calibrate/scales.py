"""Results of a calibration, and their file: with ``--scales`` it repeats a whole run to the byte."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemoquant.checkpoint.identity import Units
from nemoquant.errors import CalibrationError, brief, listing, schema_problem
from nemoquant.files import read_json
from nemoquant.model import names
from nemoquant.planning.plan import Plan

SCHEMA = 3
FILE = "nemoquant_scales.json"


@dataclass(repr=False)
class Scales:
    """Maxima of magnitudes, as float32 values that JSON repeats exactly.

    Attributes:
        settings: of the run: rows, lengths, hashes of tokens and source, device, dtype, batch, threads.
        input_amax: module -> amax of its GEMM's input over all rows. A routed expert that no token reached is
            absent.
        folded_amax: the same for modules whose input a fold changed, as it is after the fold.
        kv_amax: ``...k_proj`` or ``...v_proj`` -> amax of the keys or values that it puts into the cache.
        tokens_per_expert: MoE layer -> number of tokens of each expert.
        non_finite_rows: number of rows that were left out because they produced NaN or Inf.
        warnings: shown to the user by the run, and again by each run that takes its scales from the file.
        units: hashes of the source's units that were calibrated, see ``checkpoint/identity.py``.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    input_amax: dict[str, float] = field(default_factory=dict)
    folded_amax: dict[str, float] = field(default_factory=dict)
    kv_amax: dict[str, float] = field(default_factory=dict)
    tokens_per_expert: dict[int, list[int]] = field(default_factory=dict)
    non_finite_rows: int = 0
    warnings: list[str] = field(default_factory=list)
    units: Units = field(default_factory=dict)

    def __repr__(self) -> str:
        experts = sum(map(len, self.tokens_per_expert.values()))
        return (
            f"Scales({len(self.input_amax):,} inputs, {len(self.kv_amax):,} keys and values, "
            f"{experts - len(self.unreached()):,} of {experts:,} experts reached)"
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON data."""
        return {
            "schema": SCHEMA,
            "settings": self.settings,
            "non_finite_rows": self.non_finite_rows,
            "warnings": self.warnings,
            "units": self.units,
            "tokens_per_expert": {str(k): v for k, v in self.tokens_per_expert.items()},
            "kv_amax": self.kv_amax,
            "input_amax": self.input_amax,
            "folded_amax": self.folded_amax,
        }

    def dump(self) -> str:
        """The file's text; the same results give the same bytes."""
        return json.dumps(self.to_json(), indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Scales":
        """The reverse of ``to_json``; other data raise ValueError, KeyError, TypeError or AttributeError."""
        return Scales(
            settings=dict(data["settings"]),
            input_amax={str(k): float(v) for k, v in data["input_amax"].items()},
            folded_amax={str(k): float(v) for k, v in data["folded_amax"].items()},
            kv_amax={str(k): float(v) for k, v in data["kv_amax"].items()},
            tokens_per_expert={int(k): [int(n) for n in v] for k, v in data["tokens_per_expert"].items()},
            non_finite_rows=int(data["non_finite_rows"]),
            warnings=[str(w) for w in data["warnings"]],
            units={str(k): str(v) for k, v in data["units"].items()},
        )

    @staticmethod
    def load(path: Path) -> "Scales":
        """Read a scales file.

        Raises:
            CalibrationError: not a scales file, or of another schema; names the key, what it held, and why.
        """
        from nemoquant.calibrate.scales_schema import Content

        try:
            data = read_json(path)
        except (OSError, ValueError) as error:
            raise CalibrationError(
                f"{path} is not a scales file ({error}); expected the {FILE} of an earlier run"
            ) from None
        got = data.get("schema") if isinstance(data, dict) else None
        if type(got) is int and got != SCHEMA:
            raise CalibrationError(
                f"{path}: schema {brief(got)}, expected {SCHEMA}; calibrate again with this version"
            )
        wrong = schema_problem(Content.model_validate, data)
        if wrong is not None:
            raise CalibrationError(
                f"{path} is not a scales file ({wrong}); expected the {FILE} of an earlier run"
            )
        return Scales.from_json(data)

    def amax_of(self, plan: Plan) -> dict[str, float]:
        """The maxima of inputs that a plan's checkpoint will see: with its folds, if it has any."""
        return self.input_amax | self.folded_amax if plan.recipe.folds else self.input_amax

    def unreached(self) -> list[str]:
        """Experts without a token, as ``layer 3 expert 7``."""
        return [
            f"layer {i} expert {e}"
            for i, counts in self.tokens_per_expert.items()
            for e, n in enumerate(counts)
            if not n
        ]

    def warnings_for(self, plan: Plan) -> list[str]:
        """Warnings about this calibration for a user of ``plan``."""
        warnings = []
        if self.non_finite_rows:
            warnings.append(f"{self.non_finite_rows} calibration rows came to NaN or Inf and were left out")
        unreached, experts = self.unreached(), sum(map(len, self.tokens_per_expert.values()))
        if unreached and any(row.expert is not None and row.calibrated for row in plan.rows):
            warnings.append(
                f"{len(unreached)} of {experts} experts got no calibration token ({listing(unreached)}); "
                "each has the largest input scale of its layer and projection, give more rows to see them"
            )
        return warnings

    def summary(self) -> dict[str, Any]:
        """The settings, and how well experts were covered, as JSON data."""
        counts = [n for layer in self.tokens_per_expert.values() for n in layer]
        coverage = {
            "experts": len(counts),
            "unreached": counts.count(0),
            "fewest_tokens": min(counts, default=0),
        }
        return self.settings | {"non_finite_rows": self.non_finite_rows, "coverage": coverage}

    def check(self, plan: Plan, path: Path) -> None:
        """Make sure that a file from an earlier run has all that ``plan`` needs, and no unknown module.

        Raises:
            CalibrationError: lists the modules whose maxima are missing, or that the model does not have.
        """
        known = {row.module for row in plan.rows} | {names.HEAD}  # a tied head is no tensor, but a GEMM
        strange = [m for m in self.input_amax | self.folded_amax | self.kv_amax if m not in known]
        if strange:
            raise CalibrationError(
                f"{path} has the maxima of {len(strange)} modules that this model lacks: "
                f"{listing(strange)}; is it of another model?"
            )
        missing = [
            r.module
            for r in plan.quantized
            if r.calibrated and r.expert is None and r.module not in self.input_amax
        ]
        missing += [m for m in kv_modules(plan) if m not in self.kv_amax]
        if missing:
            raise CalibrationError(
                f"{path} lacks the maxima of {len(missing)} modules: {listing(missing)}; is it of another "
                f"model?"
            )


def kv_modules(plan: Plan) -> list[str]:
    """The projections whose outputs go into a quantized cache."""
    return [module for i in plan.kv_layers for module in names.kv_projections(i)]
