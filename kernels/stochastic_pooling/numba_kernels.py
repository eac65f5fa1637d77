"""Stochastic pooling on the CPU, compiled by numba: the four functions of `reference.py`.

A sheet is what one set of windows slides over: a plane in contiguous memory, a whole image in
channels_last. It holds `[rows, columns, step]` numbers, `step` being 1 or the number of channels,
so that the cell to the right always lies `step` numbers further, and one code serves both formats.

The work is cut into tiles: a few sheets by some rows by some columns. In a tile, the rows that the
windows need become lines of weights in the accumulation dtype, bias added, rectified and padded,
the sheets of the tile side by side, so that every inner loop is long and LLVM turns it into vector
instructions; a lane is one output. With a horizontal stride s a line deals its columns to s phases,
column q to phase q mod s, so that the same cell of neighbouring windows lies side by side whatever
the stride: cell j of all windows is a view into the line. A line is made once for all the windows
that hold it, and so are its sums over the cells of each window's row. 16-bit floats, which numba
lacks, are carried as their bits.

The vectorised passes take it that sums are ordinary numbers; they report where one is not (NaN or
infinite, for the expectation also very large or small), and those few windows are done again one by
one.

The tiles are shared out among `torch.get_num_threads()` threads of a pool of our own: numba's own
threading aborts the process when two Python threads enter it at once. The cut depends on shapes
alone and each tile has its own place for its part of the bias's gradient, so results do not depend
on the number of threads.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from . import philox, reference
from .window import Window, memory_format

try:
    import numba
    import numpy as np
    from llvmlite import ir
    from numba.core import types
    from numba.extending import intrinsic
except Exception as error:  # numba refuses versions of Python and numpy in several ways
    raise ImportError(f"numba cannot be used here: {error}") from error

OVERFLOW_SCALE = reference.OVERFLOW_SCALE
SMALLEST_SUM = reference.SMALLEST_SUM
# Sums between which sum w * w neither overflows nor loses accuracy below.
SMALLEST_SQUARABLE, LARGEST_SQUARABLE = 2.0**-50, 2.0**60

ROUNDS = philox.ROUNDS
# Rows and columns of outputs that share a call of Philox; tiles start at multiples of them.
GROUP, PAIR = 4, 2

# A line has sheets side by side until it is this long: short loops are slow.
FEWEST_LANES = 512
# A tile has whole rows if they are no longer, for memory is read best in long runs; but the lines
# should stay in the second-level cache.
MOST_LANES = 4096
MOST_ROWS = 64
# Windows of more cells are not searched cell by cell for what was drawn.
MOST_CELLS = 32
# Below this many numbers a second thread costs more than it saves.
SMALL = 16_384

# Numbers that are copied at a time: a vector of fp32.
CHUNK = 8


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile as a part of the functions that call it. No fast-math: the draw depends on order."""
    return numba.njit(function, nogil=True, error_model="numpy")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first use, to run without the interpreter's lock, and keep the code on disk."""
    try:
        return numba.njit(function, nogil=True, error_model="numpy", cache=True)
    except RuntimeError:  # no folder that numba can write its cache to
        return numba.njit(function, nogil=True, error_model="numpy")


# ---------------------------------------------------------------- numbers and their bits


def _like(value: Any, base: Any) -> Any:
    """The LLVM type with as many elements of `base` as `value` has."""
    return ir.VectorType(base, value.type.count) if isinstance(value.type, ir.VectorType) else base


def _constant(value: Any, number: float) -> Any:
    """A constant of the type of `value`, a number or a vector."""
    if isinstance(value.type, ir.VectorType):
        return ir.Constant(value.type, [number] * value.type.count)
    return ir.Constant(value.type, number)


def _build_widen(builder: Any, stored: types.Type, value: Any) -> Any:
    """A number or vector as it is stored, in the accumulation dtype.

    uint16 holds the bits of fp16, int16 those of bf16.
    """
    if stored not in (types.int16, types.uint16):
        return value
    bits = builder.zext(value, _like(value, ir.IntType(32)))
    floats = _like(value, ir.FloatType())
    if stored == types.int16:
        return builder.bitcast(builder.shl(bits, _constant(bits, 16)), floats)
    magnitude = builder.and_(bits, _constant(bits, 0x7FFF))
    sign = builder.shl(builder.and_(bits, _constant(bits, 0x8000)), _constant(bits, 16))
    # The exponent's bias is 112 larger in fp32; once more for the exponent of inf and NaN.
    normal = builder.shl(magnitude, _constant(bits, 13))
    normal = builder.add(normal, _constant(bits, 112 << 23))
    special = builder.add(normal, _constant(bits, 112 << 23))
    below = builder.sitofp(magnitude, floats)
    below = builder.bitcast(builder.fmul(below, _constant(below, 2.0**-24)), bits.type)
    is_special = builder.icmp_unsigned(">=", magnitude, _constant(bits, 0x7C00))
    is_below = builder.icmp_unsigned("<", magnitude, _constant(bits, 0x0400))
    wide = builder.select(is_below, below, builder.select(is_special, special, normal))
    return builder.bitcast(builder.or_(wide, sign), floats)


def _build_narrow(builder: Any, stored: types.Type, value: Any) -> Any:
    """The way back, rounded to nearest even."""
    if stored not in (types.int16, types.uint16):
        return value
    bits = builder.bitcast(value, _like(value, ir.IntType(32)))
    halves = _like(value, ir.IntType(16))
    if stored == types.int16:
        odd = builder.and_(builder.lshr(bits, _constant(bits, 16)), _constant(bits, 1))
        rounded = builder.add(builder.add(bits, _constant(bits, 0x7FFF)), odd)
        is_nan = builder.fcmp_unordered("uno", value, value)
        bits = builder.select(is_nan, _constant(bits, 0x7FC00000), rounded)
        return builder.trunc(builder.lshr(bits, _constant(bits, 16)), halves)
    magnitude = builder.and_(bits, _constant(bits, 0x7FFFFFFF))
    sign = builder.and_(builder.lshr(bits, _constant(bits, 16)), _constant(bits, 0x8000))
    odd = builder.and_(builder.lshr(magnitude, _constant(bits, 13)), _constant(bits, 1))
    normal = builder.sub(magnitude, _constant(bits, (112 << 23) - 0xFFF))
    normal = builder.lshr(builder.add(normal, odd), _constant(bits, 13))
    # Adding 0.5 rounds to a multiple of 2**-24, fp16's smallest number.
    below = builder.bitcast(magnitude, value.type)
    below = builder.bitcast(builder.fadd(below, _constant(below, 0.5)), bits.type)
    below = builder.sub(below, _constant(bits, 126 << 23))
    is_below = builder.icmp_unsigned("<", magnitude, _constant(bits, 113 << 23))
    is_large = builder.icmp_unsigned(">=", magnitude, _constant(bits, 143 << 23))
    is_nan = builder.icmp_unsigned(">", magnitude, _constant(bits, 0x7F800000))
    narrow = builder.select(is_below, below, normal)
    narrow = builder.select(is_large, _constant(bits, 0x7C00), narrow)
    narrow = builder.select(is_nan, _constant(bits, 0x7E00), narrow)
    return builder.trunc(builder.or_(narrow, sign), halves)


@intrinsic
def _widen(context, value, one):
    """A stored number in the dtype of `one`."""

    def generate(context, builder, signature, arguments):
        return _build_widen(builder, value, arguments[0])

    return one(value, one), generate


@intrinsic
def _narrow(context, value, like):
    """A number as it is stored, in the dtype of `like`."""

    def generate(context, builder, signature, arguments):
        return _build_narrow(builder, like, arguments[0])

    return like(value, like), generate


@intrinsic
def _as(context, value, one):
    """A constant in the dtype of `one`: numba would do the arithmetic of fp32 with it in fp64."""

    def generate(context, builder, signature, arguments):
        return context.cast(builder, arguments[0], types.float64, one)

    return one(types.float64, one), generate


