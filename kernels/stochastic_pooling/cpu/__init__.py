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


class _Plan(NamedTuple):
    """How the planes of a shape, format and window are walked over."""

    numbers: Any  # of kernels.PLAN
    address: int  # of the numbers
    layout: torch.memory_format
    output_size: tuple[int, int]
    partial_size: tuple[int, int, int]  # sheets, groups of rows, lanes of a column
    no_bias: torch.Tensor
    most_threads: int


@functools.lru_cache(maxsize=256)
def _plan(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, window: Window
) -> _Plan | None:
    """None if the reference serves."""
    kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, *dilation = (
        window.kernel_h, window.kernel_w, window.stride_h, window.stride_w,
        window.padding_h, window.padding_w, window.dilation_h, window.dilation_w,
    )  # fmt: skip
    slides = {kernel_h, kernel_w} <= {2, 3} and {stride_h, stride_w} <= {1, 2}
    if len(shape) != 4 or 0 in shape or dtype not in _NUMBERS or not slides or max(dilation) > 1:
        return None
    batch, channels, height, width = shape
    out_height, out_width = window.output_size(height, width)
    planes = batch * channels
    planar = layout == torch.contiguous_format
    sheets = -(-planes // _MOST_PLANES) if planar else batch
    step = -(-planes // sheets)
    # Columns of a row: of weights, those that windows look at; of gradients, those that a gather
    # looks at, which are windows or beside them.
    columns = max((out_width - 1) * stride_w + kernel_w, width + padding_w)
    last = (width - 1 + padding_w) // stride_w
    grad_columns = max(out_width, last + 1) + -(-kernel_w // stride_w) - 1
    numbers = np.array(
        [(
            planar, channels, planes, step, sheets, height, width, out_height, out_width,
            kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w,
            columns * step, grad_columns * step,
        )],
        PLAN,
    )  # fmt: skip
    groups = -(-height // GROUP)
    size = planes * max(height * width, out_height * out_width)
    return _Plan(
        numbers, numbers.ctypes.data, layout, (out_height, out_width), (sheets, groups, step),
        _zeros(channels), sheets * groups if size > _SMALL else 1,
    )  # fmt: skip


def sample(
    input: torch.Tensor, bias: torch.Tensor | None, seed: torch.Tensor, window: Window
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.sample`."""
    plan = _plan(input.shape, input.dtype, memory_format(input), window)
    if plan is not None:
        output = _empty(input, plan, plan.output_size)
        code = torch.empty_like(output, dtype=torch.uint8)
        tensors = _dense(input, plan), _bias(bias, plan), output, code, seed
        if _run(forward, True, window, plan, bias is not None, *tensors):
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
    shape = torch.Size((*grad_output.shape[:2], *size))
    plan = _plan(shape, grad_output.dtype, memory_format(code), window)
    if plan is None:
        return reference.sample_backward(grad_output, code, size, window, with_bias)
    grad_input = _empty(grad_output, plan, size)
    partial = _zeros(*plan.partial_size) if with_bias else _zeros(0)
    tensors = _dense(grad_output, plan), grad_input, partial, _dense(code, plan)
    _run(backward, True, window, plan, with_bias, *tensors)
    return grad_input, _grad_bias(partial, plan, with_bias)


def expectation(input: torch.Tensor, bias: torch.Tensor | None, window: Window) -> torch.Tensor:
    """See `reference.expectation`."""
    plan = _plan(input.shape, input.dtype, memory_format(input), window)
    if plan is not None:
        output = _empty(input, plan, plan.output_size)
        tensors = _dense(input, plan), _bias(bias, plan), output
        if _run(forward, False, window, plan, bias is not None, *tensors):
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
    if plan is not None and grad_output.dtype == input.dtype:
        with_sums = with_bias or bias is not None
        grad_input = _empty(input, plan, input.shape[2:])
        partial = _zeros(*plan.partial_size) if with_sums else _zeros(0)
        tensors = _dense(grad_output, plan), grad_input, partial, _dense(input, plan)
        if _run(backward, False, window, plan, with_sums, *tensors, _bias(bias, plan)):
            return grad_input, _grad_bias(partial, plan, with_bias)
    return reference.expectation_backward(grad_output, input, bias, window, with_bias)


def _run(
    make: Callable[..., Any], training: bool, window: Window, plan: _Plan, with_bias: bool,
    *tensors: torch.Tensor,
) -> bool:  # fmt: skip
    """Run a pass; False if there are numbers that only the reference takes."""
    sizes = window.kernel_h, window.kernel_w, window.stride_h, window.stride_w
    body = _compiled(make, tensors[0].dtype, training, *sizes[: 4 if make is backward else 2])
    addresses = plan.address, *(tensor.data_ptr() for tensor in tensors)
    return threads.run(body, with_bias, addresses, min(torch.get_num_threads(), plan.most_threads))


@functools.cache
def _compiled(
    make: Callable[..., Any], dtype: torch.dtype, training: bool, *sizes: int
) -> Callable[[int], None]:
    what = f"{make.__name__} in {'training' if training else 'evaluation'}"
    what = f"{what}, {sizes[0]} x {sizes[1]} cells, {str(dtype).removeprefix('torch.')},"
    return compiled_for_c(make(_NUMBERS[dtype], training, *sizes), what)


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float32, device="cpu")  # whatever the defaults are


def _dense(tensor: torch.Tensor, plan: _Plan) -> torch.Tensor:
    return tensor.detach().resolve_neg().contiguous(memory_format=plan.layout)


def _empty(like: torch.Tensor, plan: _Plan, size: Sequence[int]) -> torch.Tensor:
    # What is dense in both formats has the strides of the first, as from `contiguous`.
    layout = torch.contiguous_format if size[0] == size[1] == 1 else plan.layout
    shape = (*like.shape[:2], *size)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _bias(bias: torch.Tensor | None, plan: _Plan) -> torch.Tensor:
    return plan.no_bias if bias is None else bias.detach().to(torch.float32).contiguous()


def _grad_bias(partial: torch.Tensor, plan: _Plan, with_bias: bool) -> torch.Tensor:
    if not with_bias:
        return _zeros(0)
    # numpy, unlike torch, adds in an order that does not depend on a number of threads.
    sums = partial.numpy().sum(1, dtype=np.float64).reshape(-1)
    sums = sums[: int(plan.numbers["planes"][0])].reshape(-1, plan.no_bias.numel())
    return torch.from_numpy(sums.sum(0)).float()
