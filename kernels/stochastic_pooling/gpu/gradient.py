"""Stochastic pooling in Triton, the gradient of the expectation for windows that slide.

A cell gets 2 w * sum(g / S) - sum(g / S * y) from the windows that hold it. A lane of
`gradient_sliding_kernel` owns two neighbouring input columns and slides down the rows of outputs.
Of each input row it keeps the sums, of weights and of their squares, in every window that reaches
its columns: those of `kernel_h` rows give S and y. What a row of windows adds to its two columns
goes to the `kernel_h` rows that the windows hold, and the rows that get no more are written.

A dead window divides by zero. What comes of that reaches its own cells alone, and those have no
gradient. As in `sliding.py` a program that meets an unusual window repeats its strip.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .general import SMALLEST_SUM, expect, masked, rectified, unscaled
from .sliding import (
    LARGEST_SQUARED,
    NUMBERS,
    _bias,
    _in_plane,
    _lanes,
    _largest,
    _load_columns,
    _pair,
    _partial,
    _plane,
    _seen,
    _store,
)

# Weights are taken times this, which the gradient is not: the least of them has a reciprocal.
SCALE = tl.constexpr(2.0**24)
# Where an expectation, so scaled, is smaller, squares may have underflowed.
SMALLEST_MEAN = tl.constexpr(2.0**-55)


@triton.jit
def _columns(
    tensor, index, column, width, FIRST: tl.constexpr, COLUMNS: tl.constexpr,
    INSIDE: tl.constexpr, MASK: tl.constexpr, t: tl.constexpr,
):  # fmt: skip
    """As `_load_columns`, but in pairs also where another lane owns them."""
    if t.unit == 2:
        columns = ()
        for j in tl.static_range(FIRST // 2 * 2, FIRST + COLUMNS, 2):
            here = _pair(tensor[0], index, j)
            if MASK and (j < 0 or j >= INSIDE):
                inside = _in_plane(column, j, width, INSIDE)
                columns = columns + tl.split(tl.load(here, mask=inside[:, None], other=0))
            else:
                columns = columns + tl.split(tl.load(here))
        columns = columns[FIRST % 2 : FIRST % 2 + COLUMNS]
    else:
        columns = _load_columns(tensor, index, column, width, FIRST, COLUMNS, INSIDE, MASK, MASK, t)
    return columns


@triton.jit
def _input_row(
    input, row, height, pair, width, biases, EDGE: tl.constexpr, v: tl.constexpr
):  # fmt: skip
    """Sums of the weights of a row in each window, those of their squares, and the weights of the
    lane's own columns. A row beyond the plane, which only an edge row may be, has weights of 0."""
    if EDGE:
        present = (row >= 0) & (row < height)
        row = tl.minimum(tl.maximum(row, 0), height - 1)
    inputs = _columns(
        input, input[1] + row * input[2], pair * 2, width, v.start, len(biases), v.in_inside,
        EDGE or v.read.masked, v.read,
    )  # fmt: skip
    weights = ()
    for j in tl.static_range(len(biases)):
        bias = tl.where(present, biases[j], float("-inf")) if EDGE else biases[j]
        weights = weights + (rectified(inputs[j].to(tl.float32) * SCALE, bias, tl.float32),)
    # Minus zero is what the compiler can leave out of a sum.
    nothing = tl.full(weights[0].shape, -0.0, tl.float32)
    sums = ()
    squares = ()
    for start in tl.static_range(0, len(biases) - v.kernel_w + 1, v.stride_w):
        # An even window begins with its own column, an odd one ends with it: so do two neighbours
        # add up what both hold alike, and the compiler only once.
        row_sum = nothing
        row_squared = nothing
        for j in tl.static_range(1, v.kernel_w):
            w = weights[start + j - start // v.stride_w % 2]
            row_sum = row_sum + w
            row_squared = row_squared + w * w
        w = weights[start + start // v.stride_w % 2 * (v.kernel_w - 1)]
        sums = sums + (row_sum + w,)
        squares = squares + (row_squared + w * w,)
    return sums, squares, weights[-v.start : 2 - v.start]


@triton.jit
def _to_columns(per_window, v: tl.constexpr):
    """Sums over the windows that hold each of the lane's two columns; the first window begins
    `v.start` columns from these."""
    both = tl.full(per_window[0].shape, -0.0, tl.float32)
    for c in tl.static_range(len(per_window)):
        if v.start + c * v.stride_w <= 0 and v.start + c * v.stride_w + v.kernel_w >= 2:
            both = both + per_window[c]
    first = both
    second = both
    for c in tl.static_range(len(per_window)):
        if v.start + c * v.stride_w + v.kernel_w == 1:
            first = first + per_window[c]
        if v.start + c * v.stride_w == 1:
            second = second + per_window[c]
    return first, second


@triton.jit
def _to_rows(carried, added, v: tl.constexpr):
    """Slopes and offsets, each of two columns, of the `kernel_h` rows that a row of windows holds:
    what the first of them had from windows before, and what is added to all."""
    sums = ()
    for i in tl.static_range(v.kernel_h):
        if i < len(carried):
            slopes, offsets = carried[i]
            slopes = (slopes[0] + added[0][0], slopes[1] + added[0][1])
            offsets = (offsets[0] + added[1][0], offsets[1] + added[1][1])
            sums = sums + ((slopes, offsets),)
        else:
            sums = sums + (added,)
    return sums


@triton.jit
def _row(
    grad_output, input, grad_input, out_row, first_row, state, height, width, out_height, out_width,
    pair, exists, biases, EDGE: tl.constexpr, CHECK_LARGEST: tl.constexpr, v: tl.constexpr,
):  # fmt: skip
    """A row of outputs, with what it reads and completes. Edge rows are any, also those of the
    strip before, which complete nothing."""
    rows, carried, bias_sum, largest, smallest = state
    top = out_row * v.stride_h - v.padding_h
    for i in tl.static_range(v.kernel_h - v.stride_h, v.kernel_h):
        row = _input_row(input, top + i, height, pair, width, biases, EDGE, v)
        rows = rows + (row,)
    row_inside = out_row
    if EDGE:
        present = (out_row >= 0) & (out_row < out_height)
        row_inside = tl.minimum(tl.maximum(out_row, 0), out_height - 1)
    column = pair * (2 // v.stride_w)
    grads = _columns(
        grad_output, grad_output[1] + row_inside * grad_output[2], column, out_width,
        v.first, v.columns, v.inside, EDGE or v.grad.masked, v.grad,
    )  # fmt: skip
    slopes = ()
    offsets = ()
    for c in tl.static_range(v.columns):
        grad = grads[c].to(tl.float32)
        if c + v.first < 0 or c + v.first >= v.inside:
            grad = tl.where(_in_plane(column, c + v.first, out_width, v.inside), grad, 0.0)
        if EDGE:
            grad = tl.where(present, grad, 0.0)
        total = rows[0][0][c]
        squares = rows[0][1][c]
        for i in tl.static_range(1, v.kernel_h):
            total = total + rows[i][0][c]
            squares = squares + rows[i][1][c]
        reciprocal = 1.0 / total
        mean = squares * reciprocal
        slopes = slopes + (grad * reciprocal,)
        offsets = offsets + (grad * reciprocal * mean,)
        if CHECK_LARGEST:
            largest = _largest(largest, total)
        smallest = tl.minimum(smallest, mean)  # NaN, which is no minimum, where the window is dead
    sums = _to_rows(carried, (_to_columns(slopes, v), _to_columns(offsets, v)), v)
    for i in tl.static_range(v.stride_h):
        first_mask = exists
        if EDGE:
            inside = (out_row >= first_row) & (top + i >= 0) & (top + i < height)
            first_mask = masked(inside, exists)
        second_mask = first_mask & (pair * 2 + 1 < width)
        two = ()
        for x in tl.static_range(2):
            w = rows[i][2][x]
            grad = tl.where(w > 0, (w + w) * sums[i][0][x] - sums[i][1][x], 0.0)
            two = two + (grad,)
            bias_sum += tl.where(inside, grad, 0.0) if EDGE else grad
        index = grad_input[1] + (top + i) * grad_input[2]
        _store(grad_input, index, two, first_mask, second_mask, v.own)
    return rows[v.stride_h :], sums[v.stride_h :], bias_sum, largest, smallest


@triton.jit
def _differentiate_strip_again(
    grad_output, input, bias_ptr, grad_input, channels, height, width, out_height, out_width,
    pairs, lanes, first_row, end_row, v: tl.constexpr,
):  # fmt: skip
    """The gradients of a strip from expectations taken window by window; their sums by lanes."""
    _, exists, image, channel, pair = _lanes(channels, pairs, lanes, v)
    # Of each tensor, the planes' first numbers and the elements between two rows and two columns.
    input_ptr, in_pitch, in_step = _plane(input, image, channel, v.read)
    grad_input_ptr, own_pitch, own_step = _plane(grad_input, image, channel, v.own)
    grad_output_ptr, grad_pitch, grad_step = _plane(grad_output, image, channel, v.grad)
    bias = _bias(bias_ptr, channel, v)
    nothing = tl.zeros([v.block], tl.float32)
    bias_sum = nothing
    carried = (((nothing, nothing),) * 2,) * (v.kernel_h - v.stride_h)
    for out_row in range(first_row - (v.kernel_h - 1) // v.stride_h, end_row):
        top = out_row * v.stride_h - v.padding_h
        slopes = (nothing, nothing)
        offsets = (nothing, nothing)
        for c in range(v.first, v.first + v.columns):
            out_column = pair * (2 // v.stride_w) + c
            left = out_column * v.stride_w - v.padding_w
            mask = exists & (out_column >= 0) & (out_column < out_width)
            mask = masked((out_row >= 0) & (out_row < out_height), mask)
            windows = (
                input_ptr, bias, 0, top, left, mask,
                1, height, width, 0, in_pitch, in_step,
            )  # fmt: skip
            mean, total, infinite, scale = expect(windows, v, tl.float32)
            here = grad_output_ptr + (out_row * grad_pitch + out_column * grad_step)
            grad = tl.load(here, mask=mask, other=0.0).to(tl.float32)
            # See expectation_kernel.
            slope = tl.where(total < SMALLEST_SUM, 0.0, grad / total)
            offset = slope * unscaled(mean, False, 1.0, tl.float32)
            slope = tl.where(infinite, 0.0, slope * scale)
            first = (left <= pair * 2) & (left + v.kernel_w > pair * 2)
            second = (left <= pair * 2 + 1) & (left + v.kernel_w > pair * 2 + 1)
            slopes = (
                slopes[0] + tl.where(first, slope, 0.0),
                slopes[1] + tl.where(second, slope, 0.0),
            )
            offsets = (
                offsets[0] + tl.where(first, offset, 0.0),
                offsets[1] + tl.where(second, offset, 0.0),
            )
        sums = _to_rows(carried, (slopes, offsets), v)
        for i in tl.static_range(v.stride_h):
            inside = (out_row >= first_row) & (top + i >= 0) & (top + i < height)
            for x in tl.static_range(2):
                mask = masked(inside, exists & (pair * 2 + x < width))
                cell = (top + i) * in_pitch + (pair * 2 + x) * in_step
                w = rectified(tl.load(input_ptr + cell, mask=mask, other=0.0), bias, tl.float32)
                slope, offset = sums[i][0][x], sums[i][1][x]
                # See gather_kernel.
                grad = tl.where(slope == 0, 0.0, w * (2 * slope)) - offset
                grad = tl.where(w == float("inf"), offset, grad)
                grad = tl.where(mask & (w != 0), grad, 0.0)
                cell = (top + i) * own_pitch + (pair * 2 + x) * own_step
                tl.store(grad_input_ptr + cell, grad.to(grad_input_ptr.dtype.element_ty), mask=mask)
                bias_sum += grad
        carried = sums[v.stride_h :]
    return bias_sum


@triton.jit
def _stepped(tensor, pitch):
    return tensor[0], tensor[1], pitch, tensor[3]


@triton.jit(do_not_specialize=NUMBERS)
def gradient_sliding_kernel(
    grad_output_ptr, input_ptr, bias_ptr, grad_input_ptr, partial_bias_ptr,
    channels, height, width, out_height, out_width,
    # strides of input, grad_input and grad_output
    in_n, in_c, in_pitch, in_step, own_n, own_c, own_pitch, own_step,
    grad_n, grad_c, grad_pitch, grad_step,
    # division of the work, as in gather_sliding_kernel
    pairs, lanes, strip_rows, inner_rows, start_row, stop_row,
    v: tl.constexpr,
):  # fmt: skip
    channels = channels if v.channels == 0 else v.channels
    whole_grad_input = (grad_input_ptr, own_n, own_c, own_pitch, own_step)
    whole_input = (input_ptr, in_n, in_c, in_pitch, in_step)
    whole_grad = (grad_output_ptr, grad_n, grad_c, grad_pitch, grad_step)
    number, exists, image, channel, pair = _lanes(channels, pairs, lanes, v)
    partial = _partial(number, image, channel, pair, channels, pairs, lanes, v)
    grad_input = _seen(whole_grad_input, image, channel, pair * 2, v.own)
    if v.same:  # one index serves both
        input = (input_ptr,) + grad_input[1:]
    else:
        input = _seen(whole_input, image, channel, pair * 2, v.read)
    if v.grad_same:
        grad = (grad_output_ptr,) + grad_input[1:]
    else:
        grad = _seen(whole_grad, image, channel, pair * (2 // v.stride_w), v.grad)
    bias = _bias(bias_ptr, channel, v) * SCALE
    biases = ()
    for j in tl.static_range((v.columns - 1) * v.stride_w + v.kernel_w):
        if j + v.start < 0:  # with the other column of a pair before
            inside = pair >= (1 - j - v.start) // 2
            biases = biases + (tl.where(inside, bias, float("-inf")),)
        elif j + v.start < v.in_inside:
            biases = biases + (bias,)
        elif j + v.start == 3 and v.in_inside == 2:
            biases = biases + (biases[j - 1],)
        else:
            inside = pair * 2 + (j + v.start) < width
            biases = biases + (tl.where(inside, bias, float("-inf")),)

    first_row = start_row + tl.program_id(1) * strip_rows
    end_row = tl.minimum(first_row + strip_rows, stop_row)
    # A strip's first row is an edge row: so is the first of a plane, that has none above it.
    inner_row = first_row + 1
    groups = tl.maximum(tl.minimum(end_row, inner_rows) - inner_row, 0) // v.rows
    edge_row = inner_row + groups * v.rows
    prior_row = first_row - (v.kernel_h - 1) // v.stride_h

    nothing = tl.zeros([v.block], tl.float32)
    carried = (((nothing, nothing),) * 2,) * (v.kernel_h - v.stride_h)
    row = ((nothing,) * v.columns, (nothing,) * v.columns, (nothing,) * 2)
    rows = (row,) * (v.kernel_h - v.stride_h)
    if v.kernel_h > v.stride_h:  # see `_forward`
        top = prior_row * v.stride_h - v.padding_h
        for in_row in range(top, top + v.kernel_h - v.stride_h):
            fresh = _input_row(input, in_row, height, pair, width, biases, True, v)
            rows = rows[1:] + (fresh,)
    state = (rows, carried, nothing, nothing, nothing + float("inf"))
    # See `_forward`.
    zero = number >> 31
    inner_grad_input = _stepped(grad_input, grad_input[2] + zero)
    inner_input = _stepped(input, inner_grad_input[2] if v.same else input[2] + zero)
    inner_grad = _stepped(grad, inner_grad_input[2] if v.grad_same else grad[2] + zero)
    # The rows above the inner ones, then those below, for which the inner loop does not turn again:
    # one loop for both, as the compiler takes long for each copy of a row.
    begin, end = prior_row, inner_row
    for _ in range(2):
        for out_row in range(begin, end):
            state = _row(
                grad, input, grad_input, out_row, first_row, state,
                height, width, out_height, out_width, pair, exists, biases, True, True, v,
            )  # fmt: skip
        for group in range(groups):
            for k in tl.static_range(v.rows):
                # With stride 1 every row lies in one of the windows whose sums are looked at.
                state = _row(
                    inner_grad, inner_input, inner_grad_input,
                    inner_row + group * v.rows + k, first_row, state,
                    height, width, out_height, out_width, pair, exists, biases, False,
                    v.stride_h > 1 or k % v.kernel_h == v.kernel_h - 1 or k == v.rows - 1, v,
                )  # fmt: skip
        begin, end, groups = edge_row, end_row, 0

    _, _, bias_sum, largest, smallest = state
    unusual = ((largest < LARGEST_SQUARED) == 0) | (smallest < SMALLEST_MEAN)
    any_unusual = tl.max(unusual.to(tl.int32))
    if any_unusual > 0:  # rare
        bias_sum = _differentiate_strip_again(
            whole_grad, whole_input, bias_ptr, whole_grad_input,
            channels, height, width, out_height, out_width,
            pairs + (any_unusual >> 1), lanes, first_row, end_row, v,
        )  # fmt: skip
    if v.bias_gradient:
        tl.store(partial_bias_ptr + partial, bias_sum, mask=exists)
