"""A checkpoint to compare with its source: quantized by nemoquant or another tool in the ModelOpt layout, or not quantized at all.

How each tensor is stored is told by the file itself, not by a plan, so that any tool's output can stand beside ours. Its
weights are decoded as they are used; its taps round GEMM inputs and the KV cache as an engine would.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor

from nemoquant.checkpoint import manifest
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.checkpoint.source import FLOAT_DTYPES, Source
from nemoquant.checkpoint.summary import declared_quantization, declares_fp8_cache
from nemoquant.checkpoint.weights import LayerWeights
from nemoquant.errors import CheckpointError, TensorTableError, listing
from nemoquant.evaluate.packed import PackedWeight, fake_quantize
from nemoquant.formats.noise import Noise
from nemoquant.model.config import load_config
from nemoquant.model.roles import LINEAR_ROLES, TensorSpec
from nemoquant.model.taps import Tap
from nemoquant.pack.layouts import Stored, find_stored, kv_scale_name

TOKENIZER_PARTS = ("model", "added_tokens", "normalizer", "pre_tokenizer")
UNIMPORTANT = ("mamba_ssm_cache_dtype", "max_position_embeddings", "bos_token_id", "eos_token_ids", "mtp_layers", "mtp_modules")
CACHE_ROLE = "kv_cache"


@dataclass(frozen=True)
class Module:
    """What is measured as one: a tensor of the model, all experts of a layer and projection, or a layer's KV cache (no ``specs``).

    ``layer`` is None for embedding, final norm and head. ``taps`` are the names that its inputs go by.
    """

    name: str
    layer: int | None
    role: str
    format: str
    activation_format: str | None
    specs: tuple[TensorSpec, ...]
    taps: frozenset[str]


class Candidate:
    """An opened checkpoint. Close ``checkpoint`` after use.

    Attributes:
        name: what reports call it.
        stored: tensor of the model -> how it lies in the file; MTP tensors that the file lacks are absent.
        inputs: tap -> (format, decode scale): what is rounded at run time, GEMM inputs and ``...k_proj.output``, ``...v_proj.output``.
        modules: of the main model, in file order.
        manifest: nemoquant.json, None where another tool wrote the checkpoint.
        warnings: what the reader should know before believing a figure.
    """

    def __init__(self, path: Path, source: Source, name: str) -> None:
        """Read headers and scalars, and make sure that the checkpoint can be compared with ``source``.

        Raises:
            CheckpointError: or one of its kinds: unreadable, made from another source, another tokenizer, or not in a layout
                that can be decoded.
        """
        self.path, self.source, self.name = path, source, name
        self.warnings: list[str] = []
        config, raw = load_config(path)
        if not path.is_dir():
            raise CheckpointError(f"{path} is a config.json; diff needs the folder with the weights")
        self.manifest = manifest.read_manifest(path) if (path / manifest.FILE).exists() else None
        self._check_origin(config)
        _check_tokenizer(path, source.path)
        self.checkpoint = Checkpoint(path)
        self.stored = self._find_stored()
        self.inputs: dict[str, tuple[str, np.float32]] = {}
        declared = declared_quantization(path, raw)
        self._read_input_scales(declared)
        self.fp8_cache = declares_fp8_cache(declared)
        self._read_cache_scales()
        self._check_extra()

    def _check_origin(self, config: Any) -> None:
        assert self.source.checkpoint is not None
        ours, theirs = vars(self.source.config), vars(config)
        keys = [k for k in ours if ours[k] != theirs[k] and k not in UNIMPORTANT]
        if keys:
            raise CheckpointError(
                f"{self.path} is not of {self.source.path}: their configs differ in {listing(keys)}; expected a checkpoint made from it"
            )
        if self.manifest is None:
            return
        made_from = self.manifest["source"]
        here = {
            "config_sha256": hashlib.sha256(json.dumps(self.source.raw_config, sort_keys=True).encode()).hexdigest(),
            "tensor_table_sha256": manifest.tensor_table_sha256(self.source.checkpoint.tensors),
        }
        for key, digest in here.items():
            if made_from.get(key) != digest:
                raise CheckpointError(
                    f"{self.path} was made from another source than {self.source.path}: {manifest.FILE} has {key} "
                    f"{str(made_from.get(key))[:12]}, this source has {digest[:12]}; give the source that it was made from"
                )

    def _find_stored(self) -> dict[str, Stored]:
        stored, problems, no_mtp = {}, [], 0
        for spec in self.source.table:
            try:
                found = stored[spec.name] = find_stored(self.checkpoint.tensors, spec)
                dtype = self.checkpoint.tensors[spec.name].dtype
                if found.format == "source" and dtype not in FLOAT_DTYPES:
                    problems.append(f"{spec.name} is {dtype}")
                elif found.format != "source" and spec.role.removeprefix("mtp.") not in (*LINEAR_ROLES, "eh_proj"):
                    problems.append(f"{spec.name} ({spec.role}) is {dtype}, expected a floating dtype: it is no GEMM")
            except CheckpointError as error:
                if spec.role.startswith("mtp.") and spec.name not in self.checkpoint.tensors:
                    no_mtp += 1
                else:
                    problems.append(str(error))
        if problems:
            raise TensorTableError(
                f"{self.path}: {len(problems)} tensors are not as expected: {listing(problems)}; expected the ModelOpt layout "
                "with FP8 per tensor or NVFP4, or unquantized tensors"
            )
        if no_mtp:
            self.warnings.append(f"it lacks {no_mtp} multi-token-prediction tensors: no acceptance is measured")
        return stored

    @property
    def has_mtp(self) -> bool:
        """Whether the file has the first multi-token-prediction module."""
        return self.source.config.mtp_modules > 0 and all(
            spec.name in self.stored for spec in self.source.table if spec.role.startswith("mtp.")
        )

    def scalar(self, name: str) -> np.float32:
        """A scale per tensor; raises CheckpointError where it is no positive finite number."""
        value = np.float32(self.checkpoint.array(name).reshape(())[()])
        if not (np.isfinite(value) and value > 0):
            raise CheckpointError(f"{self.path}: {name} is {value}; expected a positive finite scale, engines would compute NaN")
        return value

    def _read_input_scales(self, declared: Mapping[str, Any]) -> None:
        algorithms = declared.get("quantized_layers") or {}
        unscaled = []
        for spec in self.source.table:
            stored = self.stored.get(spec.name)
            if stored is None or stored.format == "source":
                continue
            scale = stored.parts.get("input_scale")
            if scale is not None:
                self.inputs[spec.module] = stored.format, self.scalar(scale)
            else:
                entry = algorithms.get(spec.module)
                algorithm = entry.get("quant_algo") if isinstance(entry, dict) else declared.get("quant_algo")
                if algorithm in ("FP8", "NVFP4"):
                    unscaled.append(spec.module)
        if unscaled:
            raise CheckpointError(
                f"{self.path}: {len(unscaled)} modules are declared to have quantized inputs and lack `input_scale`: {listing(unscaled)}; "
                "engines read it as zero, calibrate again"
            )

    def _read_cache_scales(self) -> None:
        found, missing = 0, 0
        for spec in self.source.table:
            if spec.role not in ("attention.k_proj", "attention.v_proj"):
                continue
            name = kv_scale_name(spec.module)
            stored = name in self.checkpoint.tensors
            found, missing = found + stored, missing + (not stored)
            if self.fp8_cache:
                self.inputs[f"{spec.module}.output"] = "fp8", self.scalar(name) if stored else np.float32(1)
        if self.fp8_cache and missing:
            self.warnings.append(
                f"its FP8 KV cache has no scale for {missing} of {found + missing} projections: engines take 1.0, as here"
            )
        if found and not self.fp8_cache:
            self.warnings.append(f"it has {found} KV cache scales but declares no FP8 cache: engines ignore them, as here")

    def _check_extra(self) -> None:
        known = {name for stored in self.stored.values() for name in stored.parts.values()}
        known |= {kv_scale_name(s.module) for s in self.source.table if s.role in ("attention.k_proj", "attention.v_proj")}
        extra = [name for name in self.checkpoint.tensors if name not in known]
        if extra:
            raise TensorTableError(
                f"{self.path}: {len(extra)} tensors of unknown meaning: {listing(extra)}; they may change what an engine computes, "
                "expected the ModelOpt layout with FP8 per tensor or NVFP4"
            )

    @cached_property
    def modules(self) -> list[Module]:
        found: dict[str, list[TensorSpec]] = {}
        for spec in self.source.table:
            if not spec.role.startswith("mtp."):
                name = spec.module if spec.expert is None else spec.module.replace(f".experts.{spec.expert}.", ".experts.")
                found.setdefault(name, []).append(spec)
        modules = []
        for name, specs in found.items():
            first, taps = specs[0], frozenset(spec.module for spec in specs if spec.module in self.inputs)
            formats = sorted({self.stored[spec.name].format for spec in specs})
            inputs = {self.inputs[spec.module][0] if spec.module in self.inputs else None for spec in specs}
            if len(formats) > 1 or len(inputs) > 1:
                raise CheckpointError(
                    f"{self.path}: the experts of {name} have the formats {', '.join(formats)}, {len(taps)} of {len(specs)} with an "
                    "input scale; expected one for all, engines run them as one operation"
                )
            modules.append(Module(name, first.layer, first.role, formats[0], inputs.pop(), tuple(specs), taps))
            if first.role == "attention.v_proj" and self.fp8_cache:
                mixer = first.module.removesuffix(".v_proj")
                caches = frozenset(f"{mixer}.{p}_proj.output" for p in "kv")
                modules.append(Module(f"{mixer}.{CACHE_ROLE}", first.layer, CACHE_ROLE, "source", "fp8", (), caches))
        return modules

    def weights(self, prefix: str) -> "CandidateWeights":
        """The tensors under a prefix, as ``ReferenceModel`` and ``layer_forward`` take them."""
        return CandidateWeights(self, prefix)

    def tap(self, only: Collection[str] | None = None, record: Callable[[str, Noise], None] | None = None) -> Tap:
        """A tap, by full names, that rounds what an engine rounds.

        Args:
            only: names to round, others pass; None is all.
            record: told what was done at each.
        """

        def round_trip(name: str, x: Tensor) -> Tensor:
            rule = self.inputs.get(name)
            if rule is None or (only is not None and name not in only):
                return x
            y, found = fake_quantize(x, *rule)
            if record is not None:
                record(name, found)
            return y

        return round_trip


class CandidateWeights(LayerWeights):
    """A candidate's tensors under a prefix: floating ones as tensors, quantized ones as :class:`PackedWeight`."""

    def __init__(self, candidate: Candidate, prefix: str) -> None:
        super().__init__(candidate.checkpoint, prefix)
        self.candidate = candidate

    def __getitem__(self, name: str) -> Tensor:
        stored = self.candidate.stored[self.prefix + name]
        return super().__getitem__(name) if stored.format == "source" else cast(Tensor, self.packed(stored))

    def packed(self, stored: Stored) -> PackedWeight:
        """A quantized weight, mapped."""
        parts = stored.parts
        codes = self.hold(parts["codes"])
        blocks = self.hold(parts["block_scales"]) if "block_scales" in parts else None
        return PackedWeight(stored.format, codes, blocks, self.candidate.scalar(parts["global_scale"]))


def _check_tokenizer(path: Path, source: Path) -> None:
    """Where both have a tokenizer, it must split text alike."""
    files = [folder / "tokenizer.json" for folder in (path, source)]
    if not all(file.exists() for file in files):
        return
    try:
        theirs, ours = (json.loads(file.read_text(encoding="utf-8")) for file in files)
        differing = [part for part in TOKENIZER_PARTS if theirs.get(part) != ours.get(part)]
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{files[0]} or {files[1]} cannot be read as a tokenizer ({error})") from None
    if differing:
        raise CheckpointError(
            f"{path} has another tokenizer than {source}: they differ in {', '.join(differing)}; expected the same, "
            "its tokens would mean other words"
        )
