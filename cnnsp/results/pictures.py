"""The pictures of a run: curves, confusion matrix, and the images it gets most wrong."""

from __future__ import annotations

import io
import math
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor
from wcwidth import wcswidth

from .. import files
from ..cli import printable
from .evaluation import Evaluation
from .history import EpochResult

# Every figure here is made without pyplot: it needs no display and changes nobody's backend.
_DPI = 120
# Inches of a confusion matrix.
_LARGEST = 36
# Each epoch leaves a grid of photographs, which PNG hardly compresses.
_PHOTOGRAPHS_DPI = 80
# Columns of text that fit below one.
_CAPTION = 28
# For the characters that matplotlib's own font lacks, Chinese above all, by the names that
# matplotlib has for them: Windows, macOS, Linux.
_FONTS = (
    *("Microsoft YaHei", "SimHei"),
    *("PingFang SC", "PingFang HK", "Hiragino Sans GB", "Heiti TC", "Arial Unicode MS"),
    *("Noto Sans CJK SC", "Noto Sans SC", "Noto Sans CJK JP", "Source Han Sans SC"),
    *("WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback"),
)


def write(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG file; raises UserError."""
    image = io.BytesIO()
    Image.fromarray(pixels(figure)).save(image, "png")
    files.write(path, image.getvalue())


def pixels(figure: Figure) -> np.ndarray:
    """The figure as uint8 ``[H, W, 3]``; it is drawn once, which is long for many classes."""
    canvas = figure.canvas
    if figure.stale or not isinstance(canvas, FigureCanvasAgg):
        canvas = FigureCanvasAgg(figure)
        with _fonts(figure):
            canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


@contextmanager
def _fonts(figure: Figure) -> Iterator[None]:
    """Draw within this context, with installed fonts for what matplotlib's own lacks."""
    for text in figure.findobj(Text):
        if not text.get_text().isascii():
            text.set_fontfamily(["sans-serif", *_installed_fonts()])
    with warnings.catch_warnings(record=True) as caught:
        # One of each character, at each drawing.
        warnings.filterwarnings("always", "Glyph .* missing from", UserWarning)
        yield
    for w in caught:
        if "missing from" in str(w.message):
            _say_once_what_is_missing()
        else:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)


@cache
def _installed_fonts() -> list[str]:
    return sorted({font.name for font in fontManager.ttflist} & set(_FONTS), key=_FONTS.index)


@cache
def _say_once_what_is_missing() -> None:
    print(
        "pictures show boxes for characters that the fonts found here lack; install one that has "
        "them, such as Noto Sans CJK SC",
        file=sys.stderr,
    )


def shortened(name: str, most: int = 40) -> str:
    """A name of at most that many columns, of which a Chinese character takes two."""
    name = printable(name)
    if wcswidth(name) <= most:
        return name
    start, end = name, name
    while wcswidth(start) > most // 2 - 1:
        start = start[:-1]
    while wcswidth(end) > most // 2:
        end = end[1:]
    return f"{start}…{end}"


def curves(history: Sequence[EpochResult], title: str) -> Figure:
    """Both losses and the test accuracy over the epochs."""
    epochs = [row.epoch for row in history]
    train_losses = [row.train_loss for row in history]
    test_losses = [row.test_loss for row in history]
    accuracies = [row.test_accuracy for row in history]
    best, lowest = max(accuracies), min(test_losses)

    figure = Figure(figsize=(10, 3.8), dpi=_DPI, layout="constrained")
    if epochs[-1] % 1:
        title += f"; the last point is within epoch {math.ceil(epochs[-1])}"
    figure.suptitle(title, parse_math=False)
    loss, accuracy = figure.subplots(1, 2)
    style = {"marker": "o", "markersize": 3.5}
    loss.plot(epochs, train_losses, color="C0", label="training", **style)
    loss.plot(epochs, test_losses, color="C3", label="test", **style)
    loss.axhline(lowest, color="C3", linestyle=":", linewidth=1)
    top = 1.06 * max(train_losses + test_losses)
    loss.set(title=f"Loss, lowest of the test images {lowest:.4f}", ylim=(0, top))
    loss.legend()
    accuracy.plot(epochs, accuracies, color="C3", **style)
    accuracy.axhline(best, color="C3", linestyle=":", linewidth=1)
    accuracy.set_title(f"Test accuracy (%), best {best:.2f}")
    for axis in (loss, accuracy):
        axis.set(xlabel="Epoch", xlim=(min(epochs[0], 1) - 0.5, math.ceil(epochs[-1]) + 0.5))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
    return figure


