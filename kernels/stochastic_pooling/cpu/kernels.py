"""What one thread does of the two passes over a tensor.

A sheet is what windows slide over: an image in channels_last, or some contiguous planes that are
transposed on their way in and out. Either way a row is columns of `step` lanes, so that the next
column always lies `step` lanes further, and one code serves both formats.

A row of weights is made once for all the windows that hold it, rectified and in fp32, between
columns of zeros for the padding. A ring has as many rows as a window, and one of zeros. Backward is
a gather: it holds rows of gradients and codes likewise, and does the columns of each phase of the
stride together, as the same cells of windows drew them.

Threads share out groups of rows of all sheets in order, so that each walks down its sheets. The
gradient of the bias is summed up by group, so it does not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import carray
from numba.core import types
from numba.np.unsafe.ndarray import to_fixed_tuple

from . import rows
from .compiling import inlined
from .rows import GROUP, NO_CELL, PAIR

# What a pass knows of the tensors and the window; see `_plan` in __init__.py.
_PLAN = (
    "planar", "channels", "planes", "step", "sheets", "height", "width", "out_height", "out_width",
    "kernel_h", "kernel_w", "stride_h", "stride_w", "padding_h", "padding_w", "line", "grad_line",
)  # fmt: skip
PLAN = np.dtype([(name, np.int64) for name in _PLAN])
# It is called with an array: its own address; which of how many parts to do (of 0: the thread's in
# its team); what it tells, whether there are numbers that only the reference takes; whether there
# is a bias; the addresses of the plan and the tensors.
_, PART, PARTS, UNUSUAL, WITH_BIAS = range(5)

_thread_num = types.ExternalFunction("omp_get_thread_num", types.int32())
_num_threads = types.ExternalFunction("omp_get_num_threads", types.int32())
_lanes = np.uint64
_START, _ONE = _lanes(0), _lanes(1)


class _Ring(NamedTuple):
    """Rows of weights: input row r is in slot r mod kernel_h, zeros are in slot kernel_h."""

    weights: Any
    held: Any  # the row in each slot
    starts: Any  # of the rows of the windows
    fetched: Any
    bias: Any
    bits: Any  # extremes of the weights


@inlined
def _fill(array, value):
    for k in range(array.size):
        array[k] = value


# Of numpy no more than this: each of its functions takes a tenth of a second to compile.
@inlined
def _new_ring(needed, x, with_bias, plan):
    row = needed * plan.width * plan.step
    bits = np.zeros(2, np.uint32)
    bits[1] -= 1
    return _Ring(
        np.zeros(needed * (plan.kernel_h + 1) * plan.line, np.float32),
        np.zeros(plan.kernel_h, np.int64),
        np.zeros(plan.kernel_h, np.uint64),
        np.empty(plan.planar * row, x.dtype),
        np.empty(with_bias * row, np.float32),
        bits,
    )


@inlined
def _turn_to(sheet, ring, bias, plan):
    _fill(ring.held, -1)
    for k in range(min(plan.step, ring.bias.size)):
        ring.bias[k] = bias[(sheet * plan.step + k) % plan.channels]
    for k in range(plan.step, ring.bias.size):
        ring.bias[k] = ring.bias[k - plan.step]


@inlined
def _columns(columns, plan):
    """Where the cells of a window lie in its rows."""
    for j in range(columns.size):
        columns[j] = j * plan.step
    return columns


@inlined
def _place(sheet, row, size, plan):
    """Where a row of a sheet starts in a tensor of that height and width, and the number and
    distance of its planes."""
    height, width = size
    planes = min(plan.step, plan.planes - sheet * plan.step)
    start = sheet * plan.step * height * width + row * width * (1 if plan.planar else plan.step)
    return _lanes(start), _lanes(planes), _lanes(height * width)


@inlined
def _fetch(fetched, numbers, sheet, row, size, plan):
    """The lanes of a row, those of contiguous planes transposed, and where they start."""
    start, planes, plane = _place(sheet, row, size, plan)
    for p in range(_lanes(plan.planar) * planes):
        for column in range(_lanes(size[1])):
            fetched[column * _lanes(plan.step) + p] = numbers[start + p * plane + column]
    return (fetched, _START) if plan.planar else (numbers, start)


@inlined
def _target(staged, numbers, sheet, row, column, size, plan):
    """Where to put the lanes of a row from `column` on: contiguous planes wait for `_store`."""
    start, _, _ = _place(sheet, row, size, plan)
    return (staged, _START) if plan.planar else (numbers, start + _lanes(column * plan.step))


@inlined
def _store(numbers, staged, columns, column, stride, sheet, row, size, plan):
    """Store what waits as every `stride`-th column of a row of contiguous planes."""
    start, planes, plane = _place(sheet, row, size, plan)
    for p in range(_lanes(plan.planar) * planes):
        for k in range(columns):
            to = start + p * plane + _lanes(column) + k * _lanes(stride)
            numbers[to] = staged[k * _lanes(plan.step) + p]


@inlined
def _hold(oh, sheet, ring, x, plan):
    """Have the rows of the windows of output row `oh`."""
    count = _lanes(plan.width * plan.step)
    for i in range(plan.kernel_h):
        row = oh * plan.stride_h - plan.padding_h + i
        slot = row % plan.kernel_h if 0 <= row < plan.height else plan.kernel_h
        ring.starts[i] = slot * plan.line
        if slot < plan.kernel_h and ring.held[slot] != row:
            ring.held[slot] = row
            to = ring.starts[i] + _lanes(plan.padding_w * plan.step)
            size = plan.height, plan.width
            numbers, start = _fetch(ring.fetched, x, sheet, row, size, plan)
            rows.rectify(ring.weights, to, numbers, start, ring.bias, ring.bits, count)


@inlined
def _share(call, units):
    """The first of this thread's units, and the one behind the last."""
    part, parts = call[PART], call[PARTS]
    if parts == 0:
        part, parts = np.int64(_thread_num()), np.int64(_num_threads())
    return part * units // parts, (part + 1) * units // parts


