"""The drawing of the kernels, kernels.png; `pictures.py` writes it."""

# ruff: noqa: RUF001 - signs of minus

from __future__ import annotations

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from stochastic_pooling import philox, reference
from stochastic_pooling.window import Window

DPI = 160
# GitHub shows the pictures at about half their size: no text is smaller.
SMALL, TEXT, TITLE = 8, 9, 10
BLUE, ORANGE, GREEN, GREY = "#c6dbef", "#fdd0a2", "#a1d99b", "#e8e8e8"
DARK, RED = "#08519c", "#b30000"
# The window of both pictures: its inputs, three of them dead.
CELLS = torch.tensor([[1.2, -0.4, 0.5], [-1.1, 2.0, 1.6], [0.8, -0.7, 3.1]])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def written(number: float) -> str:
    return f"{number:.3g}".replace("-", "−")


def kernels() -> Figure:
    figure = Figure(figsize=(10, 7.4), dpi=DPI)
    (forward, backward), (draw, gather) = figure.subplots(2, 2)
    slide_forward(forward)
    slide_backward(backward)
    draw_a_cell(draw)
    gather_gradients(gather)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.96, 0.03, 0.1)
    return figure


def panel(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=TITLE, fontweight="bold", loc="left")
    axis.set(xlim=(0, 12), ylim=(7.8, -0.2), aspect="equal", anchor="NW")
    axis.set_axis_off()


def box(axis: Axes, x: float, y: float, text: str, colour: str, width: float = 1) -> None:
    """A cell with its upper left corner at (x, y)."""
    axis.add_patch(Rectangle((x, y), width, 1, fc=colour, ec="#888888", lw=0.8))
    axis.text(x + width / 2, y + 0.5, text, ha="center", va="center", fontsize=SMALL)


def numbers(
    axis: Axes, x: float, y: float, shown: torch.Tensor, marked: torch.Tensor, colour: str
) -> None:
    """A matrix of cells; those that are `marked` have the colour, others are grey."""
    for i, row in enumerate(shown.tolist()):
        for j, number in enumerate(row):
            box(axis, x + j, y + i, written(number), colour if marked[i, j] else GREY)


def frame(axis: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    axis.add_patch(Rectangle((x, y), width, height, fill=False, ec=colour, lw=2.2))


def label(
    axis: Axes, x: float, y: float, text: str, ha: str = "left", color: str = "black"
) -> None:
    axis.text(x, y, text, ha=ha, va="center", fontsize=SMALL, color=color)


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "lw": 1.4, "color": DARK})


def plane(axis: Axes, x: float, columns: list[str], rows: list[tuple[str, str, str]]) -> None:
    """Columns of a plane by their names, and rows by name, colour and note."""
    for j, name in enumerate(columns):
        label(axis, x + j + 0.5, 0.6, name, "center")
    for i, (name, colour, note) in enumerate(rows):
        label(axis, x - 0.2, 1.5 + i, name, "right")
        for j in range(len(columns)):
            box(axis, x + j, 1 + i, "", colour)
        label(axis, x + len(columns) + 0.25, 1.5 + i, note)


def slide_forward(axis: Axes) -> None:
    panel(axis, "Forward: a lane slides down two columns")
    rows = [
        ("r−2", GREY, "done"),
        ("r−1", BLUE, "in registers, with its sum of"),
        ("r", BLUE, "three in both of the windows"),
        ("r+1", ORANGE, "read now, rectified, summed"),
        ("r+2", "white", "read next"),
    ]
    plane(axis, 1.7, ["2p−1", "2p", "2p+1", "2p+2"], rows)
    frame(axis, 1.64, 1.94, 3, 3.06, DARK)
    frame(axis, 2.76, 2.0, 3, 3.06, RED)
    arrow(axis, (0.45, 2), (0.45, 6))
    label(axis, 1.7, 6.5, "window of output (r, 2p)", color=DARK)
    label(axis, 1.7, 7.1, "window of output (r, 2p+1)", color=RED)


