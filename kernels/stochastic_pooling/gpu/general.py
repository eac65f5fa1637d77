"""Stochastic pooling in Triton, the general kernels: every window, dtype and stride.

A program handles the tile [BLOCK_P, BLOCK_C] of one image, or of one slice of a volume: BLOCK_P
positions of a plane in row-major order, times BLOCK_C channels. The launcher lays the longer side
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
# which an 1 is worth it: planes have a depth of 1, and one of a tensor's strides is.
NUMBERS = ("channels", "height", "width", "out_height", "out_width", "positions")
ONES = ("depth", "out_depth") + tuple(
    f"{tensor}_stride_{dimension}" for tensor in ("in", "out", "grad_in") for dimension in "ncdhwp"
)


# ---------------------------------------------------------------- device functions


@triton.jit
def tile(
    depth, positions, channels,
    INDEX: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """This program's image and slice, positions [BLOCK_P, 1], channels [1, BLOCK_C] and their
    mask."""
    blocks_p = tl.cdiv(positions, BLOCK_P)
    blocks_c = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    block_p = program % blocks_p
    block_c = (program // blocks_p) % blocks_c
    plane = (program // blocks_p // blocks_c).to(tl.int64)
    position = block_p.to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    channel = block_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (position < positions) & (channel < channels)
    return plane // depth, (plane % depth).to(INDEX), position, channel, mask


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
def load_bias(bias_ptr, channel, channels, HAS_BIAS: tl.constexpr, ACC: tl.constexpr):
    """The bias of each channel, [1, BLOCK_C]; 0 without one."""
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(ACC)
    else:
        bias = tl.zeros([1, 1], dtype=ACC)
    return bias


@triton.jit
def cell(
    origin_ptr, bias, front, top, left, i, j, mask,
    depth, height, width, in_stride_d, in_stride_h, in_stride_w,
    kernel_d: tl.constexpr, kernel_h: tl.constexpr,
    dilation_d: tl.constexpr, dilation_h: tl.constexpr, dilation_w: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The weight w of cell j in row i of every window of the tile; 0 outside the input.

    The window's rows are counted through its slices; the origin is that of the slice `front`.
    """
    if kernel_d > 1:
        below = i // kernel_h * dilation_d
        row = top + i % kernel_h * dilation_h
        origin_ptr += below * in_stride_d
        mask = masked((front + below >= 0) & (front + below < depth), mask)
    else:
        row = top + i * dilation_h
    col = left + j * dilation_w
    inside = masked((row >= 0) & (row < height), mask & (col >= 0) & (col < width))
    x = tl.load(origin_ptr + row * in_stride_h + col * in_stride_w, mask=inside, other=0.0)
    return tl.where(inside, rectified(x, bias, ACC), 0.0)


@triton.jit
def stand_in(w, infinite, scale):
    """The weight v that stands for w where the sum overflows (see reference.py)."""
    return tl.where(infinite, (w == float("inf")).to(w.dtype), w * scale)


