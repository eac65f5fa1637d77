"""Files that are written whole or not at all, with errors that name them in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of ``path`` once the block has ended without error.

    Until then a file of that name stays as it is, also when the machine loses power: the content
    is on the disk before the name.

    Yields:
        a path beside ``path``, with its suffix.

    Raises:
        UserError: when it cannot be written.
    """
    temporary = path.with_name(f"unfinished-{path.name}")
    try:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}") from None
    finally:
        # A folder that became read-only keeps the fragment, which nobody reads.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """Write ``path`` as :func:`replacing` does; raises UserError."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: object) -> None:
    """Write ``content`` as JSON; raises UserError."""
    write(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """What :func:`write_json` wrote; raises UserError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is damaged; delete it to make it anew") from None


def make_folder(path: Path) -> None:
    """Make a folder, and those that it lies in, where they are missing; raises UserError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}") from None
