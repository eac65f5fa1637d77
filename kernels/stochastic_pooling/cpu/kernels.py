"""What one thread does of the two passes over a tensor.

A sheet is what windows slide over: an image in channels_last, or some contiguous planes that are
transposed on their way in and out. Either way a row is columns of `step` lanes, so that the next
column always lies `step` lanes further, and one code serves both formats.

A pass does some rows of a sheet at a time, always the same whichever thread does them. Of the rows
that their windows hold it makes a block of weights, rectified, with zeros for the padding.
Backward is a gather from a block of gradients and codes, and does the columns of each phase of the
stride together, as the same cells of windows drew them.

LLVM turns the loops over lanes into vector instructions. Places and lanes are unsigned: of a signed
index numba asks whether it is negative, and no loop that asks becomes vectors. Of numpy no more
than this: each of its functions takes a tenth of a second to compile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray
from numba.core import types

from .. import philox, reference
from .compiling import inlined
from .floats import narrow, widen

# What a pass knows of the tensors and the window; see `_plan` in __init__.py.
_PLAN = """planar planes step sheets height width out_height out_width stride_h stride_w padding_h
padding_w line"""
PLAN = np.dtype([(name, np.int64) for name in _PLAN.split()])
# Its arguments: their address; which of how many parts to do (of 0: the thread's in its team); what
# it tells, whether only the reference takes the numbers; whether there is a bias; more addresses.
_, PART, PARTS, UNUSUAL, WITH_BIAS = range(5)
# Rows and columns of outputs that share a call of Philox; rows that backward does at a time.
GROUP, PAIR, ROWS = 4, 2, 8
# The bits of weights whose sums may overflow, and of inverses that may overflow soon. Bits of
# numbers that are not negative are in the order of the numbers, those of NaN beyond.
TOO_LARGE = int(np.float32(2.0**120).view(np.uint32))
DEAD = 255
NO_CELL = 64  # as a part of a cell's number: a row or a column that a window does not have
FETCH, STORE, PLACE = range(3)

_thread_num = types.ExternalFunction("omp_get_thread_num", types.int32())
_num_threads = types.ExternalFunction("omp_get_num_threads", types.int32())
_lanes = np.uint64
_ZERO = np.float32(0)
_LOST = np.nextafter(np.float32(reference.SMALLEST_SUM), _ZERO)  # the largest without a gradient
_NOTHING = np.float32(-0.0)  # the zero that a sum starts with, for LLVM need not add it


@inlined
def _share(call, units):
    """The first of this thread's units, and the one behind the last."""
    part, parts = call[PART], call[PARTS]
    if parts == 0:
        part, parts = np.int64(_thread_num()), np.int64(_num_threads())
    return part * units // parts, (part + 1) * units // parts


@inlined
def _runs(columns, plan):
    """Lanes of neighbouring windows that have neighbouring cells: how many times how many."""
    step = _lanes(plan.step)
    return (_lanes(1), columns * step) if plan.stride_w == 1 else (columns, step)


@inlined
def _row(task, staged, numbers, sheet, row, size, plan):
    """The lanes of a row, and where they start: in `numbers`, or, of contiguous planes, in `staged`
    once they are fetched, from where they are stored."""
    height, width = size
    if not plan.planar:
        return numbers, _lanes((sheet * height + row) * width * plan.step)
    planes = 0 if task == PLACE else min(plan.step, plan.planes - sheet * plan.step)
    # Plane by plane: their distance may be a multiple of 4 KiB, which caches do not like.
    for p in range(_lanes(planes)):
        start = _lanes((sheet * plan.step * height + row) * width) + p * _lanes(height * width)
        for column in range(_lanes(width)):
            if task == FETCH:
                staged[column * _lanes(plan.step) + p] = numbers[start + column]
            else:
                numbers[start + column] = staged[column * _lanes(plan.step) + p]
    return staged, _lanes(0)


