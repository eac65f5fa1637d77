"""The Triton backend: the four functions of `reference.py` for GPU tensors.

It chooses between the kernels of `general.py` and those of `sliding.py` and launches
them; what a launch needs besides tensors is computed once for each shape. `TRITON_INTERPRET=1`
before the import runs them on CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl

from .. import reference
from .general import expectation_kernel, gather_kernel, sample_kernel
from .sliding import (
    EXPECTATION_GROUP,
    GATHER_GROUP,
    SAMPLE_GROUP,
    expectation_sliding_kernel,
    gather_sliding_kernel,
    sample_sliding_kernel,
)
from ..window import Window, memory_format

# Bytes of the accumulation dtype in a tile: two fp32 or one fp64 for each thread of 4 warps. More
# would have the fp64 kernels spill registers.
TILE_BYTES = 1024

# Lanes of a sliding kernel's program, a thread each.
SLIDING_BLOCK = 128
# Threads that fill a large GPU (an H100 holds 135,000 with 64 registers each): planes are cut into
# strips until there are as many.
FILLING_THREADS = 2**17
_GROUPS = {
    sample_sliding_kernel: SAMPLE_GROUP,
    expectation_sliding_kernel: EXPECTATION_GROUP,
    gather_sliding_kernel: GATHER_GROUP,
}
# Registers of a thread, by the channels of its lane and the window's horizontal stride: so few that
# the assembler tries hard, so many that it spills none on any target of the kernel report.
_SLIDING_REGISTERS = {
    sample_sliding_kernel: {(1, 1): 64, (1, 2): 72, (2, 1): 96, (2, 2): 120},
    expectation_sliding_kernel: {(1, 1): 64, (1, 2): 80, (2, 1): 96, (2, 2): 112},
    gather_sliding_kernel: {(1, 1): 64, (1, 2): 80, (2, 1): 96, (2, 2): 112},
}

_INTERPRETED = triton.knobs.runtime.interpret
_ALREADY_CURRENT = contextlib.nullcontext()
# A launch's grid, and its arguments that are no tensors. So many are remembered.
Plan: TypeAlias = tuple[tuple[int, ...], dict[str, Any]]
_PLANS = 4096


def sample(
    input: torch.Tensor, bias: torch.Tensor | None, seed: torch.Tensor, window: Window
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.sample`."""
    layout = memory_format(input)
    output = _empty_output(input, window, layout, input.dtype)
    code = torch.empty_like(output, dtype=window.code_dtype)
    kernel, input, plan = _forward(
        sample_sliding_kernel, sample_kernel, window, layout, input, output
    )
    _launch(
        kernel, input.device, plan,
        input_ptr=input, bias_ptr=bias, seed_ptr=seed, output_ptr=output, code_ptr=code,
        HAS_BIAS=bias is not None, DEAD=window.dead_code,
    )  # fmt: skip
    return output, code


