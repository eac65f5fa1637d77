"""The one exception that the scripts turn into a message."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right. Its text is one line and names the culprit."""
