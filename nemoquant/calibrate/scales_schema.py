"""What a scales file must look like; apart from ``scales.py``, because pydantic is slow to import."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from nemoquant.checkpoint.manifest_schema import Calibration, UnitDigest

Amax = Annotated[float, Field(ge=0, le=3.4028234663852886e38)]  # a float32
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Layer = Annotated[str, Field(pattern=r"^[0-9]{1,6}$")]
Text = Annotated[str, Field(max_length=10_000)]


class Content(BaseModel):
    """The file; what its parts mean stands in :class:`nemoquant.calibrate.scales.Scales`.

    Types are those of JSON, nothing is converted; nothing is unknown, for all of it is written again.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    schema_: int = Field(alias="schema")
    settings: Calibration
    non_finite_rows: Count
    warnings: Annotated[list[Text], Field(max_length=1000)]
    units: dict[str, UnitDigest]
    tokens_per_expert: dict[Layer, list[Count]]
    kv_amax: dict[str, Amax]
    input_amax: dict[str, Amax]
    folded_amax: dict[str, Amax]
