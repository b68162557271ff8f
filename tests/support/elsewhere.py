"""A simulated device: its tensors refuse to meet tensors of the CPU, as a GPU's would.

Each holds a tensor of the CPU, on which its operators really compute. Data move only by ``to``, ``cpu`` and
``copy_``; single numbers may be read, but no array may be made from a tensor. The device has the name
``meta``, the only one for which torch needs no driver.
"""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ELSEWHERE = torch.device("meta")
_CPU = torch.device("cpu")
_COPY = torch.ops.aten.copy_.default
_MOVES = (_COPY, torch.ops.aten._to_copy.default)


class There(torch.Tensor):
    """A tensor on the simulated device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls: type["There"], inner: torch.Tensor) -> "There":
        made: There = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=ELSEWHERE,
        )
        made.inner = inner
        return made

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of Elsewhere()")


class Elsewhere(TorchDispatchMode):
    """The device exists while this mode is entered.

    Attributes:
        here, there: how often each operator (``mm``, ``add``) ran on the CPU and on the device.
        changed: how often a tensor got another dtype on its way to the device; torch does that before it
        crosses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.here: Counter[str] = Counter()
        self.there: Counter[str] = Counter()
        self.changed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        there = [t for t in given if isinstance(t, There)]
        alien = [t for t in given if not isinstance(t, There) and t.dim()]  # a number may be on any device
        if there and alien and func not in _MOVES:
            raise AssertionError(f"{func}: {len(there)} tensors of the device meet {len(alien)} of the CPU")
        asked = kwargs.get("device")
        if asked is not None:
            on_device = asked == ELSEWHERE
            kwargs["device"] = _CPU
        else:
            on_device = isinstance(args[0], There) if func is _COPY else bool(there)
        if func in _MOVES and on_device and alien:
            self.changed += kwargs.get("dtype", args[0].dtype) != alien[0].dtype
        (self.there if on_device else self.here)[func.overloadpacket.__name__] += 1
        plain_args, plain_kwargs = tree_map_only(There, lambda t: t.inner, (args, kwargs))
        found = func(*plain_args, **plain_kwargs)
        if not on_device:
            return found
        known = {id(t.inner): t for t in there}  # an operator that works in place returns its own argument
        return tree_map_only(torch.Tensor, lambda t: known[id(t)] if id(t) in known else There(t), found)
