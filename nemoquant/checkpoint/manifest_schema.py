"""What ``nemoquant.json`` must look like; a page of its own, because pydantic is slow to import."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from nemoquant.checkpoint.header import ITEM_SIZE
from nemoquant.files import plain_name


def _plain(name: str) -> str:
    if not plain_name(name):
        raise ValueError("expected the name of a file in the folder, without a path")
    return name


def _known(dtype: str) -> str:
    if dtype not in ITEM_SIZE:
        raise ValueError(f"expected one of {', '.join(ITEM_SIZE)}")
    return dtype


Name = Annotated[str, AfterValidator(_plain)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
UnitDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Positive = Annotated[int, Field(ge=1, lt=1 << 31)]
Dtype = Annotated[str, AfterValidator(_known)]
Text = Annotated[str, Field(max_length=1 << 20)]


class _Part(BaseModel):
    """Types are those of JSON, nothing is converted; keys that no reader takes are left alone."""

    model_config = ConfigDict(strict=True)


class Dtypes(_Part):
    usual: Dtype
    others: dict[str, Dtype]


class Hub(_Part):
    """The model on the hub that a source was, and its commit, as the cache that it lay in says."""

    model: Text
    commit: Text


class Source(_Part):
    """``units`` are the hashes of the source's content (``identity.py``).

    ``hub`` is there where the source was a snapshot in the hub's cache.
    """

    config_sha256: Digest
    tensor_table_sha256: Digest
    dtypes: Dtypes
    units: dict[str, UnitDigest]
    hub: Hub | None = None


class Recipe(_Part):
    """Only its name is read from here; the rest has a schema in ``planning/recipe.py``."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,200}$")]


class Plan(_Part):
    sha256: Digest
    recipe: Recipe
    scale_groups: bool


class Calibration(_Part):
    """The settings of a scales file; see ``calibrate.run.settings``."""

    model_config = ConfigDict(strict=True, extra="forbid")

    rows: Positive
    seq_len: Positive
    tokens_sha256: Digest
    data: Text
    device: Text
    dtype: Text
    row_batch: Positive | dict[str, Positive]
    threads: Positive


class Manifest(_Part):
    """``was`` has the hash before (None: no such file) of a file that is being replaced."""

    nemoquant: Text
    source: Source
    plan: Plan
    calibration: Calibration | None
    shard_bytes: Annotated[int, Field(ge=1)]
    warnings: list[Text]
    files: dict[Name, Digest]
    was: dict[Name, Digest | None] = {}
