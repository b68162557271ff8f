"""What a scales file must look like; apart from ``scales.py``, because pydantic is slow to import."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Amax = Annotated[float, Field(ge=0, le=3.4028234663852886e38)]  # a float32
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Positive = Annotated[int, Field(ge=1, lt=1 << 31)]
Layer = Annotated[str, Field(pattern=r"^[0-9]{1,6}$")]
Text = Annotated[str, Field(max_length=10_000)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
UnitDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class _Part(BaseModel):
    """Types are those of JSON, nothing is converted; nothing is unknown, for all of it is written again."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Settings(_Part):
    """The run; see ``calibrate.run.settings``."""

    rows: Positive
    seq_len: Positive
    tokens_sha256: Digest
    data: Text
    device: Text
    dtype: Text
    row_batch: Positive | dict[str, Positive]
    threads: Positive


class Content(_Part):
    """The file; what its parts mean stands in :class:`nemoquant.calibrate.scales.Scales`."""

    schema_: int = Field(alias="schema")
    settings: Settings
    non_finite_rows: Count
    warnings: Annotated[list[Text], Field(max_length=1000)]
    units: dict[str, UnitDigest]
    tokens_per_expert: dict[Layer, list[Count]]
    kv_amax: dict[str, Amax]
    input_amax: dict[str, Amax]
