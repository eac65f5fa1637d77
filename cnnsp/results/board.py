"""What a run shows of itself: TensorBoard's events, and the progress on the terminal."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.utils import make_grid
from tqdm import tqdm

from ..cli import printable
from ..data.augment import normalisation
from ..data.batches import ImageBank
from . import pictures
from .evaluation import Evaluation
from .history import EpochResult

_SETTINGS = ".settings"  # how their event file ends


class Board:
    """TensorBoard events of one run."""

    def __init__(self, folder: Path, *, first_step: int = 0) -> None:
        # This takes back what an interrupted run logged after its checkpoint, and all of one that
        # left none here.
        self._writer = SummaryWriter(str(folder), purge_step=first_step and first_step + 1)

    def first_batch(self, images: Tensor) -> None:
        """Show up to 32 normalised images ``[B, 3, H, W]`` at half their size."""
        small = F.interpolate(images[:32].float().cpu(), scale_factor=0.5, mode="area")
        self._writer.add_image("first_batch", make_grid(_visible(small)), 0)

    def graph(self, model: nn.Module, images: Tensor) -> None:
        """Show what ``model`` does to ``images`` in evaluation mode; says so where it cannot."""
        # A copy on the CPU: the model's mode and the device's random numbers stay as they are.
        try:
            copied = copy.deepcopy(model).cpu().eval()
            with (
                # For one image in fp32 no kernel is worth compiling.
                mock.patch.dict(os.environ, STOCHASTIC_POOLING_BACKEND="torch"),
                torch.no_grad(),
                torch.random.fork_rng(devices=[]),
                contextlib.redirect_stdout(io.StringIO()),
                warnings.catch_warnings(),
            ):
                # The tracer is deprecated, but TensorBoard's graphs come from nothing else.
                warnings.simplefilter("ignore")
                self._writer.add_graph(copied, images[:1].float().cpu())
        except Exception as error:  # whatever the tracer cannot do: a run is worth more
            reason = " ".join(str(error).split())
            print(f"TensorBoard gets no graph of the network: {reason}", file=sys.stderr)

    def hyper_parameters(self, options: dict[str, Any], metrics: dict[str, float]) -> None:
        """Record settings and what they led to, for TensorBoard's table of runs.

        Args:
            options: None is left out; what is neither number nor text is shown as text.
            metrics: by the names of their columns, which no other scalar has.
        """
        shown = {
            name: value if type(value) in (int, float) else printable(str(value))
            for name, value in options.items()
            if value is not None
        }
        # Of several settings in a folder TensorBoard shows the first, so those that led to an
        # earlier end go. add_hparams would make a folder for each, which shows as another run.
        for settings in Path(self._writer.log_dir).glob(f"*{_SETTINGS}"):
            with contextlib.suppress(OSError):  # on Windows, where it is being read
                settings.unlink()
        with SummaryWriter(self._writer.log_dir, filename_suffix=_SETTINGS) as writer:
            for summary in hparams(shown, metrics):
                writer._get_file_writer().add_summary(summary)
            for name, value in metrics.items():
                writer.add_scalar(name, value)

    def train_loss(self, loss: float, step: int) -> None:
        """Show the loss of a step."""
        self._writer.add_scalar("train/loss", loss, step)

    def epoch(self, result: EpochResult, step: int, memory_mib: float | None = None) -> None:
        """Show an epoch's results, and the device memory that the run needed at most."""
        self._writer.add_scalar("test/loss", result.test_loss, step)
        self._writer.add_scalar("test/accuracy", result.test_accuracy, step)
        self._writer.add_scalar("lr", result.lr, step)
        if result.images_per_second > 0:  # NaN where none were trained
            self._writer.add_scalar("images_per_second", result.images_per_second, step)
        if memory_mib is not None:
            self._writer.add_scalar("memory_mib", memory_mib, step)
        self._writer.flush()

    def evaluation(
        self, confusion: Figure, evaluation: Evaluation, test: ImageBank, step: int
    ) -> None:
        """Show the confusion matrix, and the up to 16 test images that were most wrong."""
        self._figure("test/confusion", confusion, step)
        worst = evaluation.most_wrong(16)
        if len(worst):
            images, _ = test.batch(worst)
            names = test.images.names
            figure = pictures.mistakes(
                _visible(images.cpu()),
                evaluation.labels[worst],
                evaluation.log_probs[worst],
                test.images.classes,
                [names[number] for number in worst.tolist()] if names else (),
            )
            self._figure("test/most_wrong", figure, step)

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
        # Of several processes one has a standard output; and tqdm shows nothing on a terminal that
        # does not tell its width, such as Docker's.
        hidden = sys.stdout is None or not sys.stderr.isatty()
        hidden = hidden or os.get_terminal_size(sys.stderr.fileno()).columns == 0
        # Short enough for 80 columns.
        form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
        options = {"leave": False, "dynamic_ncols": True, "disable": hidden, "bar_format": form}
        self._bar = tqdm(desc=name, total=steps, initial=done, **options)

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
        left = tqdm.format_interval(max(0.0, seconds / done * (self._rest - done)))
        text = f"loss {loss:.4f}  {self._images / seconds:.0f} images/s  {left} left"
        if self._bar.disable:
            print(f"{self._name}  step {self._step}/{self._steps}  {text}", flush=True)
        else:
            self._bar.set_postfix_str(text)
