"""Stochastic pooling in plain PyTorch: the definition that every other backend is held against.

Stochastic pooling (Zeiler & Fergus, "Stochastic pooling for regularization of deep convolutional
neural networks", ICLR 2013, section 3) of the rectified weights w = max(a + b, 0) of a window with
sum S: training draws one cell with probability w / S (equation 3.1), evaluation gives the
expectation of that draw, sum w * w / S (equation 3.2).

The order of arithmetic, which decides the drawn cell and so is part of the contract:

- w is taken in fp32 (fp64 for fp64 inputs). Row i of the window has the running sums
  c_ij = ((w_i0 + w_i1) + … + w_ij) and the sum r_i, its last; R_i = ((r_0 + r_1) + … + r_i), and S
  is the last R. The window's running sum at the cell (i, j) is R_(i-1) + c_ij. In a window with
  depth the rows of a slice follow those of the slice before.
- The draw takes the first cell in row-major order whose running sum exceeds t = u * S. Rounding is
  monotonic and the running sum at the end of row i is R_i, so running sums never fall: the cell is
  the last one before which the running sum is at most t, which is how it is written below, and its
  weight is above 0.
- Where S <= t there is no such cell and the window is dead. That is where S = 0, and where S is so
  small, at most 2**-134 in fp32, that u * S may round to S. The output is then the weight of the
  window's last cell, 0 if that is padding: by the sum it is at most S, too little to matter.
- A window with a NaN takes its last NaN, as max pooling does.
- Where S overflows to infinity, other weights v stand for w: with infinite cells 1 for those and 0
  for the others, else w * 2**-32.

Every backend is a module with the four functions below, for planes `(N, C, H, W)` and for volumes
`(N, C, D, H, W)`; those that say `(N, C, H, W)` mean either. A `code` is a cell's number inside its
window (`Window.code_dtype`), `Window.dead_code` where the window is dead, which has no gradient.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .philox import uniforms
from .window import Window, larger, memory_format

Tensors: TypeAlias = tuple[Tensor, ...]

OVERFLOW_SCALE = 2.0**-32
# A window whose sum is smaller has no gradient in evaluation: 1 / S would overflow in fp32.
SMALLEST_SUM = 2.0**-100
# On a CPU so many planes are pooled at a time that they, or what is made for each row of a window,
# are at most these elements: then the caches hold them.
CACHED_ELEMENTS = 2**19


def sample(
    input: Tensor, bias: Tensor | None, seed: Tensor, window: Window
) -> tuple[Tensor, Tensor]:
    """Draw one cell of every window.

    Args:
        input: `(N, C, H, W)` in fp16, bf16, fp32 or fp64.
        bias: `(C,)` in any of these, or None.
        seed: int64 scalar on the input's device.

    Returns:
        output `(N, C, OH, OW)` in the input's dtype, and code in `window.code_dtype`, both in the
        input's memory format.
    """

    def draw(first_plane: int, planes: Tensor, biases: Tensor | None) -> Tensors:
        weights = _Weights(planes, biases, window)
        threshold = uniforms(seed, weights.sum.shape, first_plane) * weights.sum
        # The cells before which the running sum is at most the threshold. Running sums only grow,
        # so the last of them is the drawn one.
        reached = torch.zeros_like(weights.before_row, dtype=window.code_dtype)
        before_cell = torch.zeros_like(weights.before_row)
        for v in weights.columns():
            reached += weights.before_row + before_cell <= threshold
            before_cell = before_cell + v
        code = functools.reduce(torch.add, reached) - 1
        if weights.unusual:
            nans = _windows(weights.padded.isnan(), window).flatten(0, 2)
            number = torch.arange(window.cells, dtype=torch.int32, device=code.device)
            last_nan = torch.where(nans, number.view(-1, *[1] * code.dim()), -1).amax(0)
            code = torch.where(weights.sum.isnan(), last_nan, code)
        value = weights.cells(code) + 0.0  # no negative zero
        code = torch.where(weights.sum <= threshold, window.dead_code, code)
        return value.to(input.dtype), code.to(window.code_dtype)

    output, code = _by_planes(draw, window, input.shape[2:], input, bias)
    return _laid_out(output, input), _laid_out(code, input)


def sample_backward(
    grad_output: Tensor, code: Tensor, size: Sequence[int], window: Window, with_bias: bool
) -> tuple[Tensor, Tensor]:
    """Send each output's gradient to the cell that was drawn.

    Args:
        grad_output: `(N, C, OH, OW)`.
        code: what `sample` returned.
        size: of the input planes, (height, width), or volumes, (depth, height, width).
        with_bias: whether the bias's gradient is wanted.

    Returns:
        grad_input `(N, C, *size)` in the dtype of `grad_output` and the memory format of
        `code`, and grad_bias `(C,)` in the accumulation dtype (empty without `with_bias`).
    """

    def send(_: int, grad: Tensor, code: Tensor) -> Tensors:
        grad = grad.to(accumulation_dtype(grad_output.dtype))
        grad = torch.where(code == window.dead_code, 0, grad).flatten(1)
        cells = window.flat_indices(code, *size).flatten(1)
        sent = grad.new_zeros(len(grad), math.prod(size))
        # From the last window on, so that a CPU adds in the order of the cells, as the kernels do.
        sent.scatter_add_(1, cells.flip(1), grad.flip(1))
        return sent.view(len(grad), *size).to(grad_output.dtype), grad.sum(1)

    grad_input, sums = _by_planes(send, window, size, grad_output, code)
    return _laid_out(grad_input, code), sums.sum(0) if with_bias else sums.new_empty(0)


def expectation(input: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """The expectation of the draw in every window; shapes and types as in `sample`."""

    def mean(_: int, planes: Tensor, biases: Tensor | None) -> Tensors:
        return (_Weights(planes, biases, window).expectation().to(input.dtype),)

    (output,) = _by_planes(mean, window, input.shape[2:], input, bias)
    return _laid_out(output, input)


def expectation_backward(
    grad_output: Tensor, input: Tensor, bias: Tensor | None, window: Window, with_bias: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of `expectation`: a cell gets (2 w - y) / S from each window that it lies in.

    In a window with infinite cells it is the limit: 1 / k for each of its k infinite cells, -1 / k
    for every other live one. Shapes and types as in `sample_backward`.
    """

    def send(_: int, grad: Tensor, planes: Tensor, biases: Tensor | None) -> Tensors:
        weights = _Weights(planes, biases, window)
        grad = grad.to(weights.sum.dtype).view(weights.sum.shape)
        # grad_w = 2 w * sum(slope) - sum(offset), over the windows that hold the cell.
        slope = torch.where(weights.sum < SMALLEST_SUM, 0, grad / weights.sum)
        offset = slope * weights.scaled_expectation()
        # The weights of an infinite window are indicators, not multiples of w: no slope there.
        slope = torch.where(weights.infinite, 0, slope * weights.scale)
        slopes, offsets = (_spread(x, weights.w.shape[1:], window) for x in (slope, offset))
        # Without a slope w does not count, and may be NaN: a cell that no window holds.
        grad_w = torch.where(slopes == 0, -offsets, weights.w * (2 * slopes) - offsets)
        grad_w = torch.where(weights.w.isinf(), offsets, grad_w)
        grad_w = torch.where(weights.w == 0, 0, grad_w)
        return grad_w.to(grad_output.dtype), grad_w.sum((1, 2, 3))

    grad_input, sums = _by_planes(send, window, input.shape[2:], grad_output, input, bias)
    return _laid_out(grad_input, input), sums.sum(0) if with_bias else sums.new_empty(0)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic for inputs of `dtype`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rectify(input: Tensor, bias: Tensor | None) -> Tensor:
    """max(input + bias, 0) in the accumulation dtype; NaN stays NaN."""
    w = input.to(accumulation_dtype(input.dtype))
    if bias is not None:
        w = w + bias.to(w.dtype).view(bias.shape[0], *[1] * (w.dim() - 2))
    return w.relu()


