"""What one thread does of the passes over a tensor: forward and backward, drawn and expected.

A sheet is what windows slide over: an image in channels_last, or some contiguous planes that are
transposed on their way in and out. Either way its rows are columns of `step` lanes, so that the
next column always lies `step` lanes further and one code serves both formats.

A row of weights is made once for all the windows that hold it, rectified and in fp32, between
columns of zeros for the padding. A ring has as many rows as a window, and one row of zeros.
Backward is a gather: it holds rows of gradients and codes likewise, for as many rows of outputs as
hold a row of inputs. With a stride of 1 a loop runs over all the lanes of a row, else over those of
a column.

The threads share out groups of rows of all sheets in order, so that each walks down its sheets. The
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

# What a kernel knows of the tensors and the window; see `_plan` in __init__.py.
PLAN = np.dtype(
    [
        (name, np.int64)
        for name in (
            "planar", "channels", "planes", "step", "sheets", "height", "width", "out_height",
            "out_width", "kernel_h", "kernel_w", "stride_h", "stride_w", "padding_h", "padding_w",
            "line", "grad_line",
        )
    ]
)  # fmt: skip
# What it is told of a call: which of how many parts is wanted (of 0: the thread's in its team), and
# whether there is a bias. What it tells: whether there are numbers that only the reference takes.
PART, PARTS, WITH_BIAS, UNUSUAL = range(4)

_thread_num = types.ExternalFunction("omp_get_thread_num", types.int32())
_num_threads = types.ExternalFunction("omp_get_num_threads", types.int32())


class Kernel(NamedTuple):
    """What a pass is compiled for.

    Attributes:
        number: the dtype of the input's numbers, see floats.py.
        training: to draw, or to take the expectation.
        team: whether there is an OpenMP runtime to ask for the thread's number.
    """

    number: Any
    training: bool
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    team: bool


class _Ring(NamedTuple):
    """Rows of weights: input row r is in slot r mod kernel_h, zeros are in slot kernel_h."""

    weights: Any
    held: Any  # the row in each slot
    starts: Any  # of the rows of the windows
    fetched: Any
    bias: Any
    bits: Any  # the extremes of the weights


@inlined
def _new_ring(x, with_bias, plan):
    return _Ring(
        np.zeros((plan.kernel_h + 1) * plan.line, np.float32),
        np.full(plan.kernel_h, -1),
        np.zeros(plan.kernel_h, np.uint64),
        np.empty(plan.planar * plan.width * plan.step, x.dtype),
        np.empty(with_bias * plan.width * plan.step, np.float32),
        np.array([0, 0xFFFFFFFF], np.uint32),
    )


@inlined
def _turn_to(sheet, ring, bias, plan):
    """Start on another sheet."""
    ring.held[:] = -1
    for k in range(ring.bias.size):
        ring.bias[k] = bias[(sheet * plan.step + k % plan.step) % plan.channels]


@inlined
def _row(sheet, row, height, width, plan):
    """Where a row of a sheet starts, and the number and distance of planes."""
    planes = min(plan.step, plan.planes - sheet * plan.step)
    start = sheet * plan.step * height * width + row * width * (1 if plan.planar else plan.step)
    return np.uint64(start), np.uint64(planes), np.uint64(height * width)


@inlined
def _hold(oh, sheet, ring, x, plan):
    """Have the rows of the windows of output row `oh`."""
    step, width = np.uint64(plan.step), np.uint64(plan.width)
    for i in range(plan.kernel_h):
        row = oh * plan.stride_h - plan.padding_h + i
        slot = row % plan.kernel_h if 0 <= row < plan.height else plan.kernel_h
        ring.starts[i] = np.uint64(slot * plan.line)
        if slot == plan.kernel_h or ring.held[slot] == row:
            continue
        ring.held[slot] = row
        numbers = x
        start, planes, plane = _row(sheet, row, plan.height, plan.width, plan)
        if plan.planar:
            rows.fetch(ring.fetched, x, start, width, planes, plane, step)
            numbers, start = ring.fetched, np.uint64(0)
        to = ring.starts[i] + np.uint64(plan.padding_w) * step
        rows.rectify(ring.weights, to, numbers, start, ring.bias, width * step)
        ring.bits[0], ring.bits[1] = rows.extremes(
            ring.bits[0], ring.bits[1], ring.weights, to, width * step
        )


@inlined
def _unusual(bits, training):
    return bits[0] >= rows.TOO_LARGE or (not training and bits[1] < rows.TOO_SMALL)


@inlined
def _groups(size):
    return (size + GROUP - 1) // GROUP


@inlined
def _place_in_team():
    """Which thread this is, and of how many."""
    return np.int64(_thread_num()), np.int64(_num_threads())


def forward(kernel: Kernel) -> Callable[..., None]:
    """Tensors: input, bias, output; to draw, code and seed."""
    number, training, team = kernel.number, kernel.training, kernel.team
    kernel_h, kernel_w = kernel.kernel_h, kernel.kernel_w

    def forward(pointers):
        plan, call = carray(pointers[1], 1, PLAN)[0], carray(pointers[0], 4, np.int64)
        outputs = plan.planes * plan.out_height * plan.out_width
        x = carray(pointers[2], plan.planes * plan.height * plan.width, number)
        bias = carray(pointers[3], plan.channels, np.float32)
        output = carray(pointers[4], outputs, number)
        step, width = np.uint64(plan.step), np.uint64(plan.out_width)
        lanes = width * step
        if training:
            code = carray(pointers[5], outputs, np.uint8)
            seed = carray(pointers[6], 1, np.int64)[0]
            pairs = (plan.out_width + PAIR - 1) // PAIR
            calls = np.arange(pairs * plan.step)
            pair_of = (calls // plan.step).astype(np.uint32)
            lane_of = (calls % plan.step).astype(np.uint32)
            words = np.empty(GROUP * calls.size, np.uint32)
            halves = np.empty(GROUP * PAIR * calls.size, np.uint16)
            codes = np.empty(lanes * np.uint64(plan.planar), np.uint8)
        numbers = np.empty(lanes * np.uint64(plan.planar), number)
        ring = _new_ring(x, call[WITH_BIAS], plan)
        columns = to_fixed_tuple(np.arange(kernel_w).astype(np.uint64) * step, kernel_w)
        stride = np.uint64(plan.stride_w) * step
        runs, run = (np.uint64(1), lanes) if plan.stride_w == 1 else (width, step)

        groups = _groups(plan.out_height)
        units = plan.sheets * groups
        part, parts = call[PART], call[PARTS]
        if team and parts == 0:
            part, parts = _place_in_team()
        sheet = -1
        for unit in range(part * units // parts, (part + 1) * units // parts):
            if unit // groups != sheet:
                sheet = unit // groups
                _turn_to(sheet, ring, bias, plan)
            first = unit % groups * GROUP
            if training:
                rows.random_words(words, pair_of, lane_of, sheet * plan.step, unit % groups, seed)
                rows.deal(halves, words, np.uint64(GROUP * pairs), step)
            for oh in range(first, min(first + GROUP, plan.out_height)):
                _hold(oh, sheet, ring, x, plan)
                cells = to_fixed_tuple(ring.starts, kernel_h)
                start, planes, plane = _row(sheet, oh, plan.out_height, plan.out_width, plan)
                target, to = (numbers, np.uint64(0)) if plan.planar else (output, start)
                if training:
                    target_code = codes if plan.planar else code
                    half = np.uint64((oh - first) * pairs * PAIR) * step
                    rows.draw(
                        target, target_code, to, ring.weights, cells, columns, stride,
                        halves, half, runs, run,
                    )  # fmt: skip
                    if plan.planar:
                        rows.store(code, start, np.uint64(1), codes, width, planes, plane, step)
                else:
                    rows.expect(target, to, ring.weights, cells, columns, stride, runs, run)
                if plan.planar:
                    rows.store(output, start, np.uint64(1), numbers, width, planes, plane, step)
        if _unusual(ring.bits, training):
            call[UNUSUAL] = 1

    return forward


def backward(kernel: Kernel) -> Callable[..., None]:
    """Tensors: gradients of the output, the input, and the bias by group of rows and lane; code,
    or input and bias."""
    number, training, team = kernel.number, kernel.training, kernel.team
    kernel_h, kernel_w = kernel.kernel_h, kernel.kernel_w
    # So many windows hold an input, each way.
    taps_h, taps_w = -(-kernel_h // kernel.stride_h), -(-kernel_w // kernel.stride_w)

    def backward(pointers):
        plan, call = carray(pointers[1], 1, PLAN)[0], carray(pointers[0], 4, np.int64)
        inputs = plan.planes * plan.height * plan.width
        outputs = plan.planes * plan.out_height * plan.out_width
        grad, grad_input = carray(pointers[2], outputs, number), carray(pointers[3], inputs, number)
        groups = _groups(plan.height)
        units = plan.sheets * groups
        grad_bias = carray(pointers[4], units * plan.step, np.float32)
        step, line = np.uint64(plan.step), np.uint64(plan.grad_line)
        out_width = np.uint64(plan.out_width)
        out_lanes, margin = out_width * step, np.uint64(taps_w - 1) * step
        fetched = np.empty(out_lanes * np.uint64(plan.planar), number)
        # Row r of the outputs is in slot r mod taps_h; slot taps_h is a row of no windows.
        grads = np.zeros((taps_h + 1) * plan.grad_line, np.float32)
        if training:
            code = carray(pointers[5], outputs, np.uint8)
            fetched_code = np.empty(out_lanes * np.uint64(plan.planar), np.uint8)
            others = np.full((taps_h + 1) * plan.grad_line, rows.DEAD)
        else:
            x, bias = (
                carray(pointers[5], inputs, number),
                carray(pointers[6], plan.channels, np.float32),
            )
            ring = _new_ring(x, call[WITH_BIAS], plan)
            cells = to_fixed_tuple(np.arange(kernel_w).astype(np.uint64) * step, kernel_w)
            others = np.zeros((taps_h + 1) * plan.grad_line, np.float32)
        held, starts = np.full(taps_h, -1), np.empty(taps_h, np.uint64)
        columns = np.empty(taps_w, np.uint64)
        row_cells, column_cells = np.zeros(taps_h, np.uint8), np.empty(taps_w, np.uint8)
        gathered = np.empty(plan.width * plan.step, number)
        totals = np.zeros(call[WITH_BIAS] * plan.width * plan.step, np.float32)

        part, parts = call[PART], call[PARTS]
        if team and parts == 0:
            part, parts = _place_in_team()
        sheet = -1
        for unit in range(part * units // parts, (part + 1) * units // parts):
            if unit // groups != sheet:
                sheet = unit // groups
                held[:] = -1
                if not training:
                    _turn_to(sheet, ring, bias, plan)
            totals[:] = 0
            first = unit % groups * GROUP
            for row in range(first, min(first + GROUP, plan.height)):
                # The windows that hold the row, the upper ones first, as rows enter the ring.
                for t in range(taps_h - 1, -1, -1):
                    i = (row + plan.padding_h) % plan.stride_h + t * plan.stride_h
                    oh = (row + plan.padding_h) // plan.stride_h - t
                    inside = i < plan.kernel_h and 0 <= oh < plan.out_height
                    slot = oh % taps_h if inside else taps_h
                    starts[t], row_cells[t] = np.uint64(slot) * line, i * plan.kernel_w
                    if not inside or held[slot] == oh:
                        continue
                    held[slot] = oh
                    to = starts[t] + margin
                    numbers = grad
                    start, planes, plane = _row(sheet, oh, plan.out_height, plan.out_width, plan)
                    at = start
                    if plan.planar:
                        rows.fetch(fetched, grad, start, out_width, planes, plane, step)
                        numbers, at = fetched, np.uint64(0)
                    if training:
                        numbers_code = code
                        if plan.planar:
                            rows.fetch(fetched_code, code, start, out_width, planes, plane, step)
                            numbers_code = fetched_code
                        rows.convert(grads, to, numbers, at, out_lanes)
                        rows.convert(others, to, numbers_code, at, out_lanes)
                    else:
                        _hold(oh, sheet, ring, x, plan)
                        runs, run = (
                            (np.uint64(1), out_lanes) if plan.stride_w == 1 else (out_width, step)
                        )
                        rows.differentiate(
                            grads, others, to, numbers, at, ring.weights,
                            to_fixed_tuple(ring.starts, kernel_h), cells,
                            np.uint64(plan.stride_w) * step, runs, run,
                        )  # fmt: skip
                start, planes, plane = _row(sheet, row, plan.height, plan.width, plan)
                for phase in range(plan.stride_w):
                    # The columns that are `phase` modulo the stride, counted from the padding's.
                    low = (plan.padding_w - phase + plan.stride_w - 1) // plan.stride_w
                    high = (plan.width - 1 + plan.padding_w - phase) // plan.stride_w + 1
                    if high <= low:
                        continue
                    for t in range(taps_w):
                        j = phase + t * plan.stride_w
                        columns[t] = np.uint64(low + taps_w - 1 - t) * step
                        column_cells[t] = j if j < plan.kernel_w else NO_CELL
                    column, width = (
                        low * plan.stride_w + phase - plan.padding_w,
                        np.uint64(high - low),
                    )
                    stride, first_column = np.uint64(plan.stride_w), np.uint64(column)
                    target, to = gathered, np.uint64(0)
                    if plan.stride_w == 1 and not plan.planar:
                        target, to = grad_input, start
                    where = to_fixed_tuple(starts, taps_h), to_fixed_tuple(columns, taps_w)
                    which = to_fixed_tuple(row_cells, taps_h), to_fixed_tuple(column_cells, taps_w)
                    if training:
                        rows.gather(
                            target, to, totals, grads, others, where[0], where[1], which,
                            width * step,
                        )  # fmt: skip
                    else:
                        # The last window that holds the row left it in the ring; or none does.
                        slot = row % plan.kernel_h
                        slot = slot if ring.held[slot] == row else plan.kernel_h
                        at = slot * plan.line + (column + plan.padding_w) * plan.step
                        one = plan.stride_w == 1
                        runs, run = (np.uint64(1), width * step) if one else (width, step)
                        rows.gather_means(
                            target, to, totals, grads, others, where[0], where[1], which,
                            ring.weights, np.uint64(at), stride * step, runs, run,
                        )  # fmt: skip
                    if plan.planar:
                        rows.store(
                            grad_input, start + first_column, stride, gathered,
                            width, planes, plane, step,
                        )  # fmt: skip
                    elif plan.stride_w > 1:
                        rows.place(
                            grad_input, start + first_column * step, stride, gathered, width, step
                        )
            if totals.size > 0:
                rows.add_columns(
                    grad_bias, np.uint64(unit) * step, totals, np.uint64(plan.width), step
                )
        if not training and _unusual(ring.bits, training):
            call[UNUSUAL] = 1

    return backward
