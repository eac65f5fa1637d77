"""Stochastic pooling on the CPU, compiled by numba: the four functions of `reference.py`.

Compiled are windows that span up to 254 cells, and tiles, whose stride is their size, of up to
32,767, in fp16, bf16 and fp32: each takes seconds when it is first used, tiles of more than 4 cells
once for all. The reference serves the others, fp64 and volumes, and every call whose weights are
too large, or whose sums too small for the expectation, for plain fp32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..window import Window, memory_format

try:
    import numpy as np

    from . import compiling
    from .floats import NUMBERS
    from .kernels import NO_CELL, PLAN, ROWS, backward, forward
except Exception as error:  # numba refuses versions of Python and numpy in several ways
    raise ImportError(f"numba cannot be used here: {error}") from error

_MOST_PLANES = 32  # contiguous ones that are transposed together
_LONG_ROW = 40  # of a contiguous plane: enough for vectors, if none of its numbers need be moved
_CODES = {torch.uint8: np.uint8, torch.int16: np.int16}
_SMALL_TILE = 4  # cells
_SMALL = 16_384  # numbers, for which a second thread costs more than it saves
_NOTHING = torch.zeros(0, dtype=torch.float32, device="cpu")  # whatever the default is


class _Plan:
    """How the planes of a shape, format and window are walked over."""

    def __init__(self, shape: tuple[int, ...], layout: torch.memory_format, window: Window) -> None:
        self.batch, channels, height, self.width = shape
        self.layout, self.planes = layout, self.batch * channels
        sides = [(kernel, stride, dilation) for kernel, stride, _, dilation in window.sides(2)]
        contiguous = layout == torch.contiguous_format
        alone = window.stride_w == 1 and self.width >= _LONG_ROW
        out_height, out_width = window.output_size(height, self.width)
        # What a pass is compiled for; not the sizes of large tiles, which may be those of the data.
        self.constants = [] if _is_tiled(window) and window.cells > _SMALL_TILE else sides
        self.cell = window.code_dtype
        most = 1 if alone else _MOST_PLANES
        sheets = -(-self.planes // most) if contiguous else self.batch
        step, groups = -(-self.planes // sheets), -(-height // ROWS)
        self.partial_size = sheets, groups, step
        # Room for all columns of windows, and in a gather for windows on both sides of them.
        columns = self.width + window.padding_w + _spans(window)[1]
        phase = (-(-columns // window.stride_w) + 1) * step
        planar = contiguous and step > 1
        numbers = (planar, self.planes, step, sheets, height, self.width, out_height, out_width)
        tile = window.kernel_h, window.kernel_w
        others = (*tile, window.stride_w, window.padding_h, window.padding_w, phase)
        self.numbers = np.array([numbers + others], PLAN)
        self.address = self.numbers.ctypes.data
        large = self.planes * max(height * self.width, out_height * out_width) > _SMALL
        self.most_threads = sheets * groups if large else 1
        sizes = shape, (self.batch, channels, out_height, out_width)
        models = (torch.empty(size, device="meta", memory_format=layout) for size in sizes)
        # With the strides said it takes half the time.
        empty: Any = functools.partial(functools.partial, _NOTHING.new_empty_strided)
        self.input, self.output = (empty(model.shape, model.stride()) for model in models)

    def dense(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=self.layout)

    def run(self, make: Any, training: bool, bias: Any, *tensors: Tensor) -> bool:
        """Run a pass; False if there are numbers that only the reference takes."""
        cell = self.cell if training else torch.uint8  # evaluation has no codes
        body = _compiled(make, tensors[0].dtype, cell, training, *self.constants)
        biases = _NOTHING
        if bias is not None and len(bias) > 0:  # for each lane of a row of each sheet
            sheets, _, step = self.partial_size
            lanes = np.resize(bias.clone().float().numpy(force=True), (sheets, 1, step))
            biases = torch.from_numpy(lanes.repeat(self.width, 1))
        addresses = [tensor.data_ptr() for tensor in (biases, *tensors)]
        parts = min(torch.get_num_threads(), self.most_threads)
        return compiling.run(body, parts, bias is not None, self.address, *addresses)


def _spans(window: Window) -> list[int]:
    """Rows and columns from a window's first cell to its last."""
    return [(kernel - 1) * dilation + 1 for kernel, _, _, dilation in window.sides(2)]