@inlined
def _runs(columns, plan):
    """Lanes of neighbouring windows that have neighbouring cells."""
    step = _lanes(plan.step)
    return (_ONE, columns * step) if plan.stride_w == 1 else (columns, step)


def forward(number: Any, training: bool, kernel_h: int, kernel_w: int) -> Callable[..., None]:
    """The pass for a dtype of the input's numbers (floats.py), a mode and a size of windows.

    Tensors: input, bias, output; in training also code and seed.
    """

    def forward(pointers):
        call, plan = carray(pointers[0], 5, np.int64), carray(pointers[5], 1, PLAN)[0]
        outputs = plan.planes * plan.out_height * plan.out_width
        x = carray(pointers[6], plan.planes * plan.height * plan.width, number)
        bias = carray(pointers[7], plan.channels, np.float32)
        output, code = carray(pointers[8], outputs, number), carray(pointers[9], outputs, np.uint8)
        size = plan.out_height, plan.out_width
        step, width = _lanes(plan.step), _lanes(plan.out_width)
        stride = _lanes(plan.stride_w * plan.step)
        runs, run = _runs(width, plan)
        columns = to_fixed_tuple(_columns(np.empty(kernel_w, np.uint64), plan), kernel_w)
        ring = _new_ring(True, x, call[WITH_BIAS], plan)
        staged = np.empty(plan.planar * plan.out_width * plan.step, number)
        staged_code = np.empty(staged.size, np.uint8)
        pairs = (plan.out_width + PAIR - 1) // PAIR
        calls = pairs * plan.step
        pair_of, lane_of = np.empty(calls, np.uint32), np.empty(calls, np.uint32)
        rows.number(pair_of, lane_of, plan.step)
        words = np.empty(GROUP * calls, np.uint32)
        halves = np.empty(GROUP * PAIR * calls, np.uint16)
        groups = (plan.out_height + GROUP - 1) // GROUP
        first, end = _share(call, plan.sheets * groups)
        sheet = -1
        for unit in range(first, end):
            if unit // groups != sheet:
                sheet = unit // groups
                _turn_to(sheet, ring, bias, plan)
            row = unit % groups * GROUP
            if training:
                seed = carray(pointers[10], 1, np.int64)[0]
                rows.random_words(words, pair_of, lane_of, sheet * plan.step, row // GROUP, seed)
                rows.deal(halves, words, _lanes(GROUP * pairs), step)
            for oh in range(row, min(row + GROUP, plan.out_height)):
                _hold(oh, sheet, ring, x, plan)
                cells = to_fixed_tuple(ring.starts, kernel_h)
                target, to = _target(staged, output, sheet, oh, 0, size, plan)
                if training:
                    target_code, to = _target(staged_code, code, sheet, oh, 0, size, plan)
                    half = _lanes((oh - row) * PAIR * pairs * plan.step)
                    rows.draw(
                        target, target_code, to, ring.weights, cells, columns, stride,
                        halves, half, runs, run,
                    )  # fmt: skip
                else:
                    rows.expect(target, to, ring.weights, cells, columns, stride, runs, run)
                _store(output, staged, width, 0, 1, sheet, oh, size, plan)
                if training:
                    _store(code, staged_code, width, 0, 1, sheet, oh, size, plan)
        if ring.bits[0] >= rows.TOO_LARGE or (not training and ring.bits[1] < rows.TOO_SMALL):
            call[UNUSUAL] = 1

    return forward


def backward(
    number: Any, training: bool, kernel_h: int, kernel_w: int, stride_h: int, stride_w: int
) -> Callable[..., None]:
    """Likewise. Tensors: gradients of the output, the input, and the bias for each group of rows
    and lane of a column; then code, or input and bias."""
    # So many windows hold an input, each way.
    taps_h, taps_w = -(-kernel_h // stride_h), -(-kernel_w // stride_w)
    # A lone gradient stays as it is stored.
    held_number = number if training and taps_h * taps_w == 1 else np.float32

    def backward(pointers):
        call, plan = carray(pointers[0], 5, np.int64), carray(pointers[5], 1, PLAN)[0]
        inputs = plan.planes * plan.height * plan.width
        outputs = plan.planes * plan.out_height * plan.out_width
        grad, grad_input = carray(pointers[6], outputs, number), carray(pointers[7], inputs, number)
        groups = (plan.height + GROUP - 1) // GROUP
        grad_bias = carray(pointers[8], plan.sheets * groups * plan.step, np.float32)
        code, x = carray(pointers[9], outputs, np.uint8), carray(pointers[9], inputs, number)
        bias = carray(pointers[10], plan.channels, np.float32)
        size, out_size = (plan.height, plan.width), (plan.out_height, plan.out_width)
        step, out_width = _lanes(plan.step), _lanes(plan.out_width)
        ring = _new_ring(not training, x, call[WITH_BIAS], plan)
        cells = to_fixed_tuple(_columns(np.empty(kernel_w, np.uint64), plan), kernel_w)
        fetched = np.empty(plan.planar * plan.out_width * plan.step, number)
        fetched_code = np.empty(fetched.size, np.uint8)
        # Output row r is in slot r mod taps_h; slot taps_h is a row of no windows.
        grads = np.zeros((taps_h + 1) * plan.grad_line, held_number)
        codes = np.zeros(grads.size, np.uint8)  # in evaluation all alike, as all cells count
        _fill(codes, rows.DEAD if training else 0)
        offsets = np.zeros((not training) * grads.size, np.float32)  # what is taken off
        slopes_sum = np.empty((not training) * plan.width * plan.step, np.float32)
        offsets_sum = np.empty(slopes_sum.size, np.float32)
        held, starts = np.empty(taps_h, np.int64), np.empty(taps_h, np.uint64)
        columns = np.empty(taps_w, np.uint64)
        row_cells, column_cells = np.zeros(taps_h, np.uint8), np.empty(taps_w, np.uint8)
        gathered = np.empty(plan.width * plan.step, number)
        totals = np.zeros(call[WITH_BIAS] * plan.width * plan.step, np.float32)
        no_totals = np.zeros(0, np.float32)
        first, end = _share(call, plan.sheets * groups)
        sheet = -1
        for unit in range(first, end):
            if unit // groups != sheet:
                sheet = unit // groups
                _fill(held, -1)
                _turn_to(sheet, ring, bias, plan)
            _fill(totals, 0)
            begin = unit % groups * GROUP
            for row in range(begin, min(begin + GROUP, plan.height)):
                # The windows that hold the row, the upper ones first, as rows enter the ring.
                for t in range(taps_h - 1, -1, -1):
                    i = (row + plan.padding_h) % stride_h + t * stride_h
                    oh = (row + plan.padding_h) // stride_h - t
                    inside = i < kernel_h and 0 <= oh < plan.out_height
                    slot = oh % taps_h if inside else taps_h
                    starts[t], row_cells[t] = slot * plan.grad_line, training * i * kernel_w
                    if not inside or held[slot] == oh:
                        continue
                    held[slot] = oh
                    to = starts[t] + _lanes((taps_w - 1) * plan.step)
                    numbers, start = _fetch(fetched, grad, sheet, oh, out_size, plan)
                    if training:
                        rows.convert(grads, to, numbers, start, out_width * step)
                        drawn, start = _fetch(fetched_code, code, sheet, oh, out_size, plan)
                        rows.convert(codes, to, drawn, start, out_width * step)
                    else:
                        _hold(oh, sheet, ring, x, plan)
                        runs, run = _runs(out_width, plan)
                        rows.differentiate(
                            grads, offsets, to, numbers, start, ring.weights,
                            to_fixed_tuple(ring.starts, kernel_h), cells,
                            _lanes(stride_w) * step, runs, run,
                        )  # fmt: skip
                places = to_fixed_tuple(starts, taps_h)
                for phase in range(stride_w):
                    # Input columns that are `phase` modulo the stride, counted from the padding's.
                    low = (plan.padding_w - phase + stride_w - 1) // stride_w
                    width = (plan.width - 1 + plan.padding_w - phase) // stride_w + 1 - low
                    column = low * stride_w + phase - plan.padding_w
                    for t in range(taps_w):
                        j = phase + t * stride_w
                        columns[t] = (low + taps_w - 1 - t) * plan.step
                        column_cells[t] = training * j if j < kernel_w else NO_CELL
                    taps = places, to_fixed_tuple(columns, taps_w)
                    tap_rows = to_fixed_tuple(row_cells, taps_h)
                    which = tap_rows, to_fixed_tuple(column_cells, taps_w)
                    wide = _lanes(max(width, 0))
                    target, to = _target(gathered, grad_input, sheet, row, column, size, plan)
                    runs, run = _runs(wide, plan)
                    pitch = step if plan.planar else _lanes(stride_w) * step
                    if training:
                        rows.gather(target, to, pitch, totals, grads, codes, taps, which, runs, run)
                    else:
                        flat = taps, which, _ONE, wide * step
                        rows.gather(slopes_sum, _START, _START, no_totals, grads, codes, *flat)
                        rows.gather(offsets_sum, _START, _START, no_totals, offsets, codes, *flat)
                        # The last window that holds the row left it in the ring; or none does.
                        slot = row % kernel_h
                        slot = slot if ring.held[slot] == row else kernel_h
                        weight = slot * plan.line + (column + plan.padding_w) * plan.step
                        rows.weigh(
                            target, to, pitch, totals, slopes_sum, offsets_sum,
                            ring.weights, _lanes(weight), _lanes(stride_w) * step, runs, run,
                        )  # fmt: skip
                    _store(grad_input, gathered, wide, column, stride_w, sheet, row, size, plan)
            for column in range(_lanes(totals.size) // step):
                for k in range(step):
                    grad_bias[_lanes(unit) * step + k] += totals[column * step + k]
        if not training and (ring.bits[0] >= rows.TOO_LARGE or ring.bits[1] < rows.TOO_SMALL):
            call[UNUSUAL] = 1

    return backward
