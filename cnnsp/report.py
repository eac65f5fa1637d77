"""What a run leaves for its reader: ``summary.csv``, ``curves.png``, TensorBoard, the progress."""

from __future__ import annotations

import csv
import io
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid
from tqdm import tqdm

from .augment import IMAGENET_MEAN, IMAGENET_STD
from .errors import UserError


@dataclass(frozen=True)
class EpochResult:
    """One row of ``summary.csv``.

    Attributes:
        epoch: counted from 1.
        train_loss: mean over the epoch's augmented images, in training mode.
        test_loss: mean over the test images.
        test_accuracy: in per cent.
        lr: learning rate.
        images_per_second: of training.
        seconds: training and evaluation.
    """

    epoch: int
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
    _replace(path, text.getvalue().encode())


def draw_curves(history: Sequence[EpochResult], path: Path, title: str) -> None:
    """Draw training loss, test accuracy and test loss over the epochs, as PNG."""
    epochs = [result.epoch for result in history]
    train_losses = [result.train_loss for result in history]
    accuracies = [result.test_accuracy for result in history]
    test_losses = [result.test_loss for result in history]
    best, lowest = max(accuracies), min(test_losses)

    # A figure of its own, without pyplot: it needs no display and changes nobody's backend.
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    figure.suptitle(title)
    train_loss, accuracy, test_loss = axes
    train_loss.plot(epochs, train_losses, "o-", color="C0")
    train_loss.set_title("Training loss")
    train_loss.set_ylim(bottom=0)
    accuracy.plot(epochs, accuracies, "o-", color="C2")
    accuracy.axhline(best, color="C2", linestyle=":", linewidth=1)
    accuracy.set_title(f"Test accuracy (%), best {best:.2f}")
    test_loss.plot(epochs, test_losses, "o-", color="C3")
    test_loss.axhline(lowest, color="C3", linestyle=":", linewidth=1)
    test_loss.set_title(f"Test loss, lowest {lowest:.4f}")
    for axis in axes:
        axis.set_xlabel("Epoch")
        axis.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
        axis.lines[0].set_markersize(3.5)
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format="png")
    _replace(path, image.getvalue())


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


class Board:
    """TensorBoard events of one run."""

    def __init__(self, folder: Path, *, first_step: int = 0) -> None:
        # A resumed run takes back what an interrupted one logged after its checkpoint.
        self._writer = SummaryWriter(str(folder), purge_step=first_step or None)

    def first_batch(self, images: Tensor) -> None:
        """Show up to 32 normalised images ``[B, 3, H, W]`` at half their size."""
        mean, std = (
            torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
        small = F.interpolate(images[:32].float().cpu(), scale_factor=0.5, mode="area")
        self._writer.add_image("first_batch", make_grid((small * std + mean).clamp(0, 1)), 0)

    def train_loss(self, loss: float, step: int) -> None:
        self._writer.add_scalar("train/loss", loss, step)

    def epoch(self, result: EpochResult, step: int) -> None:
        self._writer.add_scalar("test/loss", result.test_loss, step)
        self._writer.add_scalar("test/accuracy", result.test_accuracy, step)
        self._writer.add_scalar("lr", result.lr, step)
        self._writer.add_scalar("images_per_second", result.images_per_second, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class EpochProgress:
    """A bar on a terminal; elsewhere one line each time a loss is reported.

    Args:
        name: shown in front.
        steps: steps in the epoch.
        done: steps done before, when an interrupted epoch goes on.
    """

    def __init__(self, name: str, steps: int, done: int = 0) -> None:
        self._name, self._steps, self._step = name, steps, done
        self._images, self._start = 0, time.perf_counter()
        self._bar = tqdm(
            total=steps,
            initial=done,
            desc=name,
            unit="step",
            leave=False,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> EpochProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def advance(self, images: int) -> None:
        self._step += 1
        self._images += images
        self._bar.update()

    def report(self, loss: float) -> None:
        rate = self._images / (time.perf_counter() - self._start)
        if self._bar.disable:
            print(
                f"{self._name}  step {self._step}/{self._steps}  loss {loss:.4f}  "
                f"{rate:.0f} images/s",
                flush=True,
            )
        else:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")