def sample_backward(
    grad_output: torch.Tensor,
    code: torch.Tensor,
    size: Sequence[int],
    window: Window,
    with_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.sample_backward`."""
    layout = memory_format(code)
    code = code.contiguous(memory_format=layout)
    # It came back through a flatten or a sum, say.
    grad_output = grad_output.contiguous(memory_format=layout)
    grad_input = _empty((*code.shape[:2], *size), grad_output.dtype, code.device, layout)
    if not _slides(window, grad_input.shape, code.shape, grad_input.dtype):
        grad_bias = _gather(
            window, layout, grad_input, code, None, with_bias,
            grad_output_ptr=grad_output, code_ptr=code,
        )  # fmt: skip
        return grad_input, grad_bias
    plan = _sliding_plan(gather_sliding_kernel, window, layout, grad_input, code)
    (_, strips), numbers = plan
    batch, channels = code.shape[:2]
    # [strips, lanes, channels of a lane]
    partial_bias = torch.empty(
        strips * numbers["lanes"] * numbers["VECTOR"] if with_bias else 0,
        dtype=torch.float32,
        device=code.device,
    )
    _launch(
        gather_sliding_kernel, code.device, plan,
        grad_output_ptr=grad_output, code_ptr=code, grad_input_ptr=grad_input,
        partial_bias_ptr=partial_bias, DEAD=window.dead_code, BIAS_GRADIENT=with_bias,
    )  # fmt: skip
    if not with_bias:
        return grad_input, partial_bias
    if layout == torch.channels_last:
        return grad_input, partial_bias.view(-1, channels).sum(0)
    return grad_input, partial_bias.view(strips, batch, channels, -1).sum((0, 1, 3))


def expectation(input: torch.Tensor, bias: torch.Tensor | None, window: Window) -> torch.Tensor:
    """See `reference.expectation`."""
    layout = memory_format(input)
    output = _empty_output(input, window, layout, input.dtype)
    kernel, input, plan = _forward(
        expectation_sliding_kernel, expectation_kernel, window, layout, input, output
    )
    others: dict[str, Any] = {}
    if kernel is expectation_kernel:
        others = dict.fromkeys(("grad_output_ptr", "slope_ptr", "offset_ptr"))
        others["COEFFICIENTS"] = False
    _launch(
        kernel, input.device, plan,
        input_ptr=input, bias_ptr=bias, output_ptr=output, HAS_BIAS=bias is not None, **others,
    )  # fmt: skip
    return output


def expectation_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    bias: torch.Tensor | None,
    window: Window,
    with_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.expectation_backward`."""
    layout = memory_format(input)
    slope = _empty_output(input, window, layout, reference.accumulation_dtype(input.dtype))
    offset = torch.empty_like(slope)
    _launch(
        expectation_kernel, input.device,
        _tiling_plan(expectation_kernel, window, layout, input, slope),
        input_ptr=input, bias_ptr=bias, output_ptr=None,
        grad_output_ptr=grad_output.contiguous(memory_format=layout),
        slope_ptr=slope, offset_ptr=offset, HAS_BIAS=bias is not None, COEFFICIENTS=True,
    )  # fmt: skip
    grad_input = _empty(input.shape, grad_output.dtype, input.device, layout)
    grad_bias = _gather(
        window, layout, grad_input, slope, input, with_bias,
        slope_ptr=slope, offset_ptr=offset, input_ptr=input, bias_ptr=bias,
    )  # fmt: skip
    return grad_input, grad_bias


def _forward(
    sliding: Any,
    general: Any,
    window: Window,
    layout: torch.memory_format,
    input: torch.Tensor,
    output: torch.Tensor,
) -> tuple[Any, torch.Tensor, Plan]:
    """The kernel that fills `output`, the input as it reads it, and the launch."""
    if not _slides(window, input.shape, output.shape, input.dtype):
        return general, input, _tiling_plan(general, window, layout, input, output)
    # A copy of a view, and the sliding kernel, are far less work than the general kernel.
    input = input.contiguous(memory_format=layout)
    return sliding, input, _sliding_plan(sliding, window, layout, input, output)


def _gather(
    window: Window,
    layout: torch.memory_format,
    grad_input: torch.Tensor,
    per_output: torch.Tensor,
    input: torch.Tensor | None,
    with_bias: bool,
    **pointers: torch.Tensor | None,
) -> torch.Tensor:
    """Fill `grad_input` with the general kernel and return the bias's gradient."""
    read = grad_input if input is None else input
    plan = _tiling_plan(gather_kernel, window, layout, read, per_output)
    (programs,), numbers = plan
    channels = grad_input.shape[1]
    partial_bias = torch.empty(
        programs // triton.cdiv(channels, numbers["BLOCK_C"]) if with_bias and programs else 0,
        channels if with_bias else 0,
        dtype=reference.accumulation_dtype(grad_input.dtype),
        device=grad_input.device,
    )
    absent = dict.fromkeys(
        ("grad_output_ptr", "code_ptr", "slope_ptr", "offset_ptr", "input_ptr", "bias_ptr")
    )
    _launch(
        gather_kernel, grad_input.device, plan, **{**absent, **pointers},
        grad_input_ptr=grad_input, partial_bias_ptr=partial_bias, SAMPLED=input is None,
        HAS_BIAS=pointers.get("bias_ptr") is not None, BIAS_GRADIENT=with_bias,
    )  # fmt: skip
    return partial_bias.sum(0)


def _launch(kernel: Any, device: torch.device, plan: Plan, **arguments: Any) -> None:
    grid, numbers = plan
    if grid[0] > 0:
        with _current(device):
            kernel[grid](**arguments, **numbers)


# ---------------------------------------------------------------- sliding kernels


@functools.lru_cache(_PLANS)
def _slides(
    window: Window, in_shape: torch.Size, out_shape: torch.Size, dtype: torch.dtype
) -> bool:
    """Whether a sliding kernel serves this window of such tensors, once dense."""
    sizes = (math.prod(in_shape), math.prod(out_shape))
    return (
        len(in_shape) == 4
        and {window.kernel_h, window.kernel_w} <= {2, 3}
        and {window.stride_h, window.stride_w} <= {1, 2}
        and (window.dilation_h, window.dilation_w) == (1, 1)
        and dtype != torch.float64
        # What an inner row reads beyond its end lies in the next one.
        and min(in_shape[3], out_shape[3]) >= 4
        # Every index fits 32 bits.
        and min(sizes) > 0
        and max(sizes) < 2**31
    )


def _sliding_plan(
    kernel: Any,
    window: Window,
    layout: torch.memory_format,
    input: torch.Tensor,
    output: torch.Tensor,
) -> Plan:
    """The launch over `input` and `output`, or their gradients: dense, in one format."""
    return _strips(
        kernel, window, layout == torch.channels_last, input.shape, output.shape,
        _target(input.device), SLIDING_BLOCK, FILLING_THREADS,
    )  # fmt: skip


@functools.lru_cache(_PLANS)
def _strips(
    kernel: Any,
    window: Window,
    channels_last: bool,
    in_shape: torch.Size,
    out_shape: torch.Size,
    target: Any,
    block: int,
    filling_threads: int,
) -> Plan:
    batch, channels, height, width = in_shape
    out_height, out_width = out_shape[2:]
    gathers = kernel is gather_sliding_kernel
    # A lane owns two columns of what is written, so `own` of what is read.
    own = 2 // window.stride_w if gathers else 2 * window.stride_w
    owned_width, read_width = (width, out_width) if gathers else (out_width, width)
    pairs = triton.cdiv(owned_width, 2)
    # Channels of a lane, elements between two columns, elements in a unit.
    vector = 2 if channels_last and channels % 2 == 0 else 1
    pixel = channels if channels_last else 1
    owned_unit = read_unit = vector
    if not channels_last:
        owned_unit = 2 if owned_width % 2 == 0 else 1
        read_unit = 2 if read_width % 2 == 0 and own % 2 == 0 else 1
    in_unit, out_unit = (owned_unit, read_unit) if gathers else (read_unit, owned_unit)
    lanes = batch * channels // vector * pairs

    if gathers:
        # The first row of outputs that completes a row of the input, and the one after the last.
        start = max(0, triton.cdiv(window.padding_h - window.stride_h + 1, window.stride_h))
        stop = triton.cdiv(height + window.padding_h, window.stride_h)
        rows = {"start_row": start, "stop_row": stop, "inner_rows": out_height - 1}
    else:
        # The windows of inner rows end above the last row of the input.
        inner = (height - 1 + window.padding_h - window.kernel_h) // window.stride_h + 1
        start, stop = 0, out_height
        rows = {"inner_rows": inner}
    # Few strips, but enough to fill a GPU; a grid's limit is 2**16 - 1.
    wanted = min(triton.cdiv(filling_threads, lanes), 2**15)
    group = _GROUPS[kernel]
    strip_rows = group * max(1, triton.cdiv(stop - start, group * wanted))

    registers = _SLIDING_REGISTERS[kernel][vector, window.stride_w]
    # The numbers of channels that networks have get code of their own, with 5 to 14 % fewer
    # instructions; all others share theirs.
    step, constant_step = (pixel // vector, None) if channels_last else (None, None)
    if channels_last and channels % 8 == 0:
        step, constant_step = None, step
    elif channels_last:
        registers += 8  # for more addresses
    if kernel is sample_sliding_kernel:
        rows["one"] = 0x3F800000
    numbers = dict(
        **rows, strip_rows=strip_rows, pairs=pairs, lanes=lanes,
        channels=channels, height=height, width=width, out_height=out_height, out_width=out_width,
        in_pitch=width * pixel // in_unit, IN_UNIT=in_unit,
        out_pitch=out_width * pixel // out_unit, OUT_UNIT=out_unit,
        kernel_h=window.kernel_h, kernel_w=window.kernel_w,
        stride_h=window.stride_h, stride_w=window.stride_w,
        padding_h=window.padding_h, padding_w=window.padding_w,
        step=step, STEP=constant_step, VECTOR=vector, BLOCK=block,
        # How many of the columns it reads every lane has, the last one of a row included; in a
        # backward without padding that lane may begin beyond the last output.
        INSIDE=min(own, read_width - (pairs - 1) * own),
        **_compiler_options(kernel, target, registers, block),
    )  # fmt: skip
    return (triton.cdiv(lanes, block), triton.cdiv(stop - start, strip_rows)), numbers


# ---------------------------------------------------------------- general kernels


def _tiling_plan(
    kernel: Any,
    window: Window,
    layout: torch.memory_format,
    input: torch.Tensor,
    output: torch.Tensor,
) -> Plan:
    """The launch over `input`, of any strides, and `output`, whose like are dense."""
    return _tiles(
        kernel, window, layout != torch.contiguous_format, input.shape, input.stride(),
        output.shape, input.dtype == torch.float64, _target(input.device),
    )  # fmt: skip


@functools.lru_cache(_PLANS)
def _tiles(
    kernel: Any,
    window: Window,
    channels_last: bool,
    in_shape: torch.Size,
    in_strides: tuple[int, ...],
    out_shape: torch.Size,
    double: bool,
    target: Any,
) -> Plan:
    batch, channels, *in_sizes = in_shape
    sizes = dict(zip(("depth", "height", "width"), (1, *in_sizes)[-3:], strict=True))
    out_sizes = zip(("out_depth", "out_height", "out_width"), (1, *out_shape[2:])[-3:], strict=True)
    n, c, *d, h, w = in_strides
    strides = zip("ncdhw", (n, c, *(d or [0]), h, w), strict=True)
    numbers: dict[str, Any] = {
        "channels": channels,
        **sizes,
        **dict(out_sizes),
        **{f"in_stride_{dimension}": stride for dimension, stride in strides},
    }
    for name, shape in (("out", out_shape), ("grad_in", in_shape)):  # of dense tensors
        cells = math.prod(shape[2:])
        dense = (channels * cells, 1, channels) if channels_last else (channels * cells, cells, 1)
        numbers |= {f"{name}_stride_{key}": at for key, at in zip("ncp", dense, strict=True)}

    # The tensor that the programs own, in tiles that are long where memory is contiguous.
    depth, height, width = (1, *(in_shape if kernel is gather_kernel else out_shape)[2:])[-3:]
    positions = height * width
    tile = TILE_BYTES // (8 if double else 4)
    block_c = min(triton.next_power_of_2(channels), 64) if channels_last else 1
    block_p = min(triton.next_power_of_2(max(positions, 1)), tile // block_c)
    blocks = triton.cdiv(positions, block_p) * triton.cdiv(channels, block_c)
    # One more than the largest offset inside an image.
    extent = 1 + sum(
        (size - 1) * stride for size, stride in zip(in_shape[1:], in_strides[1:], strict=True)
    )
    wide = max(extent, math.prod(in_shape[1:]), math.prod(out_shape[1:])) >= 2**30
    numbers.update(
        positions=positions,
        kernel_d=window.kernel_d, kernel_h=window.kernel_h, kernel_w=window.kernel_w,
        stride_d=window.stride_d, stride_h=window.stride_h, stride_w=window.stride_w,
        padding_d=window.padding_d, padding_h=window.padding_h, padding_w=window.padding_w,
        dilation_d=window.dilation_d, dilation_h=window.dilation_h, dilation_w=window.dilation_w,
        ACC=tl.float64 if double else tl.float32, INDEX=tl.int64 if wide else tl.int32,
        BLOCK_P=block_p, BLOCK_C=block_c,
    )  # fmt: skip
    numbers = {name: number for name, number in numbers.items() if name in kernel.arg_names}
    return (batch * depth * blocks,), numbers | _compiler_options(kernel, target)


# ---------------------------------------------------------------- devices and tensors


def _compiler_options(
    kernel: Any, target: Any, registers: int = 128, lanes: int = 128
) -> dict[str, Any]:
    """A limit to the registers of a thread on CUDA, as many warps as `lanes` fill, and whether
    products and sums may become multiply-adds: where they may not, the draw is the reference's to
    the last bit.

    Left alone, NVIDIA's assembler spills a register or two where that lets one more block run; with
    a limit of ours, which no kernel needs to spill for, it does not.
    """
    if target is None:
        return {}
    options = {
        "num_warps": lanes // target.warp_size,
        "enable_fp_fusion": kernel not in (sample_kernel, sample_sliding_kernel),
    }
    if target.backend == "cuda":
        options["maxnreg"] = registers
    return options


def _target(device: torch.device) -> Any:
    """What Triton compiles for on the device; None in the interpreter."""
    return None if _INTERPRETED else _target_of(triton.runtime.driver.active, device)


@functools.lru_cache
def _target_of(driver: Any, device: torch.device) -> Any:
    with _current(device):
        return driver.get_current_target()


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make the tensors' device the current one: Triton launches there."""
    if device.type == "cpu":  # in the interpreter
        return _ALREADY_CURRENT
    module = torch.get_device_module(device)
    return _ALREADY_CURRENT if module.current_device() == device.index else module.device(device)


def _empty_output(
    input: torch.Tensor, window: Window, layout: torch.memory_format, dtype: torch.dtype
) -> torch.Tensor:
    shape = (*input.shape[:2], *_output_size(window, input.shape[2:]))
    return _empty(shape, dtype, input.device, layout)


@functools.lru_cache(_PLANS)
def _output_size(window: Window, size: torch.Size) -> tuple[int, ...]:
    return window.output_size(*size)


def _empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, layout: torch.memory_format
) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=layout)