def slide_backward(axis: Axes) -> None:
    panel(axis, "Backward: a lane slides down the outputs")
    label(axis, 3.7, 0.05, "gradients and codes of outputs", "center")
    rows = [("r−1", GREY, ""), ("r", ORANGE, ""), ("r+1", "white", "")]
    plane(axis, 1.7, ["2p−1", "2p", "2p+1", "2p+2"], rows)
    label(axis, 9.3, 0.05, "sums of input gradients", "center")
    rows = [("r−1", GREEN, ""), ("r", BLUE, ""), ("r+1", BLUE, "")]
    plane(axis, 8.3, ["2p", "2p+1"], rows)
    arrow(axis, (5.9, 3.2), (7.3, 3.2))
    arrow(axis, (0.45, 1.7), (0.45, 6))
    notes = [
        (ORANGE, "read now, added where a code says"),
        (GREEN, "complete after that: stored, and added to the bias's gradient"),
        (BLUE, "in registers, complete one and two rows later"),
    ]
    for i, (colour, note) in enumerate(notes):
        axis.add_patch(Rectangle((1.7, 5.4 + 0.75 * i), 0.5, 0.5, fc=colour, ec="#888888", lw=0.8))
        label(axis, 2.45, 5.65 + 0.75 * i, note)


def draw_a_cell(axis: Axes) -> None:
    panel(axis, "The draw: first the row, then the cell in it")
    window, seed = Window(3, 3, 1, 1, 0, 0, 1, 1, False), torch.tensor(3)
    output, code = reference.sample(CELLS[None, None], None, seed, window)
    u = float(philox.uniforms(seed, output.shape))
    weights = CELLS.relu()
    threshold = u * float(weights.sum())
    row_ends = weights.sum(1).cumsum(0).tolist()
    row = sum(end <= threshold for end in row_ends)
    before = [0.0, *row_ends][row]
    cell_ends = (before + weights[row].cumsum(0)).tolist()
    column = sum(end <= threshold for end in cell_ends)
    assert row * 3 + column == int(code)
    assert float(weights[row, column]) == float(output)

    numbers(axis, 0.3, 0.4, weights, weights > 0, BLUE)
    frame(axis, 0.3 + column, 0.4 + row, 1, 1, RED)
    for i, total in enumerate(weights.sum(1).tolist()):
        label(axis, 3.5, 0.9 + i, f"sum {total:.1f}")
    label(axis, 6, 0.9, f"S = {row_ends[-1]:.1f}")
    label(axis, 6, 1.9, f"u = {u * 2**16:.0f} / 2¹⁶ = {u:.3f}")
    label(axis, 6, 2.9, f"u · S = {threshold:.2f}", color=RED)
    unit = 11 / row_ends[-1]
    for y, name, ends, chosen in ((4.4, "row", row_ends, row), (6.4, "cell", cell_ends, column)):
        start = 0.0 if name == "row" else before
        for number, end in enumerate(ends):
            if end > start:
                colour = GREEN if number == chosen else BLUE
                box(axis, 0.3 + start * unit, y, "", colour, (end - start) * unit)
                label(axis, 0.5 + start * unit, y + 0.5, f"{name} {number}")
                label(axis, 0.3 + end * unit, y + 1.25, f"{end:.1f}", "center")
            start = end
    at = 0.3 + threshold * unit
    axis.plot((at, at), (4.1, 7.6), color=RED, lw=1.6)
    result = f"{float(output):.1f} is drawn, code {row} · 3 + {column} = {int(code)}"
    label(axis, 7.4, 6.9, result)


def gather_gradients(axis: Axes) -> None:
    panel(axis, "Which outputs drew the input in the middle?")
    window, seed = Window(3, 3, 1, 1, 1, 1, 1, 1, False), torch.tensor(2)
    _, code = reference.sample(torch.rand(1, 1, 5, 5, generator=seeded(2)), None, seed, window)
    grad = torch.randint(1, 10, code.shape, generator=seeded(2)).float() / 10
    grad_input, _ = reference.sample_backward(grad, code, (5, 5), window, False)
    # The outputs whose windows hold the input (2, 2), and its number in each of them.
    drawn, number = code[0, 0, 1:4, 1:4], torch.arange(8, -1, -1).view(3, 3)
    equal = drawn == number
    gradients = grad[0, 0, 1:4, 1:4]
    assert torch.equal(gradients[equal].sum(), grad_input[0, 0, 2, 2])

    titles = ("codes of outputs around it", "its number in their windows", "their gradients")
    for at, title, shown in zip((0.3, 4.4, 8.5), titles, (drawn, number, gradients), strict=True):
        label(axis, at + 1.5, 0.7, title, "center")
        numbers(axis, at, 1.2, shown, equal, GREEN)
    label(axis, 3.85, 2.7, "= ?", "center")
    terms = " + ".join(f"{g:.1f}" for g in gradients[equal].tolist())
    result = f"its gradient is {terms} = {grad_input[0, 0, 2, 2]:.1f}."
    label(axis, 0.3, 5.2, f"Equal in {int(equal.sum())}: {result}")
    label(axis, 0.3, 5.95, "No atomics, one order: the same bits every time.")
