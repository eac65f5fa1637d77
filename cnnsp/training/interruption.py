"""Ctrl-C and SIGTERM as a request to stop at the next good moment."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(Exception):  # noqa: N818  it is no error
    """A run stopped because a signal asked for it, its work saved.

    Attributes:
        signal: the signal's number; the exit status is 128 more.
    """

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal_number


class Requests:
    """Within this context SIGINT and SIGTERM set :attr:`signal` and interrupt nothing.

    A second Ctrl-C raises KeyboardInterrupt, for those who cannot wait. Outside the main thread,
    where Python allows no signal handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Requests:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
