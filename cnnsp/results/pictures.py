"""The pictures of a run: curves, confusion matrix, and the images it gets most wrong."""

from __future__ import annotations

import io
import math
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
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
    _draw(figure, lambda: figure.savefig(image, format="png"))
    files.write(path, image.getvalue())


def pixels(figure: Figure) -> np.ndarray:
    """The figure as uint8 ``[H, W, 3]``."""
    canvas = FigureCanvasAgg(figure)
    _draw(figure, canvas.draw)
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _draw(figure: Figure, draw: Callable[[], None]) -> None:
    """Draw a figure, with installed fonts for what matplotlib's own lacks."""
    for text in figure.findobj(Text):
        unknown = {c for c in text.get_text() if not c.isspace()} - _characters_of("sans-serif")
        if not unknown:
            continue
        families = text.get_fontfamily()
        for name in _installed_fonts():
            if unknown & _characters_of(name):
                families = [*families, name]
                unknown -= _characters_of(name)
        text.set_fontfamily(families)
        if unknown:
            _say_once_what_is_missing()
    with warnings.catch_warnings():
        # Of each character, at each drawing.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        draw()


@cache
def _installed_fonts() -> list[str]:
    installed = {font.name for font in fontManager.ttflist}
    return [name for name in _FONTS if name in installed]


@cache
def _characters_of(family: str) -> frozenset[str]:
    return frozenset(map(chr, get_font(findfont(FontProperties(family=[family]))).get_charmap()))


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
    epochs = [result.epoch for result in history]
    train_losses = [result.train_loss for result in history]
    accuracies = [result.test_accuracy for result in history]
    test_losses = [result.test_loss for result in history]
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
    loss.set_title(f"Loss, lowest of the test images {lowest:.4f}")
    loss.set_ylim(0, 1.06 * max(train_losses + test_losses))
    loss.legend()
    accuracy.plot(epochs, accuracies, color="C3", **style)
    accuracy.axhline(best, color="C3", linestyle=":", linewidth=1)
    accuracy.set_title(f"Test accuracy (%), best {best:.2f}")
    for axis in (loss, accuracy):
        axis.set_xlabel("Epoch")
        axis.set_xlim(min(epochs[0], 1) - 0.5, math.ceil(epochs[-1]) + 0.5)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
    return figure


def confusion(evaluation: Evaluation, classes: Sequence[str], title: str) -> Figure:
    """Counts in cells that are the darker, the larger their share of the row.

    Rows are true classes, with their sensitivities on the right; columns are predictions.
    """
    counts, classes = evaluation.confusion, [shortened(name) for name in classes]
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    places = range(len(classes))
    # Inches of a cell: as few as its number needs when there are many, and less when the numbers
    # of so many classes would make a picture of a gigabyte.
    cell = min(max(0.45, min(1.1, 4.5 / len(classes))), _LARGEST / len(classes))
    side = cell * len(classes)
    longest = max(map(wcswidth, classes)) * 0.08
    width = max(side + longest + 2.2, 5)
    height = side + 1.6 + longest * 0.7
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    lines = [textwrap.fill(line, int(width / 0.1)) for line in title.splitlines()]
    figure.suptitle("\n".join(lines), parse_math=False)
    axis = figure.subplots()
    # The figure has the shape; with a fixed aspect the layout would leave no room for the labels.
    axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    digits = len(str(int(counts.max())))
    size = min(14.0, cell * 72 / max(digits, 2) * 0.9)
    for row in places:
        for column in places:
            count, dark = int(counts[row, column]), float(shares[row, column]) > 0.5
            if count or len(classes) <= 6:  # noughts would hide the mistakes among many classes
                axis.text(
                    column,
                    row,
                    str(count),
                    ha="center",
                    va="center",
                    fontsize=size,
                    color="white" if dark else "black",
                )
    turn = 45 if side / len(classes) < longest + 0.1 else 0
    axis.set_xticks(
        places,
        classes,
        rotation=turn,
        ha="right" if turn else "center",
        rotation_mode="anchor",
        parse_math=False,
    )
    axis.set_yticks(places, classes, parse_math=False)
    axis.set_xlabel("Predicted class")
    axis.set_ylabel("True class")
    # Lines between the cells.
    edges = np.arange(len(classes) - 1) + 0.5
    axis.set_xticks(edges, minor=True)
    axis.set_yticks(edges, minor=True)
    axis.grid(which="minor", color="white", linewidth=1.5)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_visible(False)

    right = axis.secondary_yaxis("right")
    percents = ["none" if math.isnan(s) else f"{s:.1f} %" for s in evaluation.sensitivities]
    right.set_yticks(places, percents)
    right.set_ylabel("Sensitivity")
    right.tick_params(length=0)
    right.spines[:].set_visible(False)
    return figure


def mistakes(
    images: Tensor,
    labels: Tensor,
    log_probs: Tensor,
    classes: Sequence[str],
    title: str,
    names: Sequence[str] = (),
) -> Figure:
    """A grid of images with "true → predicted p=0.97" below each, and its name.

    Args:
        images: ``[N, 3, H, W]`` from 0 to 1, N at least 1.
        labels: int64 ``[N]``.
        log_probs: ``[N, C]``.
        classes: the class names.
        title: above the grid.
        names: of the images, or none.
    """
    columns = min(4, len(images))
    rows = math.ceil(len(images) / columns)
    size = (2.3 * columns, (2.85 if names else 2.7) * rows + 0.4)
    figure = Figure(figsize=size, dpi=_PHOTOGRAPHS_DPI, layout="constrained")
    figure.suptitle(title, parse_math=False)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    found = log_probs.argmax(1)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    for axis in axes[len(images) :]:
        axis.set_visible(False)
    for place, (axis, image, label, log_prob, position) in enumerate(
        zip(axes, images, labels.tolist(), log_probs, found.tolist(), strict=False)
    ):
        axis.imshow(image.permute(1, 2, 0).numpy())
        probability = float(log_prob[position].exp())
        true, predicted = (shortened(classes[number], 22) for number in (label, position))
        caption = f"{true} → {predicted} p={probability:.2f}"
        if wcswidth(caption) > _CAPTION:
            caption = caption.replace(" → ", " →\n")
        if names:
            caption += f"\n{shortened(names[place], _CAPTION)}"
        axis.set_xlabel(caption, fontsize=9, parse_math=False)
    return figure
