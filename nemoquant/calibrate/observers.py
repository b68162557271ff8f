"""Observers of the reference model's taps: maxima of magnitudes, and how many tokens each expert got."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

_EXPERT = re.compile(r"\.experts\.(\d+)\.up_proj$")


class AmaxObserver:
    """A tap that keeps max |x| of each module's input, in float32, and counts the rows of experts' inputs.

    Maxima stay on the device until :meth:`collect`: reading them one by one would wait for the device each time.
    """

    def __init__(self) -> None:
        self._amax: dict[str, Tensor] = {}
        self.tokens: dict[int, int] = {}

    def tap(self) -> Callable[[str, Tensor], Tensor]:
        return self._observe

    def _observe(self, name: str, x: Tensor) -> Tensor:
        low, high = torch.aminmax(x)
        amax = torch.maximum(-low, high)
        seen = self._amax.get(name)
        self._amax[name] = amax if seen is None else torch.maximum(seen, amax)
        expert = _EXPERT.search(name)
        if expert:
            self.tokens[int(expert[1])] = self.tokens.get(int(expert[1]), 0) + x.shape[0]
        return x

    def collect(self) -> dict[str, float]:
        """Module name -> amax, then forget."""
        names = list(self._amax)
        values = torch.stack([self._amax[n].float() for n in names]).tolist() if names else []
        self._amax.clear()
        return dict(zip(names, values, strict=True))
