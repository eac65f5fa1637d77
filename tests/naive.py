"""The operator read aloud, for the other tests: plain Python numbers, one window at a time.

It follows the operator's docstrings and the order of arithmetic in `reference.py`, and shares no
code with the package: its own Philox, windows as loops over cells, and sums rounded to fp32 after
every step, as hardware would, where the operator computes in fp32. So a draw must agree index for
index in every dtype, and not only where u * S is far from a cell's boundary.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

MASK = 2**32 - 1


class Arguments(NamedTuple):
    """What `F.max_pool2d` takes, as (height, width) pairs."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        plane = torch.empty(1, 1, height, width, device="meta")
        out_height, out_width = F.max_pool2d(plane, *self).shape[2:]
        return out_height, out_width

    def inside(self, dim: int, output: int, length: int) -> list[tuple[int, int]]:
        """(number in the window, position) of a window's rows (`dim` 0) or columns (1) that lie
        in an input of `length`."""
        kernel, stride, padding, dilation = (pair[dim] for pair in self[:4])
        places = [(k, output * stride - padding + k * dilation) for k in range(kernel)]
        return [(k, place) for k, place in places if 0 <= place < length]

    def covered(self, height: int, width: int) -> torch.Tensor:
        """Which cells of a plane lie in some window."""
        rows, cols = (
            [
                any(place == x for o in range(outputs) for _, x in self.inside(dim, o, length))
                for place in range(length)
            ]
            for dim, (length, outputs) in enumerate(
                zip((height, width), self.output_size(height, width), strict=True)
            )
        )
        return torch.tensor(rows)[:, None] & torch.tensor(cols)


def philox(key: tuple[int, int], counter: tuple[int, int, int, int], rounds: int = 7) -> list[int]:
    """Philox4x32 of Salmon et al. 2011, in Python's unbounded integers."""
    c = list(counter)
    for r in range(rounds):
        k0 = (key[0] + r * 0x9E3779B9) & MASK
        k1 = (key[1] + r * 0xBB67AE85) & MASK
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ k0, second & MASK, first >> 32 ^ c[3] ^ k1, first & MASK]
    return c


