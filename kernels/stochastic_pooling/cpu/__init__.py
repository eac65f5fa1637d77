"""Stochastic pooling on the CPU, compiled by numba: the four functions of `reference.py`.

Compiled are the windows that networks train with: 2 or 3 cells a side, strides of 1 or 2, no
dilation, in fp16, bf16 and fp32. The reference serves the others, fp64 and volumes, and every call
whose numbers are too large, or for the expectation too small, for plain sums in fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .. import reference
from ..window import Window, memory_format

try:
    import numpy as np

    from . import compiling
    from .floats import FLOATS
    from .kernels import GROUP, PLAN, backward, forward
except Exception as error:  # numba refuses versions of Python and numpy in several ways
    raise ImportError(f"numba cannot be used here: {error}") from error

# Contiguous planes that are transposed together.
_MOST_PLANES = 32
# Below this many numbers a second thread costs more than it saves.
_SMALL = 16_384
_CPU = torch.device("cpu")  # whatever the default is
_NOTHING = torch.zeros(0, dtype=torch.float32, device=_CPU)


class _Plan:
    """How the planes of a shape, format and window are walked over."""

    def __init__(self, shape: tuple[int, ...], layout: torch.memory_format, window: Window) -> None:
        batch, channels, height, width = shape
        out_height, out_width = window.output_size(height, width)
        planes, planar = batch * channels, layout == torch.contiguous_format
        sheets = -(-planes // _MOST_PLANES) if planar else batch
        step, groups = -(-planes // sheets), -(-height // GROUP)
        sides = window.kernel_h, window.kernel_w, window.stride_h, window.stride_w
        # Room for all columns of windows, and in a gather for windows on both sides of them.
        columns = max(out_width * window.stride_w, width + window.padding_w) + window.kernel_w
        self.numbers = np.array(
            [(
                planar, planes, step, sheets, height, width, out_height, out_width, *sides[2:],
                window.padding_h, window.padding_w, columns * step,
            )],
            PLAN,
        )  # fmt: skip
        self.address = self.numbers.ctypes.data
        self.sides, self.layout = sides, layout
        self.batch, self.width, self.partial_size = batch, width, (sheets, groups, step)
        large = planes * max(height * width, out_height * out_width) > _SMALL
        self.most_threads = sheets * groups if large else 1
        # Shapes and strides: what is dense in both formats has those of the first.
        self.input, self.output = (
            (size, torch.empty(size, device="meta").contiguous(memory_format=layout).stride())
            for size in (shape, (batch, channels, out_height, out_width))
        )

    def dense(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous(memory_format=self.layout)

    def run(
        self,
        make: Callable[..., Any],
        training: bool,
        bias: torch.Tensor | None,
        *tensors: torch.Tensor,
    ) -> bool:
        """Run a pass; False if there are numbers that only the reference takes."""
        sides = self.sides if make is backward else self.sides[:2]
        body = _compiled(make, tensors[0].dtype, training, *sides)
        lanes = _NOTHING
        if bias is not None and bias.numel() > 0:  # for each lane of a row of each sheet
            sheets, _, step = self.partial_size
            lanes = bias.float().repeat(self.batch)
            lanes = F.pad(lanes, (0, sheets * step - lanes.numel())).view(sheets, 1, step)
            lanes = lanes.expand(-1, self.width, -1).contiguous()
        addresses = [tensor.data_ptr() for tensor in (lanes, *tensors)]
        parts = min(torch.get_num_threads(), self.most_threads)
        return compiling.run(body, parts, bias is not None, self.address, *addresses)


@functools.lru_cache(maxsize=256)
def _plan(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, window: Window
) -> _Plan | None:
    """None if the reference serves."""
    slides = {window.kernel_h, window.kernel_w} <= {2, 3} and {
        window.stride_h,
        window.stride_w,
    } <= {1, 2}
    if len(shape) != 4 or 0 in shape or dtype not in FLOATS or not slides:
        return None
    return _Plan(shape, layout, window) if window.dilation_h == window.dilation_w == 1 else None


@functools.cache
def _compiled(
    make: Callable[..., Any], dtype: torch.dtype, training: bool, *sides: int
) -> Callable[[Any], None]:
    what = f"{make.__name__} in {'training' if training else 'evaluation'}"
    what = f"{what}, {sides[0]} x {sides[1]} cells, {str(dtype).removeprefix('torch.')},"
    return compiling.compiled_for_c(make(*FLOATS[dtype], training, *sides), what)


def _empty(tensor: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(*tensor, dtype=dtype, device=_CPU)


def sample(
    input: torch.Tensor, bias: torch.Tensor | None, seed: torch.Tensor, window: Window
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.sample`."""
    plan = _plan(input.shape, input.dtype, memory_format(input), window)
    if plan is not None:
        output, code = _empty(plan.output, input.dtype), _empty(plan.output, torch.uint8)
        if plan.run(forward, True, bias, plan.dense(input), output, code, seed):
            return output, code
    return reference.sample(input, bias, seed, window)


def sample_backward(
    grad_output: torch.Tensor,
    code: torch.Tensor,
    size: Sequence[int],
    window: Window,
    with_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.sample_backward`."""
    shape = (*grad_output.shape[:2], *size)
    plan = _plan(shape, grad_output.dtype, memory_format(code), window)
    bias = _NOTHING if with_bias else None
    gradients = plan and _gradients(plan, True, bias, with_bias, grad_output, code)
    return gradients or reference.sample_backward(grad_output, code, size, window, with_bias)


def expectation(input: torch.Tensor, bias: torch.Tensor | None, window: Window) -> torch.Tensor:
    """See `reference.expectation`."""
    plan = _plan(input.shape, input.dtype, memory_format(input), window)
    if plan is not None:
        output = _empty(plan.output, input.dtype)
        if plan.run(forward, False, bias, plan.dense(input), output):
            return output
    return reference.expectation(input, bias, window)


def expectation_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    bias: torch.Tensor | None,
    window: Window,
    with_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.expectation_backward`."""
    plan = _plan(input.shape, input.dtype, memory_format(input), window)
    if grad_output.dtype != input.dtype or (with_bias and bias is None):
        plan = None
    gradients = plan and _gradients(plan, False, bias, with_bias, grad_output, input)
    return gradients or reference.expectation_backward(grad_output, input, bias, window, with_bias)


def _gradients(
    plan: _Plan, training: bool, bias: torch.Tensor | None, with_bias: bool, *tensors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    grad_output, kept = map(plan.dense, tensors)
    grad_input = _empty(plan.input, grad_output.dtype)
    partial = _NOTHING if bias is None else _NOTHING.new_zeros(plan.partial_size)
    if not plan.run(backward, training, bias, grad_output, grad_input, partial, kept):
        return None
    if not with_bias:
        return grad_input, _NOTHING.new_empty(0)  # a new one, for autograd makes it part of a graph
    # numpy, unlike torch, adds in an order that does not depend on a number of threads.
    sums = np.add.reduce(partial.numpy(), 1, np.float64).reshape(-1)
    sums = np.add.reduce(
        sums[: len(grad_input) * grad_input.shape[1]].reshape(len(grad_input), -1), 0
    )
    return grad_input, torch.from_numpy(sums.astype(np.float32))