@intrinsic
def _select(context, condition, x, y):
    """`x if condition else y` without a branch, into which LLVM would move the loads of x and y."""

    def generate(context, builder, signature, arguments):
        return builder.select(*arguments)

    return x(types.boolean, x, x), generate


@intrinsic
def _uniform(context, half, one):
    """The number in [0, 1) of 16 random bits, in the dtype of `one`."""

    def generate(context, builder, signature, arguments):
        half, one = arguments
        half = builder.zext(half, ir.IntType(32))
        return builder.fmul(builder.sitofp(half, one.type), _constant(one, 2.0**-16))

    return one(types.uint16, one), generate


@intrinsic
def _bits(context, number):
    """The bits of a number as an unsigned integer: ordered from 0 to inf, then NaN of any sign."""
    integer = types.uint64 if number == types.float64 else types.uint32

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(integer))

    return integer(number), generate


@intrinsic
def _bits_below(context, number):
    """`_bits` less one, in whose order 0 comes last."""
    integer = types.uint64 if number == types.float64 else types.uint32

    def generate(context, builder, signature, arguments):
        bits = builder.bitcast(arguments[0], context.get_value_type(integer))
        return builder.sub(bits, _constant(bits, 1))

    return integer(number), generate


@intrinsic
def _larger(context, x, y):
    """numba's own `max` of two uint32 is a uint64, which would halve the lanes of a vector."""

    def generate(context, builder, signature, arguments):
        return builder.select(builder.icmp_unsigned(">", *arguments), *arguments)

    return x(x, x), generate


@intrinsic
def _smaller(context, x, y):
    def generate(context, builder, signature, arguments):
        return builder.select(builder.icmp_unsigned("<", *arguments), *arguments)

    return x(x, x), generate


# Rows can be short, and a loop that LLVM vectorises does the numbers left over one by one. So rows
# are copied by explicit chunks, the last of which overlaps the one before.


def _chunk(context: Any, builder: Any, array_type: Any, array: Any, index: Any, count: int) -> Any:
    """The address of `count` numbers of an array."""
    data = context.make_array(array_type)(context, builder, array).data
    numbers = ir.VectorType(context.get_value_type(array_type.dtype), count)
    return builder.bitcast(builder.gep(data, [index]), numbers.as_pointer())


def _load_chunk(
    context: Any, builder: Any, array_type: Any, array: Any, index: Any, count: int
) -> Any:
    chunk = builder.load(_chunk(context, builder, array_type, array, index, count))
    chunk.align = 1
    return chunk


def _copier(count: int) -> Any:
    @intrinsic
    def copy(context, target, place, source, index):
        """Copy `count` numbers, floats to the accumulation dtype, codes as they are or as int32."""

        def generate(context, builder, signature, arguments):
            to, to_index, source_array, at = arguments
            numbers = _load_chunk(context, builder, source, source_array, at, count)
            if target.dtype != source.dtype:
                if target.dtype == types.int32:
                    extend = builder.sext if source.dtype.signed else builder.zext
                    numbers = extend(numbers, _like(numbers, ir.IntType(32)))
                else:
                    numbers = _build_widen(builder, source.dtype, numbers)
            address = _chunk(context, builder, target, to, to_index, count)
            builder.store(numbers, address).align = 1
            return context.get_dummy_value()

        return types.none(target, types.int64, source, types.int64), generate

    return copy


_copy_one, _copy_chunk = _copier(1), _copier(CHUNK)


@inlined
def _copy_run(target, place, source, start, size):
    """Copy `size` numbers. Indices and no slices: counting the references to slices takes longer
    than to copy short runs."""
    if size < CHUNK:
        for k in range(size):
            _copy_one(target, place + k, source, start + k)
        return
    for k in range(0, size - CHUNK, CHUNK):
        _copy_chunk(target, place + k, source, start + k)
    _copy_chunk(target, place + size - CHUNK, source, start + size - CHUNK)


@inlined
def _copy(target, source):
    _copy_run(target, 0, source, 0, target.size)


def _rectifier(count: int) -> Any:
    @intrinsic
    def rectify(context, target, place, source, index, bias, bias_index):
        """max(x + bias, 0) of `count` numbers; NaN stays NaN."""

        def generate(context, builder, signature, arguments):
            to, to_index, source_array, at, bias_array, bias_at = arguments
            numbers = _load_chunk(context, builder, source, source_array, at, count)
            numbers = _build_widen(builder, source.dtype, numbers)
            added = _load_chunk(context, builder, bias, bias_array, bias_at, count)
            numbers = builder.fadd(numbers, added)
            zero = _constant(numbers, 0.0)
            numbers = builder.select(builder.fcmp_ordered("<", numbers, zero), zero, numbers)
            address = _chunk(context, builder, target, to, to_index, count)
            builder.store(numbers, address).align = 1
            return context.get_dummy_value()

        index_type = types.int64
        return types.none(target, index_type, source, index_type, bias, index_type), generate

    return rectify


_rectify_one, _rectify_chunk = _rectifier(1), _rectifier(CHUNK)


@inlined
def _rectify(target, place, source, start, bias, bias_start, size):
    if size < CHUNK:
        for k in range(size):
            _rectify_one(target, place + k, source, start + k, bias, bias_start + k)
        return
    for k in range(0, size - CHUNK, CHUNK):
        _rectify_chunk(target, place + k, source, start + k, bias, bias_start + k)
    k = size - CHUNK
    _rectify_chunk(target, place + k, source, start + k, bias, bias_start + k)


def _dealer(count: int) -> Any:
    @intrinsic
    def deal(context, halves, words, place, start, index, step):
        """Deal `count` words, those from `start + index` on, to the lanes from `place` on.

        With a step of 1 the halves of a word become neighbours, else they go `step` lanes apart.
        """

        def generate(context, builder, signature, arguments):
            # The index of both arrays is that of their numbers in memory.
            to, words_array, place, start, index, step = arguments
            at = builder.add(start, index)
            numbers = _load_chunk(context, builder, words, words_array, at, count)
            high = builder.lshr(numbers, _constant(numbers, 16))
            with builder.if_else(builder.icmp_signed("==", step, step.type(1))) as (pairs, apart):
                with pairs:
                    pair = numbers
                    if sys.byteorder == "big":  # where the high half would come first
                        pair = builder.or_(high, builder.shl(numbers, _constant(numbers, 16)))
                    first = builder.add(place, builder.mul(index, index.type(PAIR)))
                    first = _chunk(context, builder, halves, to, first, count)
                    first = builder.bitcast(first, pair.type.as_pointer())
                    builder.store(pair, first).align = 1
                with apart:
                    first = builder.add(place, index)
                    for lane, half in ((first, numbers), (builder.add(first, step), high)):
                        half = builder.trunc(half, _like(half, ir.IntType(16)))
                        lane = _chunk(context, builder, halves, to, lane, count)
                        builder.store(half, lane).align = 1
            return context.get_dummy_value()

        return types.none(halves, words, place, start, index, step), generate

    return deal


# Indices and no slices: counting the references to slices takes longer than to copy short runs.
_deal_one, _deal_chunk = _dealer(1), _dealer(CHUNK)


# ---------------------------------------------------------------- tiles and lines


class _Plan(NamedTuple):
    """What the compiled functions know of the tensors, the windows and the cut into tiles."""

    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int
    dead_code: int
    height: int
    width: int
    out_height: int
    out_width: int
    sheets: int
    step: int
    # Of a tile; rows and columns are those of the outputs, or of the inputs in backward.
    tile_sheets: int
    tile_rows: int
    tile_cols: int
    # Tiles in each direction.
    bands: int
    strips: int


class _Tile(NamedTuple):
    sheet: int
    sheets: int
    row: int
    rows: int
    col: int
    cols: int
    # Columns from a sheet's first to that of the next, in each phase of a line.
    pitch: int
    # Lanes of a line, and numbers of one phase of it.
    count: int
    phase: int


