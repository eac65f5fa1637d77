"""What the command lines of the scripts share."""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from .errors import UserError
from .interruption import Interrupted


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not those that only mean "not given"."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """A parser that shows defaults in ``--help`` and reports an error in one line."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(
            prog=prog, description=description, formatter_class=_Formatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(
    kind: type[int] | type[float],
    least: float,
    *,
    exclusive: bool = False,
    most: float = math.inf,
) -> Callable[[str], float]:
    """An argument type: a finite ``kind``, at least ``least`` or above it, at most ``most``."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            what = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}") from None
        if not math.isfinite(value) or value < least or (exclusive and value == least):
            bound = f"above {least}" if exclusive else f"at least {least}"
            raise argparse.ArgumentTypeError(f"must be {bound}, got {text}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {text}")
        return value

    return parse


def exit_status(prog: str, work: Callable[[], None]) -> int:
    """Do ``work``; 0, or another status after one line on stderr.

    The status is 2 when the user has to put something right, and 128 more than the signal that
    asked for an end: 130 for Ctrl-C, 143 for SIGTERM.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A Windows code page lacks characters that names of files and classes may have.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        work()
    except UserError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except Interrupted as interruption:
        print(f"{prog}: {interruption}", file=sys.stderr)
        return 128 + interruption.signal
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    return 0


def align(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """A table as lines: its first ``left`` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def printable(text: str) -> str:
    """``text`` in one line, with escapes for what a terminal would not show."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
