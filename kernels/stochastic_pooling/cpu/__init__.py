"""Stochastic pooling on the CPU, compiled by numba: the four functions of `reference.py`.

Compiled are the windows that networks train with: 2 or 3 cells a side, strides of 1 or 2, no
dilation, in fp16, bf16 and fp32. The reference serves the others, fp64 and volumes, and every call
whose numbers are too large, or for the expectation too small, for plain sums in fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .. import reference
from ..window import Window, memory_format

try:
    import numpy as np

    from . import threads
    from .compiling import compiled_for_c
    from .kernels import GROUP, PLAN, backward, forward
except Exception as error:  # numba refuses versions of Python and numpy in several ways
    raise ImportError(f"numba cannot be used here: {error}") from error

# What numba knows of each dtype: fp16 and bf16 are their bits, see floats.py.
_NUMBERS = {torch.float32: np.float32, torch.float16: np.uint16, torch.bfloat16: np.int16}
# Contiguous planes that are transposed together.
_MOST_PLANES = 32
# Below this many numbers a second thread costs more than it saves.
_SMALL = 16_384
_CPU = torch.device("cpu")  # whatever the default is
_NOTHING = torch.zeros(0, dtype=torch.float32, device=_CPU)


class _Plan(NamedTuple):
    """How the planes of a shape, format and window are walked over."""

    numbers: Any  # of kernels.PLAN
    address: int  # of the numbers
    layout: torch.memory_format
    input: tuple[tuple[int, ...], torch.memory_format]
    output: tuple[tuple[int, ...], torch.memory_format]
    partial_size: tuple[int, int, int]  # sheets, groups of rows, lanes of a column
    sides: tuple[int, int, int, int]
    most_threads: int


@functools.lru_cache(maxsize=256)
def _plan(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, window: Window
) -> _Plan | None:
    """None if the reference serves."""
    sides = window.kernel_h, window.kernel_w, window.stride_h, window.stride_w
    slides = {*sides[:2]} <= {2, 3} and {*sides[2:]} <= {1, 2}
    dilated = max(window.dilation_h, window.dilation_w) > 1
    if len(shape) != 4 or 0 in shape or dtype not in _NUMBERS or not slides or dilated:
        return None
    batch, channels, height, width = shape
    out_height, out_width = window.output_size(height, width)
    planes = batch * channels
    planar = layout == torch.contiguous_format
    sheets = -(-planes // _MOST_PLANES) if planar else batch
    step = -(-planes // sheets)
    # Columns of a row: of weights, those that windows look at; of gradients, those that a gather
    # looks at, which are windows or beside them.
    columns = max((out_width - 1) * window.stride_w + window.kernel_w, width + window.padding_w)
    last = (width - 1 + window.padding_w) // window.stride_w
    grad_columns = max(out_width, last + 1) + -(-window.kernel_w // window.stride_w) - 1
    numbers = np.array(
        [(
            planar, channels, planes, step, sheets, height, width, out_height, out_width, *sides,
            window.padding_h, window.padding_w, columns * step, grad_columns * step,
        )],
        PLAN,
    )  # fmt: skip
    groups = -(-height // GROUP)
    size = planes * max(height * width, out_height * out_width)

    def tensor(height: int, width: int) -> tuple[tuple[int, ...], torch.memory_format]:
        # What is dense in both formats has the strides of the first, as from `contiguous`.
        dense = torch.contiguous_format if height == width == 1 else layout
        return (batch, channels, height, width), dense

    return _Plan(
        numbers, numbers.ctypes.data, layout, tensor(height, width), tensor(out_height, out_width),
        (sheets, groups, step), sides, sheets * groups if size > _SMALL else 1,
    )  # fmt: skip


def sample(
    input: torch.Tensor, bias: torch.Tensor | None, seed: torch.Tensor, window: Window
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.sample`."""
    plan = _plan(input.shape, input.dtype, memory_format(input), window)
    if plan is not None:
        output, code = _empty(plan.output, input.dtype), _empty(plan.output, torch.uint8)
        tensors = _dense(input, plan), _bias(bias), output, code, seed
        if _run(forward, True, plan, bias is not None, *tensors):
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
    if plan is None:
        return reference.sample_backward(grad_output, code, size, window, with_bias)
    grad_input, partial = _empty(plan.input, grad_output.dtype), _partial(plan, with_bias)
    tensors = _dense(grad_output, plan), grad_input, partial, _dense(code, plan)
    _run(backward, True, plan, with_bias, *tensors)
    return grad_input, _grad_bias(partial, shape, with_bias)