class _Weights:
    """The weights of every window, column by column, and their sums.

    Attributes:
        w: `(planes, D, H, W)`.
        before_row: R of the row before, `(KD * KH, planes, OD, OH, OW)`.
        sum: S, or the sum of v where S overflows, `(planes, OD, OH, OW)`.
        infinite: where a window holds an infinite cell and no NaN; a scalar if nowhere.
        scale: v / w in a window that is not infinite: `OVERFLOW_SCALE` where S overflows, else 1.
        unusual: whether some S may be NaN, or overflow so that other weights stand in.
    """

    def __init__(self, planes: Tensor, biases: Tensor | None, window: Window):
        self.window = window
        volumes = planes if planes.dim() == 4 else planes.unsqueeze(1)
        self.w = rectify(volumes[None], biases)[0]
        # Padding is no candidate: with weight 0 it is never drawn and adds nothing to a sum.
        self.padded = _pad(self.w, window)
        self.infinite = self.w.new_zeros((), dtype=torch.bool)
        self.scale = self.w.new_ones(())
        self.unusual = False
        self._add()
        # On a CPU it costs nothing to ask whether some sum is not finite; elsewhere asking would
        # wait for the device, so all is done as if one were not.
        self.unusual = planes.device.type != "cpu" or (
            self.sum.numel() > 0 and not bool(self.sum.amax().isfinite())
        )
        if self.unusual:
            overflow = self.sum.isinf()
            self.infinite = overflow & _windows(self.padded.isinf(), window).flatten(0, 2).any(0)
            self.scale = torch.where(overflow, OVERFLOW_SCALE, self.scale)
            self._add()

    def columns(self) -> Iterator[Tensor]:
        """The v of each column of the window, `(KD * KH, planes, OD, OH, OW)`."""
        for column in _windows(self.padded, self.window).unbind(2):
            yield self._stand_in(column.flatten(0, 1))

    def cells(self, code: Tensor) -> Tensor:
        """The weight of the cell `code` of every window."""
        size = self.padded.shape[1:]
        places = torch.arange(math.prod(size), device=code.device).view(1, *size)
        places = _windows(places, self.window).flatten(0, 2)
        index = places[:, 0, 0, 0, 0][code.to(torch.int64)] + places[0]
        return self.padded.flatten(1).gather(1, index.flatten(1)).view(code.shape)

    def _stand_in(self, w: Tensor) -> Tensor:
        if not self.unusual:
            return w
        return torch.where(self.infinite, w.isinf().to(w.dtype), w * self.scale)

    def _add(self) -> None:
        # From a contiguous one on, so that sums are contiguous, in which what follows is faster.
        first, *rest = self.columns()
        rows = functools.reduce(torch.add, rest, first.contiguous())
        *before, self.sum = itertools.accumulate(rows, torch.add)
        self.before_row = torch.stack((torch.zeros_like(self.sum), *before))

    def scaled_expectation(self) -> Tensor:
        """sum v * v / S, 0 for a dead window."""
        divisor = torch.where(self.sum == 0, 1, self.sum)
        rows = torch.zeros_like(self.before_row)
        for v in map(Tensor.contiguous, self.columns()):
            rows.addcmul_(v, v / divisor)
        return functools.reduce(torch.add, rows)

    def expectation(self) -> Tensor:
        expectation = self.scaled_expectation()
        if not self.unusual:
            return expectation
        # Rounding takes a mean of the largest numbers beyond them.
        largest = torch.finfo(expectation.dtype).max
        return torch.where(self.infinite, torch.inf, (expectation / self.scale).clamp(max=largest))


