"""Stochastic pooling in Triton, the sliding kernels: small windows that overlap or touch.

A lane owns two neighbouring output columns (in channels_last, of `VECTOR` channels) and slides
down a strip of rows. It keeps the rows that the next window shares in registers, with their sums,
so each input is loaded, rectified and summed once for the three rows of windows it lies in. One
call of Philox serves two columns and four rows.

    sample_sliding_kernel        draws the row of the window first, then the cell in it
    expectation_sliding_kernel   the sum of squares over the sum
    gather_sliding_kernel        the backward of sampling; a lane owns two input columns and adds up
                                 three rows of them while it slides down the outputs

The rows of a strip come in two kinds. Inner rows are unrolled and read without a mask: the halo to
the left of the first column is the end of the row above, which is there, and a bias of minus
infinity keeps it out. The first and last rows of a plane go through masks, one at a time.

Windows with a NaN, an infinity or a sum that could overflow are noticed, not handled: a program
that meets one repeats its strip with the device functions of `general.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .general import draw_cells, expect, masked, philox4x32, rectified, uniform, unscaled

# Inner rows are unrolled by these, and a strip is a multiple of them. Four rows share a Philox
# call; after six the three rows in registers are back where they began.
SAMPLE_GROUP = 4
EXPECTATION_GROUP = GATHER_GROUP = 6
SAMPLE_ROWS = tl.constexpr(SAMPLE_GROUP)
EXPECTATION_ROWS = tl.constexpr(EXPECTATION_GROUP)
GATHER_ROWS = tl.constexpr(GATHER_GROUP)
# Arguments that Triton would compile for anew where they become 1 or a multiple of 16.
NUMBERS = (
    "channels", "height", "width", "out_height", "out_width", "in_pitch", "out_pitch", "step",
    "pairs", "lanes", "strip_rows", "inner_rows", "start_row", "stop_row", "one",
)  # fmt: skip
# Sums beyond this may overflow, or hide an infinity.
LARGEST_SUM = tl.constexpr(2.0**120)
# The squares of larger sums may overflow, those of smaller ones (the bits of 2**-58) underflow.
LARGEST_SQUARED = tl.constexpr(2.0**60)
SMALLEST_SQUARED = tl.constexpr((127 - 58) << 23)
# The interpreter rounds the product of a multiply-add, a GPU does not.
FUSED_MULTIPLY_ADD = tl.constexpr(not triton.knobs.runtime.interpret)


# ---------------------------------------------------------------- device functions


@triton.jit
def _lanes(
    channels, pairs, lanes, step, VECTOR: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Number, existence, image, channel and pair of columns of each lane, [BLOCK, 1].

    The channel is the first of the lane's `VECTOR`. Lanes beyond the last repeat it.
    """
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    exists = number < lanes
    number = tl.minimum(number, lanes - 1)
    # Unsigned division is the shorter one. An argument that is 1 comes as a constant, without `to`.
    rest = number.to(tl.uint32)
    pairs = tl.cast(pairs, tl.uint32)
    if step is not None:  # channels_last
        channel = rest % tl.cast(step, tl.uint32) * VECTOR
        rest = rest // tl.cast(step, tl.uint32)
        pair = rest % pairs
        image = rest // pairs
    else:
        pair = rest % pairs
        rest = rest // pairs
        channel = rest % tl.cast(channels, tl.uint32)
        image = rest // tl.cast(channels, tl.uint32)
    return number, exists, image.to(tl.int32), channel.to(tl.int32), pair.to(tl.int32)


@triton.jit
def _lane_index(
    image, channel, channels, pair, height, pitch,
    COLUMNS: tl.constexpr, step, UNIT: tl.constexpr,
):  # fmt: skip
    """Index of the first of each lane's own `COLUMNS` columns in the first row, in units of `UNIT`
    elements; `pitch` is the length of a row in units."""
    if step is not None:
        return image * (height * pitch) + pair * (COLUMNS * step) + channel // UNIT
    else:
        return (image * channels + channel) * (height * pitch) + pair * COLUMNS // UNIT


@triton.jit
def _units(pointer, index, UNIT: tl.constexpr):
    """Pointer to the unit `index`. That a unit is one number tells the compiler its alignment."""
    BITS: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth * UNIT
    if BITS == 64:
        return pointer.to(tl.pointer_type(tl.uint64)) + index
    elif BITS == 32:
        return pointer.to(tl.pointer_type(tl.uint32)) + index
    elif BITS == 16:
        return pointer.to(tl.pointer_type(tl.uint16)) + index
    else:
        return pointer.to(tl.pointer_type(tl.uint8)) + index


