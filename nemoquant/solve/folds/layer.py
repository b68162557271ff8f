"""The folds of one layer of the main model: which of its tensors change, and how.

    norm      channels of the layer's norm against the columns of everything that reads it
    gate      channels of Mamba's gated norm against the columns of out_proj
    latent    a matrix between fc1 and the up projections of all routed experts
    expert    rows of an up projection against columns of its down projection, with relu^2 between them

No fold changes what another one looks at: each is made from the unfolded model's moments and weights, and
:func:`compose` puts them together in any order. Tensors of MTP are never touched.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nemoquant.model import names
from nemoquant.model.config import NemotronHConfig
from nemoquant.model.roles import TensorSpec, mixer_table
from nemoquant.solve.folds import choose
from nemoquant.solve.folds.transform import Exponents, Matrix, Transform, exponents_of, widen

Folds: TypeAlias = dict[str, Transform]  # by the tensor's name; others stay as they are
NO_FOLDS: Folds = {}  # never changed
Change: TypeAlias = Callable[[NDArray[Any]], NDArray[Any]]

KINDS = ("norm", "gate", "latent", "expert")
_READERS = (
    "mamba.in_proj",
    "attention.q_proj",
    "attention.k_proj",
    "attention.v_proj",
    "mlp.up_proj",
    "router",
    "shared_experts.up_proj",
)


def _tensors(config: NemotronHConfig, layer: int) -> list[TensorSpec]:
    own, kind = config.of_layer(layer), config.layers[layer]
    return list(mixer_table(own, kind, names.layer(layer) + names.MIXER, layer))


def readers(config: NemotronHConfig, layer: int) -> list[TensorSpec]:
    """The weights whose input is the layer's norm: all of them, the router's too."""
    roles = {*_READERS, "latent.fc1" if config.of_layer(layer).moe_latent_size else "experts.up_proj"}
    return [spec for spec in _tensors(config, layer) if spec.role in roles]


def pairs(config: NemotronHConfig, layer: int) -> dict[str, tuple[TensorSpec, TensorSpec]]:
    """Up and down projection by what they belong to: ``experts.3``, ``shared_experts``, or ``mlp``."""
    found: dict[str, list[TensorSpec]] = {}
    for spec in _tensors(config, layer):
        group, _, projection = spec.role.partition(".")
        if projection in ("up_proj", "down_proj"):
            key = group if spec.expert is None else f"{group}.{spec.expert}"
            found.setdefault(key, []).append(spec)
    return {key: (up, down) for key, (up, down) in found.items()}


def _times(exponents: Exponents, factor: int) -> Exponents:
    return exponents_of(factor * exponents.astype(np.int16))


def norm_transforms(config: NemotronHConfig, layer: int, exponents: Exponents) -> Folds:
    """Channels of the layer's norm times ``2^exponents``, columns of all its readers divided by them.

    Args:
        exponents: int8 [hidden].
    """
    columns = Transform(columns=_times(exponents, -1))
    folds = {spec.name: columns for spec in readers(config, layer)}
    return {f"{names.layer(layer)}norm.weight": Transform(rows=exponents), **folds}


def gate_transforms(config: NemotronHConfig, layer: int, exponents: Exponents) -> Folds:
    """Channels of a Mamba layer's gated norm times ``2^exponents``, out_proj's columns divided by them.

    Args:
        exponents: int8 [mamba_inner].
    """
    changed = {"norm": Transform(rows=exponents), "mamba.out_proj": Transform(columns=_times(exponents, -1))}
    return {spec.name: changed[spec.role] for spec in _tensors(config, layer) if spec.role in changed}


def expert_transforms(config: NemotronHConfig, layer: int, module: str, exponents: Exponents) -> Folds:
    """Rows of an up projection times ``2^e``, columns of its down projection divided by ``2^(2 e)``.

    Args:
        module: a key of :func:`pairs`.
        exponents: int8 [width].
    Raises:
        ValueError: twice an exponent does not fit int8.
    """
    up, down = pairs(config, layer)[module]
    return {up.name: Transform(rows=exponents), down.name: Transform(columns=_times(exponents, -2))}


def latent_transforms(config: NemotronHConfig, layer: int, matrix: Matrix, inverse: Matrix) -> Folds:
    """``fc1' = matrix @ fc1``, and ``up' = up @ inverse`` of every routed expert.

    Args:
        matrix, inverse: float32 [latent, latent], from ``choose.latent_matrix``.
    """
    changed = {"latent.fc1": Transform(left=matrix), "experts.up_proj": Transform(right=inverse)}
    return {spec.name: changed[spec.role] for spec in _tensors(config, layer) if spec.role in changed}


def compose(*several: Mapping[str, Transform]) -> Folds:
    """All folds as one, in this order. Raises ValueError as ``Transform.then``."""
    result: Folds = {}
    for folds in several:
        for name, transform in folds.items():
            result[name] = result[name].then(transform) if name in result else transform
    return result


def layer_folds(
    config: NemotronHConfig,
    layer: int,
    kinds: Collection[str],
    weight: Callable[[str], NDArray[Any]],
    moments: Mapping[str, ArrayLike],
    quantized: Collection[str],
) -> Folds:
    """The folds of a layer that its inputs and weights call for.

    Args:
        kinds: of ``KINDS``, those that may be chosen.
        weight: a tensor by name, uint16 (bf16 patterns), float16 or float32.
        moments: by module, sums over tokens of ``x x'`` [in, in] of its input, or of ``x^2`` [in]. Of the up
            projections of routed experts with a latent size they must be [in, in], and are added up (one
            that is the sum of all does as well). An expert without moments got no token; its own fold is
            left out.
        quantized: names of the tensors that get NVFP4. (FP8 and MXFP8 keep small values next to large ones:
            their tensors gain nothing from a fold.)
    Returns:
        All of them as one. A fold that :meth:`Transform.apply` would refuse is left out, and so is one from
        weights or moments that are not finite.
    """
    result: Folds = {}

    def add(folds: Folds) -> None:
        joint = compose(result, folds)
        # With `right` the result is float32, which holds what bf16 and float16 do; and it would take long.
        if all(joint[name].right is not None or joint[name].exact(weight(name)) for name in folds):
            result.update(joint)

    def balance(specs: Sequence[TensorSpec], build: Callable[[Exponents], Folds], power: int = 1) -> None:
        """Add a fold of the channels that ``specs``, those of them that are quantized, read."""
        seen = [spec.module for spec in specs if spec.module in moments]
        reading = [spec for spec in specs if spec.name in quantized]
        if seen and reading:
            m = np.asarray(moments[seen[0]], np.float64)
            h = m if m.ndim == 1 else np.diag(m)
            g = np.sum([choose.energy(weight(spec.name)) for spec in reading], 0)
            if choose.outliers(h, g, power):
                add(build(choose.channel_exponents(h, g, power)))

    tensors = _tensors(config, layer)
    if "norm" in kinds:
        balance(readers(config, layer), partial(norm_transforms, config, layer))
    if "gate" in kinds and config.layers[layer] == "mamba":
        out = [spec for spec in tensors if spec.role == "mamba.out_proj"]
        balance(out, partial(gate_transforms, config, layer))
    if "expert" in kinds:
        for module, (_, down) in pairs(config, layer).items():
            balance([down], partial(expert_transforms, config, layer, module), power=2)
    ups = [spec for spec in tensors if spec.role == "experts.up_proj"]
    latent = config.of_layer(layer).moe_latent_size
    if "latent" in kinds and latent and any(spec.name in quantized for spec in ups):
        h, g = np.zeros((2, latent, latent))
        for spec in ups:
            if spec.module in moments:
                h += np.asarray(moments[spec.module], np.float64)
            up = _floats(weight(spec.name))
            g += up.T @ up
        if all(m.any() and np.isfinite(m).all() for m in (h, g)):
            add(latent_transforms(config, layer, *choose.latent_matrix(h, g)))
    return result


def _floats(weight: NDArray[Any]) -> NDArray[np.float32]:
    return widen(weight).astype(np.float32)


class InputTransforms:
    """:func:`input_transform` of the modules of some folds: one for all that share a matrix."""

    def __init__(self, folds: Mapping[str, Transform]) -> None:
        self._folds = folds
        self._made: dict[tuple[int, int], Change] = {}

    def of(self, module: str) -> Change:
        fold = self._folds.get(f"{module}.weight", Transform())
        key = id(fold.right), id(fold.columns)
        if key not in self._made:
            self._made[key] = input_transform(self._folds, module)
        return self._made[key]


def input_transform(folds: Mapping[str, Transform], module: str) -> Change:
    """What the input of a module becomes: a function of float32 or float64 [tokens, in], a new array.

    ``x' = (x @ right^-T) * 2^-columns``. It is linear in each row, so with it ``f(f(H).T)`` are the folded
    second moments. All routed experts of a layer share it: see :class:`InputTransforms`.
    """
    transform = folds.get(f"{module}.weight", Transform())
    right = transform.right
    matrix = None if right is None else np.linalg.inv(right.astype(np.float64)).T
    columns = np.int32(0) if transform.columns is None else transform.columns.astype(np.int32)

    def changed(x: NDArray[Any]) -> NDArray[Any]:
        moved = x if matrix is None else x.astype(np.float64) @ matrix
        return np.ldexp(moved, -columns).astype(x.dtype)

    return changed
