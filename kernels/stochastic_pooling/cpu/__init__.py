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
_NUMBERS = {torch.float32: np.float32, torch.float16: np.int16, torch.bfloat16: np.uint16}
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
    input: tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides
    output: tuple[tuple[int, ...], tuple[int, ...]]
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

    def tensor(*size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        full = *shape[:2], *size
        return full, torch.empty(full, device="meta").contiguous(memory_format=layout).stride()

    (batch, channels, *size), out_size = shape, window.output_size(*shape[2:])
    planes, planar = batch * channels, layout == torch.contiguous_format
    sheets = -(-planes // _MOST_PLANES) if planar else batch
    step, groups = -(-planes // sheets), -(-size[0] // GROUP)
    # Room for all columns of windows, and in a gather for windows on both sides of them.
    line = max(out_size[1] * sides[3], size[1] + window.padding_w) + sides[1]
    paddings = window.padding_h, window.padding_w
    numbers = (planar, channels, planes, step, sheets, *size, *out_size, *sides[2:], *paddings)
    array = np.array([(*numbers, line * step)], PLAN)
    large = planes * max(size[0] * size[1], out_size[0] * out_size[1]) > _SMALL
    return _Plan(
        array, array.ctypes.data, layout, tensor(*size), tensor(*out_size), (sheets, groups, step),
        sides, sheets * groups if large else 1,
    )  # fmt: skip


def sample(
    input: torch.Tensor, bias: torch.Tensor | None, seed: torch.Tensor, window: Window
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.sample`."""
    plan = _plan(input.shape, input.dtype, memory_format(input), window)
    if plan is not None:
        output, code = _empty(plan.output, input.dtype), _empty(plan.output, torch.uint8)
        if _run(forward, True, plan, bias, _dense(input, plan), output, code, seed):
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
    gradients = _gradients(True, plan, bias, with_bias, grad_output, code)
    return gradients or reference.sample_backward(grad_output, code, size, window, with_bias)


def expectation(input: torch.Tensor, bias: torch.Tensor | None, window: Window) -> torch.Tensor:
    """See `reference.expectation`."""
    plan = _plan(input.shape, input.dtype, memory_format(input), window)
    if plan is not None:
        output = _empty(plan.output, input.dtype)
        if _run(forward, False, plan, bias, _dense(input, plan), output):
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
    gradients = _gradients(False, plan, bias, with_bias, grad_output, input)
    return gradients or reference.expectation_backward(grad_output, input, bias, window, with_bias)


def _gradients(
    training: bool,
    plan: _Plan | None,
    bias: torch.Tensor | None,
    with_bias: bool,
    grad_output: torch.Tensor,
    kept: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """None if only the reference can tell."""
    if plan is None:
        return None
    grad_input = _empty(plan.input, grad_output.dtype)
    partial = _NOTHING if bias is None else _NOTHING.new_zeros(plan.partial_size)
    tensors = _dense(grad_output, plan), grad_input, partial, _dense(kept, plan)
    if not _run(backward, training, plan, bias, *tensors):
        return None
    if not with_bias:
        return grad_input, _NOTHING.new_empty(0)  # a new one, for autograd makes it part of a graph
    # numpy, unlike torch, adds in an order that does not depend on a number of threads.
    sums = np.add.reduce(partial.numpy(), 1, np.float64).reshape(-1)
    batch, channels = grad_input.shape[:2]
    sums = np.add.reduce(sums[: batch * channels].reshape(batch, channels), 0)
    return grad_input, torch.from_numpy(sums.astype(np.float32))


def _run(
    make: Callable[..., Any],
    training: bool,
    plan: _Plan,
    bias: torch.Tensor | None,
    *tensors: torch.Tensor,
) -> bool:
    """Run a pass; False if there are numbers that only the reference takes."""
    sides = plan.sides if make is backward else plan.sides[:2]
    body = _compiled(make, tensors[0].dtype, training, *sides)
    biases = _NOTHING if bias is None else bias.float().contiguous()
    addresses = [tensor.data_ptr() for tensor in (biases, *tensors)]
    parts = min(torch.get_num_threads(), plan.most_threads)
    return threads.run(body, parts, bias is not None, plan.address, *addresses)


@functools.cache
def _compiled(
    make: Callable[..., Any], dtype: torch.dtype, training: bool, *sides: int
) -> Callable[[int], None]:
    what = f"{make.__name__} in {'training' if training else 'evaluation'}"
    what = f"{what}, {sides[0]} x {sides[1]} cells, {str(dtype).removeprefix('torch.')},"
    return compiled_for_c(make(_NUMBERS[dtype], training, *sides), what)


def _empty(tensor: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(*tensor, dtype=dtype, device=_CPU)


def _dense(tensor: torch.Tensor, plan: _Plan) -> torch.Tensor:
    return tensor.contiguous(memory_format=plan.layout)
