"""Checkpoints: written whole or not at all, read without running code from the file."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

from .. import files
from ..errors import UserError, distinctly

FORMAT = 2
_KEYS = {"model", "average", "pooling", "classes", "options", "progress", "items"}
_KEYS |= {"format", "optimizer", "scaler"}


def save(state: dict[str, Any], path: Path) -> None:
    """Write ``state`` as :func:`cnnsp.files.replacing` does; raises UserError."""
    import torch

    try:
        # By way of memory, for PyTorch has no word for a disk that is full.
        content = io.BytesIO()
        torch.save(state, content)
        files.write(path, content.getbuffer())
    except UserError as error:
        kept = "; the one before it is intact" if path.exists() else ""
        raise UserError(f"{error}{kept}") from None


def find(path: Path) -> Path:
    """The checkpoint of that name, or the last.pt of a run's folder; raises UserError."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"checkpoint {path} does not exist")
    if not (path / "last.pt").is_file():
        other = f", but {path / 'best.pt'}: name that" if (path / "best.pt").is_file() else ""
        raise UserError(f"folder {path} holds no last.pt{other or ': it is no run that saved'}")
    return path / "last.pt"


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint that :func:`save` wrote, its tensors on the CPU.

    Raises:
        UserError: when the file is missing, damaged or no checkpoint of ``train.py``.
    """
    import torch

    path = find(Path(path))
    try:
        # torch.load takes the tensors as they are; the archive's checksums tell a flipped bit.
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror}") from None
    except Exception:  # what a changed byte can lead to in the archive, the pickle or PyTorch
        raise UserError(f"checkpoint {path} is damaged, or no PyTorch file") from None
    known = isinstance(state, dict) and "format" in state
    if known and state["format"] != FORMAT:
        raise UserError(f"checkpoint {path} has format {state['format']}; this is format {FORMAT}")
    if not known or not state.keys() >= _KEYS:
        raise UserError(f"{path} is no checkpoint that train.py wrote")
    return state


def check_classes(state: dict[str, Any], path: str | Path, classes: tuple[str, ...]) -> None:
    """Check that a network for these classes was trained; raises UserError."""
    theirs = tuple(state["classes"])
    if theirs != classes:
        show = distinctly({*theirs, *classes})
        lacking, more = (
            ", ".join(map(show, sorted(group))) or "none"
            for group in ({*theirs} - {*classes}, {*classes} - {*theirs})
        )
        raise UserError(
            f"the data have other classes than checkpoint {path}: without {lacking}, with {more}"
        )
