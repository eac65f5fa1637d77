"""What the command lines of the scripts share."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .errors import UserError, lacks_memory
from .interruption import Interrupted, handled


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, but not those that only mean "not given"; leaves examples as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, (list, tuple)):
            return f"{action.help} (default: {' '.join(action.default)})"
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """A parser that shows defaults and examples in ``--help`` and errors in one line."""

    def __init__(
        self, prog: str, description: str | None, examples: str = "", add_help: bool = True
    ) -> None:
        epilog = f"examples:\n{examples}" if examples else None
        options: Any = {"formatter_class": _Formatter, "allow_abbrev": False, "add_help": add_help}
        super().__init__(prog, None, description, epilog, **options)

    def add_common(self, *names: str) -> None:
        """Options of :data:`COMMON`."""
        for name in names:
            self.add_argument(*name.split(), **COMMON[name])

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(
    kind: type[int] | type[float], least: float, *, exclusive: bool = False, most: float = 10**15
) -> Callable[[str], float]:
    """An argument type: a ``kind``, at least ``least`` or above it, at most ``most``."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            what = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}") from None
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {text}")
        if not value >= least or (exclusive and value == least):  # NaN, too, is refused
            bound = f"above {least}" if exclusive else f"at least {least}"
            raise argparse.ArgumentTypeError(f"must be {bound}, got {text}")
        return value

    return parse


def expanded(text: str) -> Path:
    """An argument type: a path, whose ~ not every shell replaces, nor any after an =."""
    return Path(text).expanduser()


# Options that several scripts have, by their names.
COMMON: dict[str, dict[str, Any]] = {
    "checkpoint": {
        "type": expanded,
        "help": "a best.pt or last.pt, or the folder of a run, for its last.pt",
    },
    "--json": {"action": "store_true", "help": "print JSON instead of text"},
    "--device": {"help": "cuda, cuda:1, cpu …; when not given: cuda if there is one"},
    "-b --batch-size": {"type": number(int, 1), "default": 64, "help": "images at once"},
    "-j --workers": {"type": number(int, 1), "default": 4, "help": "threads that decode images"},
}


def exit_status(prog: str, work: Callable[..., None], *arguments: Sequence[str]) -> int:
    """Do ``work``, as a rule with a command line; 0, or another status after one line on stderr.

    The status is 2 when the user has to put something right, and 128 more than the signal that
    asked for an end: 130 for Ctrl-C, 143 for SIGTERM, 141 when nobody reads the output any more.
    """
    # A notebook's, which only a notebook can import. No figure here is shown.
    os.environ["MPLBACKEND"] = "agg"
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  where it was closed
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A Windows code page lacks characters that names of files and classes may have.
        sys.stdout.reconfigure(errors="backslashreplace")
    status, message, before = 0, "", threading.excepthook
    # Of a full disk and of a reader that is gone this thread learns by itself.
    threading.excepthook = lambda args: isinstance(args.exc_value, OSError) or before(args)
    try:
        work(*arguments)
        print(end="", flush=True)
    except UserError as error:
        status, message = 2, f"error: {error}"
    except Interrupted as interruption:
        status, message = 128 + interruption.signal, str(interruption)
    except SystemExit as stop:
        status = int(stop.code or 0)
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    except BrokenPipeError:  # as `| head` leaves it
        status, message = 141, ""
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        status, message = 2, "error: out of memory; a smaller --batch-size takes less"
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        what = "write the output" if error.filename is None else f"use {error.filename}"
        status, message = 2, f"error: cannot {what}: {error.strerror}"
    finally:
        threading.excepthook = before
        try:
            print(end="", flush=True)
        except OSError:  # what is in the buffer would raise it again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if message:
        with contextlib.suppress(OSError):  # a terminal that is gone
            print(f"{prog}: {printable(message)}", file=sys.stderr)
    return status


def is_launched() -> bool:
    """Whether ``torchrun`` started this process."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()


@contextlib.contextmanager
def importing(prog: str, extra: str = "train") -> Iterator[None]:
    """Within this context Ctrl-C ends the process at once, in one line.

    As an exception it would reach libraries in the middle of their imports, which answer with
    tracebacks of their own. Of a package that is missing, this says which ``extra`` has it.
    """

    def end(*_: object) -> None:
        os.write(2, f"{prog}: interrupted\n".encode())
        os._exit(130)

    try:
        with handled(end, signal.SIGINT):
            yield
    except ModuleNotFoundError as error:
        # In double quotes, which every shell takes off, that of Windows too.
        raise UserError(f'{error}: pip install -e ".[{extra}]"') from None


@contextlib.contextmanager
def patience(message: str, seconds: float = 3.0) -> Iterator[None]:
    """Say ``message`` if the block takes longer."""
    timer = threading.Timer(seconds, print, [message], {"flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def align(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """A table as lines: its first ``left`` columns to the left, the others to the right."""
    from tabulate import tabulate  # with wcwidth, which knows the width of Chinese names

    sides = ["left" if place < left else "right" for place in range(len(rows[0]))]
    text = tabulate(rows, tablefmt="plain", colalign=sides, disable_numparse=True)
    return [line.rstrip() for line in text.splitlines()]


def printable(text: str) -> str:
    """``text`` in one line, with escapes for what a terminal would not show."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
