"""Stochastic pooling in Triton, the sliding kernels: windows of up to 5 cells a side, by 1 or 2.

A lane owns two neighbouring columns of what is written and slides down a strip of rows. It keeps
the rows that the next window shares in registers, with their sums, so each input is loaded,
rectified and summed once for all the rows of windows it lies in. One call of Philox serves two
columns and four rows.

    sample_sliding_kernel        draws the row of the window first, then the cell in it
    expectation_sliding_kernel   the sum of squares over the sum
    gather_sliding_kernel        the backward of sampling; a lane owns two input columns and adds up
                                 the rows of them that a window reaches while it slides down the
                                 outputs

The gradient of the expectation has a kernel of its own, in `gradient.py`.

What is written is dense, in the format that decides which lanes are neighbours; what is read may
have any strides. Where a batch has one row a plane, as in 1-d pooling, its images are the rows.

The rows of a strip come in two kinds. Inner rows come in unrolled groups and, where a row lies
behind the one above it in memory, are read without a mask: the halo to the left of the first column
is then memory that is there, and a bias of minus infinity keeps it out. The first and last rows of
a plane go through masks, one at a time. The rows of a group, or `v.batch` of them, are loaded all
before the first is worked on, and stored all after the last.

Windows with a NaN, an infinity or a sum that could overflow are noticed, not handled: a program
that meets one repeats its strip with the device functions of `general.py`.

`v` and `t` hold the numbers that a kernel is compiled for, of the launch and of a tensor: see
`launch.py`. A tensor is a tuple of its pointer and its strides in units of `t.unit` elements, those
of an image, a channel, a row (its pitch) and a column (a step). `_seen` makes of it what a lane
sees: in place of the image's stride, the unit where the lane begins.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .general import draw_cells, expect, masked, philox4x32, rectified, uniform, unscaled

# Arguments that Triton would compile for anew where they become 1 or a multiple of 16.
NUMBERS = (
    "channels", "height", "width", "out_height", "out_width",
    "in_n", "in_c", "in_pitch", "in_step", "out_n", "out_c", "out_pitch", "out_step",
    "own_n", "own_c", "own_pitch", "own_step", "grad_n", "grad_c", "grad_pitch", "grad_step",
    "pairs", "lanes", "strip_rows", "inner_rows", "start_row", "stop_row", "one",
)  # fmt: skip
# Sums beyond this may overflow, or hide an infinity.
LARGEST_SUM = tl.constexpr(2.0**120)
# The squares of larger sums may overflow, those of smaller ones (the bits of 2**-58) underflow.
LARGEST_SQUARED = tl.constexpr(2.0**60)
SMALLEST_SQUARED = tl.constexpr((127 - 58) << 23)
# The interpreter rounds the product of a multiply-add, a GPU does not.
FUSED_MULTIPLY_ADD = tl.constexpr(not triton.knobs.runtime.interpret)


# ---------------------------------------------------------------- lanes and memory


@triton.jit
def _lanes(channels, pairs, lanes, v: tl.constexpr):
    """Number, existence, image, channel and pair of columns of each lane, [block].

    Lanes beyond the last repeat it.
    """
    number = tl.program_id(0) * v.block + tl.arange(0, v.block)
    exists = number < lanes
    number = tl.minimum(number, lanes - 1)
    # Unsigned division is the shorter one. An argument that is 1 comes as a constant, without `to`.
    rest = number.to(tl.uint32)
    pairs = tl.cast(pairs, tl.uint32)
    channels = tl.cast(channels, tl.uint32)
    if v.channels_last:
        channel = rest % channels
        rest = rest // channels
        pair = rest % pairs
        image = rest // pairs
    else:
        pair = rest % pairs
        rest = rest // pairs
        channel = rest % channels
        image = rest // channels
    return number, exists, image.to(tl.int32), channel.to(tl.int32), pair.to(tl.int32)


@triton.jit
def _seen(tensor, image, channel, column, t: tl.constexpr):
    """A tensor as a lane sees it that begins in `column` of the first row."""
    pointer, n, c, pitch, step = tensor
    step = step if t.step == 0 else t.step
    return pointer, image * n + channel * c + column * step // t.unit, pitch, step


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
def _elements(tensor, index, at, t: tl.constexpr):
    """Pointers to the numbers `at` columns from the unit `index`."""
    pointer, _, _, step = tensor
    return _units(pointer, index, t.unit).to(pointer.dtype) + at * step


@triton.jit
def _pair(pointer, index, at):
    """The same to two neighbouring columns that are one unit, [block, 2]."""
    pointer = _units(pointer, index, 2).to(pointer.dtype)
    return pointer[:, None] + (at + tl.arange(0, 2)[None, :])


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
    tensor, index, column, width, FIRST: tl.constexpr, COLUMNS: tl.constexpr,
    INSIDE: tl.constexpr, MASK_LEFT: tl.constexpr, MASK_RIGHT: tl.constexpr, t: tl.constexpr,
):  # fmt: skip
    """`COLUMNS` neighbouring columns of a row, a tuple of [block].

    `index` is the unit of the lane's first own column, `column`; the first one loaded is `FIRST`
    columns from it. Of the last lane in a row, the columns up to the own one `INSIDE` lie in the
    plane: fewer than none where windows begin that far before it. Columns beyond the plane hold
    anything, and only with `MASK_LEFT` and `MASK_RIGHT` is it sure that they are not read.
    """
    columns = ()
    for j in tl.static_range(COLUMNS):
        here = _elements(tensor, index, j + FIRST, t)
        if j + FIRST < 0:
            if MASK_LEFT:
                inside = _in_plane(column, j + FIRST, width, INSIDE)
                columns = columns + (tl.load(here, mask=inside, other=0),)
            else:
                columns = columns + (tl.load(here),)
        elif t.unit == 2 and j + FIRST < INSIDE:
            if (j + FIRST) % 2 == 0:
                columns = columns + tl.split(tl.load(_pair(tensor[0], index, j + FIRST)))
        elif j + FIRST >= INSIDE and MASK_RIGHT:
            inside = _in_plane(column, j + FIRST, width, INSIDE)
            columns = columns + (tl.load(here, mask=inside, other=0),)
        else:
            columns = columns + (tl.load(here),)
    return columns


@triton.jit
def _store(tensor, index, two, exists, has_second, t: tl.constexpr):
    """Store the numbers of the lane's two columns."""
    ELEMENT: tl.constexpr = tensor[0].dtype.element_ty
    if t.unit == 2:
        both = tl.join(two[0], two[1]).to(ELEMENT)
        tl.store(_pair(tensor[0], index, 0), both, mask=exists[:, None])
    else:
        tl.store(_elements(tensor, index, 0, t), two[0].to(ELEMENT), mask=exists)
        tl.store(_elements(tensor, index, 1, t), two[1].to(ELEMENT), mask=has_second)


