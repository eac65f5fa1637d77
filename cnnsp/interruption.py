"""Ctrl-C, SIGTERM and a terminal that closes as a request to stop at the next good moment."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

# Of those that end a process, the two that are no Ctrl-C. Windows has no SIGHUP.
ENDS = {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}


class Interrupted(BaseException):  # not to be taken for the error of a file under way
    """A run stopped because a signal asked for it, its work saved; the exit status is 128 more."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal_number


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    """Within this context ``handler`` gets these signals, but for those that are ignored.

    Outside the main thread, where Python allows no signal handlers, it does nothing.
    """
    before = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                if signal.getsignal(number) != signal.SIG_IGN:
                    before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def end(number: int, frame: FrameType | None) -> None:
    """Handles a signal by an exception, which cleans up as it passes."""
    raise Interrupted(number, signal.Signals(number).name)


class Asked(BaseException):  # which those who try again with less, as numba's cache, let pass
    """A signal came where the work can be left at once, see :meth:`Requests.at_once`."""


class Requests:
    """Within this context SIGINT, SIGTERM and SIGHUP set :attr:`signal`, and say they were heard.

    One that was ignored, as by ``nohup``, still is. A second Ctrl-C raises KeyboardInterrupt, for
    those who cannot wait. ``promise`` is said to come next.
    """

    def __init__(self, promise: str) -> None:
        self.signal: int | None = None
        self._promise, self._at_once = promise, False
        self._handled = handled(self._request, signal.SIGINT, *ENDS)

    def __enter__(self) -> Requests:
        self._handled.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._handled.__exit__(None, None, None)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within this context a request raises :class:`Asked`, rather than to wait for a look."""
        self._at_once = True
        try:
            if self.signal is not None:
                raise Asked
            yield
        finally:
            self._at_once = False

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.signal = self.signal is None, number
        if first:
            again = "; Ctrl-C again ends it without" if number == signal.SIGINT else ""
            with contextlib.suppress(OSError, RuntimeError):  # the signal came in another print
                print(
                    f"\n{signal.Signals(number).name}: {self._promise}{again}",
                    file=sys.stderr,
                    flush=True,
                )
        if self._at_once:
            self._at_once = False
            raise Asked
