"""A checkpoint opened for computing: in a layout of ``layouts/choose.py``, from any tool, or unquantized.

How each tensor is stored is read from the file itself, not from a plan, so that any tool's output can be
opened. Weights are decoded as they are used; taps round GEMM inputs and the KV cache as an engine would.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from torch import Tensor

from nemoquant.checkpoint import intact
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.checkpoint.towers import towers
from nemoquant.checkpoint.weights import LayerWeights
from nemoquant.errors import CheckpointError, TensorTableError, WeightError, listing
from nemoquant.formats import FORMATS, FormatName
from nemoquant.formats.arithmetic import Encoded
from nemoquant.formats.noise import Noise
from nemoquant.layouts.choose import layout_of
from nemoquant.layouts.modelopt import (
    CACHES,
    LAYOUT,
    Stored,
    declared_algorithm,
    declared_cache,
    listed_algorithm,
    module_algorithm,
    unknown_cache,
)
from nemoquant.model.names import OUTPUT
from nemoquant.model.parse import load_config
from nemoquant.model.roles import LINEAR_ROLES, tensor_table
from nemoquant.model.taps import Tap, identity
from nemoquant.quantized.packed import PackedWeight, fake_quantize
from nemoquant.sources.fitting import put_right
from nemoquant.sources.source import FLOAT_DTYPES

GEMM_ROLES = (*LINEAR_ROLES, "eh_proj")  # of the main model and, with ``mtp.`` before them, of its predictors


class PackedCheckpoint:
    """An opened checkpoint. Close ``checkpoint`` after use.

    Attributes:
        config, raw_config, table: config.json, and the tensors that it calls for.
        layout: how the file is read.
        stored: tensor of the model -> how it is stored in the file; MTP tensors that the file lacks are
            absent.
        inputs: tap -> (format, decode scale) of what is rounded at run time: GEMM inputs (scale 1.0 where
            the format has none) and ``...k_proj.output``, ``...v_proj.output``.
        weights_only: modules that are declared to have inputs that are not quantized.
        cache: format of the KV cache; None if it is not quantized.
        manifest: nemoquant.json, None where another tool wrote the checkpoint.
        towers: tensors beside the language model, which are not computed with.
        warnings: what a user should know about the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        """Read headers and scalars; what has a manifest is held against it, its shards by their sizes.

        Raises:
            CheckpointError: or a subclass: unreadable, damaged, or not in a layout that can be decoded.
        """
        self.path = path
        self.warnings: list[str] = []
        self.manifest = intact.open_settings(path)
        self.config, self.raw_config = load_config(path)
        if not path.is_dir():
            raise CheckpointError(f"{path} is a config.json; expected the folder with the weights")
        self.table = tensor_table(self.config)
        self.layout = layout_of(path, self.raw_config)
        gemms = [spec.module for spec in self.table if spec.role.removeprefix("mtp.") in GEMM_ROLES]
        declared = self.layout.declared(path, self.raw_config, gemms)
        self.checkpoint = Checkpoint(path)
        if self.manifest is not None:
            intact.check_listed(self.checkpoint, self.manifest)
        self._unused: set[str] = set()
        if not declared:
            self._put_right()
        self.towers = towers(self.config, self.checkpoint.tensors)
        self.stored = self._find_stored()
        self.inputs: dict[str, tuple[FormatName, np.float32]] = {}
        self.weights_only: set[str] = set()
        self._check_declared()
        self._read_inputs(declared)
        self.cache = declared_cache(declared)
        unknown = unknown_cache(declared)
        if unknown is not None:
            raise CheckpointError(
                f"{path}: it declares a KV cache of {unknown}; expected {' or '.join(CACHES.values())}, or "
                f"none"
            )
        self._read_cache_scales()
        self._check_extra()
        self._check_router()

    def _put_right(self) -> None:
        """A checkpoint that is not quantized is taken as ``quantize`` takes it."""
        fitted = put_right(self.path, self.raw_config, self.checkpoint)
        self.raw_config, self.config, self.table = fitted.raw, fitted.config, fitted.table
        self._unused = fitted.unused
        self.warnings += fitted.warnings

    def _check_declared(self) -> None:
        """Engines read one of two config files: they must agree, with each other and with the tensors."""
        gemms = {
            spec.module: self.stored[spec.name].format
            for spec in self.table
            if spec.name in self.stored and spec.role.removeprefix("mtp.") in GEMM_ROLES
        }
        found = self.layout.contradictions(self.path, self.raw_config, gemms)
        if found:
            raise CheckpointError(
                f"{self.path}: its config files contradict each other, or its tensors: {'; '.join(found)}; "
                f"engines would read them in different ways, quantize again"
            )

    def _find_stored(self) -> dict[str, Stored]:
        stored, problems, no_mtp = {}, [], 0
        for spec in self.table:
            try:
                tensor = stored[spec.name] = self.layout.find_stored(self.checkpoint.tensors, spec)
                dtype = self.checkpoint.tensors[next(iter(tensor.parts.values()))].dtype
                if tensor.format == "source" and dtype not in FLOAT_DTYPES:
                    problems.append(f"{spec.name} is {dtype}")
                elif tensor.format != "source" and spec.role.removeprefix("mtp.") not in GEMM_ROLES:
                    problems.append(
                        f"{spec.name} ({spec.role}) is {dtype}, expected a floating dtype: it is no GEMM"
                    )
            except CheckpointError as error:
                if spec.role.startswith("mtp.") and spec.name not in self.checkpoint.tensors:
                    no_mtp += 1
                else:
                    problems.append(str(error))
        if problems:
            raise TensorTableError(
                f"{self.path}: {len(problems)} tensors are not as expected: {listing(problems)}; expected "
                f"{self.layout.expected}"
            )
        if no_mtp:
            self.warnings.append(
                f"it lacks {no_mtp} multi-token-prediction tensors: no acceptance is measured"
            )
        return stored

    @property
    def has_mtp(self) -> bool:
        """Whether the file has the first multi-token-prediction module."""
        return self.config.mtp_modules > 0 and all(
            spec.name in self.stored for spec in self.table if spec.role.startswith("mtp.")
        )

    def scalar(self, name: str) -> np.float32:
        """A per-tensor scale; raises CheckpointError where it is not a positive finite number."""
        stored = self.checkpoint.array(name)
        if stored.size != 1:
            raise CheckpointError(f"{self.path}: {name} has {stored.size:,} values; expected one scale")
        if self.checkpoint.tensors[name].dtype == "BF16":  # mapped as patterns
            stored = (stored.astype(np.uint32) << 16).view(np.float32)
        value = np.float32(stored.reshape(())[()])
        if not (np.isfinite(value) and value > 0):
            raise CheckpointError(
                f"{self.path}: {name} is {value}; expected a positive finite scale, engines would compute NaN"
            )
        return value

    def _scale(self, stored: Stored, kind: str) -> np.float32:
        """A decode scale, one of the parts of a tensor. Raises as :meth:`scalar`."""
        value = self.scalar(stored.parts[kind])
        return np.float32(1) / value if kind in stored.reciprocal else value

    def _read_inputs(self, declared: Mapping[str, Any]) -> None:
        """How inputs are rounded: by their scales in the file, or by the declared algorithm alone."""
        unscaled, others = [], []
        for spec in self.table:
            stored = self.stored.get(spec.name)
            if stored is None:
                continue
            if stored.format == "source":
                listed = listed_algorithm(declared, spec.module)
                if listed is not None and spec.name != spec.module:
                    others.append(f"{spec.module} ({listed}, its weight is not quantized)")
                continue
            layout, algorithm = LAYOUT[stored.format], module_algorithm(declared, spec.module)
            if algorithm not in (None, layout.algorithm, layout.weights_only):
                others.append(f"{spec.module} ({algorithm}, its tensors are {layout.algorithm}'s)")
            self.global_scale(stored)
            if algorithm is not None and algorithm == layout.weights_only:
                self.weights_only.add(spec.module)
            if "input_scale" in stored.parts:
                self.inputs[spec.module] = stored.format, self._scale(stored, "input_scale")
            elif not FORMATS[stored.format].calibrated and algorithm in (None, layout.algorithm):
                self.inputs[spec.module] = stored.format, np.float32(1)
            elif algorithm == layout.algorithm:
                unscaled.append(spec.module)
        whole = declared_algorithm(declared)
        if whole is not None and all(stored.format == "source" for stored in self.stored.values()):
            raise CheckpointError(
                f"{self.path}: it declares {whole} and none of its tensors is quantized; expected quantized "
                f"tensors, or no `quant_algo` in its config files"
            )
        if others:
            raise CheckpointError(
                f"{self.path}: {len(others)} modules are declared as what their tensors are not: "
                f"{listing(others)}; expected the algorithm of their tensors, quantize again"
            )
        if unscaled:
            raise CheckpointError(
                f"{self.path}: {len(unscaled)} modules are declared to have quantized inputs and lack "
                f"`input_scale`: {listing(unscaled)}; "
                "engines read it as zero, calibrate again"
            )

    def global_scale(self, stored: Stored) -> np.float32:
        """The scale of a whole weight; 1.0 where its format has none. Raises as :meth:`scalar`."""
        return self._scale(stored, "global_scale") if "global_scale" in stored.parts else np.float32(1)

    def _read_cache_scales(self) -> None:
        present, missing = 0, 0
        for spec in self.table:
            if spec.role not in ("attention.k_proj", "attention.v_proj"):
                continue
            name = self.layout.kv_scale_name(spec.module)
            stored = name in self.checkpoint.tensors
            present, missing = present + stored, missing + (not stored)
            if self.cache is not None:
                scale = self.scalar(name) if stored else np.float32(1)
                self.inputs[f"{spec.module}{OUTPUT}"] = self.cache.number, scale
        if self.cache is not None and missing:
            self.warnings.append(
                f"its {CACHES[self.cache.name]} KV cache has no scale for {missing} of {present + missing} "
                f"projections: engines take 1.0, as here"
            )
        if present and self.cache is None:
            self.warnings.append(
                f"it has {present} KV cache scales but declares no {' or '.join(CACHES.values())} cache: "
                f"engines ignore them, as here"
            )

    def _check_extra(self) -> None:
        known = {name for stored in self.stored.values() for name in stored.parts.values()} | self._unused
        known |= {
            self.layout.kv_scale_name(s.module)
            for s in self.table
            if s.role in ("attention.k_proj", "attention.v_proj")
        }
        known |= {spec.name for spec in self.towers}
        extra = [name for name in self.checkpoint.tensors if name not in known]
        if extra:
            raise TensorTableError(
                f"{self.path}: {len(extra)} tensors of unknown meaning: {listing(extra)}; they may change "
                f"what an engine computes, expected {self.layout.expected}"
            )

    def _check_router(self) -> None:
        """NaN in the bias of a router would choose experts without a NaN in any output."""
        for spec in self.table:
            name = spec.name
            if spec.role.removeprefix("mtp.") == "router.bias" and name in self.stored:
                values = LayerWeights(self.checkpoint, "")[name]
                bad = int((~values.isfinite()).sum())
                if bad:
                    raise WeightError(
                        f"{self.path}: {bad} of {values.numel()} values of {name} are NaN or Inf; expected "
                        f"finite ones, is it damaged?"
                    )

    def formats(self, module: str) -> tuple[Literal["source", FormatName], FormatName | None]:
        """The format of a module's weight, and that of its input at run time (None: not quantized)."""
        input_format = self.inputs[module][0] if module in self.inputs else None
        return self.stored[f"{module}.weight"].format, input_format

    def weights(self, prefix: str) -> "PackedWeights":
        """The tensors under a prefix, as ``ReferenceModel`` and ``layer_forward`` take them."""
        return PackedWeights(self, prefix)

    def tap(
        self, only: Collection[str] | None = None, record: Callable[[str, Noise], None] | None = None
    ) -> Tap:
        """A tap, by full names, that rounds what an engine rounds.

        Args:
            only: names to round, the others pass unchanged; None rounds all.
            record: called with each name and the noise that the rounding added.
        Returns:
            :func:`identity` where nothing is rounded.
        """
        if not (self.inputs if only is None else self.inputs.keys() & only):
            return identity

        def round_trip(name: str, x: Tensor) -> Tensor:
            rule = self.inputs.get(name)
            if rule is None or (only is not None and name not in only):
                return x
            y, added = fake_quantize(x, *rule)
            if record is not None:
                record(name, added)
            return y

        return round_trip


class PackedWeights(LayerWeights):
    """The tensors under a prefix: floating ones as tensors, quantized ones as :class:`PackedWeight`."""

    def __init__(self, opened: PackedCheckpoint, prefix: str) -> None:
        super().__init__(opened.checkpoint, prefix)
        self.opened = opened

    def __getitem__(self, name: str) -> Tensor:
        stored = self.opened.stored[self.prefix + name]
        return super().__getitem__(name) if stored.format == "source" else cast(Tensor, self.packed(stored))

    def packed(self, stored: Stored) -> PackedWeight:
        """A quantized weight; its codes and block scales are mapped."""
        assert stored.format != "source"
        parts = stored.parts
        codes = self.hold(parts["codes"])
        blocks = self.hold(parts["block_scales"]) if "block_scales" in parts else None
        return PackedWeight(stored.format, Encoded(codes, blocks), self.opened.global_scale(stored))
