"""A checkpoint to compare with its source, and the modules that are measured in it."""

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

from nemoquant.checkpoint import manifest
from nemoquant.checkpoint.towers import text_only
from nemoquant.errors import CheckpointError, listing
from nemoquant.files import MOST_TABLE_ENTRIES, read_json
from nemoquant.model import names
from nemoquant.model.roles import TensorSpec
from nemoquant.quantized.checkpoint import PackedCheckpoint
from nemoquant.solve.files import FOLDS, SOLVED
from nemoquant.solve.folds.file import check, load
from nemoquant.solve.folds.layer import NO_FOLDS
from nemoquant.solve.records import read
from nemoquant.sources.source import Source
from nemoquant.tokens.tokenizer import MOST_BYTES

TOKENIZER_PARTS = ("model", "added_tokens", "normalizer", "pre_tokenizer")
UNIMPORTANT = (
    "mamba_ssm_cache_dtype",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_ids",
    "mtp_layers",
    "mtp_layer_sizes",
    "mtp_modules",
)
CACHE_ROLE = "kv_cache"


@dataclass(frozen=True)
class ModuleSpec:
    """A unit of measurement: a tensor, all experts of a layer and projection, or a layer's KV cache.

    ``layer`` is None for embedding, final norm and head. ``specs`` is empty for a KV cache. ``taps`` are the
    names of its inputs.
    """

    name: str
    layer: int | None
    role: str
    format: str
    activation_format: str | None
    specs: tuple[TensorSpec, ...]
    taps: frozenset[str]


class CandidateCheckpoint(PackedCheckpoint):
    """An opened checkpoint that was made from ``source``; ``name`` is its name in reports.

    Attributes:
        folds: of the source's weights, which its codes stand for; empty where there are none.
        solved: tensor -> what was noted of its codes, where they were solved for.
    """

    def __init__(self, path: Path, source: Source, name: str) -> None:
        """Open it, and make sure that it can be compared with ``source``.

        Raises:
            CheckpointError: or a subclass: it can't be opened, was made from another source, or has another
                tokenizer.
        """
        super().__init__(path)
        self.source, self.name = source, name
        if self.towers:
            self.warnings.append(text_only(self.towers))
        self._check_origin()
        _check_tokenizer(path, source.path)
        written = self.manifest["files"] if self.manifest is not None else {}
        self.folds = NO_FOLDS
        if FOLDS in written:
            self.folds = load(path / FOLDS)
            check(path / FOLDS, self.folds, self.table)
        self.solved = read(path / SOLVED, [spec.name for spec in self.table]) if SOLVED in written else {}
        if source.config.mtp_modules and not self.config.mtp_modules:
            lost = sum(spec.role.startswith("mtp.") for spec in source.table)
            self.warnings.append(f"it lacks {lost} multi-token-prediction tensors: no acceptance is measured")

    def _check_origin(self) -> None:
        ours, theirs = self.source.config, self.config
        keys = [
            field.name
            for field in fields(ours)
            if getattr(ours, field.name) != getattr(theirs, field.name) and field.name not in UNIMPORTANT
        ]
        if keys:
            raise CheckpointError(
                f"{self.path} is not of {self.source.path}: their configs differ in {listing(keys)}; "
                f"expected a checkpoint made from it"
            )
        if self.manifest is None:
            return
        made_from = self.manifest["source"]
        here = {
            "config_sha256": manifest.config_sha256(self.source.raw_config),
            "tensor_table_sha256": manifest.tensor_table_sha256(self.source.checkpoint.tensors),
        }
        for key, digest in here.items():
            if made_from.get(key) != digest:
                raise CheckpointError(
                    f"{self.path} was made from another source than {self.source.path}: {manifest.FILE} has "
                    f"{key} "
                    f"{str(made_from.get(key))[:12]}, this source has {digest[:12]}; give the source that "
                    f"it was made from"
                )

    @cached_property
    def modules(self) -> list[ModuleSpec]:
        """The modules of the main model, in file order."""
        grouped: dict[str, list[TensorSpec]] = {}
        for spec in self.table:
            if not spec.role.startswith("mtp."):
                grouped.setdefault(names.stack_of(spec.module), []).append(spec)
        modules = []
        for name, specs in grouped.items():
            first, taps = specs[0], frozenset(spec.module for spec in specs if spec.module in self.inputs)
            formats = sorted({self.stored[spec.name].format for spec in specs})
            inputs = {self.inputs[spec.module][0] if spec.module in self.inputs else None for spec in specs}
            if len(formats) > 1 or len(inputs) > 1:
                raise CheckpointError(
                    f"{self.path}: the experts of {name} have the formats {', '.join(formats)}, {len(taps)} "
                    f"of {len(specs)} with an "
                    "input scale; expected one for all, engines run them as one operation"
                )
            modules.append(
                ModuleSpec(
                    name, first.layer, first.role, formats[0], inputs.pop(), specs=tuple(specs), taps=taps
                )
            )
            if first.role == "attention.v_proj" and self.cache is not None:
                mixer = names.mixer_of(first.module)
                caches = frozenset(
                    f"{mixer}{projection}{names.OUTPUT}" for projection in names.KV_PROJECTIONS
                )
                modules.append(
                    ModuleSpec(
                        f"{mixer}{CACHE_ROLE}",
                        first.layer,
                        CACHE_ROLE,
                        "source",
                        self.cache.number,
                        specs=(),
                        taps=caches,
                    )
                )
        return modules


def _check_tokenizer(path: Path, source: Path) -> None:
    """Where both folders have a tokenizer, make sure that both split text alike."""
    files = [folder / "tokenizer.json" for folder in (path, source)]
    if not all(file.exists() for file in files):
        return
    try:
        theirs, ours = (read_json(file, MOST_BYTES, entries=MOST_TABLE_ENTRIES) for file in files)
        differing = [part for part in TOKENIZER_PARTS if theirs.get(part) != ours.get(part)]
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{files[0]} or {files[1]} cannot be read as a tokenizer ({error})") from None
    if differing:
        raise CheckpointError(
            f"{path} has another tokenizer than {source}: they differ in {', '.join(differing)}; expected "
            f"the same, "
            "its tokens would mean other words"
        )
