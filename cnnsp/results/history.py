"""``summary.csv``: a row for each epoch of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from .. import files


@dataclass(frozen=True)
class EpochResult:
    """One row of ``summary.csv``."""

    epoch: float  # how many are done: 3, or 2.25 where --max-steps ended the third within
    train_loss: float  # mean over the epoch's augmented images, in training mode
    test_loss: float  # mean over the test images
    test_accuracy: float  # in per cent
    lr: float  # learning rate
    images_per_second: float  # of training; NaN where an evaluation alone was left
    seconds: float  # training and evaluation


def write_summary(history: Sequence[EpochResult], path: Path) -> None:
    """Write the history as CSV with a header line."""
    lines = [[field.name for field in fields(EpochResult)]]
    lines += [[f"{number:.6g}" for number in astuple(row)] for row in history]
    files.write(path, "".join(",".join(line) + "\n" for line in lines).encode())
