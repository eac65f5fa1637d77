"""Stochastic pooling in Triton: the four functions of `reference.py` for GPU tensors.

Three kernels serve every window, dtype and memory format. A program handles the tile
[BLOCK_P, BLOCK_C] of one image: BLOCK_P positions of a plane in row-major order, times BLOCK_C
channels. The launcher lays the longer side of the tile along the dimension that is contiguous in
memory (positions, or channels in channels_last); strides do the rest.

    _sample_kernel         a program reads its windows twice: to sum them, then to find the cell
    _expectation_kernel    the same with the expectation, or with the coefficients of its gradient
    _gather_kernel         both backwards: a program owns input cells and visits every window that
                           holds them, so there are no atomics and the sums have one order

`TRITON_INTERPRET=1` before the import runs them on CPU tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from . import philox, reference
from .window import Window, memory_format

PHILOX_ROUNDS = tl.constexpr(philox.ROUNDS)
OVERFLOW_SCALE = tl.constexpr(reference.OVERFLOW_SCALE)
SMALLEST_SUM = tl.constexpr(reference.SMALLEST_SUM)

# Bytes of the accumulation dtype in a tile: two fp32 or one fp64 for each thread of 4 warps. More
# would have the fp64 kernels spill registers.
TILE_BYTES = 1024


# ---------------------------------------------------------------- device functions


@triton.jit
def _tile(positions, channels, INDEX: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's image, positions [BLOCK_P, 1], channels [1, BLOCK_C] and their mask."""
    blocks_p = tl.cdiv(positions, BLOCK_P)
    blocks_c = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    block_p = program % blocks_p
    block_c = (program // blocks_p) % blocks_c
    image = (program // blocks_p // blocks_c).to(tl.int64)
    position = block_p.to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    channel = block_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (position < positions) & (channel < channels)
    return image, position, channel, mask


@triton.jit
def _rectified(x, bias, ACC: tl.constexpr):
    """max(x + bias, 0) in the accumulation dtype; NaN stays NaN."""
    return tl.maximum(x.to(ACC) + bias, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _load_bias(bias_ptr, channel, channels, HAS_BIAS: tl.constexpr, ACC: tl.constexpr):
    """The bias of each channel, [1, BLOCK_C]; 0 without one."""
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(ACC)
    else:
        bias = tl.zeros([1, 1], dtype=ACC)
    return bias


@triton.jit
def _cell(
    origin_ptr, bias, top, left, i, j, mask,
    height, width, in_stride_h, in_stride_w,
    dilation_h: tl.constexpr, dilation_w: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The weight w of cell (i, j) of every window of the tile; 0 outside the input."""
    row = top + i * dilation_h
    col = left + j * dilation_w
    inside = mask & (row >= 0) & (row < height) & (col >= 0) & (col < width)
    x = tl.load(origin_ptr + row * in_stride_h + col * in_stride_w, mask=inside, other=0.0)
    return tl.where(inside, _rectified(x, bias, ACC), 0.0)


@triton.jit
def _stand_in(w, infinite, scale):
    """The weight v that stands for w where the sum overflows (see reference.py)."""
    return tl.where(infinite, (w == float("inf")).to(w.dtype), w * scale)


@triton.jit
def _window_sums(
    origin_ptr, bias, top, left, mask, infinite, scale,
    height, width, in_stride_h, in_stride_w,
    kernel_h: tl.constexpr, kernel_w: tl.constexpr,
    dilation_h: tl.constexpr, dilation_w: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The sum of the weights v of every window, row by row, and the largest weight w."""
    total = tl.zeros(mask.shape, dtype=ACC)
    largest = tl.zeros(mask.shape, dtype=ACC)
    for i in range(kernel_h):
        row_sum = tl.zeros(mask.shape, dtype=ACC)
        for j in range(kernel_w):
            w = _cell(
                origin_ptr, bias, top, left, i, j, mask,
                height, width, in_stride_h, in_stride_w, dilation_h, dilation_w, ACC,
            )  # fmt: skip
            row_sum += _stand_in(w, infinite, scale)
            largest = tl.maximum(largest, w)
        total += row_sum
    return total, largest


@triton.jit
def _sum_windows(
    origin_ptr, bias, top, left, mask,
    height, width, in_stride_h, in_stride_w,
    kernel_h: tl.constexpr, kernel_w: tl.constexpr,
    dilation_h: tl.constexpr, dilation_w: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """S of every window, whether it is infinite, and its scale; summed again where S overflows."""
    infinite = tl.zeros(mask.shape, dtype=tl.int1)
    scale = tl.full(mask.shape, 1.0, dtype=ACC)
    total, largest = _window_sums(
        origin_ptr, bias, top, left, mask, infinite, scale,
        height, width, in_stride_h, in_stride_w,
        kernel_h, kernel_w, dilation_h, dilation_w, ACC,
    )  # fmt: skip
    overflow = total == float("inf")
    if tl.max(overflow.to(tl.int32)) > 0:
        infinite = overflow & (largest == float("inf"))
        scale = tl.where(overflow & (largest < float("inf")), OVERFLOW_SCALE, 1.0).to(ACC)
        total, largest = _window_sums(
            origin_ptr, bias, top, left, mask, infinite, scale,
            height, width, in_stride_h, in_stride_w,
            kernel_h, kernel_w, dilation_h, dilation_w, ACC,
        )  # fmt: skip
    return total, infinite, scale


@triton.jit
def _uniform(seed_ptr, image, channel, channels, out_row, out_col, ACC: tl.constexpr):
    """The number in [0, 1) of every output, as philox.py defines it."""
    plane = image * channels + channel
    word0, word1, word2, word3 = tl.philox(
        tl.load(seed_ptr),
        out_col.to(tl.uint32),
        (out_row // 8).to(tl.uint32),
        (plane & 0xFFFFFFFF).to(tl.uint32),
        (plane >> 32).to(tl.uint32),
        PHILOX_ROUNDS,
    )
    which = out_row % 8
    first = tl.where(which < 2, word0, word1)
    last = tl.where(which < 6, word2, word3)
    word = tl.where(which < 4, first, last)
    half = tl.where(which % 2 == 0, word & 0xFFFF, word >> 16)
    return half.to(tl.int32).to(ACC) * 0.0000152587890625  # 2**-16


# ---------------------------------------------------------------- kernels


@triton.jit
def _sample_kernel(
    input_ptr, bias_ptr, seed_ptr, output_ptr, code_ptr,
    # sizes
    channels, height, width, out_width, positions,
    # strides; output and code are dense, so one stride leads from a position to the next
    in_stride_n, in_stride_c, in_stride_h, in_stride_w,
    out_stride_n, out_stride_c, out_stride_p,
    # window
    kernel_h: tl.constexpr, kernel_w: tl.constexpr,
    stride_h: tl.constexpr, stride_w: tl.constexpr,
    padding_h: tl.constexpr, padding_w: tl.constexpr,
    dilation_h: tl.constexpr, dilation_w: tl.constexpr,
    # variant
    HAS_BIAS: tl.constexpr, DEAD: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, position, channel, mask = _tile(positions, channels, INDEX, BLOCK_P, BLOCK_C)
    out_row = position // out_width
    out_col = position % out_width
    top = out_row * stride_h - padding_h
    left = out_col * stride_w - padding_w
    bias = _load_bias(bias_ptr, channel, channels, HAS_BIAS, ACC)
    origin_ptr = input_ptr + image * in_stride_n + channel.to(INDEX) * in_stride_c

    total, infinite, scale = _sum_windows(
        origin_ptr, bias, top, left, mask,
        height, width, in_stride_h, in_stride_w,
        kernel_h, kernel_w, dilation_h, dilation_w, ACC,
    )  # fmt: skip
    threshold = _uniform(seed_ptr, image, channel, channels, out_row, out_col, ACC) * total

    # The last live cell before which the running sum is at most the threshold.
    value = tl.zeros(mask.shape, dtype=ACC)
    code = tl.full(mask.shape, DEAD, dtype=tl.int32)
    before_row = tl.zeros(mask.shape, dtype=ACC)
    for i in range(kernel_h):
        before_cell = tl.zeros(mask.shape, dtype=ACC)
        for j in range(kernel_w):
            w = _cell(
                origin_ptr, bias, top, left, i, j, mask,
                height, width, in_stride_h, in_stride_w, dilation_h, dilation_w, ACC,
            )  # fmt: skip
            v = _stand_in(w, infinite, scale)
            drawn = (v > 0) & (before_row + before_cell <= threshold)
            drawn = drawn | (v != v)
            value = tl.where(drawn, w, value)
            code = tl.where(drawn, i * kernel_w + j, code)
            before_cell += v
        before_row += before_cell

    out = image * out_stride_n + channel.to(INDEX) * out_stride_c + position * out_stride_p
    tl.store(output_ptr + out, value.to(output_ptr.dtype.element_ty), mask=mask)
    tl.store(code_ptr + out, code.to(code_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _expectation_kernel(
    # output, or grad_output, slope and offset for the gradient's coefficients
    input_ptr, bias_ptr, output_ptr, grad_output_ptr, slope_ptr, offset_ptr,
    # sizes
    channels, height, width, out_width, positions,
    # strides; output, slope and offset are dense
    in_stride_n, in_stride_c, in_stride_h, in_stride_w,
    grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w,
    out_stride_n, out_stride_c, out_stride_p,
    # window
    kernel_h: tl.constexpr, kernel_w: tl.constexpr,
    stride_h: tl.constexpr, stride_w: tl.constexpr,
    padding_h: tl.constexpr, padding_w: tl.constexpr,
    dilation_h: tl.constexpr, dilation_w: tl.constexpr,
    # variant
    HAS_BIAS: tl.constexpr, COEFFICIENTS: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, position, channel, mask = _tile(positions, channels, INDEX, BLOCK_P, BLOCK_C)
    out_row = position // out_width
    out_col = position % out_width
    top = out_row * stride_h - padding_h
    left = out_col * stride_w - padding_w
    bias = _load_bias(bias_ptr, channel, channels, HAS_BIAS, ACC)
    origin_ptr = input_ptr + image * in_stride_n + channel.to(INDEX) * in_stride_c

    total, infinite, scale = _sum_windows(
        origin_ptr, bias, top, left, mask,
        height, width, in_stride_h, in_stride_w,
        kernel_h, kernel_w, dilation_h, dilation_w, ACC,
    )  # fmt: skip
    divisor = tl.where(total == 0, 1.0, total)
    expectation = tl.zeros(mask.shape, dtype=ACC)
    for i in range(kernel_h):
        for j in range(kernel_w):
            w = _cell(
                origin_ptr, bias, top, left, i, j, mask,
                height, width, in_stride_h, in_stride_w, dilation_h, dilation_w, ACC,
            )  # fmt: skip
            v = _stand_in(w, infinite, scale)
            expectation += v * (v / divisor)

    out = image * out_stride_n + channel.to(INDEX) * out_stride_c + position * out_stride_p
    if COEFFICIENTS:
        grad_ptr = grad_output_ptr + image * grad_stride_n + channel.to(INDEX) * grad_stride_c
        grad_ptr += out_row * grad_stride_h + out_col * grad_stride_w
        grad = tl.load(grad_ptr, mask=mask, other=0.0).to(ACC)
        slope = tl.where(total < SMALLEST_SUM, 0.0, grad / divisor)
        offset = slope * expectation
        # The weights of an infinite window are indicators, not multiples of w: no slope there.
        slope = tl.where(infinite, 0.0, slope * scale)
        tl.store(slope_ptr + out, slope, mask=mask)
        tl.store(offset_ptr + out, offset, mask=mask)
    else:
        expectation = tl.where(infinite, float("inf"), expectation / scale)
        tl.store(output_ptr + out, expectation.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gather_kernel(
    # sampled: grad_output and code; else: slope, offset, input and bias
    grad_output_ptr, code_ptr, slope_ptr, offset_ptr, input_ptr, bias_ptr,
    grad_input_ptr, partial_bias_ptr,
    # sizes; positions are those of the input
    channels, width, out_height, out_width, positions,
    # strides; code, slope, offset and grad_input are dense
    in_stride_n, in_stride_c, in_stride_h, in_stride_w,
    grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w,
    out_stride_n, out_stride_c, out_stride_p,
    grad_in_stride_n, grad_in_stride_c, grad_in_stride_p,
    # window
    kernel_h: tl.constexpr, kernel_w: tl.constexpr,
    stride_h: tl.constexpr, stride_w: tl.constexpr,
    padding_h: tl.constexpr, padding_w: tl.constexpr,
    dilation_h: tl.constexpr, dilation_w: tl.constexpr,
    # variant
    SAMPLED: tl.constexpr, HAS_BIAS: tl.constexpr, BIAS_GRADIENT: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, position, channel, mask = _tile(positions, channels, INDEX, BLOCK_P, BLOCK_C)
    # Distance from the top left corner of the first window; never negative.
    row = position // width + padding_h
    col = position % width + padding_w
    grad_base = image * grad_stride_n + channel.to(INDEX) * grad_stride_c
    out_base = image * out_stride_n + channel.to(INDEX) * out_stride_c

    gathered = tl.zeros(mask.shape, dtype=ACC)
    offsets = tl.zeros(mask.shape, dtype=ACC)
    for up in range((kernel_h - 1) * dilation_h // stride_h + 1):
        out_row = row // stride_h - up
        reach_h = row - out_row * stride_h
        holds_row = (out_row >= 0) & (out_row < out_height) & (reach_h < kernel_h * dilation_h)
        holds_row = holds_row & (reach_h % dilation_h == 0)
        for back in range((kernel_w - 1) * dilation_w // stride_w + 1):
            out_col = col // stride_w - back
            reach_w = col - out_col * stride_w
            holds = (out_col >= 0) & (out_col < out_width) & (reach_w < kernel_w * dilation_w)
            holds = mask & holds_row & holds & (reach_w % dilation_w == 0)
            out = out_base + (out_row * out_width + out_col) * out_stride_p
            if SAMPLED:
                cell = reach_h // dilation_h * kernel_w + reach_w // dilation_w
                code = tl.load(code_ptr + out, mask=holds, other=0).to(tl.int32)
                grad_ptr = grad_output_ptr + grad_base
                grad_ptr += out_row * grad_stride_h + out_col * grad_stride_w
                drawn = holds & (code == cell)
                gathered += tl.load(grad_ptr, mask=drawn, other=0.0).to(ACC)
            else:
                gathered += tl.load(slope_ptr + out, mask=holds, other=0.0)
                offsets += tl.load(offset_ptr + out, mask=holds, other=0.0)

    if not SAMPLED:
        bias = _load_bias(bias_ptr, channel, channels, HAS_BIAS, ACC)
        in_ptr = input_ptr + image * in_stride_n + channel.to(INDEX) * in_stride_c
        in_ptr += position // width * in_stride_h + position % width * in_stride_w
        x = tl.load(in_ptr, mask=mask, other=0.0)
        w = tl.where(mask, _rectified(x, bias, ACC), 0.0)
        gathered = tl.where(w == float("inf"), offsets, w * (2 * gathered) - offsets)
        gathered = tl.where(w == 0, 0.0, gathered)

    grad_in = image * grad_in_stride_n + channel.to(INDEX) * grad_in_stride_c
    grad_in += position * grad_in_stride_p
    tl.store(grad_input_ptr + grad_in, gathered.to(grad_input_ptr.dtype.element_ty), mask=mask)
    if BIAS_GRADIENT:
        # One partial sum per program and channel, [images * blocks_p, channels].
        blocks_p = tl.cdiv(positions, BLOCK_P)
        partial = (image * blocks_p + tl.program_id(0) % blocks_p) * channels + channel
        partial_sum = tl.sum(gathered, axis=0, keep_dims=True)
        tl.store(partial_bias_ptr + partial, partial_sum, mask=channel < channels)


# ---------------------------------------------------------------- launchers


def sample(
    input: torch.Tensor, bias: torch.Tensor | None, seed: torch.Tensor, window: Window
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.sample`."""
    output = _empty_output(input, window, input.dtype)
    code = torch.empty_like(output, dtype=window.code_dtype)
    _launch(
        _sample_kernel,
        output,
        dict(
            input_ptr=input, bias_ptr=bias, seed_ptr=seed, output_ptr=output, code_ptr=code,
            channels=input.shape[1], height=input.shape[2], width=input.shape[3],
            out_width=output.shape[3],
            **_strides("in", input), **_dense_strides("out", output),
            HAS_BIAS=bias is not None, DEAD=window.dead_code,
            # Without contraction to multiply-adds the draw is the reference's to the last bit.
            enable_fp_fusion=False,
        ),
        window,
    )  # fmt: skip
    return output, code


def sample_backward(
    grad_output: torch.Tensor,
    code: torch.Tensor,
    height: int,
    width: int,
    window: Window,
    with_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.sample_backward`."""
    grad_input = _empty(
        (*code.shape[:2], height, width), grad_output.dtype, code.device, memory_format(code)
    )
    grad_bias = _gather(
        grad_input, code, window, with_bias, grad_output_ptr=grad_output, code_ptr=code,
        **_strides("grad", grad_output),
    )  # fmt: skip
    return grad_input, grad_bias


def expectation(input: torch.Tensor, bias: torch.Tensor | None, window: Window) -> torch.Tensor:
    """See `reference.expectation`."""
    output = _empty_output(input, window, input.dtype)
    _launch_expectation(input, bias, window, output, output_ptr=output)
    return output


def expectation_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    bias: torch.Tensor | None,
    window: Window,
    with_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.expectation_backward`."""
    slope = _empty_output(input, window, reference.accumulation_dtype(input.dtype))
    offset = torch.empty_like(slope)
    _launch_expectation(
        input, bias, window, slope,
        grad_output_ptr=grad_output, slope_ptr=slope, offset_ptr=offset,
        **_strides("grad", grad_output),
    )  # fmt: skip
    grad_input = _empty(input.shape, grad_output.dtype, input.device, memory_format(input))
    grad_bias = _gather(
        grad_input, slope, window, with_bias,
        slope_ptr=slope, offset_ptr=offset, input_ptr=input, bias_ptr=bias,
        **_strides("in", input),
    )  # fmt: skip
    return grad_input, grad_bias


def _launch_expectation(
    input: torch.Tensor,
    bias: torch.Tensor | None,
    window: Window,
    dense: torch.Tensor,
    **arguments: Any,
) -> None:
    pointers = dict.fromkeys(("output_ptr", "grad_output_ptr", "slope_ptr", "offset_ptr"))
    _launch(
        _expectation_kernel,
        dense,
        dict(
            **{**pointers, **_no_strides("grad"), **arguments},
            input_ptr=input, bias_ptr=bias,
            channels=input.shape[1], height=input.shape[2], width=input.shape[3],
            out_width=dense.shape[3],
            **_strides("in", input), **_dense_strides("out", dense),
            HAS_BIAS=bias is not None, COEFFICIENTS="slope_ptr" in arguments,
        ),
        window,
    )  # fmt: skip


def _gather(
    grad_input: torch.Tensor,
    per_output: torch.Tensor,
    window: Window,
    with_bias: bool,
    **arguments: Any,
) -> torch.Tensor:
    """Fill `grad_input` and return the bias's gradient."""
    block_p, _ = _tile_shape(grad_input)
    channels, height, width = grad_input.shape[1:]
    partial_bias = torch.empty(
        grad_input.shape[0] * triton.cdiv(height * width, block_p) if with_bias else 0,
        channels if with_bias else 0,
        dtype=reference.accumulation_dtype(grad_input.dtype),
        device=grad_input.device,
    )
    pointers = dict.fromkeys(
        ("grad_output_ptr", "code_ptr", "slope_ptr", "offset_ptr", "input_ptr", "bias_ptr")
    )
    _launch(
        _gather_kernel,
        grad_input,
        dict(
            **{**pointers, **_no_strides("in"), **_no_strides("grad"), **arguments},
            grad_input_ptr=grad_input, partial_bias_ptr=partial_bias,
            channels=channels, width=width,
            out_height=per_output.shape[2], out_width=per_output.shape[3],
            **_dense_strides("out", per_output), **_dense_strides("grad_in", grad_input),
            SAMPLED="code_ptr" in arguments, HAS_BIAS=arguments.get("bias_ptr") is not None,
            BIAS_GRADIENT=with_bias,
        ),
        window,
    )  # fmt: skip
    return partial_bias.sum(0)


def _launch(kernel: Any, dense: torch.Tensor, arguments: dict[str, Any], window: Window) -> None:
    """Run `kernel` on tiles that cover `dense`, the tensor that its programs own."""
    if dense.numel() == 0:
        return
    batch, channels, height, width = dense.shape
    positions = height * width
    block_p, block_c = _tile_shape(dense)
    programs = batch * triton.cdiv(positions, block_p) * triton.cdiv(channels, block_c)
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    wide = any(_image_extent(tensor) >= 2**30 for tensor in tensors)
    with _current(dense.device):
        kernel[(programs,)](
            **arguments,
            positions=positions,
            kernel_h=window.kernel_h, kernel_w=window.kernel_w,
            stride_h=window.stride_h, stride_w=window.stride_w,
            padding_h=window.padding_h, padding_w=window.padding_w,
            dilation_h=window.dilation_h, dilation_w=window.dilation_w,
            ACC=tl.float64 if dense.dtype == torch.float64 else tl.float32,
            INDEX=tl.int64 if wide else tl.int32,
            BLOCK_P=block_p, BLOCK_C=block_c,
            **_compiler_options(),
        )  # fmt: skip


def _compiler_options() -> dict[str, int]:
    """Left alone, NVIDIA's assembler spills a register or two where that lets one more block run;
    with a limit of ours, which no kernel reaches, it does not."""
    if triton.knobs.runtime.interpret:
        return {}
    backend = triton.runtime.driver.active.get_current_target().backend
    return {"maxnreg": 128} if backend == "cuda" else {}


def _tile_shape(dense: torch.Tensor) -> tuple[int, int]:
    """BLOCK_P and BLOCK_C: the tile is long where memory is contiguous."""
    channels, height, width = dense.shape[1:]
    tile = TILE_BYTES // reference.accumulation_dtype(dense.dtype).itemsize
    block_c = 1
    if memory_format(dense) == torch.channels_last:
        block_c = min(triton.next_power_of_2(channels), 64)
    return min(triton.next_power_of_2(height * width), tile // block_c), block_c


def _image_extent(tensor: torch.Tensor) -> int:
    """One more than the largest offset inside an image, in elements."""
    if tensor.dim() != 4:
        return tensor.numel()
    return 1 + sum(
        (size - 1) * stride
        for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
    )


def _strides(prefix: str, tensor: torch.Tensor) -> dict[str, int]:
    return {f"{prefix}_stride_{d}": s for d, s in zip("nchw", tensor.stride(), strict=True)}


def _no_strides(prefix: str) -> dict[str, int]:
    return {f"{prefix}_stride_{d}": 0 for d in "nchw"}


def _dense_strides(prefix: str, tensor: torch.Tensor) -> dict[str, int]:
    """Strides of a dense tensor: of its images, its channels and its positions."""
    channels, height, width = tensor.shape[1:]
    positions = height * width
    last = memory_format(tensor) == torch.channels_last
    strides = (channels * positions, 1, channels) if last else (channels * positions, positions, 1)
    return {f"{prefix}_stride_{d}": s for d, s in zip("ncp", strides, strict=True)}


def _empty_output(input: torch.Tensor, window: Window, dtype: torch.dtype) -> torch.Tensor:
    shape = (*input.shape[:2], *window.output_size(*input.shape[2:]))
    return _empty(shape, dtype, input.device, memory_format(input))


def _empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, layout: torch.memory_format
) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=layout)


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make the tensors' device the current one: Triton launches there."""
    if device.type == "cpu":  # in the interpreter
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)
