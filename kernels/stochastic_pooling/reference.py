"""Stochastic pooling in plain PyTorch: the definition that every other backend is held against.

Stochastic pooling (Zeiler & Fergus, "Stochastic pooling for regularization of deep convolutional
neural networks", ICLR 2013, section 3) of the rectified weights w = max(a + b, 0) of a window with
sum S: training draws one cell with probability w / S (equation 3.1), evaluation gives the
expectation of that draw, sum w * w / S (equation 3.2).

The order of arithmetic, which decides the drawn cell and so is part of the contract:

- w is taken in fp32 (fp64 for fp64 inputs). Row i of the window has the running sums
  c_ij = ((w_i0 + w_i1) + … + w_ij) and the sum r_i, its last; R_i = ((r_0 + r_1) + … + r_i), and S
  is the last R. The window's running sum at the cell (i, j) is R_(i-1) + c_ij.
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

Every backend is a module with the four functions below. A `code` is a cell's number inside its
window (`Window.code_dtype`), `Window.dead_code` where the window is dead, which has no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .philox import uniforms
from .window import Window, memory_format

OVERFLOW_SCALE = 2.0**-32
# A window whose sum is smaller has no gradient in evaluation: 1 / S would overflow in fp32.
SMALLEST_SUM = 2.0**-100
# On a CPU as many images are drawn at a time as have these elements, so that what is made for them
# stays in the caches.
CACHED_ELEMENTS = 2**18


def sample(
    input: torch.Tensor, bias: torch.Tensor | None, seed: torch.Tensor, window: Window
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one cell of every window.

    Args:
        input: `(N, C, H, W)` in fp16, bf16, fp32 or fp64.
        bias: `(C,)` in any of these, or None.
        seed: int64 scalar on the input's device.

    Returns:
        output `(N, C, OH, OW)` in the input's dtype, and code in `window.code_dtype`, both in the
        input's memory format.
    """
    images = input.shape[0]
    if input.device.type == "cpu":
        images = CACHED_ELEMENTS * images // max(input.numel(), 1)
    images = max(images, 1)
    drawn = [
        _sample(part, bias, seed, window, first_plane=n * images * input.shape[1])
        for n, part in enumerate(input.split(images))
    ]
    output, code = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    layout = memory_format(input)
    return output.contiguous(memory_format=layout), code.contiguous(memory_format=layout)


