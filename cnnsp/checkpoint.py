"""Checkpoints: written whole or not at all, read without running code from the file."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from .errors import UserError

FORMAT = 1
_KEYS = {
    "format",
    "model",
    "pooling",
    "classes",
    "options",
    "progress",
    "items",
    "optimizer",
    "scaler",
    "random",
}


def save(state: dict[str, Any], path: Path) -> None:
    """Write ``state`` to ``path``; a file of that name stays intact until the new one is whole.

    Raises:
        UserError: when it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}") from None


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint that :func:`save` wrote, its tensors on the CPU.

    Raises:
        UserError: when the file is missing, damaged or no checkpoint of ``train.py``.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError):
        raise UserError(f"checkpoint {path} is damaged, or no PyTorch file") from None
    if not isinstance(state, dict) or not state.keys() >= _KEYS:
        raise UserError(f"{path} is no checkpoint that train.py wrote")
    if state["format"] != FORMAT:
        raise UserError(f"checkpoint {path} has format {state['format']}; this is format {FORMAT}")
    return state


def check_pooling(state: dict[str, Any], path: str | Path, pooling: str) -> None:
    """Check that a network of this pooling was trained; raises UserError."""
    if state["pooling"] != pooling:
        raise UserError(
            f"checkpoint {path} was trained with --pool {state['pooling']}, not {pooling}"
        )


def check_classes(state: dict[str, Any], path: str | Path, classes: tuple[str, ...]) -> None:
    """Check that a network for these classes was trained; raises UserError."""
    theirs = tuple(state["classes"])
    if len(theirs) != len(classes):
        raise UserError(f"checkpoint {path} has {len(theirs)} classes, the data {len(classes)}")
    if theirs != classes:
        raise UserError(
            f"checkpoint {path} has the classes {', '.join(theirs)}, the data {', '.join(classes)}"
        )