def _is_tiled(window: Window) -> bool:
    return all(size == stride and dilation == 1 for size, stride, _, dilation in window.sides(2))


@functools.lru_cache(maxsize=256)
def _plan(shape: tuple[int, ...], dtype: Any, layout: Any, window: Window) -> _Plan | None:
    """None if the reference serves."""
    few = math.prod(_spans(window)) <= NO_CELL
    few = few or (_is_tiled(window) and window.code_dtype in _CODES)
    served = few and len(shape) == 4 and 0 not in shape and dtype in NUMBERS
    return _Plan(shape, layout, window) if served else None


@functools.cache
def _compiled(
    make: Any, dtype: torch.dtype, cell: torch.dtype, training: bool, *sides: tuple[int, ...]
) -> Callable[[Any], None]:
    what = f"{make.__name__} in {'training' if training else 'evaluation'}"
    cells = f"{sides[0][0]} x {sides[1][0]} cells" if sides else "tiles of any size"
    what = f"{what}, {cells}, {str(dtype).removeprefix('torch.')},"
    return compiling.compiled_for_c(make(NUMBERS[dtype], _CODES[cell], training, *sides), what)


def sample(input: Tensor, bias: Tensor | None, seed: Tensor, window: Window) -> reference.Tensors:
    plan = _plan(input.shape, input.dtype, memory_format(input), window)
    if plan is not None:
        output, code = (plan.output(dtype=dtype) for dtype in (input.dtype, plan.cell))
        if plan.run(forward, True, bias, plan.dense(input), output, code, seed):
            return output, code
    return reference.sample(input, bias, seed, window)


def sample_backward(
    grad_output: Tensor, code: Tensor, size: Sequence[int], window: Window, with_bias: bool
) -> reference.Tensors:
    plan = _plan((*grad_output.shape[:2], *size), grad_output.dtype, memory_format(code), window)
    bias = _NOTHING if with_bias else None
    gradients = plan and _gradients(plan, True, bias, with_bias, grad_output, code)
    return gradients or reference.sample_backward(grad_output, code, size, window, with_bias)


def expectation(input: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    plan = _plan(input.shape, input.dtype, memory_format(input), window)
    if plan is not None:
        output = plan.output(dtype=input.dtype)
        if plan.run(forward, False, bias, plan.dense(input), output):
            return output
    return reference.expectation(input, bias, window)


def expectation_backward(
    grad_output: Tensor, input: Tensor, bias: Tensor | None, window: Window, with_bias: bool
) -> reference.Tensors:
    served = grad_output.dtype == input.dtype and (bias is not None or not with_bias)
    plan = _plan(input.shape, input.dtype, memory_format(input), window)
    gradients = plan and served and _gradients(plan, False, bias, with_bias, grad_output, input)
    return gradients or reference.expectation_backward(grad_output, input, bias, window, with_bias)


def _gradients(
    plan: _Plan, training: bool, bias: Tensor | None, with_bias: bool, *tensors: Tensor
) -> reference.Tensors | None:
    grad_output, kept = map(plan.dense, tensors)
    grad_input = plan.input(dtype=grad_output.dtype)
    partial = _NOTHING if bias is None else _NOTHING.new_zeros(plan.partial_size)
    if not plan.run(backward, training, bias, grad_output, grad_input, partial, kept):
        return None
    if not with_bias:
        return grad_input, _NOTHING.new_empty(0)  # a new one, for autograd makes it part of a graph
    # numpy, unlike torch, adds in an order that does not depend on a number of threads.
    with np.errstate(all="ignore"):  # it would warn of infinities
        sums = partial.numpy().sum(1, np.float64).ravel()[: plan.planes].reshape(plan.batch, -1)
        return grad_input, torch.from_numpy(sums.sum(0).astype(np.float32))