def _sample(
    input: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor,
    window: Window,
    first_plane: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = _Weights(input, bias, window)
    u = uniforms(seed, weights.sum.shape, first_plane).to(weights.sum.dtype)
    threshold = u * weights.sum
    # The cells before which the running sum is at most the threshold. Running sums only grow, so
    # the last of them is the drawn one.
    reached = torch.zeros_like(threshold, dtype=window.code_dtype)
    before_row = torch.zeros_like(threshold)
    for i, row in enumerate(weights.rows()):
        before_cell = torch.zeros_like(threshold)
        for j, (_, v) in enumerate(row):
            reached += before_row + before_cell <= threshold
            if weights.unusual:
                reached = torch.where(v.isnan(), i * window.kernel_w + j + 1, reached)
            before_cell = before_cell + v
        before_row = before_row + before_cell
    code = reached - 1
    value = weights.cells(code)
    return value.to(input.dtype), torch.where(weights.sum <= threshold, window.dead_code, code)


def sample_backward(
    grad_output: torch.Tensor,
    code: torch.Tensor,
    height: int,
    width: int,
    window: Window,
    with_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Send each output's gradient to the cell that was drawn.

    Args:
        grad_output: `(N, C, OH, OW)`.
        code: what `sample` returned.
        height, width: size of the input planes.
        with_bias: whether the bias's gradient is wanted.

    Returns:
        grad_input `(N, C, height, width)` in the dtype of `grad_output` and the memory format of
        `code`, and grad_bias `(C,)` in the accumulation dtype (empty without `with_bias`).
    """
    grad = grad_output.to(accumulation_dtype(grad_output.dtype))
    grad_padded = grad.new_zeros(*grad.shape[:2], *_padded_size(height, width, window))
    for cell, target in enumerate(_cell_views(grad_padded, window, code.shape[-2:])):
        target += torch.where(code == cell, grad, 0)
    layout = memory_format(code)
    grad_input = _crop(grad_padded, height, width, window)
    grad_input = grad_input.to(grad_output.dtype).contiguous(memory_format=layout)
    live = torch.where(code == window.dead_code, 0, grad)
    return grad_input, live.sum((0, 2, 3)) if with_bias else grad.new_empty(0)


def expectation(input: torch.Tensor, bias: torch.Tensor | None, window: Window) -> torch.Tensor:
    """The expectation of the draw in every window; shapes and types as in `sample`."""
    weights = _Weights(input, bias, window)
    layout = memory_format(input)
    return weights.expectation().to(input.dtype).contiguous(memory_format=layout)


def expectation_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    bias: torch.Tensor | None,
    window: Window,
    with_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of `expectation`: a cell gets (2 w - y) / S from each window that it lies in.

    In a window with infinite cells it is the limit: 1 / k for each of its k infinite cells, -1 / k
    for every other live one. Shapes and types as in `sample_backward`.
    """
    weights = _Weights(input, bias, window)
    grad = grad_output.to(weights.sum.dtype)
    # grad_w = 2 w * sum(slope) - sum(offset), over the windows that hold the cell.
    live = ~(weights.sum < SMALLEST_SUM)
    slope = torch.where(live, grad / weights.sum, 0)
    offset = slope * weights.scaled_expectation()
    # The weights of an infinite window are indicators, not multiples of w: no slope there.
    slope = torch.where(weights.infinite, 0, slope * weights.scale)
    height, width = input.shape[-2:]
    slopes, offsets = grad.new_zeros(
        2, *input.shape[:2], *_padded_size(height, width, window)
    ).unbind()
    for slope_view, offset_view in zip(
        _cell_views(slopes, window, grad.shape[-2:]),
        _cell_views(offsets, window, grad.shape[-2:]),
        strict=True,
    ):
        slope_view += slope
        offset_view += offset
    slopes, offsets = (_crop(padded, height, width, window) for padded in (slopes, offsets))
    w = rectify(input, bias)
    grad_w = torch.where(w.isinf(), offsets, w * (2 * slopes) - offsets)
    grad_w = torch.where(w == 0, 0, grad_w)
    grad_input = grad_w.to(grad_output.dtype)
    grad_input = grad_input.contiguous(memory_format=memory_format(input))
    return grad_input, grad_w.sum((0, 2, 3)) if with_bias else grad.new_empty(0)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic for inputs of `dtype`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rectify(input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """max(input + bias, 0) in the accumulation dtype; NaN stays NaN."""
    w = input.to(accumulation_dtype(input.dtype))
    if bias is not None:
        w = w + bias.to(w.dtype)[:, None, None]
    return w.relu()


class _Weights:
    """The weights of every window, cell by cell, and their sums.

    Attributes:
        sum: S, or the sum of v where S overflows, `(N, C, OH, OW)`.
        infinite: where a window holds an infinite cell and no NaN; a scalar if nowhere.
        scale: v / w, `OVERFLOW_SCALE` where S overflows without an infinite cell, else 1.
        unusual: whether some S may be NaN, or overflow so that other weights stand in.
    """

    def __init__(self, input: torch.Tensor, bias: torch.Tensor | None, window: Window):
        self.window = window
        height, width = input.shape[-2:]
        self.output_size = window.output_size(height, width)
        w = rectify(input, bias)
        # Padding is no candidate: with weight 0 it is never drawn and adds nothing to a sum.
        padded_height, padded_width = _padded_size(height, width, window)
        bottom = padded_height - height - window.padding_h
        right = padded_width - width - window.padding_w
        self.padded = F.pad(w, (window.padding_w, right, window.padding_h, bottom))
        self.infinite = w.new_zeros((), dtype=torch.bool)
        self.scale = w.new_ones(())
        self.unusual = False
        self.sum = self._sum()
        # On a CPU it costs nothing to ask whether some sum is not finite; elsewhere asking would
        # wait for the device, so all is done as if one were not.
        self.unusual = input.device.type != "cpu" or (
            self.sum.numel() > 0 and not bool(self.sum.amax().isfinite())
        )
        if self.unusual:
            overflow = self.sum.isinf()
            holds_infinity = torch.zeros_like(overflow)
            for row in self.rows():
                for w_cell, _ in row:
                    holds_infinity |= w_cell.isinf()
            self.infinite = overflow & holds_infinity
            self.scale = torch.where(overflow & ~holds_infinity, OVERFLOW_SCALE, self.scale)
            self.sum = torch.where(overflow, self._sum(), self.sum)

    def rows(self) -> Iterator[Iterator[tuple[torch.Tensor, torch.Tensor]]]:
        """Rows of cells; a cell is (w, v), two `(N, C, OH, OW)` tensors."""
        views = list(_cell_views(self.padded, self.window, self.output_size))
        for start in range(0, len(views), self.window.kernel_w):
            yield ((w, self._stand_in(w)) for w in views[start : start + self.window.kernel_w])

    def cells(self, code: torch.Tensor) -> torch.Tensor:
        """The weight of the cell `code` of every window."""
        width = self.padded.shape[-1]
        window, (out_h, out_w) = self.window, self.output_size
        device = code.device
        cell = torch.arange(window.cells, device=device)
        down = cell // window.kernel_w * window.dilation_h
        offset = down * width + cell % window.kernel_w * window.dilation_w
        top = torch.arange(out_h, device=device)[:, None] * window.stride_h
        corner = top * width + torch.arange(out_w, device=device) * window.stride_w
        index = offset[code.to(torch.int64)] + corner
        return self.padded.flatten(2).gather(2, index.flatten(2)).view(code.shape)

    def _stand_in(self, w: torch.Tensor) -> torch.Tensor:
        if not self.unusual:
            return w
        return torch.where(self.infinite, w.isinf().to(w.dtype), w * self.scale)

    def _sum(self) -> torch.Tensor:
        row_sums = (functools.reduce(torch.add, (v for _, v in row)) for row in self.rows())
        return functools.reduce(torch.add, row_sums)

    def scaled_expectation(self) -> torch.Tensor:
        """sum v * v / S, 0 for a dead window."""
        divisor = torch.where(self.sum == 0, 1, self.sum)
        total = torch.zeros_like(self.sum)
        for row in self.rows():
            for _, v in row:
                total.addcmul_(v, v / divisor)
        return total

    def expectation(self) -> torch.Tensor:
        expectation = self.scaled_expectation()
        if not self.unusual:
            return expectation
        return torch.where(self.infinite, torch.inf, expectation / self.scale)


def _padded_size(height: int, width: int, window: Window) -> tuple[int, int]:
    """Height and width of a plane that holds every cell of every window."""
    out_h, out_w = window.output_size(height, width)
    reach_h = (out_h - 1) * window.stride_h + (window.kernel_h - 1) * window.dilation_h + 1
    reach_w = (out_w - 1) * window.stride_w + (window.kernel_w - 1) * window.dilation_w + 1
    return max(reach_h, height + window.padding_h), max(reach_w, width + window.padding_w)


def _cell_views(
    padded: torch.Tensor, window: Window, output_size: tuple[int, int] | torch.Size
) -> Iterator[torch.Tensor]:
    """For each cell of the window, in row-major order, its `(N, C, OH, OW)` view into `padded`."""
    out_h, out_w = output_size
    for i in range(window.kernel_h):
        top = i * window.dilation_h
        rows = slice(top, top + (out_h - 1) * window.stride_h + 1, window.stride_h)
        for j in range(window.kernel_w):
            left = j * window.dilation_w
            cols = slice(left, left + (out_w - 1) * window.stride_w + 1, window.stride_w)
            yield padded[:, :, rows, cols]


def _crop(padded: torch.Tensor, height: int, width: int, window: Window) -> torch.Tensor:
    top, left = window.padding_h, window.padding_w
    return padded[:, :, top : top + height, left : left + width]
