"""The one exception that the scripts turn into a message."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from unicodedata import normalize


class UserError(Exception):
    """Something the user can put right. Its text is one line and names the culprit."""


def distinctly(names: Collection[str]) -> Callable[[str], str]:
    """How to show them: of two in one look, an é or an e and its accent, escapes tell which."""
    return repr if len({normalize("NFC", name) for name in names}) == len(names) else ascii


def quoted(*words: str | Path) -> str:
    """For a command line: where one needs quotes, in those that every shell takes off."""
    return " ".join(w if shlex.quote(w) == w else f'"{w}"' for w in map(str, words))


def lacks_memory(error: Exception) -> bool:
    """Whether it says that memory is used up; of a CPU's PyTorch has no error of its own."""
    said = re.search("out of memory|DefaultCPUAllocator", str(error))
    return said is not None or isinstance(error, MemoryError)


def raise_all(reasons: Sequence[str], most: int = 20) -> None:
    """Raise one UserError of all ``reasons``, if there are any, so that one start shows them."""
    if reasons:
        more = [f"and {len(reasons) - most:,} more"] if len(reasons) > most else []
        raise UserError("; ".join([*reasons[:most], *more]))