@triton.jit
def window_sums(
    origin_ptr, bias, front, top, left, mask, infinite, scale,
    depth, height, width, in_stride_d, in_stride_h, in_stride_w,
    kernel_d: tl.constexpr, kernel_h: tl.constexpr, kernel_w: tl.constexpr,
    dilation_d: tl.constexpr, dilation_h: tl.constexpr, dilation_w: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The sum of the weights v of every window, row by row, and the largest weight w."""
    total = tl.zeros(mask.shape, dtype=ACC)
    largest = tl.zeros(mask.shape, dtype=ACC)
    for i in range(kernel_d * kernel_h):
        row_sum = tl.zeros(mask.shape, dtype=ACC)
        for j in range(kernel_w):
            w = cell(
                origin_ptr, bias, front, top, left, i, j, mask,
                depth, height, width, in_stride_d, in_stride_h, in_stride_w,
                kernel_d, kernel_h, dilation_d, dilation_h, dilation_w, ACC,
            )  # fmt: skip
            row_sum += stand_in(w, infinite, scale)
            largest = tl.maximum(largest, w)
        total += row_sum
    return total, largest


@triton.jit
def sum_windows(
    origin_ptr, bias, front, top, left, mask,
    depth, height, width, in_stride_d, in_stride_h, in_stride_w,
    kernel_d: tl.constexpr, kernel_h: tl.constexpr, kernel_w: tl.constexpr,
    dilation_d: tl.constexpr, dilation_h: tl.constexpr, dilation_w: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """S of every window, whether it is infinite, and its scale; summed again where S overflows."""
    infinite = tl.zeros(mask.shape, dtype=tl.int1)
    scale = tl.full(mask.shape, 1.0, dtype=ACC)
    total, largest = window_sums(
        origin_ptr, bias, front, top, left, mask, infinite, scale,
        depth, height, width, in_stride_d, in_stride_h, in_stride_w,
        kernel_d, kernel_h, kernel_w, dilation_d, dilation_h, dilation_w, ACC,
    )  # fmt: skip
    overflow = total == float("inf")
    if tl.max(overflow.to(tl.int32)) > 0:  # rare
        infinite = overflow & (largest == float("inf"))
        scale = tl.where(overflow & (largest < float("inf")), OVERFLOW_SCALE, 1.0).to(ACC)
        total, largest = window_sums(
            origin_ptr, bias, front, top, left, mask, infinite, scale,
            depth, height, width, in_stride_d, in_stride_h, in_stride_w,
            kernel_d, kernel_h, kernel_w, dilation_d, dilation_h, dilation_w, ACC,
        )  # fmt: skip
    return total, infinite, scale


@triton.jit
def philox4x32(c0, c1, c2, c3, key):
    """The four words of the counter (c0, c1, c2, c3), uint32 that broadcast together."""
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    for _ in tl.static_range(PHILOX_ROUNDS):
        # As 64-bit products: one instruction gives both halves.
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
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
def draw_cells(
    origin_ptr, bias, front, top, left, mask, number,
    depth, height, width, in_stride_d, in_stride_h, in_stride_w,
    kernel_d: tl.constexpr, kernel_h: tl.constexpr, kernel_w: tl.constexpr,
    dilation_d: tl.constexpr, dilation_h: tl.constexpr, dilation_w: tl.constexpr,
    DEAD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The weight of the cell that each window draws with its number in [0, 1), and its code."""
    total, infinite, scale = sum_windows(
        origin_ptr, bias, front, top, left, mask,
        depth, height, width, in_stride_d, in_stride_h, in_stride_w,
        kernel_d, kernel_h, kernel_w, dilation_d, dilation_h, dilation_w, ACC,
    )  # fmt: skip
    threshold = number * total
    # The last cell before which the running sum is at most the threshold.
    value = tl.zeros(mask.shape, dtype=ACC)
    code = tl.full(mask.shape, DEAD, dtype=tl.int32)
    before_row = tl.zeros(mask.shape, dtype=ACC)
    for i in range(kernel_d * kernel_h):
        before_cell = tl.zeros(mask.shape, dtype=ACC)
        for j in range(kernel_w):
            w = cell(
                origin_ptr, bias, front, top, left, i, j, mask,
                depth, height, width, in_stride_d, in_stride_h, in_stride_w,
                kernel_d, kernel_h, dilation_d, dilation_h, dilation_w, ACC,
            )  # fmt: skip
            v = stand_in(w, infinite, scale)
            drawn = (before_row + before_cell <= threshold) | (v != v)
            value = tl.where(drawn, w, value)
            code = tl.where(drawn, i * kernel_w + j, code)
            before_cell += v
        before_row += before_cell
    return value, tl.where(total <= threshold, DEAD, code)


@triton.jit
def expect(
    origin_ptr, bias, front, top, left, mask,
    depth, height, width, in_stride_d, in_stride_h, in_stride_w,
    kernel_d: tl.constexpr, kernel_h: tl.constexpr, kernel_w: tl.constexpr,
    dilation_d: tl.constexpr, dilation_h: tl.constexpr, dilation_w: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """sum v * v / S of every window, S, whether it is infinite, and its scale."""
    total, infinite, scale = sum_windows(
        origin_ptr, bias, front, top, left, mask,
        depth, height, width, in_stride_d, in_stride_h, in_stride_w,
        kernel_d, kernel_h, kernel_w, dilation_d, dilation_h, dilation_w, ACC,
    )  # fmt: skip
    divisor = tl.where(total == 0, 1.0, total)
    expectation = tl.zeros(mask.shape, dtype=ACC)
    for i in range(kernel_d * kernel_h):
        for j in range(kernel_w):
            w = cell(
                origin_ptr, bias, front, top, left, i, j, mask,
                depth, height, width, in_stride_d, in_stride_h, in_stride_w,
                kernel_d, kernel_h, dilation_d, dilation_h, dilation_w, ACC,
            )  # fmt: skip
            v = stand_in(w, infinite, scale)
            expectation += v * (v / divisor)
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
    # window
    kernel_d: tl.constexpr, kernel_h: tl.constexpr, kernel_w: tl.constexpr,
    stride_d: tl.constexpr, stride_h: tl.constexpr, stride_w: tl.constexpr,
    padding_d: tl.constexpr, padding_h: tl.constexpr, padding_w: tl.constexpr,
    dilation_d: tl.constexpr, dilation_h: tl.constexpr, dilation_w: tl.constexpr,
    # variant
    HAS_BIAS: tl.constexpr, DEAD: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, out_slice, position, channel, mask = tile(
        out_depth, positions, channels, INDEX, BLOCK_P, BLOCK_C
    )
    out_row = position // out_width
    out_col = position % out_width
    front = out_slice * stride_d - padding_d
    top = out_row * stride_h - padding_h
    left = out_col * stride_w - padding_w
    bias = load_bias(bias_ptr, channel, channels, HAS_BIAS, ACC)
    origin_ptr = input_ptr + image * in_stride_n + front * in_stride_d
    origin_ptr += channel.to(INDEX) * in_stride_c

    plane = (image * channels + channel) * out_depth + out_slice
    number = uniform(seed_ptr, plane, out_row, out_col, ACC)
    value, code = draw_cells(
        origin_ptr, bias, front, top, left, mask, number,
        depth, height, width, in_stride_d, in_stride_h, in_stride_w,
        kernel_d, kernel_h, kernel_w, dilation_d, dilation_h, dilation_w, DEAD, ACC,
    )  # fmt: skip
    out = image * out_stride_n + channel.to(INDEX) * out_stride_c
    out += (out_slice * positions + position) * out_stride_p
    tl.store(output_ptr + out, value.to(output_ptr.dtype.element_ty), mask=mask)
    tl.store(code_ptr + out, code.to(code_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=ONES)
def expectation_kernel(
    # output, or grad_output, slope and offset for the gradient's coefficients
    input_ptr, bias_ptr, output_ptr, grad_output_ptr, slope_ptr, offset_ptr,
    # sizes
    channels, depth, height, width, out_depth, out_width, positions,
    # strides; output, grad_output, slope and offset are dense
    in_stride_n, in_stride_c, in_stride_d, in_stride_h, in_stride_w,
    out_stride_n, out_stride_c, out_stride_p,
    # window
    kernel_d: tl.constexpr, kernel_h: tl.constexpr, kernel_w: tl.constexpr,
    stride_d: tl.constexpr, stride_h: tl.constexpr, stride_w: tl.constexpr,
    padding_d: tl.constexpr, padding_h: tl.constexpr, padding_w: tl.constexpr,
    dilation_d: tl.constexpr, dilation_h: tl.constexpr, dilation_w: tl.constexpr,
    # variant
    HAS_BIAS: tl.constexpr, COEFFICIENTS: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, out_slice, position, channel, mask = tile(
        out_depth, positions, channels, INDEX, BLOCK_P, BLOCK_C
    )
    out_row = position // out_width
    out_col = position % out_width
    front = out_slice * stride_d - padding_d
    top = out_row * stride_h - padding_h
    left = out_col * stride_w - padding_w
    bias = load_bias(bias_ptr, channel, channels, HAS_BIAS, ACC)
    origin_ptr = input_ptr + image * in_stride_n + front * in_stride_d
    origin_ptr += channel.to(INDEX) * in_stride_c

    expectation, total, infinite, scale = expect(
        origin_ptr, bias, front, top, left, mask,
        depth, height, width, in_stride_d, in_stride_h, in_stride_w,
        kernel_d, kernel_h, kernel_w, dilation_d, dilation_h, dilation_w, ACC,
    )  # fmt: skip
    out = image * out_stride_n + channel.to(INDEX) * out_stride_c
    out += (out_slice * positions + position) * out_stride_p
    if COEFFICIENTS:
        grad = tl.load(grad_output_ptr + out, mask=mask, other=0.0).to(ACC)
        slope = tl.where(total < SMALLEST_SUM, 0.0, grad / tl.where(total == 0, 1.0, total))
        # An approximate quotient takes a mean of the largest number beyond it.
        offset = slope * unscaled(expectation, False, 1.0, ACC)
        # The weights of an infinite window are indicators, not multiples of w: no slope there.
        slope = tl.where(infinite, 0.0, slope * scale)
        tl.store(slope_ptr + out, slope, mask=mask)
        tl.store(offset_ptr + out, offset, mask=mask)
    else:
        expectation = unscaled(expectation, infinite, scale, ACC)
        tl.store(output_ptr + out, expectation.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=ONES)
def gather_kernel(
    # sampled: grad_output and code; else: slope, offset, input and bias
    grad_output_ptr, code_ptr, slope_ptr, offset_ptr, input_ptr, bias_ptr,
    grad_input_ptr, partial_bias_ptr,
    # sizes; positions are those of the input
    channels, depth, width, out_depth, out_height, out_width, positions,
    # strides; grad_output, code, slope, offset and grad_input are dense
    in_stride_n, in_stride_c, in_stride_d, in_stride_h, in_stride_w,
    out_stride_n, out_stride_c, out_stride_p,
    grad_in_stride_n, grad_in_stride_c, grad_in_stride_p,
    # window
    kernel_d: tl.constexpr, kernel_h: tl.constexpr, kernel_w: tl.constexpr,
    stride_d: tl.constexpr, stride_h: tl.constexpr, stride_w: tl.constexpr,
    padding_d: tl.constexpr, padding_h: tl.constexpr, padding_w: tl.constexpr,
    dilation_d: tl.constexpr, dilation_h: tl.constexpr, dilation_w: tl.constexpr,
    # variant
    SAMPLED: tl.constexpr, HAS_BIAS: tl.constexpr, BIAS_GRADIENT: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, in_slice, position, channel, mask = tile(
        depth, positions, channels, INDEX, BLOCK_P, BLOCK_C
    )
    # Distance from the first corner of the first window; never negative.
    slice = in_slice + padding_d
    row = position // width + padding_h
    col = position % width + padding_w
    out_base = image * out_stride_n + channel.to(INDEX) * out_stride_c

    gathered = tl.zeros(mask.shape, dtype=ACC)
    offsets = tl.zeros(mask.shape, dtype=ACC)
    for ahead in range((kernel_d - 1) * dilation_d // stride_d + 1):
        out_slice = slice // stride_d - ahead
        reach_d = slice - out_slice * stride_d
        holds_slice = (out_slice >= 0) & (out_slice < out_depth) & (reach_d < kernel_d * dilation_d)
        holds_slice = holds_slice & (reach_d % dilation_d == 0)
        for up in range((kernel_h - 1) * dilation_h // stride_h + 1):
            out_row = row // stride_h - up
            reach_h = row - out_row * stride_h
            holds_row = (out_row >= 0) & (out_row < out_height) & (reach_h < kernel_h * dilation_h)
            holds_row = masked(holds_slice, holds_row & (reach_h % dilation_h == 0))
            for back in range((kernel_w - 1) * dilation_w // stride_w + 1):
                out_col = col // stride_w - back
                reach_w = col - out_col * stride_w
                holds = (out_col >= 0) & (out_col < out_width) & (reach_w < kernel_w * dilation_w)
                holds = mask & holds_row & holds & (reach_w % dilation_w == 0)
                out = (out_slice * out_height + out_row) * out_width + out_col
                out = out_base + out * out_stride_p
                if SAMPLED:
                    cell = reach_d // dilation_d * kernel_h + reach_h // dilation_h
                    cell = cell * kernel_w + reach_w // dilation_w
                    code = tl.load(code_ptr + out, mask=holds, other=0).to(tl.int32)
                    drawn = holds & (code == cell)
                    gathered += tl.load(grad_output_ptr + out, mask=drawn, other=0.0).to(ACC)
                else:
                    gathered += tl.load(slope_ptr + out, mask=holds, other=0.0)
                    offsets += tl.load(offset_ptr + out, mask=holds, other=0.0)

    if not SAMPLED:
        bias = load_bias(bias_ptr, channel, channels, HAS_BIAS, ACC)
        in_ptr = input_ptr + image * in_stride_n + channel.to(INDEX) * in_stride_c
        in_ptr += in_slice * in_stride_d
        in_ptr += position // width * in_stride_h + position % width * in_stride_w
        x = tl.load(in_ptr, mask=mask, other=0.0)
        w = tl.where(mask, rectified(x, bias, ACC), 0.0)
        # Without a slope w does not count, and may be NaN: a cell that no window holds.
        slope = tl.where(gathered == 0, 0.0, w * (2 * gathered))
        gathered = tl.where(w == float("inf"), offsets, slope - offsets)
        gathered = tl.where(w == 0, 0.0, gathered)

    grad_in = image * grad_in_stride_n + channel.to(INDEX) * grad_in_stride_c
    grad_in += (in_slice * positions + position) * grad_in_stride_p
    tl.store(grad_input_ptr + grad_in, gathered.to(grad_input_ptr.dtype.element_ty), mask=mask)
    if BIAS_GRADIENT:
        # One partial sum per program and channel, [images * depth * blocks_p, channels].
        blocks_p = tl.cdiv(positions, BLOCK_P)
        partial = (image * depth + in_slice) * blocks_p + tl.program_id(0) % blocks_p
        partial = partial * channels + channel
        partial_sum = tl.sum(gathered, axis=0, keep_dims=True)
        tl.store(partial_bias_ptr + partial, partial_sum, mask=channel < channels)
