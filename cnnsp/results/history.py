"""``summary.csv``: a row for each epoch of a run."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .. import files
from ..errors import UserError


@dataclass(frozen=True)
class EpochResult:
    """One row of ``summary.csv``.

    Attributes:
        epoch: how many are done: 3, or 2.25 where ``--max-steps`` ended the third within.
        train_loss: mean over the epoch's augmented images, in training mode.
        test_loss: mean over the test images.
        test_accuracy: in per cent.
        lr: learning rate.
        images_per_second: of training.
        seconds: training and evaluation.
    """

    epoch: float
    train_loss: float
    test_loss: float
    test_accuracy: float
    lr: float
    images_per_second: float
    seconds: float


def write_summary(history: Sequence[EpochResult], path: Path) -> None:
    """Write the history as CSV with a header line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(EpochResult)], lineterminator="\n")
    writer.writeheader()
    for result in history:
        row = asdict(result)
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    files.write(path, text.getvalue().encode())


def read_summary(path: Path) -> list[EpochResult]:
    """The rows of a ``summary.csv``; raises UserError."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        values = [{name: float(value) for name, value in row.items()} for row in rows]
        return [
            EpochResult(int(epoch) if (epoch := row.pop("epoch")).is_integer() else epoch, **row)
            for row in values
        ]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is no summary that train.py wrote") from None