def uniform(seed: int, plane: int, oh: int, ow: int) -> float:
    """The number in [0, 1) of one output, from the bits that `philox.py` documents."""
    key = (seed & MASK, seed >> 32 & MASK)
    word = philox(key, (ow // 2, oh // 4, plane & MASK, plane >> 32))[oh % 4]
    return (word >> 16 if ow % 2 else word & 0xFFFF) / 2**16


def drawn_seed(generator: torch.Generator) -> int:
    """The seed that a pool given `generator` draws; it advances the generator just as the pool."""
    return int(
        torch.randint(
            -(2**63), 2**63 - 1, (), dtype=torch.int64, device=generator.device, generator=generator
        )
    )


class Cell(NamedTuple):
    """A window's cell inside the input: its place in the window and in the plane, its weight."""

    i: int
    row: int
    col: int
    w: float


@dataclass(frozen=True)
class Window:
    """What the operator makes of one window.

    Attributes:
        place: (n, c, oh, ow).
        value: the training output, before it is rounded to the input's dtype.
        index: of the drawn cell, `row * width + col`; of the first cell if nothing is drawn.
        drawn: (row, col) that gets the training gradient, None if the window is dead.
        expectation: the evaluation output.
        slopes: ((row, col), derivative of the expectation) for every cell inside the input.
    """

    place: tuple[int, int, int, int]
    value: float
    index: int
    drawn: tuple[int, int] | None
    expectation: float
    slopes: list[tuple[tuple[int, int], float]]


class Pool:
    """All windows of a pool of `input` `(N, C, H, W)`, with the seed that it draws.

    Attributes:
        value, index, expectation, live: of the windows, `(N, C, OH, OW)`; floats in fp64.
    """

    def __init__(
        self, input: torch.Tensor, bias: torch.Tensor | None, seed: int, arguments: Arguments
    ):
        self.shape = tuple(input.shape)
        self.windows = list(_windows(input, bias, seed, arguments))
        size = (*self.shape[:2], *arguments.output_size(*self.shape[2:]))

        def gathered(values: list, dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype).reshape(size)

        self.value = gathered([window.value for window in self.windows], torch.float64)
        self.index = gathered([window.index for window in self.windows], torch.int64)
        self.expectation = gathered([window.expectation for window in self.windows], torch.float64)
        self.live = gathered([window.drawn is not None for window in self.windows], torch.bool)

    def gradient(
        self, grad_output: torch.Tensor, training: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of the input and of the bias, in fp64."""
        grads = grad_output.double().tolist()
        terms: dict[tuple[int, int, int, int], list[float]] = {}
        for window in self.windows:
            n, c, oh, ow = window.place
            slopes = window.slopes
            if training:
                slopes = [] if window.drawn is None else [(window.drawn, 1.0)]
            for (row, col), slope in slopes:
                terms.setdefault((n, c, row, col), []).append(grads[n][c][oh][ow] * slope)
        grad_input = torch.zeros(self.shape, dtype=torch.float64)
        for place, values in terms.items():
            # sum, not fsum, which refuses inf - inf.
            grad_input[place] = sum(values)
        return grad_input, grad_input.sum((0, 2, 3))


def _windows(
    input: torch.Tensor, bias: torch.Tensor | None, seed: int, arguments: Arguments
) -> Iterator[Window]:
    batch, channels, height, width = input.shape
    in_fp64 = input.dtype == torch.float64
    rounded = float if in_fp64 else _to_fp32
    planes = input.detach().double().tolist()
    biases = (
        [0.0] * channels if bias is None else [rounded(b) for b in bias.detach().double().tolist()]
    )
    out_height, out_width = arguments.output_size(height, width)
    last = (arguments.kernel[0] - 1, arguments.kernel[1] - 1)
    for n, c, oh, ow in itertools.product(*map(range, (batch, channels, out_height, out_width))):
        rows, cols = arguments.inside(0, oh, height), arguments.inside(1, ow, width)
        cells = [
            Cell(i, row, col, _weight(planes[n][c][row][col], biases[c], rounded))
            for (i, row), (_, col) in itertools.product(rows, cols)
        ]
        u = uniform(seed, n * channels + c, oh, ow)
        drawn = _draw(cells, u, rounded)
        if drawn is not None:
            value, row, col = drawn.w, drawn.row, drawn.col
        else:
            # The last cell, where S is too small for a draw; 0 where it is padding.
            inside = rows and cols and (rows[-1][0], cols[-1][0]) == last
            value = cells[-1].w if inside else 0.0
            row, col = (_first(found, size) for found, size in ((rows, height), (cols, width)))
        expectation, derivatives = _expectation([cell.w for cell in cells])
        yield Window(
            (n, c, oh, ow),
            value,
            row * width + col,
            None if drawn is None else (row, col),
            expectation,
            [((cell.row, cell.col), slope) for cell, slope in zip(cells, derivatives, strict=True)],
        )


def _first(inside: list[tuple[int, int]], length: int) -> int:
    # A dilated window can step over a short input; its index need only lie in the plane.
    return inside[0][1] if inside else length - 1


def _weight(a: float, b: float, rounded: Callable[[float], float]) -> float:
    w = rounded(a + b)
    return w if w > 0 or math.isnan(w) else 0.0


def _draw(cells: list[Cell], u: float, rounded: Callable[[float], float]) -> Cell | None:
    not_numbers = [cell for cell in cells if math.isnan(cell.w)]
    if not_numbers:
        return not_numbers[-1]
    running = _running_sums([(cell.i, cell.w) for cell in cells], rounded)
    if running and math.isinf(running[-1]):
        infinite = any(math.isinf(cell.w) for cell in cells)
        running = _running_sums(
            [
                (cell.i, float(math.isinf(cell.w)) if infinite else rounded(cell.w * 2.0**-32))
                for cell in cells
            ],
            rounded,
        )
    # The product of a double and a multiple of 2**-16 is rounded once, as it is in fp32.
    threshold = rounded(u * running[-1]) if running else 0.0
    return next((cell for cell, sum in zip(cells, running, strict=True) if sum > threshold), None)


def _running_sums(
    weights: list[tuple[int, float]], rounded: Callable[[float], float]
) -> list[float]:
    """Sums up to each cell: of its row, then added to the sum of the rows before."""
    sums, before = [], 0.0
    for _, row in itertools.groupby(weights, key=lambda weight: weight[0]):
        in_row = 0.0
        for _, w in row:
            in_row = rounded(in_row + w)
            sums.append(rounded(before + in_row))
        before = sums[-1]
    return sums


def _expectation(weights: list[float]) -> tuple[float, list[float]]:
    """The expectation and its derivatives, to fp64's precision at any scale."""
    if any(math.isnan(w) for w in weights):
        return math.nan, [math.nan if w != 0 else 0.0 for w in weights]
    largest = max(weights, default=0.0)
    if largest == 0:
        return 0.0, [0.0] * len(weights)
    if math.isinf(largest):
        share = 1 / weights.count(math.inf)
        return math.inf, [share if w == math.inf else (-share if w > 0 else 0.0) for w in weights]
    relative = [w / largest for w in weights]
    total = math.fsum(relative)
    mean = math.fsum(w * w for w in relative) / total
    # Where S is below 2**-100, 1 / S would overflow in fp32: no gradient, in fp64 neither.
    if math.log2(largest) + math.log2(total) < -100:
        return mean * largest, [0.0] * len(weights)
    return mean * largest, [(2 * (w / largest) - mean) / total if w > 0 else 0.0 for w in weights]


def _to_fp32(x: float) -> float:
    """The nearest fp32. A sum or product of two of them may be taken in fp64 first: 53 bits are
    more than twice 24 and two, so that the second rounding gives what one would."""
    try:
        return struct.unpack("f", struct.pack("f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)