@triton.jit
def _partial(number, image, channel, pair, channels, pairs, lanes, v: tl.constexpr):
    """Where the lane's share of the bias's gradient is stored: channels last or first, so that
    PyTorch sums over one dimension, which takes half as long as over those before and behind."""
    strip = tl.program_id(1)
    if v.channels_last:
        return strip * lanes + number
    else:
        each = tl.cast(lanes, tl.uint32) // tl.cast(channels, tl.uint32)
        return (channel * tl.num_programs(1) + strip) * each.to(tl.int32) + image * pairs + pair


@triton.jit
def _keep_together():
    """Hold the warps of a program in step where they write parts of the same sectors of 32 bytes.

    A sector that the cache gives up before it is whole has to be read for the memory's error
    correction. On an H100 the barrier left 0.4 of a million such reads and 0.85 of a draw's time.
    """
    tl.debug_barrier()


# ---------------------------------------------------------------- rows of weights


@triton.jit
def _bias(bias_ptr, channel, v: tl.constexpr):
    """The bias of each lane's channel, [block]; 0 without one."""
    if v.has_bias:
        return tl.load(bias_ptr + channel).to(tl.float32)
    else:
        return tl.zeros(channel.shape, tl.float32)


@triton.jit
def _biases(bias_ptr, channel, column, width, v: tl.constexpr):
    """The bias of each column, a tuple of [block]; minus infinity beyond the plane."""
    bias = _bias(bias_ptr, channel, v)
    biases = ()
    for j in tl.static_range(v.stride_w + v.kernel_w):
        if j >= v.padding_w and j - v.padding_w < v.inside:
            biases = biases + (bias,)
        else:
            inside = _in_plane(column, j - v.padding_w, width, v.inside)
            biases = biases + (tl.where(inside, bias, float("-inf")),)
    return biases


