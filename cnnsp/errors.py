"""The one exception that the scripts turn into a message."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NO_MEMORY = re.compile("out of memory|DefaultCPUAllocator")


class UserError(Exception):
    """Something the user can put right. Its text is one line and names the culprit."""


def lacks_memory(error: Exception) -> bool:
    """Whether it says that memory is used up; of a CPU's PyTorch has no error of its own."""
    return isinstance(error, MemoryError) or bool(_NO_MEMORY.search(str(error)))


def raise_all(reasons: Sequence[str], most: int = 20) -> None:
    """Raise one UserError of all ``reasons``, if there are any, so that one start shows them."""
    if reasons:
        more = [f"and {len(reasons) - most:,} more"] if len(reasons) > most else []
        raise UserError("; ".join([*reasons[:most], *more]))
