"""What a TensorRT says while it works, kept."""

from typing import Any

IGNORED = ("cudaError 35",)  # no driver: a builder without a GPU says so once for each layer, and builds


def logger(trt: Any) -> Any:
    """A logger of the module ``trt`` that keeps ``errors`` and ``warnings``; the complaint that there is no GPU is neither."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: set[str] = set()

        def log(self, severity: Any, message: str) -> None:
            if any(text in message for text in IGNORED):
                return
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                self.warnings.add(message.split("] ", 1)[-1])

        def text(self) -> str:
            return "; ".join(self.errors[:3])[:1500] or "it gives no reason"

    return Logger()
