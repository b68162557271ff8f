"""Collects the messages that a TensorRT logs while it works."""

from functools import cache
from typing import Any

IGNORED = ("cudaError 35",)  # no driver: a builder without a GPU logs it once for each layer, and builds


def logger(trt: Any) -> Any:
    """The logger of the module ``trt``, cleared; it keeps ``errors`` and ``warnings``.

    The message that there is no GPU is neither. There is one logger a process: TensorRT keeps to the first
    one that it is given for as long as anything made with it lives, and messages to a second one would be
    lost.
    """
    log = _logger(trt.ILogger)
    log.errors.clear()
    log.warnings.clear()
    return log


@cache
def _logger(base: Any) -> Any:
    class Logger(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: set[str] = set()

        def log(self, severity: Any, message: str) -> None:
            if any(text in message for text in IGNORED):
                return
            if severity <= base.ERROR:
                self.errors.append(message)
            elif severity == base.WARNING:
                self.warnings.add(message.split("] ", 1)[-1])

        def text(self) -> str:
            return "; ".join(self.errors[:3])[:1500] or "it gives no reason"

    return Logger()
