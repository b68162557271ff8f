"""Work in the background: a thread, a short queue, and the first error raised to the next caller."""

import queue
import threading
from collections.abc import Callable

DEPTH = 8  # pieces of a few megabytes that may wait


class Background:
    """Runs the functions it is given, one after the other, in its own thread.

    ``put`` waits while ``depth`` functions are in the queue. After an error no more of them are run, and
    ``put`` and ``check`` raise it.
    """

    def __init__(self, name: str, depth: int = DEPTH) -> None:
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._cancelled = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], None]) -> None:
        self.check()
        self._queue.put(work)

    def check(self) -> None:
        """Raise the error, if there was one."""
        if self._error is not None:
            raise self._error

    def end(self, *, cancel: bool = False) -> None:
        """Wait until all work is done, or with ``cancel`` only the current piece, and end the thread.

        Raises nothing; see ``check``.
        """
        self._cancelled = cancel
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            if self._error is None and not self._cancelled:
                try:
                    work()
                except BaseException as error:  # of any kind: it is raised to the caller
                    self._error = error