@triton.jit
def _elements(
    pointer, index, at, step, VECTOR: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """Pointers to the numbers `at` columns from the unit `index`, [BLOCK, VECTOR]."""
    pointer = _units(pointer, index, UNIT).to(pointer.dtype)
    if step is not None:
        return pointer + (at * step * VECTOR + tl.arange(0, VECTOR)[None, :])
    else:
        return pointer + at


@triton.jit
def _pair(pointer, index, at):
    """The same to two neighbouring columns of a contiguous tensor, [BLOCK, 1, 2]."""
    pointer = _units(pointer, index, 2).to(pointer.dtype)
    return pointer[:, :, None] + (at + tl.arange(0, 2)[None, None, :])


@triton.jit
def _in_plane(column, at: tl.constexpr, width, INSIDE: tl.constexpr):
    """Whether the column `at` from each lane's first own one lies in the plane; of those that are
    not sure to, see `_load_columns`."""
    if at >= 0:
        return column + at < width
    elif at < INSIDE:
        return column + at >= 0
    else:
        return (column + at >= 0) & (column + at < width)


@triton.jit
def _load_columns(
    pointer, index, column, width, FIRST: tl.constexpr, COLUMNS: tl.constexpr,
    INSIDE: tl.constexpr, MASK_LEFT: tl.constexpr, MASK_RIGHT: tl.constexpr,
    step, VECTOR: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """`COLUMNS` neighbouring columns of a row, a tuple of [BLOCK, VECTOR].

    `index` is the unit of the lane's first own column, `column`; the first one loaded is `FIRST`
    columns from it. Of the last lane in a row, the columns up to the own one `INSIDE` lie in the
    plane: fewer than none where windows begin that far before it. Columns beyond the plane hold
    anything, and only with `MASK_LEFT` and `MASK_RIGHT` is it sure that they are not read.
    """
    columns = ()
    for j in tl.static_range(COLUMNS):
        here = _elements(pointer, index, j + FIRST, step, VECTOR, UNIT)
        if j + FIRST < 0:
            if MASK_LEFT:
                inside = _in_plane(column, j + FIRST, width, INSIDE)
                columns = columns + (tl.load(here, mask=inside, other=0),)
            else:
                columns = columns + (tl.load(here),)
        elif step is None and UNIT == 2 and j + FIRST < INSIDE // 2 * 2:
            if (j + FIRST) % 2 == 0:
                columns = columns + tl.split(tl.load(_pair(pointer, index, j + FIRST)))
        elif j + FIRST >= INSIDE and MASK_RIGHT:
            inside = _in_plane(column, j + FIRST, width, INSIDE)
            columns = columns + (tl.load(here, mask=inside, other=0),)
        else:
            columns = columns + (tl.load(here),)
    return columns


@triton.jit
def _weigh(inputs, biases, stride_w: tl.constexpr, kernel_w: tl.constexpr):
    """A row: the weights of its columns, and their sum in each of the lane's two windows."""
    weights = ()
    for j in tl.static_range(len(inputs)):
        weights = weights + (rectified(inputs[j], biases[j], tl.float32),)
    sums = ()
    for x in tl.static_range(2):
        row_sum = weights[x * stride_w]
        for j in tl.static_range(1, kernel_w):
            row_sum = row_sum + weights[x * stride_w + j]
        sums = sums + (row_sum,)
    return weights, sums


@triton.jit
def _origin(
    pointer, image, channel, channels, height, pitch,
    step, VECTOR: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Pointer to the first number of each lane's planes, [BLOCK, VECTOR]."""
    if step is not None:
        channel = channel + tl.arange(0, VECTOR)[None, :]
        return pointer + (image.to(tl.int64) * height * pitch * UNIT + channel)
    else:
        return pointer + (image * channels + channel).to(tl.int64) * height * pitch * UNIT


@triton.jit
def _bias(bias_ptr, channel, HAS_BIAS: tl.constexpr, step, VECTOR: tl.constexpr):
    """The bias of each lane's channels, [BLOCK, VECTOR]; 0 without one."""
    if step is not None:
        channel = channel + tl.arange(0, VECTOR)[None, :]
    if HAS_BIAS:
        return tl.load(bias_ptr + channel).to(tl.float32)
    else:
        return tl.zeros(channel.shape, tl.float32)


@triton.jit
def _biases(
    bias_ptr, channel, column, width, FIRST: tl.constexpr, COLUMNS: tl.constexpr,
    INSIDE: tl.constexpr, HAS_BIAS: tl.constexpr, step, VECTOR: tl.constexpr,
):  # fmt: skip
    """The bias of each column, a tuple of [BLOCK, VECTOR]; minus infinity beyond the plane."""
    bias = _bias(bias_ptr, channel, HAS_BIAS, step, VECTOR)
    biases = ()
    for j in tl.static_range(COLUMNS):
        if j + FIRST >= 0 and j + FIRST < INSIDE:
            biases = biases + (bias,)
        else:
            inside = _in_plane(column, j + FIRST, width, INSIDE)
            biases = biases + (tl.where(inside, bias, float("-inf")),)
    return biases


@triton.jit
def _store(
    pointer, index, two, exists, has_second,
    step, VECTOR: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Store the numbers of the lane's two columns."""
    ELEMENT: tl.constexpr = pointer.dtype.element_ty
    if step is None and UNIT == 2:
        both = tl.join(two[0], two[1]).to(ELEMENT)
        tl.store(_pair(pointer, index, 0), both, mask=exists[:, :, None])
    else:
        here = _elements(pointer, index, 0, step, VECTOR, UNIT)
        tl.store(here, two[0].to(ELEMENT), mask=exists)
        here = _elements(pointer, index, 1, step, VECTOR, UNIT)
        tl.store(here, two[1].to(ELEMENT), mask=has_second)


@triton.jit
def _load_edge(
    pointer, lane, row, height, pitch, column, width, biases,
    FIRST: tl.constexpr, INSIDE: tl.constexpr,
    step, VECTOR: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The columns of any row and their biases; one beyond the plane has biases that undo it."""
    present = (row >= 0) & (row < height)
    index = lane + tl.minimum(tl.maximum(row, 0), height - 1) * pitch
    inputs = _load_columns(
        pointer, index, column, width, FIRST, len(biases), INSIDE, True, True, step, VECTOR, UNIT
    )
    shifted = ()
    for j in tl.static_range(len(biases)):
        shifted = shifted + (tl.where(present, biases[j], float("-inf")),)
    return inputs, shifted


@triton.jit
def _words(pair, quad, plane, key, VECTOR: tl.constexpr):
    """The random words of four rows, four of [BLOCK, VECTOR]; `plane` is the lane's first one."""
    words = philox4x32(pair, quad, plane, 0, key)
    if VECTOR == 2:
        # Joined, the two lie in one thread, as the inputs do. With a tensor of planes the compiler
        # would spread them over two threads and exchange the words through shared memory.
        second = philox4x32(pair, quad, plane + 1, 0, key)
        both = ()
        for i in tl.static_range(4):
            joined = tl.join(words[i], second[i])
            both = both + (tl.reshape(joined, [joined.shape[0], 2]),)
        words = both
    return words


@triton.jit
def _threshold(word, total, one, HIGH: tl.constexpr):
    """u * S, with u the low or high half of the word over 2**16.

    `one` holds the bits of 1.0, so 1 + u takes a shift, a mask and an or, without a conversion.
    """
    if HIGH:
        bits = (word >> 9) & 0x007FFF80
    else:
        bits = (word << 7) & 0x007FFF80
    one_plus_u = (bits | one).to(tl.float32, bitcast=True)
    if FUSED_MULTIPLY_ADD:
        return tl.fma(one_plus_u, total, -total)
    else:
        return (one_plus_u - 1.0) * total


@triton.jit
def _draw(
    word, rows, one, x: tl.constexpr, stride_w: tl.constexpr, kernel_w: tl.constexpr,
    DEAD: tl.constexpr, CODE_SCALE: tl.constexpr,
):  # fmt: skip
    """Value, code and sum of the lane's window `x`; the code comes in two parts to add up, each
    times `CODE_SCALE`."""
    total = rows[0][1][x]
    for i in tl.static_range(1, len(rows)):
        total = total + rows[i][1][x]
    threshold = _threshold(word, total, one, x == 1)

    # The row: the last one before which the running sum is at most the threshold.
    cells = rows[0][0][x * stride_w : x * stride_w + kernel_w]
    before = 0.0
    row_code = 0
    running = rows[0][1][x]
    for i in tl.static_range(1, len(rows)):
        passed = running <= threshold
        before = tl.where(passed, running, before)
        chosen = ()
        for j in tl.static_range(kernel_w):
            chosen = chosen + (tl.where(passed, rows[i][0][x * stride_w + j], cells[j]),)
        cells = chosen
        row_code = tl.where(passed, i * kernel_w * CODE_SCALE, row_code)
        running = running + rows[i][1][x]
    # In a dead window every comparison holds, so the column's part is that of the last column.
    row_code = tl.where(total <= threshold, (DEAD - (kernel_w - 1)) * CODE_SCALE, row_code)

    # The cell in it, likewise.
    value = cells[0]
    column_code = 0
    within = cells[0]
    for j in tl.static_range(1, kernel_w):
        passed = before + within <= threshold
        value = tl.where(passed, cells[j], value)
        column_code = tl.where(passed, j * CODE_SCALE, column_code)
        within = within + cells[j]
    return value, row_code, column_code, total


@triton.jit
def _largest(largest, total):
    return tl.maximum(largest, total, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _draw_row(
    output_ptr, code_ptr, index, word, rows, one, exists, has_second,
    stride_w: tl.constexpr, kernel_w: tl.constexpr, DEAD: tl.constexpr,
    step, VECTOR: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Draw and store the lane's two windows; their larger sum, or NaN."""
    JOINED: tl.constexpr = step is None and UNIT == 2
    SCALE: tl.constexpr = 256 if JOINED else 1
    value0, row0, column0, total0 = _draw(word, rows, one, 0, stride_w, kernel_w, DEAD, 1)
    value1, row1, column1, total1 = _draw(word, rows, one, 1, stride_w, kernel_w, DEAD, SCALE)
    _store(output_ptr, index, (value0, value1), exists, has_second, step, VECTOR, UNIT)
    if JOINED:
        # One 16-bit number; the code of the second window is scaled by 256 already.
        codes = (row0 + column0) + (row1 + column1)
        tl.store(_units(code_ptr, index, 2), codes.to(tl.uint16), mask=exists)
    else:
        codes = (row0 + column0, row1 + column1)
        _store(code_ptr, index, codes, exists, has_second, step, VECTOR, UNIT)
    return _largest(total0, total1)


# ---------------------------------------------------------------- kernels


@triton.jit
def _sample_strip_again(
    input_ptr, bias_ptr, seed_ptr, output_ptr, code_ptr,
    channels, height, width, out_height, out_width, in_pitch, out_pitch,
    pairs, lanes, first_row, end_row,
    kernel_h: tl.constexpr, kernel_w: tl.constexpr,
    stride_h: tl.constexpr, stride_w: tl.constexpr,
    padding_h: tl.constexpr, padding_w: tl.constexpr,
    HAS_BIAS: tl.constexpr, DEAD: tl.constexpr, step, VECTOR: tl.constexpr,
    IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Draw a strip window by window, with what NaN, infinities and overflow ask for."""
    _, exists, image, channel, pair = _lanes(channels, pairs, lanes, step, VECTOR, BLOCK)
    lane = _lane_index(image, channel, channels, pair, out_height, out_pitch, 2, step, OUT_UNIT)
    origin_ptr = _origin(
        input_ptr, image, channel, channels, height, in_pitch, step, VECTOR, IN_UNIT
    )
    bias = _bias(bias_ptr, channel, HAS_BIAS, step, VECTOR)
    plane = (image * channels + channel).to(tl.int64) + tl.arange(0, VECTOR)[None, :]
    for strip_row in range(end_row - first_row):
        out_row = first_row + strip_row
        index = lane + out_row * out_pitch
        for x in range(2):
            out_column = pair * 2 + x
            mask = tl.broadcast_to(exists & (out_column < out_width), [BLOCK, VECTOR])
            value, code = draw_cells(
                origin_ptr, bias,
                0, out_row * stride_h - padding_h, out_column * stride_w - padding_w,
                mask, uniform(seed_ptr, plane, out_row, out_column, tl.float32),
                1, height, width, 0, in_pitch * IN_UNIT, 1 if step is None else step * VECTOR,
                1, kernel_h, kernel_w, 1, 1, 1, DEAD, tl.float32,
            )  # fmt: skip
            to = _elements(output_ptr, index, x, step, VECTOR, OUT_UNIT)
            tl.store(to, value.to(output_ptr.dtype.element_ty), mask=mask)
            to = _elements(code_ptr, index, x, step, VECTOR, OUT_UNIT)
            tl.store(to, code.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=NUMBERS)
def sample_sliding_kernel(
    input_ptr, bias_ptr, seed_ptr, output_ptr, code_ptr,
    # sizes; a pitch is the length of a row in units, a step that of a column in channels_last
    channels, height, width, out_height, out_width, in_pitch, out_pitch, step,
    # division of the work; rows from inner_rows on are edge rows
    pairs, lanes, strip_rows, inner_rows,
    one,  # the bits of 1.0
    # window
    kernel_h: tl.constexpr, kernel_w: tl.constexpr,
    stride_h: tl.constexpr, stride_w: tl.constexpr,
    padding_h: tl.constexpr, padding_w: tl.constexpr,
    # variant
    HAS_BIAS: tl.constexpr, DEAD: tl.constexpr, STEP: tl.constexpr, VECTOR: tl.constexpr,
    IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, INSIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    OWN: tl.constexpr = 2 * stride_w
    KEPT: tl.constexpr = kernel_h - stride_h
    # The output has the input's size: one index serves both.
    SAME: tl.constexpr = (
        stride_h * stride_w == 1 and kernel_h == 2 * padding_h + 1 and kernel_w == 2 * padding_w + 1
    )
    # The first row read by the loop is at least KEPT - padding_h: is there one above it?
    MASK_LEFT: tl.constexpr = KEPT - padding_h < 1
    step = step if STEP is None else STEP  # one of them, or none in contiguous tensors
    number, exists, image, channel, pair = _lanes(channels, pairs, lanes, step, VECTOR, BLOCK)
    has_second = exists & (pair * 2 + 1 < out_width)
    column = pair * OWN
    out_lane = _lane_index(image, channel, channels, pair, out_height, out_pitch, 2, step, OUT_UNIT)
    if SAME:
        in_pitch = out_pitch
        in_lane = out_lane
    else:
        in_lane = _lane_index(image, channel, channels, pair, height, in_pitch, OWN, step, IN_UNIT)
    biases = _biases(
        bias_ptr, channel, column, width, -padding_w, stride_w + kernel_w,
        INSIDE, HAS_BIAS, step, VECTOR,
    )  # fmt: skip
    key = tl.load(seed_ptr)
    plane = image * channels + channel
    c0, c2 = pair.to(tl.uint32), plane.to(tl.uint32)

    first_row = tl.program_id(1) * strip_rows
    end_row = tl.minimum(first_row + strip_rows, out_height)
    groups = tl.maximum(tl.minimum(end_row, inner_rows) - first_row, 0) // SAMPLE_ROWS

    rows = ()
    largest = tl.zeros([BLOCK, VECTOR], tl.float32)
    for i in tl.static_range(KEPT):
        inputs, row_biases = _load_edge(
            input_ptr, in_lane, first_row * stride_h - padding_h + i, height, in_pitch,
            column, width, biases, -padding_w, INSIDE, step, VECTOR, IN_UNIT,
        )  # fmt: skip
        row = _weigh(inputs, row_biases, stride_w, kernel_w)
        rows = rows + (row,)
        largest = _largest(largest, _largest(row[1][0], row[1][1]))

    # Zero that the compiler cannot see through. With it these numbers stay in a register of each
    # lane: `one` would be a second constant to its instruction, and the indices of the unrolled
    # rows would become as many registers instead of one.
    zero = number >> 31
    one = zero.to(tl.uint32) + one
    out_step = out_pitch + zero
    in_step = out_step if SAME else in_pitch + zero
    in_index = in_lane + (first_row * stride_h - padding_h + KEPT) * in_pitch
    out_index = out_lane + first_row * out_pitch
    for group in range(groups):
        quad = first_row // SAMPLE_ROWS + group
        words = _words(c0, quad.to(tl.uint32), c2, key, VECTOR)
        for k in tl.static_range(SAMPLE_ROWS):
            if SAME:
                in_index = out_index + out_step * (KEPT - padding_h)
            for i in tl.static_range(KEPT, kernel_h):
                if i < padding_h:  # above the plane, for its first window
                    out_row = first_row + group * SAMPLE_ROWS + k
                    inputs, row_biases = _load_edge(
                        input_ptr, in_lane, out_row * stride_h - padding_h + i, height, in_pitch,
                        column, width, biases, -padding_w, INSIDE, step, VECTOR, IN_UNIT,
                    )  # fmt: skip
                else:
                    row_biases = biases
                    inputs = _load_columns(
                        input_ptr, in_index, column, width, -padding_w, len(biases),
                        INSIDE, MASK_LEFT, False, step, VECTOR, IN_UNIT,
                    )  # fmt: skip
                rows = rows + (_weigh(inputs, row_biases, stride_w, kernel_w),)
                in_index += in_step
            row_largest = _draw_row(
                output_ptr, code_ptr, out_index, words[k], rows, one, exists, has_second,
                stride_w, kernel_w, DEAD, step, VECTOR, OUT_UNIT,
            )  # fmt: skip
            # With stride 1 every row lies in one of these windows.
            if stride_h > 1 or k % kernel_h == kernel_h - 2 or k == SAMPLE_ROWS - 1:
                largest = _largest(largest, row_largest)
            out_index += out_step
            rows = rows[stride_h:]

    edge_row = first_row + groups * SAMPLE_ROWS
    words = _words(c0, (edge_row // SAMPLE_ROWS).to(tl.uint32), c2, key, VECTOR)
    for edge in range(end_row - edge_row):
        out_row = edge_row + edge
        if (edge > 0) & (out_row % SAMPLE_ROWS == 0):
            words = _words(c0, (out_row // SAMPLE_ROWS).to(tl.uint32), c2, key, VECTOR)
        for i in tl.static_range(KEPT, kernel_h):
            inputs, row_biases = _load_edge(
                input_ptr, in_lane, out_row * stride_h - padding_h + i, height, in_pitch,
                column, width, biases, -padding_w, INSIDE, step, VECTOR, IN_UNIT,
            )  # fmt: skip
            rows = rows + (_weigh(inputs, row_biases, stride_w, kernel_w),)
        row_largest = _draw_row(
            output_ptr, code_ptr, out_lane + out_row * out_pitch, words[0], rows, one,
            exists, has_second, stride_w, kernel_w, DEAD, step, VECTOR, OUT_UNIT,
        )  # fmt: skip
        largest = _largest(largest, row_largest)
        rows = rows[stride_h:]
        words = words[1:] + words[:1]

    unusual = (largest < LARGEST_SUM) == 0
    any_unusual = tl.max(unusual.to(tl.int32))
    if any_unusual > 0:  # rare
        # The added zero keeps the compiler from holding all that is needed here through the loops.
        _sample_strip_again(
            input_ptr, bias_ptr, seed_ptr, output_ptr, code_ptr,
            channels, height, width, out_height, out_width, in_pitch, out_pitch,
            pairs + (any_unusual >> 1), lanes, first_row, end_row,
            kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w,
            HAS_BIAS, DEAD, step, VECTOR, IN_UNIT, OUT_UNIT, BLOCK,
        )  # fmt: skip


@triton.jit
def _moments(inputs, biases, stride_w: tl.constexpr, kernel_w: tl.constexpr):
    """The sums of the weights of a row in the lane's two windows, and those of their squares."""
    weights = ()
    for j in tl.static_range(len(inputs)):
        weights = weights + (rectified(inputs[j], biases[j], tl.float32),)
    # What both windows hold is added up once.
    both = weights[stride_w] * 0.0
    both_squared = both
    for j in tl.static_range(stride_w, kernel_w):
        both = weights[j] if j == stride_w else both + weights[j]
        both_squared = (
            weights[j] * weights[j] if j == stride_w else both_squared + weights[j] * weights[j]
        )
    sums = ()
    squares = ()
    for x in tl.static_range(2):
        row_sum = both
        row_squared = both_squared
        for j in tl.static_range(stride_w):
            w = weights[j + x * kernel_w]
            row_sum = w if stride_w == kernel_w and j == 0 else row_sum + w
            row_squared = w * w if stride_w == kernel_w and j == 0 else row_squared + w * w
        sums = sums + (row_sum,)
        squares = squares + (row_squared,)
    return sums, squares


@triton.jit
def _expect_row(
    output_ptr, index, rows, largest, smallest, exists, has_second,
    step, VECTOR: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Store the lane's two expectations; the largest sum so far, or NaN, and the smallest one that
    is not 0, as its bits minus 1."""
    ELEMENT: tl.constexpr = output_ptr.dtype.element_ty
    expectations = ()
    for x in tl.static_range(2):
        total = rows[0][0][x]
        squares = rows[0][1][x]
        for i in tl.static_range(1, len(rows)):
            total = total + rows[i][0][x]
            squares = squares + rows[i][1][x]
        # 0 / 2**-126 is the 0 of a dead window.
        expectations = expectations + (squares / tl.maximum(total, 2.0**-126),)
        largest = _largest(largest, total)
        if ELEMENT != tl.float16:
            smallest = tl.minimum(smallest, total.to(tl.uint32, bitcast=True) - 1)
    _store(output_ptr, index, expectations, exists, has_second, step, VECTOR, UNIT)
    return largest, smallest


@triton.jit
def _expect_strip_again(
    input_ptr, bias_ptr, output_ptr,
    channels, height, width, out_height, out_width, in_pitch, out_pitch,
    pairs, lanes, first_row, end_row,
    kernel_h: tl.constexpr, kernel_w: tl.constexpr,
    stride_h: tl.constexpr, stride_w: tl.constexpr,
    padding_h: tl.constexpr, padding_w: tl.constexpr,
    HAS_BIAS: tl.constexpr, step, VECTOR: tl.constexpr,
    IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The expectations of a strip window by window, as `_sample_strip_again` draws it."""
    _, exists, image, channel, pair = _lanes(channels, pairs, lanes, step, VECTOR, BLOCK)
    lane = _lane_index(image, channel, channels, pair, out_height, out_pitch, 2, step, OUT_UNIT)
    origin_ptr = _origin(
        input_ptr, image, channel, channels, height, in_pitch, step, VECTOR, IN_UNIT
    )
    bias = _bias(bias_ptr, channel, HAS_BIAS, step, VECTOR)
    for strip_row in range(end_row - first_row):
        out_row = first_row + strip_row
        index = lane + out_row * out_pitch
        for x in range(2):
            out_column = pair * 2 + x
            mask = tl.broadcast_to(exists & (out_column < out_width), [BLOCK, VECTOR])
            expectation, _total, infinite, scale = expect(
                origin_ptr, bias,
                0, out_row * stride_h - padding_h, out_column * stride_w - padding_w, mask,
                1, height, width, 0, in_pitch * IN_UNIT, 1 if step is None else step * VECTOR,
                1, kernel_h, kernel_w, 1, 1, 1, tl.float32,
            )  # fmt: skip
            expectation = unscaled(expectation, infinite, scale, tl.float32)
            to = _elements(output_ptr, index, x, step, VECTOR, OUT_UNIT)
            tl.store(to, expectation.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=NUMBERS)
def expectation_sliding_kernel(
    input_ptr, bias_ptr, output_ptr,
    # as in sample_sliding_kernel
    channels, height, width, out_height, out_width, in_pitch, out_pitch, step,
    pairs, lanes, strip_rows, inner_rows,
    kernel_h: tl.constexpr, kernel_w: tl.constexpr,
    stride_h: tl.constexpr, stride_w: tl.constexpr,
    padding_h: tl.constexpr, padding_w: tl.constexpr,
    HAS_BIAS: tl.constexpr, STEP: tl.constexpr, VECTOR: tl.constexpr,
    IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, INSIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    OWN: tl.constexpr = 2 * stride_w
    KEPT: tl.constexpr = kernel_h - stride_h
    # The output has the input's size: one index serves both.
    SAME: tl.constexpr = (
        stride_h * stride_w == 1 and kernel_h == 2 * padding_h + 1 and kernel_w == 2 * padding_w + 1
    )
    MASK_LEFT: tl.constexpr = KEPT - padding_h < 1
    step = step if STEP is None else STEP  # one of them, or none in contiguous tensors
    number, exists, image, channel, pair = _lanes(channels, pairs, lanes, step, VECTOR, BLOCK)
    has_second = exists & (pair * 2 + 1 < out_width)
    column = pair * OWN
    out_lane = _lane_index(image, channel, channels, pair, out_height, out_pitch, 2, step, OUT_UNIT)
    if SAME:
        in_pitch = out_pitch
        in_lane = out_lane
    else:
        in_lane = _lane_index(image, channel, channels, pair, height, in_pitch, OWN, step, IN_UNIT)
    biases = _biases(
        bias_ptr, channel, column, width, -padding_w, stride_w + kernel_w,
        INSIDE, HAS_BIAS, step, VECTOR,
    )  # fmt: skip
    first_row = tl.program_id(1) * strip_rows
    end_row = tl.minimum(first_row + strip_rows, out_height)
    groups = tl.maximum(tl.minimum(end_row, inner_rows) - first_row, 0) // EXPECTATION_ROWS

    rows = ()
    for i in tl.static_range(KEPT):
        inputs, row_biases = _load_edge(
            input_ptr, in_lane, first_row * stride_h - padding_h + i, height, in_pitch,
            column, width, biases, -padding_w, INSIDE, step, VECTOR, IN_UNIT,
        )  # fmt: skip
        rows = rows + (_moments(inputs, row_biases, stride_w, kernel_w),)

    largest = tl.zeros([BLOCK, VECTOR], tl.float32)
    smallest = tl.full([BLOCK, VECTOR], 0xFFFFFFFF, tl.uint32)
    zero = number >> 31
    out_step = out_pitch + zero
    in_step = out_step if SAME else in_pitch + zero
    in_index = in_lane + (first_row * stride_h - padding_h + KEPT) * in_pitch
    out_index = out_lane + first_row * out_pitch
    for group in range(groups):
        for k in tl.static_range(EXPECTATION_ROWS):
            if SAME:
                in_index = out_index + out_step * (KEPT - padding_h)
            for i in tl.static_range(KEPT, kernel_h):
                if i < padding_h:  # above the plane, for its first window
                    out_row = first_row + group * EXPECTATION_ROWS + k
                    inputs, row_biases = _load_edge(
                        input_ptr, in_lane, out_row * stride_h - padding_h + i, height, in_pitch,
                        column, width, biases, -padding_w, INSIDE, step, VECTOR, IN_UNIT,
                    )  # fmt: skip
                else:
                    row_biases = biases
                    inputs = _load_columns(
                        input_ptr, in_index, column, width, -padding_w, len(biases),
                        INSIDE, MASK_LEFT, False, step, VECTOR, IN_UNIT,
                    )  # fmt: skip
                rows = rows + (_moments(inputs, row_biases, stride_w, kernel_w),)
                in_index += in_step
            largest, smallest = _expect_row(
                output_ptr, out_index, rows, largest, smallest, exists, has_second,
                step, VECTOR, OUT_UNIT,
            )  # fmt: skip
            out_index += out_step
            rows = rows[stride_h:]

    edge_row = first_row + groups * EXPECTATION_ROWS
    for edge in range(end_row - edge_row):
        out_row = edge_row + edge
        for i in tl.static_range(KEPT, kernel_h):
            inputs, row_biases = _load_edge(
                input_ptr, in_lane, out_row * stride_h - padding_h + i, height, in_pitch,
                column, width, biases, -padding_w, INSIDE, step, VECTOR, IN_UNIT,
            )  # fmt: skip
            rows = rows + (_moments(inputs, row_biases, stride_w, kernel_w),)
        largest, smallest = _expect_row(
            output_ptr, out_lane + out_row * out_pitch, rows, largest, smallest,
            exists, has_second, step, VECTOR, OUT_UNIT,
        )  # fmt: skip
        rows = rows[stride_h:]

    unusual = (largest < LARGEST_SQUARED) == 0
    if output_ptr.dtype.element_ty != tl.float16:  # where so small an expectation is 0
        unusual = unusual | (smallest < SMALLEST_SQUARED)
    any_unusual = tl.max(unusual.to(tl.int32))
    if any_unusual > 0:  # rare
        _expect_strip_again(
            input_ptr, bias_ptr, output_ptr,
            channels, height, width, out_height, out_width, in_pitch, out_pitch,
            pairs + (any_unusual >> 1), lanes, first_row, end_row,
            kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w,
            HAS_BIAS, step, VECTOR, IN_UNIT, OUT_UNIT, BLOCK,
        )  # fmt: skip


@triton.jit
def _gather_row(
    grad_ptr, code_ptr, index, present, column, width, sums,
    kernel_w: tl.constexpr, stride_w: tl.constexpr, padding_w: tl.constexpr,
    DEAD: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr, INSIDE: tl.constexpr,
    MASK: tl.constexpr, MASK_LEFT: tl.constexpr,
    step, VECTOR: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Add the gradients of a row of outputs to the cells that they drew.

    `sums` are those of the `kernel_h` rows of input that the windows reach, each of the lane's two
    columns. Without `MASK` the row is there and has one below it.
    """
    grads = _load_columns(
        grad_ptr, index, column, width, FIRST, COLUMNS, INSIDE, MASK or MASK_LEFT, MASK,
        step, VECTOR, UNIT,
    )  # fmt: skip
    codes = _load_columns(
        code_ptr, index, column, width, FIRST, COLUMNS, INSIDE, MASK or MASK_LEFT, MASK,
        step, VECTOR, UNIT,
    )  # fmt: skip
    for c in tl.static_range(COLUMNS):
        grad = grads[c].to(tl.float32)
        code = codes[c].to(tl.int32)
        if c + FIRST < 0 or c + FIRST >= INSIDE:
            code = tl.where(_in_plane(column, c + FIRST, width, INSIDE), code, DEAD)
        if MASK:
            code = tl.where(present, code, DEAD)
        added = ()
        for i in tl.static_range(len(sums)):
            row = ()
            for x in tl.static_range(2):
                # The column of the window that the lane's column x is.
                if (
                    x + padding_w - stride_w * (c + FIRST) >= 0
                    and x + padding_w - stride_w * (c + FIRST) < kernel_w
                ):
                    drawn = code == i * kernel_w + x + padding_w - stride_w * (c + FIRST)
                    row = row + (tl.where(drawn, sums[i][x] + grad, sums[i][x]),)
                else:
                    row = row + (sums[i][x],)
            added = added + (row,)
        sums = added
    return sums


@triton.jit(do_not_specialize=NUMBERS)
def gather_sliding_kernel(
    grad_output_ptr, code_ptr, grad_input_ptr, partial_bias_ptr,
    # sizes, of input and output
    channels, height, width, out_height, out_width, in_pitch, out_pitch, step,
    # division of the work over rows of outputs; rows from inner_rows on are edge rows
    pairs, lanes, strip_rows, inner_rows, start_row, stop_row,
    # window
    kernel_h: tl.constexpr, kernel_w: tl.constexpr,
    stride_h: tl.constexpr, stride_w: tl.constexpr,
    padding_h: tl.constexpr, padding_w: tl.constexpr,
    # variant
    DEAD: tl.constexpr, BIAS_GRADIENT: tl.constexpr, STEP: tl.constexpr, VECTOR: tl.constexpr,
    IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, INSIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # The outputs whose windows reach the lane's columns, counted from the output `column`.
    OWN: tl.constexpr = 2 // stride_w
    FIRST: tl.constexpr = -((kernel_w - 1 - padding_w) // stride_w)
    COLUMNS: tl.constexpr = (1 + padding_w) // stride_w - FIRST + 1
    PRIOR: tl.constexpr = (kernel_h - 1) // stride_h
    # The output has the input's size: one index serves both.
    SAME: tl.constexpr = (
        stride_h * stride_w == 1 and kernel_h == 2 * padding_h + 1 and kernel_w == 2 * padding_w + 1
    )
    step = step if STEP is None else STEP  # one of them, or none in contiguous tensors
    number, exists, image, channel, pair = _lanes(channels, pairs, lanes, step, VECTOR, BLOCK)
    has_second = exists & (pair * 2 + 1 < width)
    column = pair * OWN
    in_lane = _lane_index(image, channel, channels, pair, height, in_pitch, 2, step, IN_UNIT)
    if SAME:
        out_pitch = in_pitch
        out_lane = in_lane
    else:
        out_lane = _lane_index(
            image, channel, channels, pair, out_height, out_pitch, OWN, step, OUT_UNIT
        )
    first_row = start_row + tl.program_id(1) * strip_rows
    end_row = tl.minimum(first_row + strip_rows, stop_row)
    groups = tl.maximum(tl.minimum(end_row, inner_rows) - first_row, 0) // GATHER_ROWS

    nothing = tl.zeros([BLOCK, VECTOR], tl.float32)
    fresh = ((nothing, nothing),) * stride_h
    sums = ((nothing, nothing),) * kernel_h
    bias_sum = nothing
    for prior in tl.static_range(PRIOR):
        out_row = first_row - PRIOR + prior
        present = (out_row >= 0) & (out_row < out_height)
        index = out_lane + tl.minimum(tl.maximum(out_row, 0), out_height - 1) * out_pitch
        sums = _gather_row(
            grad_output_ptr, code_ptr, index, present, column, out_width, sums,
            kernel_w, stride_w, padding_w, DEAD, FIRST, COLUMNS, INSIDE, True, True,
            step, VECTOR, OUT_UNIT,
        )  # fmt: skip
        sums = sums[stride_h:] + fresh

    # See sample_sliding_kernel.
    zero = number >> 31
    in_step = in_pitch + zero
    out_step = in_step if SAME else out_pitch + zero
    in_index = in_lane + (first_row * stride_h - padding_h) * in_pitch
    out_index = out_lane + first_row * out_pitch
    for group in range(groups):
        for k in tl.static_range(GATHER_ROWS):
            if SAME:
                out_index = in_index + in_step * padding_h
            sums = _gather_row(
                grad_output_ptr, code_ptr, out_index, True, column, out_width, sums,
                kernel_w, stride_w, padding_w, DEAD, FIRST, COLUMNS, INSIDE, False,
                padding_h < stride_h, step, VECTOR, OUT_UNIT,
            )  # fmt: skip
            out_index += out_step
            for i in tl.static_range(stride_h):
                if BIAS_GRADIENT:
                    bias_sum += sums[i][0] + sums[i][1]
                if i < padding_h and stride_h > 1:
                    inside = (first_row + group * GATHER_ROWS + k) * stride_h - padding_h + i >= 0
                    _store(
                        grad_input_ptr, in_index, sums[i],
                        masked(inside, exists), masked(inside, has_second),
                        step, VECTOR, IN_UNIT,
                    )  # fmt: skip
                else:
                    _store(
                        grad_input_ptr, in_index, sums[i], exists, has_second,
                        step, VECTOR, IN_UNIT,
                    )  # fmt: skip
                in_index += in_step
            sums = sums[stride_h:] + fresh

    edge_row = first_row + groups * GATHER_ROWS
    for edge in range(end_row - edge_row):
        out_row = edge_row + edge
        index = out_lane + tl.minimum(out_row, out_height - 1) * out_pitch
        sums = _gather_row(
            grad_output_ptr, code_ptr, index, out_row < out_height, column, out_width, sums,
            kernel_w, stride_w, padding_w, DEAD, FIRST, COLUMNS, INSIDE, True, True,
            step, VECTOR, OUT_UNIT,
        )  # fmt: skip
        for i in tl.static_range(stride_h):
            if BIAS_GRADIENT:
                bias_sum += sums[i][0] + sums[i][1]
            row = out_row * stride_h - padding_h + i
            inside = (row >= 0) & (row < height)
            _store(
                grad_input_ptr, in_lane + row * in_pitch, sums[i],
                masked(inside, exists), masked(inside, has_second),
                step, VECTOR, IN_UNIT,
            )  # fmt: skip
        sums = sums[stride_h:] + fresh

    if BIAS_GRADIENT:
        # [strips, lanes, VECTOR]
        partial = (tl.program_id(1).to(tl.int64) * lanes + number) * VECTOR
        partial += tl.arange(0, VECTOR)[None, :]
        tl.store(partial_bias_ptr + partial, bias_sum, mask=exists)