def cells(planes: Tensor, window: Window) -> list[Tensor]:
    """For each cell of the window, in row-major order, its value in every window.

    Args:
        planes: `(N, C, H, W)`, or volumes `(N, C, D, H, W)`.

    Returns:
        as many `(N, C, OH, OW)` or `(N, C, OD, OH, OW)` tensors, 0 where the cell is padding.
    """
    volumes = planes if planes.dim() == 5 else planes.unsqueeze(2)
    padded = _pad(volumes, window)
    steps = [
        [
            slice(cell * dilation, cell * dilation + (outputs - 1) * stride + 1, stride)
            for cell in range(kernel)
        ]
        for outputs, (kernel, stride, _, dilation) in zip(
            window.output_size(*volumes.shape[2:]), window.sides(3), strict=True
        )
    ]
    views = (padded[:, :, d, h, w] for d, h, w in itertools.product(*steps))
    return [view if planes.dim() == 5 else view.squeeze(2) for view in views]


def _by_planes(
    do: Callable[..., Tensors], window: Window, size: Sequence[int], *tensors: Tensor | None
) -> list[Tensor]:
    """What `do` makes of `(N, C, ...)` and `(C,)` tensors, some planes at a time: it is given the
    number of the first, and of each tensor `(planes, ...)`."""
    assert tensors[0] is not None
    batch, channels = tensors[0].shape[:2]
    each = batch * channels
    if tensors[0].device.type == "cpu":
        rows = window.kernel_d * window.kernel_h * math.prod(window.output_size(*size))
        each = CACHED_ELEMENTS // max(rows, math.prod(size))
    each = max(each, 1)
    parts = [
        itertools.repeat(None)
        if t is None
        else t.expand(batch, channels, *t.shape[2:]).contiguous().flatten(0, 1).split(each)
        for t in tensors
    ]
    done = [do(n * each, *part) for n, part in enumerate(zip(*parts, strict=False))]
    results = [torch.cat(parts) for parts in zip(*done, strict=True)]
    return [result.view(batch, channels, *result.shape[1:]) for result in results]