@triton.jit
def _weigh(inputs, biases, v: tl.constexpr):
    """A row for a draw: the weights of its columns, and their sum in each of the lane's two
    windows."""
    weights = ()
    for j in tl.static_range(len(inputs)):
        weights = weights + (rectified(inputs[j], biases[j], tl.float32),)
    sums = ()
    for x in tl.static_range(2):
        row_sum = weights[x * v.stride_w]
        for j in tl.static_range(1, v.kernel_w):
            row_sum = row_sum + weights[x * v.stride_w + j]
        sums = sums + (row_sum,)
    return weights, sums


@triton.jit
def _moments(inputs, biases, v: tl.constexpr):
    """A row for an expectation: the sums of its weights in the lane's two windows, and those of
    their squares."""
    weights = ()
    for j in tl.static_range(len(inputs)):
        weights = weights + (rectified(inputs[j], biases[j], tl.float32),)
    # What both windows hold is added up once. Minus zero the compiler can leave out of a sum.
    both = tl.full(weights[0].shape, -0.0, tl.float32)
    both_squared = both
    for j in tl.static_range(v.stride_w, v.kernel_w):
        both += weights[j]
        both_squared += weights[j] * weights[j]
    sums = ()
    squares = ()
    for x in tl.static_range(2):
        row_sum = both
        row_squared = both_squared
        for j in tl.static_range(v.stride_w):
            w = weights[j + x * v.kernel_w]
            row_sum += w
            row_squared += w * w
        sums = sums + (row_sum,)
        squares = squares + (row_squared,)
    return sums, squares


@triton.jit
def _row(inputs, biases, v: tl.constexpr):
    if v.draws:
        return _weigh(inputs, biases, v)
    else:
        return _moments(inputs, biases, v)


@triton.jit
def _load_edge(input, row, height, column, width, biases, v: tl.constexpr):
    """The columns of any row of input and their biases; one beyond the plane has biases that undo
    it."""
    present = (row >= 0) & (row < height)
    index = input[1] + tl.minimum(tl.maximum(row, 0), height - 1) * input[2]
    inputs = _load_columns(
        input, index, column, width, -v.padding_w, len(biases), v.inside, True, True, v.read
    )
    shifted = ()
    for j in tl.static_range(len(biases)):
        shifted = shifted + (tl.where(present, biases[j], float("-inf")),)
    return inputs, shifted


# ---------------------------------------------------------------- draws and expectations


