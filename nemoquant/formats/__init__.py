"""Number formats: what a plan needs to know of each, without arrays.

Their arithmetic is in the modules of the same names, each behind one object (see ``arithmetic.py``); the
tables of both have the same names, and so has every table by format in other rooms.

    fp8    E4M3 codes in the weight's own shape, one fp32 scale
    mxfp8  E4M3 codes; an E8M0 scale, a power of two, for each 32 of the input dimension
    nvfp4  E2M1 codes, two per byte; an E4M3 scale for each 16 of the input dimension; one fp32 scale

Importing this package loads neither numpy nor numba.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

FormatName = Literal["fp8", "mxfp8", "nvfp4"]
CacheName = Literal["fp8"]
ScaleMethod = Literal["max", "mse", "four_over_six"]  # codes that follow from the weight alone
SolvedMethod = Literal["hess", "gptq"]  # codes that also depend on the GEMM's inputs: the room `solve`
Method = Literal[ScaleMethod, SolvedMethod]
SOLVED: tuple[SolvedMethod, ...] = get_args(SolvedMethod)
METHODS: tuple[Method, ...] = (*get_args(ScaleMethod), *SOLVED)
PartKind = Literal["codes", "block_scales", "global_scale"]
Device = Literal["cpu", "cuda"]
DEVICES: tuple[Device, ...] = get_args(Device)


class PackedTensor(NamedTuple):
    """One tensor of a packed weight: its kind, its safetensors dtype, its shape (a scalar is ``()``)."""

    kind: PartKind
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Format:
    """A number format for weights and for the inputs of their GEMMs.

    Attributes:
        title: for people, as in a model card.
        weight_bits: bits of one code, without scales.
        block: number of inputs that share a block scale; None without block scales.
        code_dtype: safetensors dtype of the codes.
        scale_dtype: that of the block scales; None without block scales.
        global_scale: whether one fp32 scale multiplies the whole tensor.
        methods: how block scales can be chosen from the weight alone, the default first.
        solved: how codes can be solved for, with the inputs of the GEMM.
        plain: the method that solved codes are held against, and that a weight gets whose inputs nobody saw.
        calibrated: whether inputs need a scale from calibration; else theirs follow from the input at run
            time.
        weights_only: whether engines take weights of this format with inputs that are not quantized.
    """

    name: FormatName
    title: str
    weight_bits: int
    block: int | None
    code_dtype: str
    scale_dtype: str | None
    global_scale: bool
    methods: tuple[ScaleMethod, ...]
    solved: tuple[SolvedMethod, ...]
    plain: ScaleMethod
    calibrated: bool
    weights_only: bool

    @property
    def input_headroom(self) -> bool:
        """Whether a recipe's ``headroom`` multiplies the calibrated scales of inputs.

        Only where blocks have scales below a calibrated one: these take it up in their exponent.
        """
        return self.calibrated and self.block is not None

    @property
    def short(self) -> str:
        """The name for people: ``FP8``."""
        return self.name.upper()

    def indivisible(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape, which should be [out, in], cannot have this format; None if it can."""
        if len(shape) != 2 or min(shape) < 1:
            return f"shape {list(shape)} is not [out, in]"
        if self.block is not None and shape[1] % self.block:
            return f"input dimension {shape[1]} is not a multiple of {self.name}'s block of {self.block}"
        return None

    def checked_method(self, method: str) -> ScaleMethod:
        """The method, if it is one of ``methods``; raises ValueError otherwise."""
        for known in self.methods:
            if known == method:
                return known
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(self.methods)}")

    def alone(self, method: Method) -> ScaleMethod:
        """The method that needs the weight alone: ``method`` itself, or ``plain`` for one that is solved."""
        return self.plain if method in SOLVED else self.checked_method(method)

    def nearest(self, method: Method) -> Method:
        """The method, if this format has it, else the one that comes nearest.

        Formats without block scales have nothing that ``mse`` or ``hess`` could choose.
        """
        return method if method in (*self.methods, *self.solved) else self.plain

    def packed_tensors(self, shape: tuple[int, int]) -> tuple[PackedTensor, ...]:
        """The tensors that a weight [out, in] becomes, in the order in which they are written.

        Raises ValueError if the shape is ``indivisible``.
        """
        problem = self.indivisible(shape)
        if problem is not None:
            raise ValueError(f"format {self.name}: {problem}")
        rows, columns = shape
        tensors = [PackedTensor("codes", self.code_dtype, (rows, columns * self.weight_bits // 8))]
        if self.block is not None and self.scale_dtype is not None:
            tensors.append(PackedTensor("block_scales", self.scale_dtype, (rows, columns // self.block)))
        if self.global_scale:
            tensors.append(PackedTensor("global_scale", "F32", ()))
        return tuple(tensors)


FORMATS: Mapping[FormatName, Format] = MappingProxyType(
    {
        "fp8": Format(
            "fp8",
            title="FP8 (E4M3, one scale a tensor)",
            weight_bits=8,
            block=None,
            code_dtype="F8_E4M3",
            scale_dtype=None,
            global_scale=True,
            methods=("max",),
            solved=("gptq",),
            plain="max",
            calibrated=True,
            weights_only=True,
        ),
        "mxfp8": Format(
            "mxfp8",
            title="MXFP8 (E4M3, a power-of-two scale for each 32 values)",
            weight_bits=8,
            block=32,
            code_dtype="F8_E4M3",
            scale_dtype="U8",
            global_scale=False,
            methods=("max",),
            solved=("gptq",),
            plain="max",
            calibrated=False,
            weights_only=False,
        ),
        "nvfp4": Format(
            "nvfp4",
            title="NVFP4 (E2M1, a scale for each 16 values)",
            weight_bits=4,
            block=16,
            code_dtype="U8",
            scale_dtype="F8_E4M3",
            global_scale=True,
            methods=("max", "mse", "four_over_six"),
            solved=("hess", "gptq"),
            plain="mse",
            calibrated=True,
            weights_only=True,
        ),
    }
)


@dataclass(frozen=True)
class CacheFormat:
    """A format of the KV cache: keys and values, each tensor with its calibrated scale.

    Attributes:
        number: the number format of an element; its arithmetic makes the scale and rounds.
        bits: of an element.
    """

    name: CacheName
    number: FormatName
    bits: int


CACHE_FORMATS: Mapping[CacheName, CacheFormat] = MappingProxyType({"fp8": CacheFormat("fp8", "fp8", bits=8)})