@inlined
def _random_halves(halves, words, pairs, lanes, first_plane, group, seed, step):
    """Philox's four words for each pair of columns of each plane (see philox.py), in 64 bits for
    the sake of its products; then the low halves for even columns, the high halves for odd ones.
    In one loop the second, over the lanes of a column, would be too short for vectors."""
    mask, half, count = _lanes(0xFFFFFFFF), _lanes(32), _lanes(pairs.size)
    for k in range(count):
        plane = _lanes(first_plane) + lanes[k]
        c0, c1, c2, c3 = _lanes(pairs[k]), _lanes(group), plane & mask, plane >> half
        k0, k1 = _lanes(seed) & mask, _lanes(seed) >> half
        for _ in range(philox.ROUNDS):
            product0, product1 = _lanes(0xD2511F53) * c0, _lanes(0xCD9E8D57) * c2
            c0, c1 = (product1 >> half) ^ c1 ^ k0, product1 & mask
            c2, c3 = (product0 >> half) ^ c3 ^ k1, product0 & mask
            k0, k1 = (k0 + _lanes(0x9E3779B9)) & mask, (k1 + _lanes(0xBB67AE85)) & mask
        words[k], words[count + k] = np.uint32(c0), np.uint32(c1)
        words[count * _lanes(2) + k], words[count * _lanes(3) + k] = np.uint32(c2), np.uint32(c3)
    for column in range(_lanes(words.size) // step):
        for k in range(step):
            word, even = words[column * step + k], _lanes(PAIR) * column * step + k
            halves[even], halves[even + step] = np.uint16(word), np.uint16(word >> np.uint32(16))


@inlined
def _weigh(weights, top, end, x, staged, biases, sheet, call, plan):
    """Make weights of rows from `top` on: max(x + bias, 0), where NaN stays NaN and no zero is
    negative. Say so if there are some that only the reference takes."""
    count, bias = _lanes(plan.width * plan.step), _lanes(sheet * plan.width * plan.step)
    with_bias = call[WITH_BIAS] > 0
    most = np.uint32(0)
    for row in range(top, end):
        to = _lanes((row - top) * plan.line + plan.padding_w * plan.step)
        if not 0 <= row < plan.height:
            for k in range(count):
                weights[to + k] = _ZERO
            continue
        numbers, start = _row(FETCH, staged, x, sheet, row, (plan.height, plan.width), plan)
        for k in range(count):
            w = widen(numbers[start + k])
            w = w + biases[bias + k] if with_bias else w
            w = _ZERO if w <= _ZERO else w
            weights[to + k] = w
            bits = np.float32(w).view(np.uint32)
            most = bits if bits > most else most
    if most >= TOO_LARGE:
        call[UNUSUAL] = 1


@inlined
def _window(weights, first, line, step, cells, lost):
    """Of the window whose first cell is a lane the sum, its inverse or 0, and the expectation."""
    total, mean = _NOTHING, _ZERO
    for i in range(len(cells[0])):
        row = _NOTHING
        for j in range(len(cells[1])):
            row += weights[first + _lanes(i) * line + _lanes(j) * step]
        total += row
    inverse = np.float32(1) / total if total > lost else _ZERO
    for i in range(len(cells[0])):
        for j in range(len(cells[1])):
            w = weights[first + _lanes(i) * line + _lanes(j) * step]
            mean += w * (w * inverse)
    return total, inverse, mean


def forward(number: Any, training: bool, kernel_h: int, kernel_w: int) -> Any:
    """The pass for a dtype (see floats.py), a mode and a size of windows. Tensors: the biases of a
    row of lanes of each sheet, input, output; in training also code and seed."""
    # For their lengths. No function may be a constant of a pass, or the cache finds it never again.
    cells = (0,) * kernel_h, (0,) * kernel_w

    def forward(pointers):
        call, plan = carray(pointers[0], 5, np.int64), carray(pointers[5], 1, PLAN)[0]
        outputs = plan.planes * plan.out_height * plan.out_width
        biases = carray(pointers[6], plan.sheets * plan.width * plan.step, np.float32)
        x = carray(pointers[7], plan.planes * plan.height * plan.width, number)
        output, code = carray(pointers[8], outputs, number), carray(pointers[9], outputs, np.uint8)
        size, step, line = (plan.out_height, plan.out_width), _lanes(plan.step), _lanes(plan.line)
        runs, run = _runs(_lanes(plan.out_width), plan)
        pitch = _lanes(plan.stride_w) * step
        weights = np.zeros(((GROUP - 1) * plan.stride_h + kernel_h) * plan.line, np.float32)
        fetched = np.empty(plan.width * plan.step, number)
        staged = np.empty(plan.out_width * plan.step, number)
        staged_code = np.empty(staged.size, np.uint8)
        calls = (plan.out_width + PAIR - 1) // PAIR * plan.step
        pairs, lanes = np.empty(calls, np.uint32), np.empty(calls, np.uint32)
        for pair in range(calls // plan.step):
            for k in range(plan.step):
                pairs[pair * plan.step + k], lanes[pair * plan.step + k] = pair, k
        words = np.empty(GROUP * calls, np.uint32)
        halves = np.empty(PAIR * words.size, np.uint16)
        groups = (plan.out_height + GROUP - 1) // GROUP
        most = np.uint32(0)
        start, end = _share(call, plan.sheets * groups)
        for unit in range(start, end):
            sheet, group = unit // groups, unit % groups
            out_top, out_end = group * GROUP, min(group * GROUP + GROUP, plan.out_height)
            top = out_top * plan.stride_h - plan.padding_h
            bottom = (out_end - 1) * plan.stride_h - plan.padding_h + kernel_h
            _weigh(weights, top, bottom, x, fetched, biases, sheet, call, plan)
            if training:
                seed, plane = carray(pointers[10], 1, np.int64)[0], sheet * plan.step
                _random_halves(halves, words, pairs, lanes, plane, group, seed, step)
            for oh in range(out_top, out_end):
                target, to = _row(PLACE, staged, output, sheet, oh, size, plan)
                codes, to = _row(PLACE, staged_code, code, sheet, oh, size, plan)
                corner = _lanes((oh - out_top) * plan.stride_h) * line
                half = _lanes((oh - out_top) * PAIR * calls)
                for m in range(runs):
                    for k in range(run):
                        first, lane = corner + m * pitch + k, m * run + k
                        total, inverse, value = _window(weights, first, line, step, cells, _ZERO)
                        if training:
                            u = np.float32(halves[half + lane]) * np.float32(2.0**-16)
                            threshold = u * total
                            before_row, value, drawn = _NOTHING, _NOTHING, 0
                            for i in range(kernel_h):
                                before = _NOTHING
                                for j in range(kernel_w):
                                    w = weights[first + _lanes(i) * line + _lanes(j) * step]
                                    reached = before_row + before <= threshold
                                    value = w if reached else value
                                    drawn = i * kernel_w + j if reached else drawn
                                    before += w
                                before_row += before
                            codes[to + lane] = DEAD if total <= threshold else drawn
                        else:
                            bits = np.float32(inverse).view(np.uint32)
                            most = bits if bits > most else most
                        target[to + lane] = narrow(value, target)
                _row(STORE, staged, output, sheet, oh, size, plan)
                if training:
                    _row(STORE, staged_code, code, sheet, oh, size, plan)
        if most >= TOO_LARGE:
            call[UNUSUAL] = 1

    return forward


def backward(number: Any, training: bool, *sides: int) -> Any:
    """Likewise for sizes and strides. Tensors: the biases; the gradients of output and input, and
    that of the bias for each group of rows and lane of a column; then code, or input."""
    kernel_h, kernel_w, stride_h, stride_w = sides
    cells, evaluation = ((0,) * kernel_h, (0,) * kernel_w), int(not training)
    # So many windows hold an input, each way, and so many rows of them hold the rows of a group.
    taps_h, taps_w = -(-kernel_h // stride_h), -(-kernel_w // stride_w)
    most = -(-ROWS // stride_h) + taps_h

    def backward(pointers):
        call, plan = carray(pointers[0], 5, np.int64), carray(pointers[5], 1, PLAN)[0]
        inputs = plan.planes * plan.height * plan.width
        outputs = plan.planes * plan.out_height * plan.out_width
        biases = carray(pointers[6], plan.sheets * plan.width * plan.step, np.float32)
        grad, grad_input = carray(pointers[7], outputs, number), carray(pointers[8], inputs, number)
        groups = (plan.height + ROWS - 1) // ROWS
        grad_bias = carray(pointers[9], plan.sheets * groups * plan.step, np.float32)
        code, x = carray(pointers[10], outputs, np.uint8), carray(pointers[10], inputs, number)
        size, out_size = (plan.height, plan.width), (plan.out_height, plan.out_width)
        step, line = _lanes(plan.step), _lanes(plan.line)
        pitch, out_lanes = _lanes(stride_w) * step, _lanes(plan.out_width) * step
        fetched = np.empty(max(plan.width, plan.out_width) * plan.step, number)
        fetched_code = np.empty(fetched.size, np.uint8)
        staged = np.empty(plan.width * plan.step, number)
        codes = np.zeros(most * plan.line, np.uint8)  # one more than codes; 0 outside
        grads = np.zeros(codes.size, np.float32)
        # Of full size without a bias, too: masked access where no memory is costs 100s of cycles.
        with_bias, totals = call[WITH_BIAS] > 0, np.zeros(staged.size, np.float32)
        offsets = np.zeros(evaluation * codes.size, np.float32)
        rows = (most - 1) * stride_h + max(kernel_h, stride_h)  # between windows, too
        weights = np.zeros(evaluation * rows * plan.line, np.float32)
        start, end = _share(call, plan.sheets * groups)
        for unit in range(start, end):
            sheet, top = unit // groups, unit % groups * ROWS
            last = min(top + ROWS, plan.height) - 1
            # The rows of windows that hold these rows, and the first row that those hold.
            out_top = (top + plan.padding_h) // stride_h - (taps_h - 1)
            out_last = (last + plan.padding_h) // stride_h
            above = out_top * stride_h - plan.padding_h
            if not training:
                bottom = out_last * stride_h - plan.padding_h + kernel_h
                _weigh(weights, above, bottom, x, fetched, biases, sheet, call, plan)
            for oh in range(out_top, out_last + 1):
                to = _lanes(oh - out_top) * line + _lanes(taps_w - 1) * step
                inside = 0 <= oh < plan.out_height
                for k in range(out_lanes):  # in evaluation all the cells of a window were drawn
                    codes[to + k] = inside
                if not inside:
                    continue
                numbers, first = _row(FETCH, fetched, grad, sheet, oh, out_size, plan)
                if training:
                    drew, first = _row(FETCH, fetched_code, code, sheet, oh, out_size, plan)
                    for k in range(out_lanes):
                        grads[to + k] = widen(numbers[first + k])
                        codes[to + k] = drew[first + k] + 1
                    continue
                # What a window's gradient is made of (reference.py): the number by which its
                # weights are multiplied, and the one that is taken off.
                corner = _lanes((oh - out_top) * stride_h) * line
                runs, run = _runs(_lanes(plan.out_width), plan)
                for m in range(runs):
                    for k in range(run):
                        cell, lane = corner + m * pitch + k, m * run + k
                        _, inverse, mean = _window(weights, cell, line, step, cells, _LOST)
                        slope = widen(numbers[first + lane]) * inverse
                        slope = slope if inverse != _ZERO else _ZERO
                        grads[to + lane], offsets[to + lane] = slope, slope * mean
            for row in range(top, last + 1):
                target, to = _row(PLACE, staged, grad_input, sheet, row, size, plan)
                i0 = (row + plan.padding_h) % stride_h
                upper = (row + plan.padding_h) // stride_h - (taps_h - 1) - out_top
                for phase in range(stride_w):
                    # Input columns that are `phase` modulo the stride, counted from the padding's.
                    low = (plan.padding_w - phase + stride_w - 1) // stride_w
                    columns = (plan.width - 1 + plan.padding_w - phase) // stride_w + 1 - low
                    column = low * stride_w + phase - plan.padding_w
                    place = to + _lanes(column) * step
                    corner = _lanes(upper) * line + _lanes(low) * step
                    weight = _lanes(row - above) * line + _lanes(column + plan.padding_w) * step
                    runs, run = _runs(_lanes(max(columns, 0)), plan)
                    for m in range(runs):
                        for k in range(run):
                            lane, total, offset = m * run + k, _ZERO, _ZERO
                            for t in range(taps_h):
                                i, tap_row = i0 + t * stride_h, _lanes(taps_h - 1 - t) * line
                                cell_row = i * kernel_w * training if i < kernel_h else NO_CELL
                                for u in range(taps_w):
                                    j = phase + u * stride_w
                                    tap = corner + lane + tap_row + _lanes(taps_w - 1 - u) * step
                                    cell = j * training if j < kernel_w else NO_CELL
                                    drawn = codes[tap] == np.uint8(cell_row + cell + 1)
                                    total += grads[tap] if drawn else _ZERO
                                    if not training:
                                        offset += offsets[tap] if drawn else _ZERO
                            if not training:
                                w = weights[weight + m * pitch + k]
                                total = w * (total + total) - offset if w != _ZERO else _ZERO
                            if with_bias:
                                totals[lane] += total
                            target[place + m * pitch + k] = narrow(total, target)
                _row(STORE, staged, grad_input, sheet, row, size, plan)
            for column in range(_lanes(with_bias * totals.size) // step):
                for k in range(step):
                    grad_bias[_lanes(unit) * step + k] += totals[column * step + k]
                    totals[column * step + k] = _ZERO

    return backward
