"""Files that are written whole or not at all, with errors that name them in one line."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from .errors import UserError
from .interruption import ENDS, end, handled

if sys.platform != "win32":
    import fcntl


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
        for _ in range(10):  # for a second: Windows refuses while another program reads the file
            with suppress(PermissionError):
                os.replace(temporary, path)
                break
            time.sleep(0.1)
        else:
            os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        # A folder that became read-only keeps the fragment, which nobody reads.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write(path: Path, content: bytes | memoryview) -> None:
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


@contextmanager
def claimed(folder: Path, *, rename: bool = False) -> Iterator[Path]:
    """A folder that no other process writes to: made, or locked if it is there.

    Where nothing was written to it, it is gone afterwards, also when SIGTERM ends the work.

    Args:
        folder: its name.
        rename: whether to take ``folder-2``, ``folder-3`` and so on where that exists.

    Raises:
        UserError: when another process has claimed it, or it cannot be made.
    """
    # On Windows there may be none: a drive that is not there.
    above = next((p for p in (folder, *folder.parents) if p.exists()), Path(folder.anchor))
    if not above.is_dir():
        raise UserError(f"output folder {folder}: {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"output folder {folder}: {above} is not writable")
    wanted, numbers, made = folder, count(2), []
    try:
        # Only what is missing: systems differ in what they say to the making of a root.
        for path in (p for p in (*reversed(folder.parents), folder) if not p.exists()):
            with suppress(FileExistsError):
                path.mkdir()
                made.append(path)
        while rename and folder not in made:
            folder = wanted.with_name(f"{wanted.name}-{next(numbers)}")
            with suppress(FileExistsError):
                folder.mkdir()
                made.append(folder)
        lock = _lock(folder)
    except OSError as error:
        raise UserError(f"output folder {folder}: {error.strerror}") from None
    try:
        with handled(end, *ENDS):
            yield folder
    finally:
        if lock is not None:
            os.close(lock)
        for path in reversed(made):
            with suppress(OSError):  # it is not empty
                path.rmdir()


def _lock(folder: Path) -> int | None:
    """A lock on a folder, which ends with the process at the latest; None where there are none."""
    try:
        if sys.platform == "win32":
            return os.open(folder / ".running", os.O_CREAT | os.O_EXCL | os.O_TEMPORARY)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise
            return None  # a file system without locks
        return descriptor
    except (FileExistsError, BlockingIOError):
        # Windows deletes the file with the process, but not when the machine goes down.
        left = "; if none is, delete its .running" if sys.platform == "win32" else ""
        raise UserError(
            f"another run is writing to {folder}: choose another folder{left}"
        ) from None