def confusion(evaluation: Evaluation, classes: Sequence[str], title: str) -> Figure:
    """Counts in cells that are the darker, the larger their share of the row.

    Rows are true classes, with their sensitivities on the right; columns are predictions. The
    accuracy stands under ``title``.
    """
    counts, classes = evaluation.confusion, [shortened(name) for name in classes]
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    places = range(len(classes))
    # Inches of a cell: as few as its number needs when there are many, and less when the numbers
    # of so many classes would make a picture of a gigabyte.
    cell = min(max(0.45, min(1.1, 4.5 / len(classes))), _LARGEST / len(classes))
    side, longest = cell * len(classes), max(map(wcswidth, classes)) * 0.08
    width, height = max(side + longest + 2.2, 5), side + 1.6 + longest * 0.7
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    title = textwrap.fill(title, int(width / 0.1))
    figure.suptitle(f"{title}\naccuracy {evaluation.accuracy:.2f} %", parse_math=False)
    axis = figure.subplots()
    edges = np.arange(len(classes) + 1) - 0.5
    look: Any = {"cmap": "Blues", "vmin": 0, "vmax": 1, "edgecolors": "white", "linewidth": 1.5}
    axis.pcolormesh(edges, edges, shares.numpy(), **look)
    axis.invert_yaxis()
    digits = len(str(int(counts.max())))
    size = min(14.0, cell * 72 / max(digits, 2) * 0.9)
    for (row, column), count in np.ndenumerate(counts.numpy()):
        if count or len(classes) <= 6:  # noughts would hide the mistakes among many classes
            color = "white" if shares[row, column] > 0.5 else "black"
            text = axis.text(column, row, str(count), ha="center", va="center", fontsize=size)
            text.set(color=color, in_layout=False)  # it is in its cell
    turn = cell < longest + 0.1
    style: Any = {"rotation": 45, "ha": "right"} if turn else {"ha": "center"}
    axis.set_xticks(places, classes, rotation_mode="anchor", parse_math=False, **style)
    axis.set_yticks(places, classes, parse_math=False)
    axis.set(xlabel="Predicted class", ylabel="True class")
    right = axis.secondary_yaxis("right")
    percents = ["none" if s is None else f"{s:.1f} %" for s in evaluation.sensitivities]
    right.set_yticks(places, percents)
    right.set_ylabel("Sensitivity")
    for axes in (axis, right):
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure


def mistakes(
    images: Tensor,
    labels: Tensor,
    log_probs: Tensor,
    classes: Sequence[str],
    names: Sequence[str] = (),
) -> Figure:
    """A grid of images with "true → predicted p=0.97" below each, and its name, if there are names.

    ``images`` are ``[N, 3, H, W]`` from 0 to 1, N at least 1; ``labels`` int64 ``[N]``;
    ``log_probs`` ``[N, C]``.
    """
    columns = min(4, len(images))
    rows = math.ceil(len(images) / columns)
    size = (2.3 * columns, (2.85 if names else 2.7) * rows + 0.4)
    figure = Figure(figsize=size, dpi=_PHOTOGRAPHS_DPI, layout="constrained")
    figure.suptitle("Most wrong test images")  # fits above one
    for place, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        axis = figure.add_subplot(rows, columns, place + 1, xticks=[], yticks=[])
        axis.imshow(image)
        found = int(log_probs[place].argmax())
        true, predicted = (shortened(classes[label], 22) for label in (int(labels[place]), found))
        caption = f"{true} → {predicted} p={float(log_probs[place, found].exp()):.2f}"
        if wcswidth(caption) > _CAPTION:
            caption = caption.replace(" → ", " →\n")
        if names:
            caption += f"\n{shortened(names[place], _CAPTION)}"
        axis.set_xlabel(caption, fontsize=9, parse_math=False)
    return figure
