"""Ctrl-C and SIGTERM: the first asks to stop after the step, the second stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType


class Interrupted(Exception):
    """Training stopped because a signal asked for it, after a checkpoint was written."""


class Aborted(BaseException):
    """A second signal: stop at once, whatever is lost."""


class Interruption:
    """Remembers that a signal came.

    Args:
        echo: Seconds in which another signal counts as the same: a launcher passes on what the terminal has sent to
            its processes already.
    """

    def __init__(self, echo: float = 0.0) -> None:
        self.signum: int | None = None
        self._echo, self._came = echo, 0.0

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.signum is not None

    @property
    def exit_status(self) -> int:
        """What a shell expects of a process that a signal ended."""
        return 128 + (self.signum or signal.SIGINT)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.requested:
            if time.monotonic() - self._came < self._echo:
                return
            raise Aborted
        self.signum, self._came = signum, time.monotonic()
        # past the buffered streams, which a handler may have interrupted in the middle of a write
        os.write(2, b"\nstopping after this step and saving; once more to stop at once\n")

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Handles SIGINT and SIGTERM while inside; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {signum: signal.signal(signum, self.handle) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
