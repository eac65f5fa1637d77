"""Stochastic pooling in Triton, the general kernels: every window, dtype and stride.

A program handles the tile [block_p, block_c] of one image, or of one slice of a volume: `block_p`
positions of a plane in row-major order, times `block_c` channels. The launcher lays the longer side
of the tile along the dimension that is contiguous in memory (positions, or channels in
channels_last); strides do the rest. A plane is a volume of one slice.

    sample_kernel          a program reads its windows twice: to sum them, then to find the cell
    expectation_kernel     the same with the expectation, or with the coefficients of its gradient
    gather_kernel          both backwards: a program owns input cells and visits every window that
                           holds them, so there are no atomics and the sums have one order

The device functions serve tiles of any shape; `sliding.py` uses them too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import philox, reference

PHILOX_ROUNDS = tl.constexpr(philox.ROUNDS)
OVERFLOW_SCALE = tl.constexpr(reference.OVERFLOW_SCALE)
SMALLEST_SUM = tl.constexpr(reference.SMALLEST_SUM)
LARGEST_FP32 = tl.constexpr(torch.finfo(torch.float32).max)
LARGEST_FP64 = tl.constexpr(torch.finfo(torch.float64).max)
# Arguments that Triton would compile for anew where they become 1 or a multiple of 16, and those of
# which a 1 is worth it: planes have a depth of 1, and one of a tensor's strides is.
NUMBERS = ("channels", "height", "width", "out_height", "out_width", "positions")
ONES = ("depth", "out_depth") + tuple(
    f"{tensor}_stride_{dimension}"
    for tensor in ("in", "out", "grad", "grad_in")
    for dimension in "ncdhwp"
)


# ---------------------------------------------------------------- device functions


@triton.jit
def tile(depth, positions, channels, v: tl.constexpr):
    """This program's image and slice, positions [block_p, 1], channels [1, block_c] and their
    mask."""
    blocks_p = tl.cdiv(positions, v.block_p)
    blocks_c = tl.cdiv(channels, v.block_c)
    program = tl.program_id(0)
    block_p = program % blocks_p
    block_c = (program // blocks_p) % blocks_c
    plane = (program // blocks_p // blocks_c).to(tl.int64)
    position = block_p.to(v.index) * v.block_p + tl.arange(0, v.block_p)[:, None]
    channel = block_c * v.block_c + tl.arange(0, v.block_c)[None, :]
    mask = (position < positions) & (channel < channels)
    return plane // depth, (plane % depth).to(v.index), position, channel, mask


@triton.jit
def masked(one, block):
    """`one & block`, where `one` may be a single number: `&` makes integers of those in the
    interpreter of Triton 3.9, which takes no integers for a mask."""
    return tl.where(one, block, False)


@triton.jit
def rectified(x, bias, ACC: tl.constexpr):
    """max(x + bias, 0) in the accumulation dtype; NaN stays NaN."""
    return tl.maximum(x.to(ACC) + bias, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_bias(bias_ptr, channel, channels, v: tl.constexpr):
    """The bias of each channel, [1, block_c]; 0 without one."""
    if v.has_bias:
        bias = tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(v.acc)
    else:
        bias = tl.zeros([1, 1], dtype=v.acc)
    return bias


@triton.jit
def cell(windows, i, j, v: tl.constexpr, ACC: tl.constexpr):
    """The weight w of cell j in row i of every window of the tile; 0 outside the input.

    `windows` has the pointer to the slice of their first cells, the bias, the slice, row and column
    of the first cell, a mask, and the input's sizes and strides. A window's rows are counted
    through its slices.
    """
    origin_ptr, bias, front, top, left, mask = windows[:6]
    depth, height, width, in_stride_d, in_stride_h, in_stride_w = windows[6:]
    if v.kernel_d > 1:
        slice = front + i // v.kernel_h * v.dilation_d
        row = top + i % v.kernel_h * v.dilation_h
        # `slice` has the index's type, as a product with a wide stride needs.
        origin_ptr += (slice - front) * in_stride_d
        mask = masked((slice >= 0) & (slice < depth), mask)
    else:
        row = top + i * v.dilation_h
    col = left + j * v.dilation_w
    inside = masked((row >= 0) & (row < height), mask & (col >= 0) & (col < width))
    x = tl.load(origin_ptr + row * in_stride_h + col * in_stride_w, mask=inside, other=0.0)
    return tl.where(inside, rectified(x, bias, ACC), 0.0)


@triton.jit
def stand_in(w, infinite, scale):
    """The weight v that stands for w where the sum overflows (see reference.py)."""
    return tl.where(infinite, (w == float("inf")).to(w.dtype), w * scale)


@triton.jit
def window_sums(windows, infinite, scale, v: tl.constexpr, ACC: tl.constexpr):
    """The sum of the weights v of every window, row by row, and the largest weight w."""
    total = tl.zeros(scale.shape, dtype=ACC)
    largest = tl.zeros(scale.shape, dtype=ACC)
    for i in range(v.kernel_d * v.kernel_h):
        row_sum = tl.zeros(scale.shape, dtype=ACC)
        for j in range(v.kernel_w):
            w = cell(windows, i, j, v, ACC)
            row_sum += stand_in(w, infinite, scale)
            largest = tl.maximum(largest, w)
        total += row_sum
    return total, largest


@triton.jit
def sum_windows(windows, v: tl.constexpr, ACC: tl.constexpr):
    """S of every window, whether it is infinite, and its scale; summed again where S overflows."""
    SHAPE: tl.constexpr = windows[5].shape
    infinite = tl.zeros(SHAPE, dtype=tl.int1)
    scale = tl.full(SHAPE, 1.0, dtype=ACC)
    total, largest = window_sums(windows, infinite, scale, v, ACC)
    overflow = total == float("inf")
    if tl.max(overflow.to(tl.int32)) > 0:  # rare
        infinite = overflow & (largest == float("inf"))
        scale = tl.where(overflow, OVERFLOW_SCALE, 1.0).to(ACC)
        total, largest = window_sums(windows, infinite, scale, v, ACC)
    return total, infinite, scale


@triton.jit
def philox4x32(c0, c1, c2, c3, key):
    """The four words of the counter (c0, c1, c2, c3), uint32 that broadcast together."""
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    for _ in tl.static_range(PHILOX_ROUNDS):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, c2 * 0xCD9E8D57, high0 ^ c3 ^ k1, c0 * 0xD2511F53
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniform(seed_ptr, plane, out_row, out_col, ACC: tl.constexpr):
    """The number in [0, 1) of every output, as philox.py defines it; plane is int64."""
    word0, word1, word2, word3 = philox4x32(
        (out_col // 2).to(tl.uint32),
        (out_row // 4).to(tl.uint32),
        plane.to(tl.uint32),
        (plane >> 32).to(tl.uint32),
        tl.load(seed_ptr),
    )
    which = out_row % 4
    word = tl.where(which < 2, tl.where(which < 1, word0, word1), tl.where(which < 3, word2, word3))
    half = tl.where(out_col % 2 == 0, word & 0xFFFF, word >> 16)
    return half.to(tl.int32).to(ACC) * 0.0000152587890625  # 2**-16


@triton.jit
def draw_cells(windows, number, v: tl.constexpr, ACC: tl.constexpr):
    """The weight of the cell that each window draws with its number in [0, 1), and its code."""
    total, infinite, scale = sum_windows(windows, v, ACC)
    threshold = number * total
    # The last cell before which the running sum is at most the threshold.
    value = tl.zeros(total.shape, dtype=ACC)
    code = tl.full(total.shape, v.dead, dtype=tl.int32)
    before_row = tl.zeros(total.shape, dtype=ACC)
    for i in range(v.kernel_d * v.kernel_h):
        before_cell = tl.zeros(total.shape, dtype=ACC)
        for j in range(v.kernel_w):
            w = cell(windows, i, j, v, ACC)
            share = stand_in(w, infinite, scale)
            drawn = (before_row + before_cell <= threshold) | (share != share)
            value = tl.where(drawn, w, value)
            code = tl.where(drawn, i * v.kernel_w + j, code)
            before_cell += share
        before_row += before_cell
    return value, tl.where(total <= threshold, v.dead, code)


@triton.jit
def expect(windows, v: tl.constexpr, ACC: tl.constexpr):
    """sum v * v / S of every window, S, whether it is infinite, and its scale."""
    total, infinite, scale = sum_windows(windows, v, ACC)
    divisor = tl.where(total == 0, 1.0, total)
    expectation = tl.zeros(total.shape, dtype=ACC)
    for i in range(v.kernel_d * v.kernel_h):
        for j in range(v.kernel_w):
            w = stand_in(cell(windows, i, j, v, ACC), infinite, scale)
            expectation += w * (w / divisor)
    return expectation, total, infinite, scale


@triton.jit
def unscaled(expectation, infinite, scale, ACC: tl.constexpr):
    """The expectation of the weights w from that of v; rounding takes it no further than the
    largest number."""
    LARGEST: tl.constexpr = LARGEST_FP64 if ACC == tl.float64 else LARGEST_FP32
    mean = tl.minimum(expectation / scale, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(infinite, float("inf"), mean)


# ---------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=ONES)
def sample_kernel(
    input_ptr, bias_ptr, seed_ptr, output_ptr, code_ptr,
    # sizes
    channels, depth, height, width, out_depth, out_width, positions,
    # strides; output and code are dense, so one stride leads from a position to the next
    in_stride_n, in_stride_c, in_stride_d, in_stride_h, in_stride_w,
    out_stride_n, out_stride_c, out_stride_p,
    v: tl.constexpr,
):  # fmt: skip
    image, out_slice, position, channel, mask = tile(out_depth, positions, channels, v)
    out_row = position // out_width
    out_col = position % out_width
    front = out_slice * v.stride_d - v.padding_d
    origin_ptr = input_ptr + image * in_stride_n + front * in_stride_d
    windows = (
        origin_ptr + channel.to(v.index) * in_stride_c, load_bias(bias_ptr, channel, channels, v),
        front, out_row * v.stride_h - v.padding_h, out_col * v.stride_w - v.padding_w, mask,
        depth, height, width, in_stride_d, in_stride_h, in_stride_w,
    )  # fmt: skip

    plane = (image * channels + channel) * out_depth + out_slice
    number = uniform(seed_ptr, plane, out_row, out_col, v.acc)
    value, code = draw_cells(windows, number, v, v.acc)
    out = image * out_stride_n + channel.to(v.index) * out_stride_c
    out += (out_slice * positions + position) * out_stride_p
    tl.store(output_ptr + out, value.to(output_ptr.dtype.element_ty), mask=mask)
    tl.store(code_ptr + out, code.to(code_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=ONES)
def expectation_kernel(
    # output, or grad_output, slope and offset for the gradient's coefficients
    input_ptr, bias_ptr, output_ptr, grad_output_ptr, slope_ptr, offset_ptr,
    # sizes
    channels, depth, height, width, out_depth, out_width, positions,
    # strides; output, slope and offset are dense
    in_stride_n, in_stride_c, in_stride_d, in_stride_h, in_stride_w,
    grad_stride_n, grad_stride_c, grad_stride_d, grad_stride_h, grad_stride_w,
    out_stride_n, out_stride_c, out_stride_p,
    v: tl.constexpr,
):  # fmt: skip
    image, out_slice, position, channel, mask = tile(out_depth, positions, channels, v)
    out_row = position // out_width
    out_col = position % out_width
    front = out_slice * v.stride_d - v.padding_d
    origin_ptr = input_ptr + image * in_stride_n + front * in_stride_d
    windows = (
        origin_ptr + channel.to(v.index) * in_stride_c, load_bias(bias_ptr, channel, channels, v),
        front, out_row * v.stride_h - v.padding_h, out_col * v.stride_w - v.padding_w, mask,
        depth, height, width, in_stride_d, in_stride_h, in_stride_w,
    )  # fmt: skip

    expectation, total, infinite, scale = expect(windows, v, v.acc)
    out = image * out_stride_n + channel.to(v.index) * out_stride_c
    out += (out_slice * positions + position) * out_stride_p
    if v.coefficients:
        grad_ptr = grad_output_ptr + image * grad_stride_n + channel.to(v.index) * grad_stride_c
        grad_ptr += out_slice * grad_stride_d + out_row * grad_stride_h + out_col * grad_stride_w
        grad = tl.load(grad_ptr, mask=mask, other=0.0).to(v.acc)
        slope = tl.where(total < SMALLEST_SUM, 0.0, grad / total)
        # An approximate quotient takes a mean of the largest number beyond it.
        offset = slope * unscaled(expectation, False, 1.0, v.acc)
        # The weights of an infinite window are indicators, not multiples of w: no slope there.
        slope = tl.where(infinite, 0.0, slope * scale)
        tl.store(slope_ptr + out, slope, mask=mask)
        tl.store(offset_ptr + out, offset, mask=mask)
    else:
        expectation = unscaled(expectation, infinite, scale, v.acc)
        tl.store(output_ptr + out, expectation.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=ONES)
def gather_kernel(
    # sampled: grad_output and code; else: slope, offset, input and bias
    grad_output_ptr, code_ptr, slope_ptr, offset_ptr, input_ptr, bias_ptr,
    grad_input_ptr, partial_bias_ptr,
    # sizes; positions are those of the input
    channels, depth, width, out_depth, out_height, out_width, positions,
    # strides; code, slope, offset and grad_input are dense
    in_stride_n, in_stride_c, in_stride_d, in_stride_h, in_stride_w,
    grad_stride_n, grad_stride_c, grad_stride_d, grad_stride_h, grad_stride_w,
    out_stride_n, out_stride_c, out_stride_p,
    grad_in_stride_n, grad_in_stride_c, grad_in_stride_p,
    v: tl.constexpr,
):  # fmt: skip
    image, in_slice, position, channel, mask = tile(depth, positions, channels, v)
    # Distance from the first corner of the first window; never negative.
    slice = in_slice + v.padding_d
    row = position // width + v.padding_h
    col = position % width + v.padding_w
    grad_base = image * grad_stride_n + channel.to(v.index) * grad_stride_c
    out_base = image * out_stride_n + channel.to(v.index) * out_stride_c

    gathered = tl.zeros(mask.shape, dtype=v.acc)
    offsets = tl.zeros(mask.shape, dtype=v.acc)
    for ahead in range((v.kernel_d - 1) * v.dilation_d // v.stride_d + 1):
        out_slice = slice // v.stride_d - ahead
        reach_d = slice - out_slice * v.stride_d
        holds_slice = (
            (out_slice >= 0) & (out_slice < out_depth) & (reach_d < v.kernel_d * v.dilation_d)
        )
        holds_slice = holds_slice & (reach_d % v.dilation_d == 0)
        for up in range((v.kernel_h - 1) * v.dilation_h // v.stride_h + 1):
            out_row = row // v.stride_h - up
            reach_h = row - out_row * v.stride_h
            holds_row = (
                (out_row >= 0) & (out_row < out_height) & (reach_h < v.kernel_h * v.dilation_h)
            )
            holds_row = masked(holds_slice, holds_row & (reach_h % v.dilation_h == 0))
            for back in range((v.kernel_w - 1) * v.dilation_w // v.stride_w + 1):
                out_col = col // v.stride_w - back
                reach_w = col - out_col * v.stride_w
                holds = (
                    (out_col >= 0) & (out_col < out_width) & (reach_w < v.kernel_w * v.dilation_w)
                )
                holds = mask & holds_row & holds & (reach_w % v.dilation_w == 0)
                out = (out_slice * out_height + out_row) * out_width + out_col
                out = out_base + out * out_stride_p
                if v.sampled:
                    cell = reach_d // v.dilation_d * v.kernel_h + reach_h // v.dilation_h
                    cell = cell * v.kernel_w + reach_w // v.dilation_w
                    code = tl.load(code_ptr + out, mask=holds, other=0).to(tl.int32)
                    grad_ptr = grad_output_ptr + grad_base
                    grad_ptr += out_slice * grad_stride_d
                    grad_ptr += out_row * grad_stride_h + out_col * grad_stride_w
                    drawn = holds & (code == cell)
                    gathered += tl.load(grad_ptr, mask=drawn, other=0.0).to(v.acc)
                else:
                    gathered += tl.load(slope_ptr + out, mask=holds, other=0.0)
                    offsets += tl.load(offset_ptr + out, mask=holds, other=0.0)

    if not v.sampled:
        bias = load_bias(bias_ptr, channel, channels, v)
        in_ptr = input_ptr + image * in_stride_n + channel.to(v.index) * in_stride_c
        in_ptr += in_slice * in_stride_d
        in_ptr += position // width * in_stride_h + position % width * in_stride_w
        x = tl.load(in_ptr, mask=mask, other=0.0)
        w = rectified(x, bias, v.acc)
        # Without a slope w does not count, and may be NaN: a cell that no window holds.
        slope = tl.where(gathered == 0, 0.0, w * (2 * gathered))
        gathered = tl.where(w == float("inf"), offsets, slope - offsets)
        gathered = tl.where(w == 0, 0.0, gathered)

    grad_in = image * grad_in_stride_n + channel.to(v.index) * grad_in_stride_c
    grad_in += (in_slice * positions + position) * grad_in_stride_p
    tl.store(grad_input_ptr + grad_in, gathered.to(grad_input_ptr.dtype.element_ty), mask=mask)
    if v.bias_gradient:
        # One partial sum per program and channel, [images * depth * blocks_p, channels].
        blocks_p = tl.cdiv(positions, v.block_p)
        partial = (image * depth + in_slice) * blocks_p + tl.program_id(0) % blocks_p
        partial = partial * channels + channel
        partial_sum = tl.sum(gathered, axis=0, keep_dims=True)
        tl.store(partial_bias_ptr + partial, partial_sum, mask=channel < channels)
