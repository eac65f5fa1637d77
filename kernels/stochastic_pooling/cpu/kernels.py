"""What one thread does of the two passes over a tensor.

A sheet is what windows slide over: an image in channels_last, or some contiguous planes that are
transposed on their way in and out, or, with a stride of 1, a plane whose rows are long. In any case
a row is columns of `step` lanes.

A pass does some rows of a sheet at a time, always the same whichever thread does them. Of the rows
that their windows hold it makes a block of weights, rectified, with zeros for the padding, where
the columns of each phase of the stride stand together, so that the same cells of neighbouring
windows are neighbours. Backward gathers from a block of gradients and codes, phase by phase, for
the same cells of windows drew the columns of one.

LLVM turns the loops over lanes into vector instructions. Places and lanes are unsigned: of a signed
index numba asks whether it is negative, and no loop that asks becomes vectors. What loops for each
lane is a function of its own, or LLVM does a lane alone for the sake of the inner loop's last
number, and up to seven more. A function of numpy's takes a tenth of a second to compile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray
from numba.core import types

from .. import philox, reference
from .compiling import inlined
from .floats import narrow, widen

# What a pass knows of the tensors and the window; see `_Plan` in __init__.py.
_PLAN = """planar planes step sheets height width out_height out_width tile_h tile_w stride_w
padding_h padding_w phase"""
PLAN = np.dtype([(name, np.int64) for name in _PLAN.split()])
# Its arguments: their address; which of how many parts to do (of 0: the thread's in its team); what
# it tells, whether only the reference takes the numbers; whether there is a bias; more addresses.
_, PART, PARTS, UNUSUAL, WITH_BIAS = range(5)
# Rows and columns of outputs that share a call of Philox; rows that backward does at a time.
GROUP, PAIR, ROWS = 4, 2, 8
# The bits of weights of which 2**15, a window's cells, may overflow, and of inverses that soon may.
# Bits of numbers that are not negative are in the order of the numbers, those of NaN beyond.
TOO_LARGE = int(np.float32(2.0**112).view(np.uint32))
DEAD, NO_CELL = -1, 254  # the code of a dead window, and of a cell that no window has
FETCH, STORE, PLACE = range(3)
SUM, DRAW, MEAN = range(3)
TOTAL, BEFORE, SCALE, VALUE, DRAWN = range(5)

_thread_num = types.ExternalFunction("omp_get_thread_num", types.int32())
_num_threads = types.ExternalFunction("omp_get_num_threads", types.int32())
_lanes = np.uint64
_ZERO = np.float32(0)
_LOST = np.nextafter(np.float32(reference.SMALLEST_SUM), _ZERO)  # the largest without a gradient
_NOTHING = np.float32(-0.0)  # the zero that a sum starts with, for LLVM need not add it


@inlined
def _share(call, units):
    """This thread's units."""
    part, parts = call[PART], call[PARTS]
    if parts == 0:
        part, parts = np.int64(_thread_num()), np.int64(_num_threads())
    return range(part * units // parts, (part + 1) * units // parts)


@inlined
def _runs(plan):
    """Where each column of the input starts in a row of a block, and how many lanes lie together
    there, as they do in the input: a column's, or with a stride of 1 the whole row's."""
    starts = np.empty(plan.width, _lanes)
    for column in range(plan.width):
        place, phase = divmod(column + plan.padding_w, plan.stride_w)
        starts[column] = phase * plan.phase + place * plan.step
    return starts, plan.step * (plan.width if plan.stride_w == 1 else 1)


@inlined
def _row(task, staged, numbers, sheet, row, size, plan):
    """The lanes of a row, and where they start: in `numbers`, or, of contiguous planes, in `staged`
    once they are fetched, from where they are stored. Lanes without a plane repeat the last."""
    (height, width), step = size, _lanes(plan.step)
    if not plan.planar:
        return numbers, _lanes((sheet * height + row) * width) * step
    present = min(plan.planes - sheet * plan.step, plan.step)
    planes = (plan.step, present, 0)[task]
    # Plane by plane: their distance may be a multiple of 4 KiB, which caches do not like.
    for p in range(_lanes(planes)):
        plane = _lanes(sheet * plan.step) + min(p, _lanes(present - 1))
        start = (plane * _lanes(height) + _lanes(row)) * _lanes(width)
        for column in range(_lanes(width)):
            if task == FETCH:
                staged[column * step + p] = numbers[start + column]
            else:
                numbers[start + column] = staged[column * step + p]
    return staged, _lanes(0)


@inlined
def _random_halves(halves, words, pairs, lanes, first_plane, group, seed, step):
    """Philox's four words for each pair of columns of each plane (see philox.py), in 64 bits for
    its products, all in one loop; then the low halves for even columns, the high ones for odd."""
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
    for k in range(_lanes(words.size if step == 1 else 0)):  # one loop, too
        even = _lanes(PAIR) * k
        halves[even], halves[even + 1] = np.uint16(words[k]), np.uint16(words[k] >> np.uint32(16))
    for column in range(_lanes(words.size if step > 1 else 0) // step):
        for k in range(step):
            word, even = words[column * step + k], _lanes(PAIR) * column * step + k
            halves[even], halves[even + step] = np.uint16(word), np.uint16(word >> np.uint32(16))


@inlined
def _weigh(weights, top, end, x, staged, runs, biases, sheet, call, plan):
    """Make weights of rows from `top` on: max(x + bias, 0), where NaN stays NaN and no zero is
    negative. Say so if there are some that only the reference takes."""
    bias, (starts, run) = _lanes(sheet * plan.width * plan.step), runs
    with_bias, most = call[WITH_BIAS] > 0, np.uint32(0)
    for row in range(top, end):
        inside, at = 0 <= row < plan.height, min(max(row, 0), plan.height - 1)
        numbers, start = _row(FETCH, staged, x, sheet, at, (plan.height, plan.width), plan)
        block = _lanes((row - top) * plan.stride_w * plan.phase)
        for n in range(plan.width * plan.step // run):  # in the order of memory, for the caches
            first, to = _lanes(n * run), block + starts[n]
            for k in range(_lanes(run)):
                w = widen(numbers[start + first + k])
                w = w + biases[bias + first + k] if with_bias else w
                w = _ZERO if w <= _ZERO or not inside else w
                weights[to + k] = w
                bits = np.float32(w).view(np.uint32)
                most = bits if bits > most else most
    if most >= TOO_LARGE:
        call[UNUSUAL] = 1


@inlined
def _cell(i, j, grid):
    """Lanes from the first cell of a window to another."""
    ((_, _, dilation_h), (_, stride_w, dilation_w)), step, phase = grid
    i, j = i * dilation_h, j * dilation_w
    return _lanes(i * stride_w + j % stride_w) * phase + _lanes(j // stride_w) * step


@inlined
def _scale(training, half, total, lost):
    """The threshold of a draw, or the inverse of the sum, or 0."""
    if training:
        return np.float32(half) * np.float32(2.0**-16) * total
    return np.float32(1) / total if total > lost else _ZERO


@inlined
def _window(training, half, weights, first, grid, lost):
    """Of the window whose first cell is a lane the sum, its `_scale`, and the expectation, or the
    weight and number of the last cell before which the sum is at most the threshold. The number is
    a float, for a vector of bytes has more lanes."""
    ((kernel_h, _, _), (kernel_w, _, _)), total, before_row = grid[0], _NOTHING, _NOTHING
    for i in range(kernel_h):
        row = _NOTHING
        for j in range(kernel_w):
            row += weights[first + _cell(i, j, grid)]
        total += row
    scale, value, drawn = _scale(training, half, total, lost), _ZERO, _ZERO
    for i in range(kernel_h):
        before = _NOTHING
        for j in range(kernel_w):
            w = weights[first + _cell(i, j, grid)]
            if training:
                reached = before_row + before <= scale
                value = w if reached else value
                drawn = np.float32(i * kernel_w + j) if reached else drawn
            else:
                value += w * (w * scale)
            before += w
        before_row += before
    return total, scale, value, drawn


@inlined
def _tiles(training, kept, halves, weights, first, grid, lost):
    """The same of a row of tiles whose size is not known, into rows of `kept`: around loops of
    unknown length LLVM makes no vectors, so this does all lanes of a cell before the next."""
    _every(SUM, kept, weights, first, grid)
    for lane in range(_lanes(kept.shape[1])):
        half = halves[lane] if training else 0
        kept[SCALE, lane] = _scale(training, half, kept[TOTAL, lane], lost)
    _every(DRAW if training else MEAN, kept, weights, first, grid)


@inlined
def _every(task, kept, weights, first, grid):
    """Add up each cell of a row of tiles, and draw or take the mean."""
    ((kernel_h, _, _), (kernel_w, _, _)), lanes = grid[0], _lanes(kept.shape[1])
    for lane in range(lanes):
        kept[TOTAL, lane], kept[BEFORE, lane] = _NOTHING, _NOTHING
        kept[VALUE, lane], kept[DRAWN, lane] = _ZERO, np.float32(-1)
    for i in range(kernel_h):
        for j in range(kernel_w):
            at = first + _cell(i, j, grid)
            for lane in range(lanes):
                w = weights[at + lane]
                if task == DRAW:
                    # As products, for LLVM makes slow masked stores of what is kept or replaced.
                    # Sums never fall, so that those of all cells before are reached, too.
                    reached = kept[TOTAL, lane] + kept[BEFORE, lane] <= kept[SCALE, lane]
                    one, none = np.float32(reached), np.float32(not reached)
                    kept[VALUE, lane] = kept[VALUE, lane] * none + w * one
                    kept[DRAWN, lane] += one
                if task == MEAN:
                    kept[VALUE, lane] += w * (w * kept[SCALE, lane])
                else:
                    kept[BEFORE, lane] += w
        for lane in range(lanes):
            kept[TOTAL, lane] += kept[BEFORE, lane]
            kept[BEFORE, lane] = _NOTHING


@inlined
def _gather(numbers, codes, first, grid, taps, i0, j0, training):
    """The sum of the numbers of the windows that drew an input; of all that hold it, if not in
    training. In the last one it is the cell (i0, j0); `first` is the place of the first."""
    ((kernel_h, stride_h, dilation_h), (kernel_w, stride_w, dilation_w)), step, phase = grid
    (taps_h, taps_w), total = taps, _ZERO
    for t in range(taps_h):
        for u in range(taps_w):
            i, j = i0 + t * stride_h, j0 + u * stride_w
            window = first + _lanes(taps_h - 1 - t) * phase + _lanes(taps_w - 1 - u) * step
            number, held = numbers[window], (i % dilation_h == 0) & (j % dilation_w == 0)
            i, j = i // dilation_h, j // dilation_w
            held = held & (i < kernel_h) & (j < kernel_w)
            if training:
                held = codes[window] == codes.dtype.type(i * kernel_w + j if held else NO_CELL)
            total += number if held else _ZERO
    return total


def _taps(kernel: int, stride: int, dilation: int) -> int:
    """How many windows at most hold an input, of which not all may have it for a cell."""
    return ((kernel - 1) * dilation + stride) // stride


def forward(number: Any, cell: Any, training: bool, *sides: tuple[int, int, int]) -> Any:
    """The pass for dtypes of numbers (see floats.py) and codes, a mode, and size, stride and
    dilation of a window's height and width, or for tiles, whose sizes the plan knows. Tensors: the
    biases of a row of lanes of each sheet, input, output; in training also code and seed."""
    # No function may be a constant of a pass, or the cache finds it never again.
    known, sizes = len(sides) > 0, sides or ((1, 1, 1), (1, 1, 1))

    def forward(pointers):
        call, plan = carray(pointers[0], 5, np.int64), carray(pointers[5], 1, PLAN)[0]
        tile = (plan.tile_h, plan.tile_h, 1), (plan.tile_w, plan.tile_w, 1)
        sides = sizes if known else tile
        (kernel_h, stride_h, dilation_h), (_, stride_w, _) = sides
        span = (kernel_h - 1) * dilation_h + 1
        outputs = plan.planes * plan.out_height * plan.out_width
        biases = carray(pointers[6], plan.sheets * plan.width * plan.step, np.float32)
        x = carray(pointers[7], plan.planes * plan.height * plan.width, number)
        output, code = carray(pointers[8], outputs, number), carray(pointers[9], outputs, cell)
        size, out_lanes = (plan.out_height, plan.out_width), plan.out_width * plan.step
        line, grid = stride_w * plan.phase, (sides, _lanes(plan.step), _lanes(plan.phase))
        rows = (min(GROUP, plan.out_height) - 1) * stride_h + span
        weights = np.zeros(rows * line, np.float32)
        runs, fetched = _runs(plan), np.empty(plan.width * plan.step, number)
        staged, staged_code = np.empty(out_lanes, number), np.empty(out_lanes, cell)
        calls = (plan.out_width + PAIR - 1) // PAIR * plan.step
        pairs, lanes = np.empty(calls, np.uint32), np.empty(calls, np.uint32)
        for k in range(calls):
            pairs[k], lanes[k] = k // plan.step, k % plan.step
        words = np.empty(GROUP * calls, np.uint32)
        halves = np.empty(PAIR * words.size, np.uint16)
        groups = (plan.out_height + GROUP - 1) // GROUP
        kept = np.empty((5, out_lanes), np.float32)
        most = np.uint32(0)
        for unit in _share(call, plan.sheets * groups):
            sheet, group = unit // groups, unit % groups
            out_top, out_end = group * GROUP, min(group * GROUP + GROUP, plan.out_height)
            tops = out_top * stride_h - plan.padding_h, (out_end - 1) * stride_h - plan.padding_h
            _weigh(weights, tops[0], tops[1] + span, x, fetched, runs, biases, sheet, call, plan)
            if training:
                seed, plane = carray(pointers[10], 1, np.int64)[0], sheet * plan.step
                _random_halves(halves, words, pairs, lanes, plane, group, seed, grid[1])
            for oh in range(out_top, out_end):
                target, to = _row(PLACE, staged, output, sheet, oh, size, plan)
                codes, to = _row(PLACE, staged_code, code, sheet, oh, size, plan)
                corner = _lanes((oh - out_top) * stride_h * line)
                half = _lanes((oh - out_top) * PAIR * calls)
                if not known:
                    _tiles(training, kept, halves[half:], weights, corner, grid, _ZERO)
                for lane in range(_lanes(out_lanes)):
                    if known:
                        first = corner + lane
                        window = _window(training, halves[half + lane], weights, first, grid, _ZERO)
                    else:
                        numbers = kept[:, lane]
                        window = numbers[TOTAL], numbers[SCALE], numbers[VALUE], numbers[DRAWN]
                    total, scale, value, drawn = window
                    if training:
                        drawn = np.float32(DEAD) if total <= scale else drawn
                        codes[to + lane] = cell(np.int32(drawn))
                    else:
                        bits = np.float32(scale).view(np.uint32)
                        most = bits if bits > most else most
                    target[to + lane] = narrow(value, target)
                _row(STORE, staged, output, sheet, oh, size, plan)
                if training:
                    _row(STORE, staged_code, code, sheet, oh, size, plan)
        if most >= TOO_LARGE:
            call[UNUSUAL] = 1

    return forward


def backward(number: Any, cell: Any, training: bool, *sides: tuple[int, int, int]) -> Any:
    """Likewise. Tensors: the biases; the gradients of output and input, and that of the bias for
    each group of rows and lane of a column; then code, or input."""
    known, sizes = len(sides) > 0, sides or ((1, 1, 1), (1, 1, 1))
    taps_h, taps_w = taps = _taps(*sizes[0]), _taps(*sizes[1])

    def backward(pointers):
        call, plan = carray(pointers[0], 5, np.int64), carray(pointers[5], 1, PLAN)[0]
        tile = (plan.tile_h, plan.tile_h, 1), (plan.tile_w, plan.tile_w, 1)
        sides = sizes if known else tile
        (kernel_h, stride_h, dilation_h), (_, stride_w, _) = sides
        span = (kernel_h - 1) * dilation_h + 1
        most = -(-ROWS // stride_h) + taps_h  # rows of windows that hold the rows of a group
        inputs = plan.planes * plan.height * plan.width
        outputs = plan.planes * plan.out_height * plan.out_width
        biases = carray(pointers[6], plan.sheets * plan.width * plan.step, np.float32)
        grad, grad_input = carray(pointers[7], outputs, number), carray(pointers[8], inputs, number)
        groups = (plan.height + ROWS - 1) // ROWS
        grad_bias = carray(pointers[9], plan.sheets * groups * plan.step, np.float32)
        code, x = carray(pointers[10], outputs, cell), carray(pointers[10], inputs, number)
        size, out_size = (plan.height, plan.width), (plan.out_height, plan.out_width)
        step, phase = _lanes(plan.step), _lanes(plan.phase)
        grid, out_lanes = (sides, step, phase), _lanes(plan.out_width) * step
        kept = np.empty((5, out_lanes), np.float32)
        fetched = np.empty(max(plan.width, plan.out_width) * plan.step, number)
        fetched_code = np.empty(fetched.size, cell)
        staged = np.empty(plan.width * plan.step, number)
        gathered = np.empty(stride_w * plan.phase, np.float32)
        totals = np.zeros(plan.phase, np.float32)
        runs = starts, run = _runs(plan)
        low = _lanes(plan.padding_w // stride_w) * step
        high = _lanes((plan.width - 1 + plan.padding_w) // stride_w + 1) * step
        # Windows outside the plane pass on nothing, whatever they seem to have drawn.
        codes = np.empty(most * plan.phase, cell)
        grads, offsets = np.zeros(codes.size, np.float32), np.zeros(codes.size, np.float32)
        rows = (most - 1) * stride_h + max(span, stride_h)  # between windows, too
        weights = np.zeros((1 - training) * rows * stride_w * plan.phase, np.float32)
        for unit in _share(call, plan.sheets * groups):
            sheet, top = unit // groups, unit % groups * ROWS
            last = min(top + ROWS, plan.height) - 1
            # The rows of windows that hold these rows, and the first row that those hold.
            out_top = (top + plan.padding_h) // stride_h - (taps_h - 1)
            out_last = (last + plan.padding_h) // stride_h
            above = out_top * stride_h - plan.padding_h
            if not training:
                bottom = out_last * stride_h - plan.padding_h + span
                _weigh(weights, above, bottom, x, fetched, runs, biases, sheet, call, plan)
            for oh in range(out_top, out_last + 1):
                to = _lanes(oh - out_top) * phase + _lanes(taps_w - 1) * step
                if not 0 <= oh < plan.out_height:
                    for k in range(out_lanes):
                        grads[to + k], offsets[to + k] = _ZERO, _ZERO
                    continue
                numbers, first = _row(FETCH, fetched, grad, sheet, oh, out_size, plan)
                if training:
                    drew, first = _row(FETCH, fetched_code, code, sheet, oh, out_size, plan)
                    for k in range(out_lanes):
                        grads[to + k] = widen(numbers[first + k])
                        codes[to + k] = drew[first + k]
                    continue
                # By what a window's weights are multiplied, and what is taken off (reference.py).
                corner = _lanes((oh - out_top) * stride_h * stride_w) * phase
                if not known:
                    _tiles(False, kept, codes, weights, corner, grid, _LOST)
                for k in range(out_lanes):
                    inverse, mean = kept[SCALE, k], kept[VALUE, k]
                    if known:
                        _, inverse, mean, _ = _window(False, 0, weights, corner + k, grid, _LOST)
                    slope = widen(numbers[first + k]) * inverse
                    slope = slope if inverse != _ZERO else _ZERO
                    grads[to + k], offsets[to + k] = slope, slope * mean
            for row in range(top, last + 1):
                target, to = _row(PLACE, staged, grad_input, sheet, row, size, plan)
                i0 = (row + plan.padding_h) % stride_h
                upper = (row + plan.padding_h) // stride_h - (taps_h - 1) - out_top
                for j0 in range(stride_w):
                    weight = _lanes((row - above) * stride_w + j0) * phase
                    for lane in range(low, high):
                        at = _lanes(upper) * phase + lane
                        total = _gather(grads, codes, at, grid, taps, i0, j0, training)
                        if not training:
                            off = _gather(offsets, codes, at, grid, taps, i0, j0, training)
                            w = weights[weight + lane]
                            total = w * (total + total) - off if w != _ZERO else _ZERO
                        gathered[_lanes(j0) * phase + lane] = total
                    for lane in range(low, high if call[WITH_BIAS] else low):
                        totals[lane] += gathered[_lanes(j0) * phase + lane]
                for n in range(plan.width * plan.step // run):
                    first, start = to + _lanes(n * run), starts[n]
                    for k in range(_lanes(run)):
                        target[first + k] = narrow(gathered[start + k], target)
                _row(STORE, staged, grad_input, sheet, row, size, plan)
            for column in range(_lanes(call[WITH_BIAS] * totals.size) // step):
                for k in range(step):
                    grad_bias[_lanes(unit) * step + k] += totals[column * step + k]
                    totals[column * step + k] = _ZERO

    return backward