@triton.jit
def _words(pair, row, image, channels, channel, key, v: tl.constexpr):
    """The random words of four rows from `row`, four of [block]; of one image where images are
    rows."""
    if v.folded:
        plane = row * channels + channel
        quad = 0
    else:
        plane = image * channels + channel
        quad = tl.cast(row // 4, tl.uint32)  # in the interpreter a row may be an int
    return philox4x32(pair.to(tl.uint32), quad, plane.to(tl.uint32), 0, key)


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
def _draw(word, rows, one, x: tl.constexpr, CODE_SCALE: tl.constexpr, v: tl.constexpr):
    """Value, code and sum of the lane's window `x`; the code comes in two parts to add up, each
    times `CODE_SCALE`."""
    total = rows[0][1][x]
    for i in tl.static_range(1, len(rows)):
        total = total + rows[i][1][x]
    threshold = _threshold(word, total, one, x == 1)

    # The row: the last one before which the running sum is at most the threshold.
    FIRST: tl.constexpr = x * v.stride_w
    cells = rows[0][0][FIRST : FIRST + v.kernel_w]
    before = 0.0
    row_code = 0
    running = rows[0][1][x]
    for i in tl.static_range(1, len(rows)):
        passed = running <= threshold
        before = tl.where(passed, running, before)
        chosen = ()
        for j in tl.static_range(v.kernel_w):
            chosen = chosen + (tl.where(passed, rows[i][0][FIRST + j], cells[j]),)
        cells = chosen
        row_code = tl.where(passed, i * v.kernel_w * CODE_SCALE, row_code)
        running = running + rows[i][1][x]
    # In a dead window every comparison holds, so the column's part is that of the last column.
    row_code = tl.where(total <= threshold, (v.dead - (v.kernel_w - 1)) * CODE_SCALE, row_code)

    # The cell in it, likewise.
    value = cells[0]
    column_code = 0
    within = cells[0]
    for j in tl.static_range(1, v.kernel_w):
        passed = before + within <= threshold
        value = tl.where(passed, cells[j], value)
        column_code = tl.where(passed, j * CODE_SCALE, column_code)
        within = within + cells[j]
    return value, row_code, column_code, total


@triton.jit
def _largest(largest, total):
    return tl.maximum(largest, total, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _draw_row(word, rows, one, ELEMENT: tl.constexpr, v: tl.constexpr):
    """Draw the lane's two windows: what to store of them, and their larger sum, or NaN."""
    SCALE: tl.constexpr = 256 if v.own.unit == 2 else 1  # both codes are stored as one number
    value0, row0, column0, total0 = _draw(word, rows, one, 0, 1, v)
    value1, row1, column1, total1 = _draw(word, rows, one, 1, SCALE, v)
    values = (value0.to(ELEMENT), value1.to(ELEMENT))
    return (values, row0, column0, row1, column1), _largest(total0, total1)


@triton.jit
def _expect_row(rows, largest, smallest, ELEMENT: tl.constexpr, v: tl.constexpr):
    """The lane's two expectations; the largest sum so far, or NaN, and the smallest one that is not
    0, as its bits minus 1."""
    expectations = ()
    for x in tl.static_range(2):
        total = rows[0][0][x]
        squares = rows[0][1][x]
        for i in tl.static_range(1, len(rows)):
            total = total + rows[i][0][x]
            squares = squares + rows[i][1][x]
        # 0 / 2**-126 is the 0 of a dead window.
        expectations = expectations + ((squares / tl.maximum(total, 2.0**-126)).to(ELEMENT),)
        largest = _largest(largest, total)
        if ELEMENT != tl.float16:
            smallest = tl.minimum(smallest, total.to(tl.uint32, bitcast=True) - 1)
    return (expectations,), largest, smallest


@triton.jit
def _store_row(output, code, index, made, exists, has_second, v: tl.constexpr):
    """Store what `_draw_row` or `_expect_row` made."""
    _store(output, index, made[0], exists, has_second, v.own)
    if v.draws:
        if v.own.unit == 2:
            codes = (made[1] + made[2]) + (made[3] + made[4])
            tl.store(_units(code[0], index, 2), codes.to(tl.uint16), mask=exists)
        else:
            codes = (made[1] + made[2], made[3] + made[4])
            _store(code, index, codes, exists, has_second, v.own)


@triton.jit
def _plane(tensor, image, channel, t: tl.constexpr):
    """Pointer to each lane's plane, and how many elements lie from a row and a column to the
    next."""
    tensor = _seen(tensor, image, channel, 0, t)
    return _elements(tensor, tensor[1], 0, t), tensor[2] * t.unit, tensor[3]


@triton.jit
def _strip_again(
    input, bias_ptr, seed_ptr, output, code_ptr, channels, height, width, out_width,
    pairs, lanes, first_row, end_row, v: tl.constexpr,
):  # fmt: skip
    """A strip window by window, with what NaN, infinities and overflow ask for."""
    _, exists, image, channel, pair = _lanes(channels, pairs, lanes, v)
    input_ptr, in_pitch, in_step = _plane(input, image, channel, v.read)
    output_ptr, out_pitch, out_step = _plane(output, image, channel, v.own)
    if v.draws:
        code_ptr, _, _ = _plane((code_ptr,) + output[1:], image, channel, v.own)
    bias = _bias(bias_ptr, channel, v)
    for strip_row in range(end_row - first_row):
        out_row = first_row + strip_row
        top = out_row * v.stride_h - v.padding_h
        for x in range(2):
            out_column = pair * 2 + x
            mask = exists & (out_column < out_width)
            window = (
                input_ptr, bias, 0, top, out_column * v.stride_w - v.padding_w, mask,
                1, height, width, 0, in_pitch, in_step,
            )  # fmt: skip
            to = out_row * out_pitch + out_column * out_step
            if v.draws:
                plane = (out_row if v.folded else image) * channels + channel
                number = uniform(
                    seed_ptr, plane.to(tl.int64), 0 * out_row if v.folded else out_row, out_column,
                    tl.float32,
                )  # fmt: skip
                value, drawn = draw_cells(window, number, v, tl.float32)
                tl.store(code_ptr + to, drawn.to(tl.uint8), mask=mask)
            else:
                value, _total, infinite, scale = expect(window, v, tl.float32)
                value = unscaled(value, infinite, scale, tl.float32)
            tl.store(output_ptr + to, value.to(output_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- forward


@triton.jit
def _load_rows(
    input, index, row_step, out_row, height, column, width, biases, v: tl.constexpr
):  # fmt: skip
    """The rows of input that the windows of an inner row are the first to read, from the unit
    `index`, each with the biases of its columns."""
    KEPT: tl.constexpr = v.kernel_h - v.stride_h
    rows = ()
    for i in tl.static_range(KEPT, v.kernel_h):
        if i < v.padding_h:  # above the plane, for its first window
            row = out_row * v.stride_h - v.padding_h + i
            rows = rows + (_load_edge(input, row, height, column, width, biases, v),)
        else:
            # The first of these rows is at least KEPT - padding_h: is there one above it?
            inputs = _load_columns(
                input, index, column, width, -v.padding_w, len(biases), v.inside,
                KEPT - v.padding_h < 1 or v.read.masked, v.read.masked, v.read,
            )  # fmt: skip
            rows = rows + ((inputs, biases),)
        index += row_step
    return rows


@triton.jit
def _forward(
    input, bias_ptr, seed_ptr, output, code_ptr, channels, height, width, out_height, out_width,
    pairs, lanes, strip_rows, inner_rows, one, v: tl.constexpr,
):  # fmt: skip
    """Draws, or expectations, of this program's lanes in its strip."""
    KEPT: tl.constexpr = v.kernel_h - v.stride_h
    channels = channels if v.channels == 0 else v.channels
    whole_input, whole_output = input, output
    number, exists, image, channel, pair = _lanes(channels, pairs, lanes, v)
    has_second = exists & (pair * 2 + 1 < out_width)
    column = pair * (2 * v.stride_w)
    output = _seen(output, image, channel, pair * 2, v.own)
    code = (code_ptr,) + output[1:]
    if v.same:  # one index serves both
        input = (input[0],) + output[1:]
    else:
        input = _seen(input, image, channel, column, v.read)
    biases = _biases(bias_ptr, channel, column, width, v)
    first_row = tl.program_id(1) * strip_rows
    end_row = tl.minimum(first_row + strip_rows, out_height)
    groups = tl.maximum(tl.minimum(end_row, inner_rows) - first_row, 0) // v.rows

    largest = tl.zeros([v.block], tl.float32)
    smallest = tl.full([v.block], 0xFFFFFFFF, tl.uint32)
    nothing = (largest,) * len(biases)
    rows = (_row(nothing, nothing, v),) * KEPT
    if KEPT > 0:
        # A loop that LLVM unrolls. Without one Triton takes half as long again: one of its passes
        # follows each load and store to all that is connected, but from a loop's result to its
        # start without what is inside.
        top = first_row * v.stride_h - v.padding_h
        for in_row in range(top, top + KEPT):
            inputs, row_biases = _load_edge(input, in_row, height, column, width, biases, v)
            fresh = _row(inputs, row_biases, v)
            rows = rows[1:] + (fresh,)
            if v.draws:
                largest = _largest(largest, _largest(fresh[1][0], fresh[1][1]))

    # Zero that the compiler cannot see through. With it these numbers stay in a register of each
    # lane: `one` would be a second constant to its instruction, and the indices of the unrolled
    # rows would become as many registers instead of one.
    zero = number >> 31
    one = zero.to(tl.uint32) + one
    out_row_step = output[2] + zero
    in_row_step = out_row_step if v.same else input[2] + zero
    in_index = input[1] + (first_row * v.stride_h - v.padding_h + KEPT) * input[2]
    out_index = output[1] + first_row * output[2]
    words = (tl.zeros([v.block], tl.uint32),) * 4
    if v.draws:
        key = tl.load(seed_ptr)
    for group in range(groups):
        group_row = first_row + group * v.rows
        _keep_together()
        for start in tl.static_range(0, v.rows, v.batch):
            loaded = ()
            for k in tl.static_range(v.batch):
                if v.same:
                    in_index = out_index + out_row_step * (KEPT - v.padding_h + k)
                fresh = _load_rows(
                    input, in_index, in_row_step, group_row + start + k,
                    height, column, width, biases, v,
                )  # fmt: skip
                loaded = loaded + (fresh,)
                in_index += in_row_step * v.stride_h
            made = ()
            for k in tl.static_range(v.batch):
                for i in tl.static_range(v.stride_h):
                    rows = rows + (_row(loaded[k][i][0], loaded[k][i][1], v),)
                if v.draws and (v.folded or start + k == 0):
                    words = _words(pair, group_row + start + k, image, channels, channel, key, v)
                two, largest, smallest = _finish_row(
                    words[0 if v.folded else (start + k) % 4], rows, one, largest, smallest,
                    # With stride 1 every row lies in one of these windows.
                    v.stride_h > 1 or v.kernel_h == 1 or (start + k) % v.kernel_h == v.kernel_h - 2
                    or start + k == v.rows - 1,
                    output[0].dtype.element_ty, v,
                )  # fmt: skip
                rows = rows[v.stride_h :]
                made = made + (two,)
            for k in tl.static_range(v.batch):
                _store_row(output, code, out_index, made[k], exists, has_second, v)
                out_index += out_row_step

    # A loop that hands on three rows of moments or more is what LLVM of Triton 3.9 dies of.
    FIRST: tl.constexpr = KEPT if v.draws or KEPT < 3 else 0
    edge_row = first_row + groups * v.rows
    for out_row in range(edge_row, end_row):
        if v.draws:
            if v.folded | (out_row % 4 == 0):
                words = _words(pair, out_row, image, channels, channel, key, v)
        for i in tl.static_range(FIRST, v.kernel_h):
            inputs, row_biases = _load_edge(
                input, out_row * v.stride_h - v.padding_h + i, height, column, width, biases, v
            )
            rows = rows[:i] + (_row(inputs, row_biases, v),)
        edge_two, largest, smallest = _finish_row(
            words[0], rows, one, largest, smallest, True, output[0].dtype.element_ty, v
        )
        edge_index = output[1] + out_row * output[2]
        _store_row(output, code, edge_index, edge_two, exists, has_second, v)
        rows = rows[v.stride_h :]
        words = words[1:] + words[:1]

    if v.draws:
        unusual = (largest < LARGEST_SUM) == 0
    else:
        unusual = (largest < LARGEST_SQUARED) == 0
        if output[0].dtype.element_ty != tl.float16:  # where so small an expectation is 0
            unusual = unusual | (smallest < SMALLEST_SQUARED)
    any_unusual = tl.max(unusual.to(tl.int32))
    if any_unusual > 0:  # rare
        # The added zero keeps the compiler from holding all that is needed here through the loops.
        _strip_again(
            whole_input, bias_ptr, seed_ptr, whole_output, code_ptr,
            channels, height, width, out_width,
            pairs + (any_unusual >> 1), lanes, first_row, end_row, v,
        )  # fmt: skip


@triton.jit
def _finish_row(
    word, rows, one, largest, smallest,
    LOOK: tl.constexpr, ELEMENT: tl.constexpr, v: tl.constexpr,
):  # fmt: skip
    if v.draws:
        two, row_largest = _draw_row(word, rows, one, ELEMENT, v)
        if LOOK:
            largest = _largest(largest, row_largest)
    else:
        two, largest, smallest = _expect_row(rows, largest, smallest, ELEMENT, v)
    return two, largest, smallest


@triton.jit(do_not_specialize=NUMBERS)
def sample_sliding_kernel(
    input_ptr, bias_ptr, seed_ptr, output_ptr, code_ptr,
    channels, height, width, out_height, out_width,
    # strides; those of a code are its output's
    in_n, in_c, in_pitch, in_step, out_n, out_c, out_pitch, out_step,
    # division of the work; rows from inner_rows on are edge rows
    pairs, lanes, strip_rows, inner_rows,
    one,  # the bits of 1.0
    v: tl.constexpr,
):  # fmt: skip
    _forward(
        (input_ptr, in_n, in_c, in_pitch, in_step), bias_ptr, seed_ptr,
        (output_ptr, out_n, out_c, out_pitch, out_step), code_ptr,
        channels, height, width, out_height, out_width,
        pairs, lanes, strip_rows, inner_rows, one, v,
    )  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def expectation_sliding_kernel(
    input_ptr, bias_ptr, output_ptr,
    channels, height, width, out_height, out_width,
    in_n, in_c, in_pitch, in_step, out_n, out_c, out_pitch, out_step,
    pairs, lanes, strip_rows, inner_rows,
    v: tl.constexpr,
):  # fmt: skip
    _forward(
        (input_ptr, in_n, in_c, in_pitch, in_step), bias_ptr, None,
        (output_ptr, out_n, out_c, out_pitch, out_step), None,
        channels, height, width, out_height, out_width,
        pairs, lanes, strip_rows, inner_rows, 0, v,
    )  # fmt: skip


# ---------------------------------------------------------------- backward


@triton.jit
def _load_outputs(
    grad, code, grad_index, index, column, width, MASK: tl.constexpr, v: tl.constexpr
):  # fmt: skip
    """The gradients and the codes of the outputs in a row whose windows reach the lane's columns.

    Without `MASK` the row has one below it.
    """
    LEFT: tl.constexpr = MASK or v.padding_h < v.stride_h  # or it has one above it
    grads = _load_columns(
        grad, grad_index, column, width, v.first, v.columns, v.inside,
        LEFT or v.grad.masked, MASK or v.grad.masked, v.grad,
    )  # fmt: skip
    codes = _load_columns(
        code, index, column, width, v.first, v.columns, v.inside,
        LEFT or v.read.masked, MASK or v.read.masked, v.read,
    )  # fmt: skip
    return grads, codes


@triton.jit
def _gather_row(grads, codes, present, column, width, sums, MASK: tl.constexpr, v: tl.constexpr):
    """Add the gradients of a row of outputs to the cells that they drew; with `MASK`, if it is
    `present`.

    `sums` are those of the `kernel_h` rows of input that the windows reach, each of the lane's two
    columns.
    """
    for c in tl.static_range(len(grads)):
        grad = grads[c].to(tl.float32)
        code = codes[c].to(tl.int32)
        if c + v.first < 0 or c + v.first >= v.inside:
            code = tl.where(_in_plane(column, c + v.first, width, v.inside), code, v.dead)
        if MASK:
            code = tl.where(present, code, v.dead)
        added = ()
        for i in tl.static_range(len(sums)):
            row = ()
            for x in tl.static_range(2):
                # The column of the window that the lane's column x is.
                if (
                    x + v.padding_w - v.stride_w * (c + v.first) >= 0
                    and x + v.padding_w - v.stride_w * (c + v.first) < v.kernel_w
                ):
                    drawn = code == i * v.kernel_w + x + v.padding_w - v.stride_w * (c + v.first)
                    row = row + (tl.where(drawn, sums[i][x] + grad, sums[i][x]),)
                else:
                    row = row + (sums[i][x],)
            added = added + (row,)
        sums = added
    return sums


@triton.jit(do_not_specialize=NUMBERS)
def gather_sliding_kernel(
    grad_output_ptr, code_ptr, grad_input_ptr, partial_bias_ptr,
    channels, height, width, out_height, out_width,
    # strides of grad_input, code and grad_output
    in_n, in_c, in_pitch, in_step, out_n, out_c, out_pitch, out_step,
    grad_n, grad_c, grad_pitch, grad_step,
    # division of the work over rows of outputs; rows from inner_rows on are edge rows
    pairs, lanes, strip_rows, inner_rows, start_row, stop_row,
    v: tl.constexpr,
):  # fmt: skip
    channels = channels if v.channels == 0 else v.channels
    number, exists, image, channel, pair = _lanes(channels, pairs, lanes, v)
    partial = _partial(number, image, channel, pair, channels, pairs, lanes, v)
    has_second = exists & (pair * 2 + 1 < width)
    column = pair * (2 // v.stride_w)
    grad_input = (grad_input_ptr, in_n, in_c, in_pitch, in_step)
    grad_input = _seen(grad_input, image, channel, pair * 2, v.own)
    if v.same:  # one index serves both
        code = (code_ptr,) + grad_input[1:]
    else:
        code = (code_ptr, out_n, out_c, out_pitch, out_step)
        code = _seen(code, image, channel, column, v.read)
    if v.grad_same:
        grad = (grad_output_ptr,) + code[1:]
    else:
        grad = (grad_output_ptr, grad_n, grad_c, grad_pitch, grad_step)
        grad = _seen(grad, image, channel, column, v.grad)
    first_row = start_row + tl.program_id(1) * strip_rows
    end_row = tl.minimum(first_row + strip_rows, stop_row)
    groups = tl.maximum(tl.minimum(end_row, inner_rows) - first_row, 0) // v.rows

    nothing = tl.zeros([v.block], tl.float32)
    empty = ((nothing, nothing),) * v.stride_h
    sums = ((nothing, nothing),) * v.kernel_h
    bias_sum = nothing
    ELEMENT: tl.constexpr = grad_input_ptr.dtype.element_ty
    # A loop as in `_forward`.
    for out_row in range(first_row - (v.kernel_h - 1) // v.stride_h, first_row):
        present = (out_row >= 0) & (out_row < out_height)
        row = tl.minimum(tl.maximum(out_row, 0), out_height - 1)
        grads, codes = _load_outputs(
            grad, code, grad[1] + row * grad[2], code[1] + row * code[2], column, out_width, True, v
        )
        sums = _gather_row(grads, codes, present, column, out_width, sums, True, v)
        sums = sums[v.stride_h :] + empty

    # See `_forward`.
    zero = number >> 31
    in_row_step = grad_input[2] + zero
    out_row_step = in_row_step if v.same else code[2] + zero
    grad_row_step = out_row_step if v.grad_same else grad[2] + zero
    in_index = grad_input[1] + (first_row * v.stride_h - v.padding_h) * grad_input[2]
    out_index = code[1] + first_row * code[2]
    grad_index = grad[1] + first_row * grad[2]
    for group in range(groups):
        _keep_together()
        loaded = ()
        for k in tl.static_range(v.rows):
            if v.same:
                out_index = in_index + in_row_step * (v.padding_h + k)
            if v.grad_same:
                grad_index = out_index
            outputs = _load_outputs(grad, code, grad_index, out_index, column, out_width, False, v)
            loaded = loaded + (outputs,)
            out_index += out_row_step
            grad_index += grad_row_step
        made = ()
        for k in tl.static_range(v.rows):
            sums = _gather_row(loaded[k][0], loaded[k][1], True, column, out_width, sums, False, v)
            for i in tl.static_range(v.stride_h):
                if v.bias_gradient:
                    bias_sum += sums[i][0] + sums[i][1]
                made = made + ((sums[i][0].to(ELEMENT), sums[i][1].to(ELEMENT)),)
            sums = sums[v.stride_h :] + empty
        for i in tl.static_range(len(made)):
            row_exists = exists
            row_has_second = has_second
            if i < v.padding_h and v.stride_h > 1:
                inside = (first_row + group * v.rows) * v.stride_h - v.padding_h + i >= 0
                row_exists = masked(inside, exists)
                row_has_second = masked(inside, has_second)
            _store(grad_input, in_index, made[i], row_exists, row_has_second, v.own)
            in_index += in_row_step

    edge_row = first_row + groups * v.rows
    for out_row in range(edge_row, end_row):
        row = tl.minimum(out_row, out_height - 1)
        grads, codes = _load_outputs(
            grad, code, grad[1] + row * grad[2], code[1] + row * code[2], column, out_width, True, v
        )
        sums = _gather_row(grads, codes, out_row < out_height, column, out_width, sums, True, v)
        for i in tl.static_range(v.stride_h):
            if v.bias_gradient:
                bias_sum += sums[i][0] + sums[i][1]
            row = out_row * v.stride_h - v.padding_h + i
            inside = (row >= 0) & (row < height)
            index = grad_input[1] + row * grad_input[2]
            _store(
                grad_input, index, sums[i], masked(inside, exists), masked(inside, has_second),
                v.own,
            )  # fmt: skip
        sums = sums[v.stride_h :] + empty
    if v.bias_gradient:
        tl.store(partial_bias_ptr + partial, bias_sum, mask=exists)