class _Ring(NamedTuple):
    """The lines that the windows of a row of outputs need, and those that were made before.

    Input row r is in slot r mod the number of slots; one more slot is a row of padding.
    """

    lines: Any
    sums: Any
    squares: Any
    # Scratch memory for the weights of an input row.
    weights: Any
    # The row that each slot holds, and the slot of each row of the windows.
    held: Any
    slots: Any


@inlined
def _whole_chunks(count):
    return (count + CHUNK - 1) // CHUNK * CHUNK


@inlined
def _pitch(cols, plan):
    """Columns of each phase of a line that holds the windows of `cols` outputs."""
    reach = (cols - 1) * plan.stride_w + (plan.kernel_w - 1) * plan.dilation_w
    return reach // plan.stride_w + 1


@inlined
def _lanes(sheets, pitch, cols, step):
    """Lanes of a line; whole vectors where the line is a copy anyway."""
    count = ((sheets - 1) * pitch + cols) * step
    return count if sheets == 1 else _whole_chunks(count)


@inlined
def _tile(number, rows, columns, margin, plan):
    """A tile by its number, of sheets of `rows` x `columns`.

    margin: columns that a line has more than the tile; -1 for those that its windows need.
    """
    strip = number % plan.strips
    band = number // plan.strips % plan.bands
    sheet = number // (plan.strips * plan.bands) * plan.tile_sheets
    sheets = min(plan.tile_sheets, plan.sheets - sheet)
    row, col = band * plan.tile_rows, strip * plan.tile_cols
    cols = min(plan.tile_cols, columns - col)
    pitch = _pitch(cols, plan) if margin < 0 else cols + margin
    return _Tile(
        sheet,
        sheets,
        row,
        min(plan.tile_rows, rows - row),
        col,
        cols,
        pitch,
        _lanes(sheets, pitch, cols, plan.step),
        sheets * pitch * plan.step,
    )


@inlined
def _row_of(target, row, rows, columns, sheet, tile, plan):
    """The tile's part of a row of a sheet, in a tensor of `rows` x `columns` numbers a sheet."""
    start = ((sheet * rows + row) * columns + tile.col) * plan.step
    return target[start : start + tile.cols * plan.step]


@inlined
def _unstage(target, staged, row, rows, columns, tile, plan):
    """Store a row of results of several sheets, which lie side by side."""
    for p in range(tile.sheets):
        place = (((tile.sheet + p) * rows + row) * columns + tile.col) * plan.step
        start = p * tile.pitch * plan.step
        _copy_run(target, place, staged, start, tile.cols * plan.step)


@inlined
def _cell(line, j, tile, plan):
    """Cell j of the windows of all lanes: a view into the line."""
    column = j * plan.dilation_w
    start = column % plan.stride_w * tile.phase + column // plan.stride_w * plan.step
    return line[start : start + tile.count]


