"""Make the pictures of the documentation: `python docs/pictures.py [FOLDER]`.

    pooling.png   a flower pooled in several ways, and how often the operator draws each cell
    kernels.png   how the kernels slide, draw and gather (drawing.py)

Every number in them is the operator's. FOLDER is that of this file if not given.
"""

# ruff: noqa: RUF001 - a multiplication sign in a title

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from drawing import BLUE, CELLS, DARK, DPI, GREY, SMALL, TEXT, kernels, numbers, seeded, written
from matplotlib.figure import Figure
from PIL import Image

from cnnsp.data.synthetic import synthetic_flowers
from cnnsp.results.pictures import pixels
from stochastic_pooling import stochastic_pool2d

DRAWS = 200_000


def pooling() -> Figure:
    figure = Figure(figsize=(10, 4.5), dpi=DPI)
    left, right = figure.subfigures(1, 2, width_ratios=(1.5, 1))
    flower(left)
    frequencies(right)
    return figure


def flower(figure: Figure, size: int = 8) -> None:
    """A flower pooled by brightness: the pixels that are picked are shown in their colours."""
    image = synthetic_flowers(1).images[1:2].float() / 255
    brightness = (image * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)

    def picked(indices: torch.Tensor) -> torch.Tensor:
        colours = image.flatten(2).gather(2, indices.flatten(2).expand(-1, 3, -1))
        return colours.view(1, 3, *indices.shape[2:])

    def drawn(seed: int) -> torch.Tensor:
        options = {"return_indices": True, "generator": seeded(seed)}
        return picked(stochastic_pool2d(brightness, size, **options)[1])

    # The brightness of what is expected is what is expected of the brightness.
    shares = F.avg_pool2d(image * brightness, size) / F.avg_pool2d(brightness, size)
    shown = {
        "a picture": image,
        "max pooling": picked(F.max_pool2d(brightness, size, return_indices=True)[1]),
        "average pooling": F.avg_pool2d(image, size),
        "stochastic pooling: a draw": drawn(0),
        "another draw": drawn(1),
        "evaluation: its expectation": shares,
    }
    axes = figure.subplots(2, 3)
    for axis, (title, pooled) in zip(axes.flat, shown.items(), strict=True):
        axis.imshow(pooled[0].permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(title, fontsize=TEXT, pad=4)
        axis.set_axis_off()
    figure.subplots_adjust(0.01, 0.05, 0.99, 0.94, 0.03, 0.13)
    note = f"Windows of {size} × {size} brightnesses; a pixel that is picked keeps its colour."
    figure.text(0.01, 0.012, note, fontsize=SMALL, color="#444444")


def frequencies(figure: Figure) -> None:
    """How often the operator draws each cell of a window, against its share of the sum."""
    planes = CELLS.expand(DRAWS, 1, 3, 3)
    _, drawn = stochastic_pool2d(planes, 3, return_indices=True, generator=seeded(0))
    counts = drawn.flatten().bincount(minlength=9).double()
    weights = CELLS.relu().double().flatten()
    shares = weights / weights.sum()
    errors = (shares * (1 - shares) / DRAWS).sqrt()
    live = shares > 0
    assert counts[~live].sum() == 0
    chi_square = ((counts - DRAWS * shares)[live] ** 2 / (DRAWS * shares[live])).sum()
    freedom = live.sum().double() - 1
    p = float(torch.special.gammaincc(freedom / 2, chi_square / 2))

    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.6, 1))
    above.bar(range(9), shares.tolist(), 0.7, color=BLUE, label="probability w / S")
    above.plot(
        range(9), (counts / DRAWS).tolist(), "o", color=DARK, ms=4, label="share of the draws"
    )
    above.set_title(
        f"{DRAWS:,} draws of one window: χ² = {chi_square:.1f}, p = {p:.2f}", fontsize=TEXT
    )
    above.set_ylim(0, 0.4)
    above.set_yticks((0, 0.1, 0.2, 0.3, 0.4))
    above.legend(fontsize=SMALL, loc="upper left", bbox_to_anchor=(0.33, 1), frameon=False)
    inset = above.inset_axes((0.03, 0.47, 0.3, 0.5))
    inset.set(xlim=(0, 3), ylim=(3, 0), aspect="equal")
    inset.set_axis_off()
    numbers(inset, 0, 0, CELLS, live.view(3, 3), BLUE)
    for cell in (~live).nonzero().flatten().tolist():
        above.text(cell, 0.012, "never", ha="center", fontsize=SMALL, color="#666666")
    below.axhspan(-2, 2, color=GREY)
    below.axhline(0, color="#999999", lw=0.8)
    deviations = ((counts / DRAWS - shares) / errors)[live]
    below.errorbar(
        live.nonzero().flatten().tolist(), deviations.tolist(), 1, fmt="o", color=DARK, ms=4
    )
    below.set_ylim(-3.6, 3.6)
    below.set_ylabel("deviation,\nstandard errors", fontsize=SMALL)
    below.set_xticks(range(9), [written(a) for a in CELLS.flatten().tolist()])
    below.set_xlabel("input of the cell (negative: dead, by the ReLU)", fontsize=SMALL)
    for axis in (above, below):
        axis.tick_params(labelsize=SMALL)
        axis.spines[["top", "right"]].set_visible(False)
    figure.subplots_adjust(0.17, 0.12, 0.99, 0.94, hspace=0.1)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in (("pooling", pooling), ("kernels", kernels)):
        image = Image.fromarray(pixels(picture()))
        # A palette takes a third of the memory, and no difference can be seen.
        palette = image.quantize(256, Image.Quantize.FASTOCTREE)
        palette.save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