def expectation(input: torch.Tensor, bias: torch.Tensor | None, window: Window) -> torch.Tensor:
    """See `reference.expectation`."""
    plan = _plan(input.shape, input.dtype, memory_format(input), window)
    if plan is not None:
        output = _empty(plan.output, input.dtype)
        tensors = _dense(input, plan), _bias(bias), output
        if _run(forward, False, plan, bias is not None, *tensors):
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
    served = grad_output.dtype == input.dtype and (bias is not None or not with_bias)
    if plan is not None and served:
        grad_input, partial = _empty(plan.input, input.dtype), _partial(plan, bias is not None)
        tensors = _dense(grad_output, plan), grad_input, partial, _dense(input, plan), _bias(bias)
        if _run(backward, False, plan, bias is not None, *tensors):
            return grad_input, _grad_bias(partial, input.shape, with_bias)
    return reference.expectation_backward(grad_output, input, bias, window, with_bias)


def _run(
    make: Callable[..., Any], training: bool, plan: _Plan, with_bias: bool, *tensors: torch.Tensor
) -> bool:
    """Run a pass; False if there are numbers that only the reference takes."""
    sides = plan.sides if make is backward else plan.sides[:2]
    body = _compiled(make, tensors[0].dtype, training, *sides)
    addresses = [tensor.data_ptr() for tensor in tensors]
    parts = min(torch.get_num_threads(), plan.most_threads)
    return threads.run(body, parts, with_bias, plan.address, *addresses)


@functools.cache
def _compiled(
    make: Callable[..., Any], dtype: torch.dtype, training: bool, *sides: int
) -> Callable[[int], None]:
    what = f"{make.__name__} in {'training' if training else 'evaluation'}"
    what = f"{what}, {sides[0]} x {sides[1]} cells, {str(dtype).removeprefix('torch.')},"
    return compiled_for_c(make(_NUMBERS[dtype], training, *sides), what)


def _empty(tensor: tuple[tuple[int, ...], torch.memory_format], dtype: torch.dtype) -> torch.Tensor:
    shape, layout = tensor
    return torch.empty(shape, dtype=dtype, device=_CPU, memory_format=layout)


def _dense(tensor: torch.Tensor, plan: _Plan) -> torch.Tensor:
    return tensor.contiguous(memory_format=plan.layout)


def _bias(bias: torch.Tensor | None) -> torch.Tensor:
    return _NOTHING if bias is None else bias.float().contiguous()


def _partial(plan: _Plan, with_bias: bool) -> torch.Tensor:
    """For the sums of the gradient of the bias."""
    return _NOTHING.new_zeros(plan.partial_size) if with_bias else _NOTHING


def _grad_bias(partial: torch.Tensor, shape: Sequence[int], with_bias: bool) -> torch.Tensor:
    if not with_bias:
        return _NOTHING.new_empty(0)  # a new one, for autograd makes it part of a graph
    # numpy, unlike torch, adds in an order that does not depend on a number of threads.
    sums = np.add.reduce(partial.numpy(), 1, np.float64).reshape(-1)
    sums = sums[: shape[0] * shape[1]].reshape(shape[:2])
    return torch.from_numpy(np.add.reduce(sums, 0).astype(np.float32))