@inlined
def _inside(phase, first, tile, plan):
    """The columns of a phase that are no padding, and the input column of the first of them."""
    begin = first + phase
    low = max(0, (-begin + plan.stride_w - 1) // plan.stride_w)
    high = min(tile.pitch, (plan.width - begin + plan.stride_w - 1) // plan.stride_w)
    return low, high, begin + low * plan.stride_w


@inlined
def _deal_row(line, weights, p, first, tile, plan):
    """Deal the weights of sheet p's row to the phases."""
    step = plan.step
    for phase in range(plan.stride_w):
        low, high, begin = _inside(phase, first, tile, plan)
        place = phase * tile.phase + (p * tile.pitch + low) * step
        if step > 1:
            for m in range(high - low):
                to, at = place + m * step, (begin + m * plan.stride_w) * step
                _copy_run(line, to, weights, at, step)
        elif plan.stride_w == 2:  # a constant, so that LLVM makes vectors of it
            for m in range(high - low):
                line[place + m] = weights[begin + 2 * m]
        else:
            for m in range(high - low):
                line[place + m] = weights[begin + m * plan.stride_w]


@inlined
def _make_line(line, weights, x, bias_rows, row, first, tile, plan):
    """Fill a line with the weights of an input row; `first` is the input column of its start.

    The places of the padding are left as they are. `weights` is scratch memory for a row.
    """
    step = plan.step
    for p in range(tile.sheets):
        sheet = tile.sheet + p
        start = (sheet * plan.height + row) * plan.width * step
        # The place of a number in memory, as all indices here.
        bias_start = sheet % bias_rows.shape[0] * plan.width * step
        if plan.stride_w > 1:
            _rectify(weights, 0, x, start, bias_rows, bias_start, plan.width * step)
            _deal_row(line, weights, p, first, tile, plan)
            continue
        low, high, begin = _inside(0, first, tile, plan)
        if high > low:
            place, at = (p * tile.pitch + low) * step, begin * step
            size = (high - low) * step
            _rectify(line, place, x, start + at, bias_rows, bias_start + at, size)


@inlined
def _sum_cells(sums, line, tile, plan):
    """Sums over the cells of a row of each window, in the order of the contract."""
    count = tile.count
    cell0 = _cell(line, 0, tile, plan)
    if plan.kernel_w < 3:
        cell1 = _cell(line, plan.kernel_w - 1, tile, plan)
        one_cell = plan.kernel_w == 1
        for k in range(count):
            sums[k] = cell0[k] if one_cell else cell0[k] + cell1[k]
        return
    cell1, cell2 = _cell(line, 1, tile, plan), _cell(line, 2, tile, plan)
    for k in range(count):
        sums[k] = cell0[k] + cell1[k] + cell2[k]
    for j in range(3, plan.kernel_w):
        cell = _cell(line, j, tile, plan)
        for k in range(count):
            sums[k] += cell[k]


@inlined
def _sum_squares(squares, line, tile, plan):
    squares[: tile.count] = 0
    for j in range(plan.kernel_w):
        cell = _cell(line, j, tile, plan)
        for k in range(tile.count):
            squares[k] += cell[k] * cell[k]


@inlined
def _new_ring(most_sheets, most_pitch, plan, with_squares, one):
    slots = (plan.kernel_h - 1) * plan.dilation_h + 1
    lanes = most_sheets * most_pitch * plan.step + CHUNK
    dtype = np.dtype(type(one))
    return _Ring(
        np.zeros((slots + 1, lanes * plan.stride_w), dtype),
        np.zeros((slots + 1, lanes), dtype),
        np.zeros((slots + 1, lanes if with_squares else 0), dtype),
        np.empty(plan.width * plan.step if plan.stride_w > 1 else 0, dtype),
        np.full(slots, -1),
        np.empty(plan.kernel_h, np.int64),
    )


@inlined
def _hold(ring, oh, x, bias_rows, tile, plan, with_squares):
    """Have the lines of output row `oh`'s windows in their slots."""
    padding = ring.held.size
    first = tile.col * plan.stride_w - plan.padding_w
    for i in range(plan.kernel_h):
        row = oh * plan.stride_h - plan.padding_h + i * plan.dilation_h
        if row < 0 or row >= plan.height:
            ring.slots[i] = padding
            continue
        slot = row % padding
        ring.slots[i] = slot
        if ring.held[slot] == row:
            continue
        ring.held[slot] = row
        _make_line(ring.lines[slot], ring.weights, x, bias_rows, row, first, tile, plan)
        _sum_cells(ring.sums[slot], ring.lines[slot], tile, plan)
        if with_squares:
            _sum_squares(ring.squares[slot], ring.lines[slot], tile, plan)


@inlined
def _not_between(top_bits, low_bits, smallest, largest):
    """Whether of some sums, by their extreme bits, one is neither 0 nor in [smallest, largest)."""
    return top_bits >= _bits(largest) or low_bits < _bits_below(smallest)


# ---------------------------------------------------------------- drawing


@inlined
def _pairs(cols):
    """Pairs of columns, the last of which may lack its second."""
    return (cols + PAIR - 1) // PAIR


@inlined
def _number_calls(pairs, planes, tile, plan):
    """The pair of columns and, from the tile's first, the plane of each call of Philox."""
    call = 0
    for p in range(tile.sheets):
        for pair in range(_pairs(tile.cols)):
            for d in range(plan.step):
                pairs[call] = tile.col // PAIR + pair
                planes[call] = p * plan.step + d
                call += 1


@inlined
def _random_words(words, pairs, planes, first_plane, group, key0, key1, calls):
    """Philox's four words of each call (see philox.py), in the 64-bit lanes of its products."""
    mask = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    for k in range(calls):
        plane = np.uint64(first_plane) + planes[k]
        c0 = pairs[k] & mask
        c1 = np.uint64(group)
        c2 = plane & mask
        c3 = plane >> half
        k0 = np.uint64(key0)
        k1 = np.uint64(key1)
        for _ in range(ROUNDS):
            product0 = np.uint64(0xD2511F53) * c0
            product1 = np.uint64(0xCD9E8D57) * c2
            c0 = (product1 >> half) ^ c1 ^ k0
            c1 = product1 & mask
            c2 = (product0 >> half) ^ c3 ^ k1
            c3 = product0 & mask
            k0 = (k0 + np.uint64(0x9E3779B9)) & mask
            k1 = (k1 + np.uint64(0xBB67AE85)) & mask
        words[0, k] = np.uint32(c0)
        words[1, k] = np.uint32(c1)
        words[2, k] = np.uint32(c2)
        words[3, k] = np.uint32(c3)


@inlined
def _deal(halves, words, tile, plan):
    """Deal the words of a group of rows, one a row for each call, to the lanes: the low half to
    the first column of a pair, the high half to the second. A last pair without one spills into a
    lane that the next sheet overwrites or that is void."""
    step = plan.step
    pairs = _pairs(tile.cols)
    # Calls of neighbouring lanes: one pair of channels_last, else all pairs of the sheet.
    run = pairs if step == 1 else step
    for row in range(GROUP):
        start = row * words.shape[1]
        for p in range(tile.sheets):
            place = row * halves.shape[1] + p * tile.pitch * step
            for _ in range(pairs * step // run):
                if run < CHUNK:
                    for k in range(run):
                        _deal_one(halves, words, place, start, k, step)
                else:
                    for chunk in range(run // CHUNK):
                        _deal_chunk(halves, words, place, start, chunk * CHUNK, step)
                    if run % CHUNK != 0:
                        _deal_chunk(halves, words, place, start, run - CHUNK, step)
                start += run
                place += PAIR * run


@inlined
def _draw_3x3(target, code, ring, halves, tile, plan, one):
    """Draw in windows of 3 x 3: the row first, then the cell in it.

    Returns whether some window has a sum that is not finite; what is stored there is void.
    """
    zero = one - one
    two, three, six, dead_code = _as(2.0, one), _as(3.0, one), _as(6.0, one), _as(255.0, one)
    like = target[0]
    slots = ring.slots
    top, middle, bottom = ring.lines[slots[0]], ring.lines[slots[1]], ring.lines[slots[2]]
    top0, top1, top2 = (
        _cell(top, 0, tile, plan), _cell(top, 1, tile, plan), _cell(top, 2, tile, plan)
    )  # fmt: skip
    middle0, middle1, middle2 = (
        _cell(middle, 0, tile, plan), _cell(middle, 1, tile, plan), _cell(middle, 2, tile, plan)
    )  # fmt: skip
    bottom0, bottom1, bottom2 = (
        _cell(bottom, 0, tile, plan), _cell(bottom, 1, tile, plan), _cell(bottom, 2, tile, plan)
    )  # fmt: skip
    sum0, sum1, sum2 = ring.sums[slots[0]], ring.sums[slots[1]], ring.sums[slots[2]]
    top_bits = _bits(zero)
    for k in range(tile.count):
        total0 = sum0[k]
        total1 = total0 + sum1[k]
        total = total1 + sum2[k]
        threshold = _uniform(halves[k], one) * total
        beyond0 = total0 <= threshold
        beyond1 = total1 <= threshold
        w0 = _select(beyond1, bottom0[k], _select(beyond0, middle0[k], top0[k]))
        w1 = _select(beyond1, bottom1[k], _select(beyond0, middle1[k], top1[k]))
        w2 = _select(beyond1, bottom2[k], _select(beyond0, middle2[k], top2[k]))
        before = _select(beyond1, total1, _select(beyond0, total0, zero))
        past0 = before + w0 <= threshold
        past1 = before + (w0 + w1) <= threshold
        target[k] = _narrow(_select(past1, w2, _select(past0, w1, w0)), like)
        # Reckoned in the dtype of the weights: LLVM would do integers in narrow vectors.
        row = _select(beyond1, six, _select(beyond0, three, zero))
        column = _select(past1, two, _select(past0, one, zero))
        cell = _select(total <= threshold, dead_code, row + column)
        code[k] = np.uint8(np.int32(cell))
        top_bits = _larger(top_bits, _bits(total))
    return top_bits >= _bits(_as(np.inf, one))


@inlined
def _draw_2x2(target, code, ring, halves, tile, plan, one):
    """Draw in windows of 2 x 2; for the rest see `_draw_3x3`."""
    zero = one - one
    two, dead_code = _as(2.0, one), _as(255.0, one)
    like = target[0]
    slots = ring.slots
    top, bottom = ring.lines[slots[0]], ring.lines[slots[1]]
    top0, top1 = _cell(top, 0, tile, plan), _cell(top, 1, tile, plan)
    bottom0, bottom1 = _cell(bottom, 0, tile, plan), _cell(bottom, 1, tile, plan)
    sum0, sum1 = ring.sums[slots[0]], ring.sums[slots[1]]
    top_bits = _bits(zero)
    for k in range(tile.count):
        total0 = sum0[k]
        total = total0 + sum1[k]
        threshold = _uniform(halves[k], one) * total
        beyond = total0 <= threshold
        w0 = _select(beyond, bottom0[k], top0[k])
        w1 = _select(beyond, bottom1[k], top1[k])
        past = _select(beyond, total0, zero) + w0 <= threshold
        target[k] = _narrow(_select(past, w1, w0), like)
        cell = _select(beyond, two, zero) + _select(past, one, zero)
        code[k] = np.uint8(np.int32(_select(total <= threshold, dead_code, cell)))
        top_bits = _larger(top_bits, _bits(total))
    return top_bits >= _bits(_as(np.inf, one))


@inlined
def _draw(target, code, value, number, before, ring, halves, tile, plan, one):
    """Draw in windows of any size, cell by cell; for the rest see `_draw_3x3`."""
    count = tile.count
    zero = one - one
    threshold, before_row, before_cell = before[0], before[1], before[2]
    top_bits = _bits(zero)
    before_row[:] = zero
    for i in range(plan.kernel_h):
        row_sum = ring.sums[ring.slots[i]]
        for k in range(count):
            before_row[k] += row_sum[k]
    for k in range(count):
        total = before_row[k]
        threshold[k] = _uniform(halves[k], one) * total
        top_bits = _larger(top_bits, _bits(total))
        before_row[k] = zero
    for i in range(plan.kernel_h):
        before_cell[:] = zero
        line = ring.lines[ring.slots[i]]
        for j in range(plan.kernel_w):
            cell = _cell(line, j, tile, plan)
            this = np.int32(i * plan.kernel_w + j)
            for k in range(count):
                w = cell[k]
                # Always so in the first cell.
                drawn = before_row[k] + before_cell[k] <= threshold[k]
                value[k] = _select(drawn, w, value[k])
                number[k] = _select(drawn, this, number[k])
                before_cell[k] += w
        row_sum = ring.sums[ring.slots[i]]
        for k in range(count):
            before_row[k] += row_sum[k]
    like = target[0]
    dead_code = np.int32(plan.dead_code)
    for k in range(count):
        target[k] = _narrow(value[k], like)
        # By now the sum of all rows.
        code[k] = _select(before_row[k] <= threshold[k], dead_code, number[k])
    return top_bits >= _bits(_as(np.inf, one))


@inlined
def _stand_in(w, infinite, scale, one):
    """The weight v that stands for w where the sum overflows (see reference.py)."""
    if infinite:
        return one if w == np.inf else one - one
    return w * scale


@inlined
def _sum_window(k, ring, tile, plan, infinite, scale, one):
    """S of a single window, from the weights that stand for its own, and the largest of these."""
    total = largest = one - one
    for i in range(plan.kernel_h):
        line = ring.lines[ring.slots[i]]
        row_sum = one - one
        for j in range(plan.kernel_w):
            w = _cell(line, j, tile, plan)[k]
            row_sum += _stand_in(w, infinite, scale, one)
            largest = max(largest, w)
        total += row_sum
    return total, largest


@inlined
def _weigh_window(k, ring, tile, plan, one):
    """S of a single window, whether it is infinite, and its scale."""
    total, largest = _sum_window(k, ring, tile, plan, False, one, one)
    if total != np.inf:
        return total, False, one
    infinite = largest == np.inf
    scale = one if infinite else _as(OVERFLOW_SCALE, one)
    total, _ = _sum_window(k, ring, tile, plan, infinite, scale, one)
    return total, infinite, scale


@inlined
def _draw_one(k, ring, half, tile, plan, one):
    """Draw in a single window, as in reference.py."""
    total, infinite, scale = _weigh_window(k, ring, tile, plan, one)
    threshold = _uniform(half, one) * total
    value, code = one - one, 0
    before_row = one - one
    for i in range(plan.kernel_h):
        line = ring.lines[ring.slots[i]]
        before_cell = one - one
        for j in range(plan.kernel_w):
            w = _cell(line, j, tile, plan)[k]
            v = _stand_in(w, infinite, scale, one)
            if before_row + before_cell <= threshold or v != v:
                value, code = w, i * plan.kernel_w + j
            before_cell += v
        before_row += before_cell
    return value, plan.dead_code if total <= threshold else code


@inlined
def _total(k, ring, plan, one):
    total = one - one
    for i in range(plan.kernel_h):
        total += ring.sums[ring.slots[i], k]
    return total


@inlined
def _redraw(target, code, ring, halves, tile, plan, one):
    """Draw again in the windows whose sum is not finite."""
    like = target[0]
    for k in range(tile.count):
        if _total(k, ring, plan, one) < np.inf:
            continue
        drawn, code[k] = _draw_one(k, ring, halves[k], tile, plan, one)
        target[k] = _narrow(drawn, like)


@compiled
def _sample_tiles(begin, end, x, bias_rows, output, code, key0, key1, plan, one):
    """Draw every window of the tiles `begin` to `end`."""
    is_3x3 = plan.kernel_h == 3 and plan.kernel_w == 3
    is_2x2 = plan.kernel_h == 2 and plan.kernel_w == 2
    rows, columns = plan.out_height, plan.out_width
    ring = _new_ring(plan.tile_sheets, _pitch(plan.tile_cols, plan), plan, False, one)
    lanes = ring.sums.shape[1]
    most_calls = plan.tile_sheets * _pairs(plan.tile_cols) * plan.step + CHUNK
    words = np.empty((GROUP, most_calls), np.uint32)
    pairs, planes = np.zeros(most_calls, np.uint64), np.zeros(most_calls, np.uint64)
    halves = np.zeros((GROUP, lanes + plan.step), np.uint16)
    target, cells = np.empty(lanes, output.dtype), np.empty(lanes, code.dtype)
    scratch = np.empty((4, 1 if is_3x3 or is_2x2 else lanes), bias_rows.dtype)
    numbers = np.empty(1 if is_3x3 or is_2x2 else lanes, np.int32)
    last_sheets, last_col = 0, 0
    for tile_number in range(begin, end):
        tile = _tile(tile_number, rows, columns, -1, plan)
        ring.held[:] = -1
        if tile.sheets != last_sheets or tile.col != last_col:
            last_sheets, last_col = tile.sheets, tile.col
            ring.lines[:] = 0  # other columns are padding now
            _number_calls(pairs, planes, tile, plan)
        for oh in range(tile.row, tile.row + tile.rows):
            if oh % GROUP == 0:
                _random_words(
                    words, pairs, planes, tile.sheet * plan.step, oh // GROUP, key0, key1,
                    _whole_chunks(tile.sheets * _pairs(tile.cols) * plan.step),
                )  # fmt: skip
                _deal(halves, words, tile, plan)
            row_halves = halves[oh % GROUP]
            _hold(ring, oh, x, bias_rows, tile, plan, False)
            if tile.sheets == 1:
                target = _row_of(output, oh, rows, columns, tile.sheet, tile, plan)
                cells = _row_of(code, oh, rows, columns, tile.sheet, tile, plan)
            if is_3x3:
                void = _draw_3x3(target, cells, ring, row_halves, tile, plan, one)
            elif is_2x2:
                void = _draw_2x2(target, cells, ring, row_halves, tile, plan, one)
            else:
                void = _draw(
                    target, cells, scratch[3], numbers, scratch, ring, row_halves, tile, plan, one
                )  # fmt: skip
            if void:
                _redraw(target, cells, ring, row_halves, tile, plan, one)
            if tile.sheets > 1:
                _unstage(output, target, oh, rows, columns, tile, plan)
                _unstage(code, cells, oh, rows, columns, tile, plan)


# ---------------------------------------------------------------- backward of drawing


@inlined
def _hold_gradient(grads, codes, grad, code, oh, tile, plan):
    """A row of output gradients and codes as lines, which start `kernel_w - 1` columns early.

    Windows that do not exist have dead codes, which were there before.
    """
    first = tile.col + plan.padding_w - (plan.kernel_w - 1)
    low = max(0, -first)
    high = min(tile.pitch, plan.out_width - first)
    if high <= low:
        return
    size = (high - low) * plan.step
    for p in range(tile.sheets):
        row = (tile.sheet + p) * plan.out_height + oh
        place = (row * plan.out_width + first + low) * plan.step
        start = (p * tile.pitch + low) * plan.step
        _copy(grads[start : start + size], grad[place : place + size])
        _copy(codes[start : start + size], code[place : place + size])


@inlined
def _gather_3x3(target, sums, grads, codes, slots, tile, plan, one):
    """What the nine windows that hold an input sent to it: cell (i, j) of the window 2 - j columns
    further in line i."""
    zero = one - one
    like = target[0]
    first, second, third = 2 * plan.step, plan.step, 0
    g0, g1, g2 = grads[slots[0]], grads[slots[1]], grads[slots[2]]
    c0, c1, c2 = codes[slots[0]], codes[slots[1]], codes[slots[2]]
    g00, g01, g02 = g0[first:], g0[second:], g0[third:]
    g10, g11, g12 = g1[first:], g1[second:], g1[third:]
    g20, g21, g22 = g2[first:], g2[second:], g2[third:]
    c00, c01, c02 = c0[first:], c0[second:], c0[third:]
    c10, c11, c12 = c1[first:], c1[second:], c1[third:]
    c20, c21, c22 = c2[first:], c2[second:], c2[third:]
    for k in range(tile.count):
        row0 = _select(c00[k] == 0, g00[k], zero) + _select(c01[k] == 1, g01[k], zero)
        row0 += _select(c02[k] == 2, g02[k], zero)
        row1 = _select(c10[k] == 3, g10[k], zero) + _select(c11[k] == 4, g11[k], zero)
        row1 += _select(c12[k] == 5, g12[k], zero)
        row2 = _select(c20[k] == 6, g20[k], zero) + _select(c21[k] == 7, g21[k], zero)
        row2 += _select(c22[k] == 8, g22[k], zero)
        total = row0 + row1 + row2
        sums[k] += total
        target[k] = _narrow(total, like)


@inlined
def _add_channels(partial, sums, tile, plan):
    """Sum a line over its columns: [sheets, step]."""
    for p in range(tile.sheets):
        channels = partial[tile.sheet + p]
        for column in range(tile.cols):
            start = (p * tile.pitch + column) * plan.step
            numbers = sums[start : start + plan.step]
            for d in range(plan.step):
                channels[d] += numbers[d]


@compiled
def _gather_tiles(begin, end, grad, code, grad_input, partial, plan, one):
    """Backward of 3 x 3 windows with stride 1: every input looks at the nine windows it is in."""
    rows, columns = plan.height, plan.width
    lanes = plan.tile_sheets * (plan.tile_cols + 2) * plan.step + CHUNK
    slots, held = np.empty(3, np.int64), np.empty(3, np.int64)
    # One more slot for rows without windows. The lanes beyond the last are void.
    grads = np.zeros((4, lanes + 2 * plan.step), partial.dtype)
    codes = np.empty((4, lanes + 2 * plan.step), np.int32)
    target, sums = np.empty(lanes, grad_input.dtype), np.empty(lanes, partial.dtype)
    last_sheets, last_col = 0, 0
    for number in range(begin, end):
        tile = _tile(number, rows, columns, 2, plan)
        held[:] = -1
        sums[:] = 0
        if tile.sheets != last_sheets or tile.col != last_col:
            last_sheets, last_col = tile.sheets, tile.col
            codes[:] = plan.dead_code  # other columns are without windows now
        for ih in range(tile.row, tile.row + tile.rows):
            for i in range(3):
                oh = ih + plan.padding_h - i
                if oh < 0 or oh >= plan.out_height:
                    slots[i] = 3
                    continue
                slot = oh % 3
                slots[i] = slot
                if held[slot] != oh:
                    held[slot] = oh
                    _hold_gradient(grads[slot], codes[slot], grad, code, oh, tile, plan)
            if tile.sheets == 1:
                target = _row_of(grad_input, ih, rows, columns, tile.sheet, tile, plan)
            _gather_3x3(target, sums, grads, codes, slots, tile, plan, one)
            if tile.sheets > 1:
                _unstage(grad_input, target, ih, rows, columns, tile, plan)
        _add_channels(partial[number % (plan.bands * plan.strips)], sums, tile, plan)


@inlined
def _touching_rows(tile, plan):
    """The rows of outputs of which a window may reach into the tile's rows of inputs."""
    reach = (plan.kernel_h - 1) * plan.dilation_h
    low = (tile.row + plan.padding_h - reach + plan.stride_h - 1) // plan.stride_h
    high = (tile.row + tile.rows - 1 + plan.padding_h) // plan.stride_h + 1
    return range(max(low, 0), min(high, plan.out_height))


@inlined
def _collect(gathered, line, tile, plan):
    """A line that starts with the padding as a row of a sheet again: `_deal_row` the other way."""
    step = plan.step
    for phase in range(plan.stride_w):
        low, high, first = _inside(phase, -plan.padding_w, tile, plan)
        count = max(high - low, 0)
        start = phase * tile.phase + low * step
        if plan.stride_w == 1:
            _copy_run(gathered, first * step, line, start, count * step)
        elif step > 1:
            for m in range(count):
                at = (first + m * plan.stride_w) * step
                _copy_run(gathered, at, line, start + m * step, step)
        elif plan.stride_w == 2:  # a constant, so that LLVM makes vectors of it
            for m in range(count):
                gathered[first + 2 * m] = line[start + m]
        else:
            for m in range(count):
                gathered[first + m * plan.stride_w] = line[start + m]


@compiled
def _spread_tiles(begin, end, grad, code, grad_input, partial, plan, one):
    """Backward of small windows: of a row of outputs, each cell of all windows looks for what was
    sent to it; lines of sums have phases as those of weights. Tiles are those of `_scatter_tiles`.
    """
    step = plan.step
    zero = one - one
    rows, columns = plan.height, plan.width
    size, out_size = columns * step, plan.out_width * step
    pitch = _pitch(plan.out_width, plan)
    totals = np.empty((plan.tile_rows, plan.stride_w * pitch * step), partial.dtype)
    numbers, codes = np.empty(out_size, partial.dtype), np.empty(out_size, np.int32)
    # Columns that no window holds stay 0.
    gathered, sums = np.zeros(size, partial.dtype), np.empty(size, partial.dtype)
    like = grad_input[0]
    for number in range(begin, end):
        tile = _tile(number, rows, columns, 0, plan)
        # The same rows of the same sheet as lanes of outputs.
        windows = _Tile(
            tile.sheet, 1, tile.row, tile.rows, 0, plan.out_width, pitch, out_size, pitch * step
        )
        totals[:] = zero
        sums[:] = zero
        for oh in _touching_rows(tile, plan):
            place = (tile.sheet * plan.out_height + oh) * out_size
            _copy(numbers, grad[place : place + out_size])
            _copy(codes, code[place : place + out_size])
            for i in range(plan.kernel_h):
                row = oh * plan.stride_h - plan.padding_h + i * plan.dilation_h - tile.row
                if row >= 0 and row < tile.rows:
                    for j in range(plan.kernel_w):
                        cell = _cell(totals[row], j, windows, plan)
                        this = np.int32(i * plan.kernel_w + j)
                        for k in range(out_size):
                            cell[k] += _select(codes[k] == this, numbers[k], zero)
        for row in range(tile.rows):
            _collect(gathered, totals[row], windows, plan)
            to = _row_of(grad_input, tile.row + row, rows, columns, tile.sheet, tile, plan)
            for k in range(size):
                to[k] = _narrow(gathered[k], like)
                sums[k] += gathered[k]
        _add_channels(partial[number % plan.bands], sums, tile, plan)


@compiled
def _scatter_tiles(begin, end, grad, code, grad_input, partial, plan, one):
    """Backward of any windows: every output's gradient is added where its code says."""
    step = plan.step
    rows, columns = plan.height, plan.width
    size, out_size = columns * step, plan.out_width * step
    cells = plan.kernel_h * plan.kernel_w
    cell_row, cell_place = np.empty(cells, np.int64), np.empty(cells, np.int64)
    for cell in range(cells):
        cell_row[cell] = cell // plan.kernel_w * plan.dilation_h
        column = cell % plan.kernel_w * plan.dilation_w
        cell_place[cell] = (cell_row[cell] * columns + column) * step
    totals = np.empty(plan.tile_rows * size, partial.dtype)
    like = grad_input[0]
    for number in range(begin, end):
        tile = _tile(number, rows, columns, 0, plan)
        totals[:] = 0
        for oh in _touching_rows(tile, plan):
            place = (tile.sheet * plan.out_height + oh) * out_size
            row_grad, row_code = grad[place : place + out_size], code[place : place + out_size]
            top = oh * plan.stride_h - plan.padding_h - tile.row
            k = 0
            for ow in range(plan.out_width):
                origin = (top * columns + ow * plan.stride_w - plan.padding_w) * step
                for d in range(step):
                    cell = row_code[k]
                    if cell != plan.dead_code:
                        row = top + cell_row[cell]
                        if row >= 0 and row < tile.rows:
                            totals[origin + d + cell_place[cell]] += _widen(row_grad[k], one)
                    k += 1
        for row in range(tile.rows):
            line = totals[row * size : (row + 1) * size]
            to = _row_of(grad_input, tile.row + row, rows, columns, tile.sheet, tile, plan)
            for k in range(size):
                to[k] = _narrow(line[k], like)
            _add_channels(partial[number % plan.bands], line, tile, plan)


# ---------------------------------------------------------------- expectation


@inlined
def _expect_one(k, ring, tile, plan, one):
    """sum v * v / S of a single window, S, whether it is infinite, and its scale."""
    total, infinite, scale = _weigh_window(k, ring, tile, plan, one)
    mean = one - one
    if total == 0:
        return mean, total, infinite, scale
    for i in range(plan.kernel_h):
        line = ring.lines[ring.slots[i]]
        for j in range(plan.kernel_w):
            v = _stand_in(_cell(line, j, tile, plan)[k], infinite, scale, one)
            mean += v * (v / total)
    return mean, total, infinite, scale


@inlined
def _is_squarable(total):
    return total == 0 or (total >= SMALLEST_SQUARABLE and total < LARGEST_SQUARABLE)


@inlined
def _sum_windows(total, mean, ring, tile, plan, one):
    """S and sum w * w / S of every lane; whether some are void, being no ordinary numbers."""
    count = tile.count
    zero = one - one
    total[:count] = zero
    mean[:count] = zero
    for i in range(plan.kernel_h):
        sums, squares = ring.sums[ring.slots[i]], ring.squares[ring.slots[i]]
        for k in range(count):
            total[k] += sums[k]
            mean[k] += squares[k]
    top_bits, low_bits = _bits(zero), _bits_below(zero)
    for k in range(count):
        mean[k] = mean[k] / _select(total[k] == zero, one, total[k])
        top_bits = _larger(top_bits, _bits(total[k]))
        low_bits = _smaller(low_bits, _bits_below(total[k]))
    smallest, largest = _as(SMALLEST_SQUARABLE, one), _as(LARGEST_SQUARABLE, one)
    return _not_between(top_bits, low_bits, smallest, largest)


@compiled
def _expect_tiles(begin, end, x, bias_rows, output, plan, one):
    """The expectation of every window of the tiles `begin` to `end`."""
    rows, columns = plan.out_height, plan.out_width
    ring = _new_ring(plan.tile_sheets, _pitch(plan.tile_cols, plan), plan, True, one)
    lanes = ring.sums.shape[1]
    total, mean = np.empty(lanes, bias_rows.dtype), np.empty(lanes, bias_rows.dtype)
    target = np.empty(lanes, output.dtype)
    bound = np.finfo(total.dtype).max
    last_sheets, last_col = 0, 0
    for number in range(begin, end):
        tile = _tile(number, rows, columns, -1, plan)
        ring.held[:] = -1
        if tile.sheets != last_sheets or tile.col != last_col:
            last_sheets, last_col = tile.sheets, tile.col
            ring.lines[:] = 0  # other columns are padding now
        for oh in range(tile.row, tile.row + tile.rows):
            _hold(ring, oh, x, bias_rows, tile, plan, True)
            if _sum_windows(total, mean, ring, tile, plan, one):
                for k in range(tile.count):
                    if not _is_squarable(total[k]):
                        scaled, _, infinite, scale = _expect_one(k, ring, tile, plan, one)
                        mean[k] = _as(np.inf, one) if infinite else scaled / scale
                        # Rounding takes a mean of the largest numbers beyond them.
                        if mean[k] > bound and not infinite:
                            mean[k] = bound
            if tile.sheets == 1:
                target = _row_of(output, oh, rows, columns, tile.sheet, tile, plan)
            like = target[0]
            for k in range(tile.count):
                target[k] = _narrow(mean[k], like)
            if tile.sheets > 1:
                _unstage(output, target, oh, rows, columns, tile, plan)


@inlined
def _spread(spread, numbers, tile, plan):
    """Add each window's number to the columns of its cells, in phases as those of a line."""
    spread[:] = 0
    for j in range(plan.kernel_w):
        cell = _cell(spread, j, tile, plan)
        for k in range(tile.count):
            cell[k] += numbers[k]


@inlined
def _expect_row(slope, offset, total, mean, ring, tile, plan, one):
    """Turn a row of output gradients in `slope` into what the gradient is made of (reference.py):
    the numbers by which a weight is multiplied, and those that are taken off."""
    zero = one - one
    void = _sum_windows(total, mean, ring, tile, plan, one)
    if void:
        offset[:] = slope
    for k in range(tile.count):
        divisor = _select(total[k] == zero, one, total[k])
        slope[k] = _select(total[k] == zero, zero, slope[k] / divisor)
    if not void:
        for k in range(tile.count):
            offset[k] = slope[k] * mean[k]
        return
    for k in range(tile.count):
        if _is_squarable(total[k]):
            offset[k] = slope[k] * mean[k]
            continue
        scaled, stand_in_total, infinite, scale = _expect_one(k, ring, tile, plan, one)
        share = zero if stand_in_total < SMALLEST_SUM else offset[k] / stand_in_total
        offset[k] = share * scaled
        slope[k] = zero if infinite else share * scale


@compiled
def _expect_backward_tiles(
    begin, end, grad, x, bias_rows, grad_input, partial, plan, one
):  # fmt: skip
    """Backward of the expectation; tiles are of one sheet and have whole rows."""
    step = plan.step
    dtype = partial.dtype
    zero = one - one
    rows, columns = plan.height, plan.width
    size, out_size = columns * step, plan.out_width * step
    ring = _new_ring(1, _pitch(plan.out_width, plan), plan, True, one)
    lanes, line_size = ring.sums.shape[1], ring.lines.shape[1]
    total, mean = np.empty(lanes, dtype), np.empty(lanes, dtype)
    slope, offset = np.empty(lanes, dtype), np.empty(lanes, dtype)
    spread, line = np.empty(line_size, dtype), np.empty(line_size, dtype)
    slopes = np.empty((plan.tile_rows, line_size), dtype)
    offsets = np.empty((plan.tile_rows, line_size), dtype)
    gathered, sums = np.zeros(size, dtype), np.empty(size, dtype)
    like = grad_input[0]
    for number in range(begin, end):
        tile = _tile(number, rows, columns, 0, plan)
        # The same rows of the same sheet as lanes of outputs.
        pitch = _pitch(plan.out_width, plan)
        windows = _Tile(
            tile.sheet, 1, tile.row, tile.rows, 0, plan.out_width, pitch, out_size, pitch * step
        )
        ring.held[:] = -1
        slopes[:] = zero
        offsets[:] = zero
        sums[:] = zero
        for oh in _touching_rows(tile, plan):
            _hold(ring, oh, x, bias_rows, windows, plan, True)
            place = (tile.sheet * plan.out_height + oh) * out_size
            _copy(slope[:out_size], grad[place : place + out_size])
            _expect_row(slope, offset, total, mean, ring, windows, plan, one)
            for numbers, targets in ((slope, slopes), (offset, offsets)):
                _spread(spread, numbers, windows, plan)
                for i in range(plan.kernel_h):
                    row = oh * plan.stride_h - plan.padding_h + i * plan.dilation_h - tile.row
                    if row >= 0 and row < tile.rows:
                        target = targets[row]
                        for k in range(line_size):
                            target[k] += spread[k]
        for row in range(tile.rows):
            _make_line(
                line, ring.weights, x, bias_rows, tile.row + row, -plan.padding_w, windows, plan
            )
            row_slope, row_offset = slopes[row], offsets[row]
            for k in range(line_size):
                w = line[k]
                gradient = w * (row_slope[k] + row_slope[k]) - row_offset[k]
                # Without a slope w does not count, and may be NaN: a cell that no window holds.
                gradient = _select(row_slope[k] == zero, -row_offset[k], gradient)
                gradient = _select(w == np.inf, row_offset[k], gradient)
                line[k] = _select(w == zero, zero, gradient)
            _collect(gathered, line, windows, plan)
            to = _row_of(grad_input, tile.row + row, rows, columns, tile.sheet, tile, plan)
            for k in range(size):
                to[k] = _narrow(gathered[k], like)
                sums[k] += gathered[k]
        _add_channels(partial[number % plan.bands], sums, tile, plan)


# ---------------------------------------------------------------- threads

_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def _forget_pool() -> None:
    """In a forked child, which has the pool but none of its threads."""
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _submit(function: Callable[[], None]) -> Future[None] | None:
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="stochastic_pooling")
        try:
            return _pool.submit(function)
        except RuntimeError:  # the interpreter is shutting down: no new threads
            return None


def share_out(
    function: Callable[..., None], tiles: int, threads: int, arguments: tuple[Any, ...]
) -> None:
    """Call `function(begin, end, *arguments)` on parts of `range(tiles)` until all are done.

    The caller works too, and does what helpers that never got a thread would have done: calls from
    many threads at once do not wait for one another.
    """
    if threads == 1:
        function(0, tiles, *arguments)
        return
    parts = min(tiles, 8 * threads)
    bounds = [tiles * part // parts for part in range(parts + 1)]
    shares = itertools.count()

    def work() -> None:
        # `next` on a count is atomic.
        while (part := next(shares)) < parts:
            function(bounds[part], bounds[part + 1], *arguments)

    helpers = [helper for _ in range(threads - 1) if (helper := _submit(work)) is not None]
    try:
        work()
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.result()


# ---------------------------------------------------------------- tensors


class _Job:
    """Tensors of one memory format as arrays, the plan, and the threads' shares."""

    def __init__(
        self, like: torch.Tensor, dtype: torch.dtype, height: int, width: int, window: Window
    ) -> None:
        self.layout = memory_format(like)
        self.batch, self.channels = like.shape[:2]
        self.window = window
        self.height, self.width = height, width
        self.out_height, self.out_width = window.output_size(height, width)
        self.step = self.channels if self.layout == torch.channels_last else 1
        self.sheets = self.batch * self.channels // self.step
        self.accumulation = reference.accumulation_dtype(dtype)
        self.one = np.float64(1) if dtype == torch.float64 else np.float32(1)

    def plan(self, rows: int, columns: int) -> None:
        """Tiles that are passed over in lines."""
        strips = -(-columns * self.step // MOST_LANES)
        bands = -(-rows // MOST_ROWS)
        # Equal parts, for a narrow last one would take as long as a wide one.
        tile_cols = -(-columns // (min(strips, columns) * PAIR)) * PAIR
        tile_rows = -(-rows // (bands * GROUP)) * GROUP
        tile_sheets = max(1, min(FEWEST_LANES // (columns * self.step), self.sheets))
        self._cut(rows, columns, tile_sheets, tile_rows, tile_cols)

    def plan_backward(self) -> None:
        """Tiles of whole rows of inputs of one sheet, of which the sums stay in the cache."""
        rows = 8 * MOST_LANES // (self.width * self.step)
        self._cut(self.height, self.width, 1, max(1, min(rows, self.height)), self.width)

    def _cut(self, rows: int, columns: int, sheets: int, tile_rows: int, tile_cols: int) -> None:
        w = self.window
        self.bands, self.strips = -(-rows // tile_rows), -(-columns // tile_cols)
        self.tiles = -(-self.sheets // sheets) * self.bands * self.strips
        self.numbers = _Plan(
            w.kernel_h, w.kernel_w, w.stride_h, w.stride_w, w.padding_h, w.padding_w,
            w.dilation_h, w.dilation_w, w.dead_code, self.height, self.width,
            self.out_height, self.out_width, self.sheets, self.step, sheets, tile_rows, tile_cols,
            self.bands, self.strips,
        )  # fmt: skip

    def array(self, tensor: torch.Tensor) -> Any:
        """The numbers in the order they lie in memory; copied only if not dense in the layout."""
        dense = tensor.detach().contiguous(memory_format=self.layout)
        if self.layout == torch.channels_last:
            dense = dense.permute(0, 2, 3, 1)
        if dense.dtype == torch.float16:
            dense = dense.view(torch.uint16)
        elif dense.dtype == torch.bfloat16:
            dense = dense.view(torch.int16)
        return dense.reshape(-1).numpy()

    def empty(self, height: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        # What is dense in both formats has the strides of the first, as from `contiguous`.
        layout = torch.contiguous_format if height == width == 1 else self.layout
        shape = (self.batch, self.channels, height, width)
        return torch.empty(shape, dtype=dtype, memory_format=layout)

    def bias_rows(self, bias: torch.Tensor | None) -> Any:
        """The bias as it is added to a row of each kind of sheet: [kinds, width * step]."""
        if bias is None:
            return np.zeros((1, self.width * self.step), self.one.dtype)
        values = bias.detach().to(self.accumulation).numpy() + 0.0  # no negative zero
        if self.layout == torch.channels_last:
            return np.tile(values, self.width)[None]
        return np.repeat(values[:, None], self.width, axis=1)

    def partial_bias(self) -> Any:
        """Places for the tiles' parts of the bias's gradient: [tiles of a sheet, sheets, step]."""
        return np.zeros((self.bands * self.strips, self.sheets, self.step), self.one.dtype)

    def grad_bias(self, partial: Any, with_bias: bool) -> torch.Tensor:
        if not with_bias:
            return torch.empty(0, dtype=self.accumulation)
        # numpy, unlike torch, adds in an order that does not depend on a number of threads.
        by_image = partial.sum(0, dtype=np.float64).reshape(self.batch, self.channels)
        return torch.from_numpy(by_image.sum(0)).to(self.accumulation)

    def no_gradients(self, grad_input: torch.Tensor, with_bias: bool) -> Any:
        """Of an empty batch."""
        return grad_input, torch.zeros(self.channels * with_bias, dtype=self.accumulation)

    def run(self, function: Callable[..., None], *arguments: Any) -> None:
        """`function(begin, end, *arguments, plan, one)` over all tiles."""
        outputs = self.out_height * self.out_width
        numbers = self.sheets * self.step * max(self.height * self.width, outputs)
        threads = min(torch.get_num_threads(), self.tiles) if numbers > SMALL else 1
        share_out(function, self.tiles, threads, (*arguments, self.numbers, self.one))


def sample(
    input: torch.Tensor, bias: torch.Tensor | None, seed: torch.Tensor, window: Window
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.sample`."""
    job = _Job(input, input.dtype, *input.shape[2:], window)
    output = job.empty(job.out_height, job.out_width, input.dtype)
    code = job.empty(job.out_height, job.out_width, window.code_dtype)
    if output.numel() > 0:
        key = int(seed)
        job.plan(job.out_height, job.out_width)
        job.run(
            _sample_tiles, job.array(input), job.bias_rows(bias), job.array(output),
            job.array(code), key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF,
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
    height, width = size
    job = _Job(code, grad_output.dtype, height, width, window)
    grad_input = job.empty(height, width, grad_output.dtype)
    if grad_input.numel() == 0:
        return job.no_gradients(grad_input, with_bias)
    gathers = (
        window.kernel_h, window.kernel_w, window.stride_h, window.stride_w,
        window.dilation_h, window.dilation_w,
    ) == (3, 3, 1, 1, 1, 1)  # fmt: skip
    if gathers:
        function = _gather_tiles
        job.plan(height, width)
    else:
        few = window.kernel_h * window.kernel_w <= MOST_CELLS
        function = _spread_tiles if few else _scatter_tiles
        job.plan_backward()
    partial = job.partial_bias()
    job.run(
        function,
        job.array(grad_output), job.array(code), job.array(grad_input), partial,
    )  # fmt: skip
    return grad_input, job.grad_bias(partial, with_bias)


def expectation(input: torch.Tensor, bias: torch.Tensor | None, window: Window) -> torch.Tensor:
    """See `reference.expectation`."""
    job = _Job(input, input.dtype, *input.shape[2:], window)
    output = job.empty(job.out_height, job.out_width, input.dtype)
    if output.numel() > 0:
        job.plan(job.out_height, job.out_width)
        job.run(_expect_tiles, job.array(input), job.bias_rows(bias), job.array(output))
    return output


def expectation_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    bias: torch.Tensor | None,
    window: Window,
    with_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.expectation_backward`."""
    job = _Job(input, input.dtype, *input.shape[2:], window)
    grad_input = job.empty(*input.shape[2:], grad_output.dtype)
    if grad_input.numel() == 0:
        return job.no_gradients(grad_input, with_bias)
    job.plan_backward()
    partial = job.partial_bias()
    job.run(
        _expect_backward_tiles, job.array(grad_output), job.array(input), job.bias_rows(bias),
        job.array(grad_input), partial,
    )  # fmt: skip
    return grad_input, job.grad_bias(partial, with_bias)
