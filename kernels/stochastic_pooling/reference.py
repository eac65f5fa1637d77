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
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from .philox import uniforms
from .window import Window, larger, memory_format

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
    volumes = _volumes(input)
    images = volumes.shape[0]
    if input.device.type == "cpu":
        images = CACHED_ELEMENTS * images // max(volumes.numel(), 1)
    images = max(images, 1)
    drawn = [
        _sample(part, bias, seed, window, first_image=n * images)
        for n, part in enumerate(volumes.split(images))
    ]
    output, code = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    return _laid_out(output, input), _laid_out(code, input)


def _sample(
    input: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor,
    window: Window,
    first_image: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = _Weights(input, bias, window)
    u = uniforms(seed, weights.sum.shape, first_image).to(weights.sum.dtype)
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
    value = weights.cells(code) + 0.0  # no negative zero
    return value.to(input.dtype), torch.where(weights.sum <= threshold, window.dead_code, code)


def sample_backward(
    grad_output: torch.Tensor,
    code: torch.Tensor,
    size: Sequence[int],
    window: Window,
    with_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
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
    grad, codes = _volumes(grad_output), _volumes(code)
    grad = grad.to(accumulation_dtype(grad_output.dtype))
    size = (1, *size)[-3:]
    grad_padded = grad.new_zeros(*grad.shape[:2], *_padded_size(size, window))
    for cell, target in enumerate(_cell_views(grad_padded, window, codes.shape[2:])):
        target += torch.where(codes == cell, grad, 0)
    grad_input = _crop(grad_padded, size, window).to(grad_output.dtype)
    live = torch.where(codes == window.dead_code, 0, grad)
    grad_bias = live.sum((0, 2, 3, 4)) if with_bias else grad.new_empty(0)
    return _laid_out(grad_input, code), grad_bias


def expectation(input: torch.Tensor, bias: torch.Tensor | None, window: Window) -> torch.Tensor:
    """The expectation of the draw in every window; shapes and types as in `sample`."""
    weights = _Weights(_volumes(input), bias, window)
    return _laid_out(weights.expectation().to(input.dtype), input)


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
    volumes = _volumes(input)
    weights = _Weights(volumes, bias, window)
    grad = _volumes(grad_output).to(weights.sum.dtype)
    # grad_w = 2 w * sum(slope) - sum(offset), over the windows that hold the cell.
    live = ~(weights.sum < SMALLEST_SUM)
    slope = torch.where(live, grad / weights.sum, 0)
    offset = slope * weights.scaled_expectation()
    # The weights of an infinite window are indicators, not multiples of w: no slope there.
    slope = torch.where(weights.infinite, 0, slope * weights.scale)
    size = volumes.shape[2:]
    slopes, offsets = grad.new_zeros(2, *volumes.shape[:2], *_padded_size(size, window)).unbind()
    for slope_view, offset_view in zip(
        _cell_views(slopes, window, grad.shape[2:]),
        _cell_views(offsets, window, grad.shape[2:]),
        strict=True,
    ):
        slope_view += slope
        offset_view += offset
    slopes, offsets = (_crop(padded, size, window) for padded in (slopes, offsets))
    w = rectify(volumes, bias)
    # Without a slope w does not count, and may be NaN: a cell that no window holds.
    grad_w = torch.where(slopes == 0, -offsets, w * (2 * slopes) - offsets)
    grad_w = torch.where(w.isinf(), offsets, grad_w)
    grad_w = torch.where(w == 0, 0, grad_w)
    grad_bias = grad_w.sum((0, 2, 3, 4)) if with_bias else grad.new_empty(0)
    return _laid_out(grad_w.to(grad_output.dtype), input), grad_bias


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic for inputs of `dtype`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rectify(input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """max(input + bias, 0) in the accumulation dtype; NaN stays NaN."""
    w = input.to(accumulation_dtype(input.dtype))
    if bias is not None:
        w = w + bias.to(w.dtype).view(-1, *[1] * (w.dim() - 2))
    return w.relu()


class _Weights:
    """The weights of every window, cell by cell, and their sums.

    Attributes:
        sum: S, or the sum of v where S overflows, `(N, C, OD, OH, OW)`.
        infinite: where a window holds an infinite cell and no NaN; a scalar if nowhere.
        scale: v / w, `OVERFLOW_SCALE` where S overflows without an infinite cell, else 1.
        unusual: whether some S may be NaN, or overflow so that other weights stand in.
    """

    def __init__(self, input: torch.Tensor, bias: torch.Tensor | None, window: Window):
        self.window = window
        self.output_size = window.output_size(*input.shape[2:])
        w = rectify(input, bias)
        # Padding is no candidate: with weight 0 it is never drawn and adds nothing to a sum.
        self.padded = _pad(w, window)
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
        """Rows of cells; a cell is (w, v), two `(N, C, OD, OH, OW)` tensors."""
        views = list(_cell_views(self.padded, self.window, self.output_size))
        for start in range(0, len(views), self.window.kernel_w):
            yield ((w, self._stand_in(w)) for w in views[start : start + self.window.kernel_w])

    def cells(self, code: torch.Tensor) -> torch.Tensor:
        """The weight of the cell `code` of every window."""
        depth, height, width = self.padded.shape[2:]
        places = torch.arange(depth * height * width, device=code.device)
        places = places.view(1, 1, depth, height, width)
        views = list(_cell_views(places, self.window, self.output_size))
        offset = torch.stack([view[0, 0, 0, 0, 0] for view in views])
        index = offset[code.to(torch.int64)] + views[0]
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
        # Rounding takes a mean of the largest numbers beyond them.
        largest = torch.finfo(expectation.dtype).max
        return torch.where(self.infinite, torch.inf, (expectation / self.scale).clamp(max=largest))


def cells(planes: torch.Tensor, window: Window) -> list[torch.Tensor]:
    """For each cell of the window, in row-major order, its value in every window.

    Args:
        planes: `(N, C, H, W)`, or volumes `(N, C, D, H, W)`.

    Returns:
        as many `(N, C, OH, OW)` or `(N, C, OD, OH, OW)` tensors, 0 where the cell is padding.
    """
    volumes = _volumes(planes)
    views = _cell_views(_pad(volumes, window), window, window.output_size(*volumes.shape[2:]))
    return [view if planes.dim() == 5 else view.squeeze(2) for view in views]


def _volumes(planes: torch.Tensor) -> torch.Tensor:
    """`(N, C, H, W)` as `(N, C, 1, H, W)`; volumes as they are."""
    return planes if planes.dim() == 5 else planes.unsqueeze(2)


def _laid_out(volumes: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`volumes` with the number of dimensions and in the memory format of `like`."""
    result = volumes if like.dim() == 5 else volumes.squeeze(2)
    return result.contiguous(memory_format=memory_format(like))


def _padded_size(size: Sequence[int], window: Window) -> tuple[int, ...]:
    """Depth, height and width of a volume that holds every cell of every window."""
    return tuple(
        larger((outputs - 1) * stride + (kernel - 1) * dilation + 1, length + padding)
        for length, outputs, (kernel, stride, padding, dilation) in zip(
            size, window.output_size(*size), window.sides(3), strict=True
        )
    )


def _pad(volumes: torch.Tensor, window: Window) -> torch.Tensor:
    """The volumes with zeros around them, so large as `_padded_size`."""
    size = volumes.shape[2:]
    margins: list[int] = []
    for padded, length, (_, _, padding, _) in zip(
        _padded_size(size, window), size, window.sides(3), strict=True
    ):
        margins = [padding, padded - length - padding, *margins]
    return F.pad(volumes, margins)


def _cell_views(
    padded: torch.Tensor, window: Window, output_size: Sequence[int]
) -> Iterator[torch.Tensor]:
    """For each cell of the window, in row-major order, its `(N, C, OD, OH, OW)` view."""
    steps = [
        [
            slice(cell * dilation, cell * dilation + (outputs - 1) * stride + 1, stride)
            for cell in range(kernel)
        ]
        for outputs, (kernel, stride, _, dilation) in zip(output_size, window.sides(3), strict=True)
    ]
    for slices, rows, cols in itertools.product(*steps):
        yield padded[:, :, slices, rows, cols]


def _crop(padded: torch.Tensor, size: Sequence[int], window: Window) -> torch.Tensor:
    for dim, (length, (_, _, padding, _)) in enumerate(zip(size, window.sides(3), strict=True), 2):
        padded = padded.narrow(dim, padding, length)
    return padded
