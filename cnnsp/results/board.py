"""What a run shows of itself: TensorBoard's events, and the progress on the terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid
from tqdm import tqdm

from ..data.augment import normalisation
from ..data.batches import ImageBank
from . import pictures
from .evaluation import Evaluation
from .history import EpochResult


class Board:
    """TensorBoard events of one run."""

    def __init__(self, folder: Path, *, first_step: int = 0) -> None:
        # A resumed run takes back what an interrupted one logged after its checkpoint.
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def first_batch(self, images: Tensor) -> None:
        """Show up to 32 normalised images ``[B, 3, H, W]`` at half their size."""
        small = F.interpolate(images[:32].float().cpu(), scale_factor=0.5, mode="area")
        self._writer.add_image("first_batch", make_grid(_visible(small)), 0)

    def train_loss(self, loss: float, step: int) -> None:
        """Show the loss of a step."""
        self._writer.add_scalar("train/loss", loss, step)

    def epoch(self, result: EpochResult, step: int) -> None:
        """Show an epoch's results."""
        self._writer.add_scalar("test/loss", result.test_loss, step)
        self._writer.add_scalar("test/accuracy", result.test_accuracy, step)
        self._writer.add_scalar("lr", result.lr, step)
        self._writer.add_scalar("images_per_second", result.images_per_second, step)

    def evaluation(
        self, evaluation: Evaluation, test: ImageBank, classes: Sequence[str], step: int
    ) -> None:
        """Show the confusion matrix, and the up to 16 test images that were most wrong."""
        confusion = pictures.confusion(evaluation, classes, "Test images")
        self._figure("test/confusion", confusion, step)
        worst = evaluation.most_wrong(16)
        if len(worst):
            images, _ = test.batch(worst)
            names = test.images.names
            figure = pictures.mistakes(
                _visible(images.cpu()),
                evaluation.labels[worst],
                evaluation.log_probs[worst],
                classes,
                [names[number] for number in worst.tolist()] if names else (),
            )
            self._figure("test/most_wrong", figure, step)
        self._writer.flush()

    def _figure(self, tag: str, figure: Figure, step: int) -> None:
        self._writer.add_image(tag, pictures.pixels(figure), step, dataformats="HWC")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # where writing failed before, this would say so again
            self._writer.close()


def _visible(images: Tensor) -> Tensor:
    """Normalised images ``[..., 3, H, W]`` on the CPU, from 0 to 1 again."""
    mean, std = normalisation(images.device)
    return (images * std + mean).clamp(0, 1)


class EpochProgress:
    """A bar on a terminal; elsewhere one line each time a loss is reported.

    Of ``steps`` in the epoch some were ``done`` before, when an interrupted epoch goes on; ``rest``
    are those left, later epochs' included.
    """

    def __init__(self, name: str, steps: int, done: int = 0, rest: int = 0) -> None:
        self._name, self._steps, self._step = name, steps, done
        self._first, self._rest = done, rest
        self._images, self._start = 0, time.perf_counter()
        # Of several processes one has a standard output.
        hidden = sys.stdout is None or not sys.stderr.isatty()
        options = {"leave": False, "dynamic_ncols": True, "disable": hidden}
        self._bar = tqdm(desc=name, total=steps, initial=done, unit="step", **options)

    def __enter__(self) -> EpochProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, images: int) -> None:
        self._step += 1
        self._images += images
        self._bar.update()

    def report(self, loss: float) -> None:
        seconds, done = time.perf_counter() - self._start, self._step - self._first
        left = duration(seconds / done * (self._rest - done))
        text = f"loss {loss:.4f}  {self._images / seconds:.0f} images/s  {left} left"
        if self._bar.disable:
            print(f"{self._name}  step {self._step}/{self._steps}  {text}", flush=True)
        else:
            self._bar.set_postfix_str(text)


def duration(seconds: float) -> str:
    """For people: 45 s, 12 min or 3 h 05 min."""
    minutes = round(max(0.0, seconds) / 60)
    if minutes < 2:
        return f"{max(0.0, seconds):.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
