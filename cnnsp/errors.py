"""The one exception that the scripts turn into a message."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Something the user can put right. Its text is one line and names the culprit."""


def raise_all(reasons: Sequence[str], most: int = 20) -> None:
    """Raise one UserError of all ``reasons``, if there are any, so that one start shows them."""
    if reasons:
        more = [f"and {len(reasons) - most:,} more"] if len(reasons) > most else []
        raise UserError("; ".join([*reasons[:most], *more]))