def _windows(padded: Tensor, window: Window) -> Tensor:
    """A view of the cells of every window, `(KD, KH, KW, planes, OD, OH, OW)`."""
    for dim, (kernel, stride, _, dilation) in enumerate(window.sides(3), 1):
        padded = padded.unfold(dim, (kernel - 1) * dilation + 1, stride)[..., ::dilation]
    return padded.movedim((4, 5, 6), (0, 1, 2))


def _laid_out(result: Tensor, like: Tensor) -> Tensor:
    """`result` with the number of dimensions and in the memory format of `like`."""
    result = result if like.dim() == result.dim() else result.squeeze(2)
    # Not `contiguous`, which leaves the strides of 1 x 1 planes; nor a view of what it was made
    # from: what a Function returns could not be changed in place if it were one.
    return result.clone(memory_format=memory_format(like))


def _padded_size(size: Sequence[int], window: Window) -> tuple[int, ...]:
    """Depth, height and width of a volume that holds every cell of every window."""
    return tuple(
        larger((outputs - 1) * stride + (kernel - 1) * dilation + 1, length + padding)
        for length, outputs, (kernel, stride, padding, dilation) in zip(
            size, window.output_size(*size), window.sides(3), strict=True
        )
    )


def _pad(volumes: Tensor, window: Window) -> Tensor:
    """The volumes with zeros around them, so large as `_padded_size`."""
    size = volumes.shape[-3:]
    margins: list[int] = []
    for padded, length, (_, _, padding, _) in zip(
        _padded_size(size, window), size, window.sides(3), strict=True
    ):
        margins = [padding, padded - length - padding, *margins]
    return F.pad(volumes, margins)


def _spread(values: Tensor, size: Sequence[int], window: Window) -> Tensor:
    """For each cell of `(planes, D, H, W)` the sum of the values of the windows that hold it."""
    padded_size = _padded_size(size, window)
    for dim, (kernel, stride, padding, dilation) in enumerate(window.sides(3)):
        of_windows = values.movedim(dim + 1, 0)
        shape = list(values.shape)
        shape[dim + 1] = padded_size[dim]
        of_cells = values.new_zeros(shape).movedim(dim + 1, 0)
        for cell in range(0, kernel * dilation, dilation):
            of_cells[cell : cell + (len(of_windows) - 1) * stride + 1 : stride] += of_windows
        values = of_cells[padding : padding + size[dim]].movedim(0, dim + 1)
    return values
