"""Taps: functions through which the input of every matrix product of the reference model passes.

A tap is called with a module's name and the input of its product, and returns the tensor that is multiplied
instead. An observer returns its argument, a fake quantizer a rounded tensor; for the model there is no
difference. Names are those of the checkpoint's modules: relative to the mixer inside a block (``in_proj``),
to the layer in ``layer_forward`` (``mixer.in_proj``), and full in ``ReferenceModel``
(``backbone.layers.3.mixer.in_proj``). Besides the products, there are ``k_proj.output`` and
``v_proj.output``, keys and values as they enter the cache, and ``gate``, the router's input.

A tap must return the shape, dtype and device of its argument. It may keep the argument, but must not change
it in place: q, k and v (and the router, the shared expert and fc1) get the same tensor one after the other.
"""

import threading
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Tap = Callable[[str, Tensor], Tensor]
Weights = Mapping[str, Tensor]

PAD_ROWS = 16
# A weight in another dtype than the compute dtype is converted in slices of at most this size.
CAST_ELEMENTS = 1 << 24


def identity(name: str, x: Tensor) -> Tensor:  # noqa: ARG001
    """The tap that changes nothing."""
    return x


def prefixed(tap: Tap | None, prefix: str) -> Tap:
    """A tap for the modules under ``prefix``, which calls ``tap`` with ``prefix`` before their names."""
    if tap is None or tap is identity:
        return identity
    outer = tap
    return lambda name, x: outer(prefix + name, x)


class Scope(Mapping[str, Tensor]):
    """The weights under ``prefix``, by their names without it.

    Each is looked up on demand: nothing is copied, and nothing is read early.
    """

    def __init__(self, weights: Weights, prefix: str) -> None:
        self.weights, self.prefix = weights, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[self.prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self.prefix) for name in self.weights if name.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def linear(name: str, x: Tensor, weights: Weights, tap: Tap) -> Tensor:
    """``tap(x) @ weights[name + ".weight"].T`` in the dtype and on the device of ``x``.

    Args:
        x: [tokens, in].
        weights: holds [out, in] of any floating dtype; converted here in slices of rows that are dropped.
    Returns:
        [tokens, out], dtype of ``x``.
    """
    return product(tap(name, x), weights[name + ".weight"])


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``: [tokens, in] times [out, in], in the dtype and on the device of ``x``.

    In bfloat16 on a CPU the tokens are padded with zeros to a multiple of ``PAD_ROWS``. Without padding a
    kernel would be compiled for each new number of rows, which takes longer than the product itself where
    each expert gets another number of tokens.
    """
    count = x.shape[0]
    if (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.dim() == 2
        and count > PAD_ROWS
        and count % PAD_ROWS
    ):
        return _product(F.pad(x, (0, 0, 0, -count % PAD_ROWS)), weight)[:count]
    return _product(x, weight)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    if weight.dtype == x.dtype and weight.device == x.device:
        return F.linear(x, weight)
    rows = max(1, CAST_ELEMENTS // weight.shape[1])
    if weight.shape[0] <= rows:
        return F.linear(x, _converted(weight, x))
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    for start in range(0, weight.shape[0], rows):
        y[..., start : start + rows] = F.linear(x, _converted(weight[start : start + rows], x))
    return y


_scratch = threading.local()


def _converted(weight: Tensor, x: Tensor) -> Tensor:
    """``weight`` in the dtype and on the device of ``x``.

    On a CPU it is in this thread's scratch memory, which the next call overwrites. (Fresh memory for one
    expert after the other fragments the heap: up to half a gigabyte stayed allocated, measured.)
    """
    if not isinstance(weight, Tensor):  # a packed weight decodes itself
        return weight.to(x)
    if x.device.type != "cpu":
        # Copied in its own dtype and widened on the device: in one step torch would widen it before the copy.
        return weight.to(x.device).to(x.dtype)
    buffer: Tensor | None = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.dtype != x.dtype or buffer.numel() < weight.numel():
        buffer = _scratch.buffer = torch.empty(weight.numel(), dtype=x.dtype)
    return buffer[: weight.numel()].view(weight.shape).copy_(weight)


def squared_relu(x: Tensor) -> Tensor:
    """``relu(x)^2``, the activation of this family's experts and MLPs; ``x`` is overwritten."""
    return torch.relu_(x).square_()
