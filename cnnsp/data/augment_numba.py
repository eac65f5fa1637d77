"""The batches of `augment.py` on the CPU, compiled by numba: one pass from bytes to numbers.

The compiled functions make the images `begin` to `end` of a batch and write them where they belong,
in either memory format: number `c` of pixel `p` lies at `p * pixel_step + c * channel_step`. The
images of a batch are shared out among `torch.get_num_threads()` threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

# Where numba is missing or unusable, this import says so with an ImportError.
from stochastic_pooling.cpu.compiling import compiled, inlined

from .threads import share_out

# Table entries are moved as their bits, for numba has no 16-bit floats.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


# Positions are unsigned, for numba would test whether signed ones count from the end.
_place = np.uint64
_ONE, _TWO, _THREE, _FOUR = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)


_FOUR_BYTES, _FOUR_FLOATS = ir.VectorType(ir.IntType(8), 4), ir.VectorType(ir.FloatType(), 4)


def _place_of(context, builder, array_type, array, index, kind):
    """The pointer to what lies at an index of an array, as that to an LLVM type."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


@intrinsic
def _copy_four(context, target, source, to, at):
    """Copy four bytes at once, from `source[at]` to `target[to]`."""

    def generate(context, builder, signature, arguments):
        kinds, (target, source, to, at) = signature.args, arguments
        place = _place_of(context, builder, kinds[1], source, at, _FOUR_BYTES)
        value = builder.load(place, align=1)
        place = _place_of(context, builder, kinds[0], target, to, _FOUR_BYTES)
        builder.store(value, place, align=1)
        return context.get_dummy_value()

    return types.none(target, source, to, at), generate


@intrinsic
def _scale_four(context, target, source, to, at, slope, start):
    """Write four numbers at once, from `target[to]`: four bytes from `source[at]` on a line each.

    Their slopes and starts are the first four in fp32 of two arrays.
    """

    def generate(context, builder, signature, arguments):
        kinds, (target, source, to, at, slope, start) = signature.args, arguments
        place = _place_of(context, builder, kinds[1], source, at, _FOUR_BYTES)
        value = builder.uitofp(builder.load(place, align=1), _FOUR_FLOATS)
        zero = ir.Constant(ir.IntType(64), 0)
        place = _place_of(context, builder, kinds[4], slope, zero, _FOUR_FLOATS)
        value = builder.fmul(value, builder.load(place, align=4))
        place = _place_of(context, builder, kinds[5], start, zero, _FOUR_FLOATS)
        value = builder.fadd(value, builder.load(place, align=4))
        place = _place_of(context, builder, kinds[0], target, to, _FOUR_FLOATS)
        builder.store(value, place, align=4)
        return context.get_dummy_value()

    return types.none(target, source, to, at, slope, start), generate


@inlined
def _widen(words, image):
    """Copy an image of three bytes a pixel to words of four; word 0 is black, pixel 0 word 1.

    It brings the image into the cache in order, and rotation then finds black like any pixel.
    """
    last = image.size // 3 - 1
    words[:4] = 0
    for pixel in range(last):
        # The fourth byte is the next pixel's, which is never used.
        _copy_four(words, image, _FOUR * _place(pixel + 1), _THREE * _place(pixel))
    for c in range(3):
        words[4 * (last + 1) + c] = image[3 * last + c]


@inlined
def _gather_row(line, words, source):
    """The bytes of one row of a rotated image; `line` has one byte more."""
    for x in range(source.size):
        # The fourth byte is written over in its turn.
        _copy_four(line, words, _THREE * _place(x), _FOUR * _place(source[x]))


@inlined
def _scale_gathered_row(out, words, source, slopes, starts):
    """Gather and scale a row at once, in channels_last; `out` goes on beyond the row, or ends."""
    whole = source.size if out.size > 3 * source.size else source.size - 1
    for x in range(whole):
        # The fourth number is written over in its turn; the very last pixel must not write it.
        _scale_four(out, words, _THREE * _place(x), _FOUR * _place(source[x]), slopes, starts)
    for x in range(whole, source.size):
        for c in range(3):
            out[3 * x + c] = slopes[c] * np.float32(words[4 * source[x] + c]) + starts[c]


@inlined
def _look_up_row(out, line, table, width, pixel_step, channel_step):
    red, green, blue = table[0], table[1], table[2]
    out_green, out_blue = out[channel_step:], out[2 * channel_step :]
    for x in range(width):
        at, to = _THREE * _place(x), _place(x * pixel_step)
        out[to] = red[line[at]]
        out_green[to] = green[line[at + _ONE]]
        out_blue[to] = blue[line[at + _TWO]]


@inlined
def _scale_row(out, line, slopes, starts, width, pixel_step, channel_step):
    """What `_look_up_row` does with tables that are straight lines, in vector instructions."""
    if pixel_step == 3:
        for at in range(3 * width):
            out[at] = slopes[at] * np.float32(line[at]) + starts[at]
    else:
        for c in range(3):
            plane = out[c * channel_step :]
            for x in range(width):
                plane[x] = slopes[c] * np.float32(line[3 * x + c]) + starts[c]


@compiled
def _look_up(
    begin, end, pixels, rows, sources, source_of, levels, level_of, straight, slope, start, output,
    pixel_step, channel_step, width,
):  # fmt: skip
    gathered = np.empty(3 * width + 1, np.uint8)
    words = np.empty(4 * (sources.shape[1] + 1), np.uint8)
    slopes, starts = np.empty(3 * width, np.float32), np.empty(3 * width, np.float32)
    for n in range(begin, end):
        image, source, table = pixels[rows[n]], sources[source_of[n]], levels[level_of[n]]
        if source_of[n] > 0:
            _widen(words, image)
        if straight[level_of[n]]:
            for at in range(3 * width):
                slopes[at] = slope[level_of[n], at % 3]
                starts[at] = start[level_of[n], at % 3]
        for first in range(0, source.size, width):
            out = output[n, first * pixel_step :]
            line = image[3 * first :]
            if source_of[n] > 0 and straight[level_of[n]] and pixel_step == 3:
                moved = source[first : first + width]
                _scale_gathered_row(out.view(np.float32), words, moved, slopes, starts)
                continue
            if source_of[n] > 0:
                # Two loops are faster than one: loads need not wait for where stores may go.
                _gather_row(gathered, words, source[first : first + width])
                line = gathered[0:]
            # Constant steps make faster loops.
            if straight[level_of[n]]:
                numbers = out.view(np.float32)
                _scale_row(numbers, line, slopes, starts, width, pixel_step, channel_step)
            elif pixel_step == 3:
                _look_up_row(out, line, table, width, 3, 1)
            else:
                _look_up_row(out, line, table, width, 1, channel_step)


@inlined
def _clamp(value):
    return min(max(value, np.float32(0)), np.float32(1))


@inlined
def _gray(red, green, blue):
    return np.float32(0.2989) * red + np.float32(0.587) * green + np.float32(0.114) * blue


@inlined
def _power(line, exponent, whole, mantissa):
    """`line ** exponent` in place, for numbers in [0, 1]; `whole` and `mantissa` are scratch.

    It is 2 ** (exponent * log2(x)) with a short series for each, which LLVM turns into vector
    instructions, as it does not with a call of the C library for every number.
    """
    one = np.float32(1)
    bits, mantissa_bits = line.view(np.int32), mantissa.view(np.int32)
    for x in range(line.size):
        # x = mantissa * 2 ** whole, with a mantissa between the roots of 1/2 and 2.
        exponent_bits = np.int32((bits[x] - np.int32(0x3F3504F3)) >> 23)
        whole[x] = exponent_bits
        mantissa_bits[x] = bits[x] - np.int32(exponent_bits << 23)
    for x in range(line.size):
        t = (mantissa[x] - one) / (mantissa[x] + one)
        tt = t * t
        series = np.float32(0.41219859) * tt + np.float32(0.57707802)
        series = (series * tt + np.float32(0.96179669)) * tt + np.float32(2.8853901)
        power = max(exponent * (np.float32(whole[x]) + t * series), np.float32(-126))
        if whole[x] < -126:
            power = np.float32(-126)  # of 0, and of numbers that are as good as 0
        nearest = np.int32(power - np.float32(0.5))
        f = power - np.float32(nearest)
        series = np.float32(1.5403530e-4) * f + np.float32(1.3333558e-3)
        series = (series * f + np.float32(9.6181291e-3)) * f + np.float32(5.5504109e-2)
        series = (series * f + np.float32(0.24022651)) * f + np.float32(0.69314718)
        line[x] = series * f + one
        whole[x] = nearest
    for x in range(line.size):
        bits[x] += np.int32(whole[x] << 23)


@inlined
def _locate_row(at, part_x, part_y, factor, y, height, width, numbers, nearest):
    """Where row `y` of the warped image comes from.

    Pixel `x` is `factor[x]` times the image's at byte `at[x]`, or times what lies `part_x[x]` and
    `part_y[x]` of the way from there to its neighbours on the right and below.
    """
    one, half, zero = np.float32(1), np.float32(0.5), np.float32(0)
    a, b, c, d = numbers[0], numbers[1], numbers[2], numbers[3]
    scale_x, scale_y, middle_x, middle_y = numbers[4], numbers[5], numbers[6], numbers[7]
    left, top, right, bottom = numbers[8], numbers[9], numbers[10], numbers[11]
    unit = numbers[12] / np.float32(255)
    center_x, center_y = np.float32((width - 1) / 2), np.float32((height - 1) / 2)
    last_x, last_y = np.int32(max(width - 2, 0)), np.int32(max(height - 2, 0))
    from_y = np.float32(y) - center_y
    for x in range(width):
        from_x = np.float32(x) - center_x
        u = a * from_x + b * from_y
        v = c * from_x + d * from_y
        covered = _clamp(center_x + one - abs(u)) * _clamp(center_y + one - abs(v))
        source_x = min(max(u * scale_x + middle_x, left), right)
        source_y = min(max(v * scale_y + middle_y, top), bottom)
        if nearest:
            at[x] = 3 * (np.int32(source_y + half) * width + np.int32(source_x + half))
            factor[x] = unit if covered >= half else zero
        else:
            x0, y0 = min(np.int32(source_x), last_x), min(np.int32(source_y), last_y)
            at[x] = 3 * (y0 * width + x0)
            part_x[x], part_y[x] = source_x - np.float32(x0), source_y - np.float32(y0)
            factor[x] = unit * covered


@inlined
def _sample_row(line, channel, at, part_x, part_y, factor, height, width, nearest):
    """One channel of the row that is located so, its brightness adjusted."""
    if nearest:
        for x in range(width):
            line[x] = _clamp(np.float32(channel[_place(at[x])]) * factor[x])
        return
    step_x, step_y = _place(3 * min(width - 1, 1)), _place(3 * width * min(height - 1, 1))
    for x in range(width):
        here = _place(at[x])
        below = here + step_y
        p00, p01 = np.float32(channel[here]), np.float32(channel[here + step_x])
        p10, p11 = np.float32(channel[below]), np.float32(channel[below + step_x])
        upper = p00 + part_x[x] * (p01 - p00)
        lower = p10 + part_x[x] * (p11 - p10)
        line[x] = _clamp((upper + part_y[x] * (lower - upper)) * factor[x])


@compiled
def _draw(
    begin, end, pixels, rows, numbers, nearest, mean, std, output, pixel_step, channel_step, width
):
    size = pixels.shape[1] // 3
    height = size // width
    planes = np.empty((3, height, width), np.float32)
    # Scratch for one row.
    at, whole = np.empty(width, np.int32), np.empty(width, np.int32)
    part_x, part_y = np.empty(width, np.float32), np.empty(width, np.float32)
    factor, mantissa = np.empty(width, np.float32), np.empty(width, np.float32)
    for n in range(begin, end):
        image, out = pixels[rows[n]], output[n]
        total = 0.0
        for y in range(height):
            _locate_row(at, part_x, part_y, factor, y, height, width, numbers[n], nearest)
            for c in range(3):
                _sample_row(
                    planes[c, y], image[c:], at, part_x, part_y, factor, height, width, nearest
                )
            red, green, blue = planes[0, y], planes[1, y], planes[2, y]
            row_total = np.float32(0)
            for x in range(width):
                row_total += _gray(red[x], green[x], blue[x])
            total += row_total
        gray_mean = np.float32(total / size)
        contrast, saturation, gamma = numbers[n, 13], numbers[n, 14], numbers[n, 15]
        from_mean = (np.float32(1) - contrast) * gray_mean
        for y in range(height):
            red, green, blue = planes[0, y], planes[1, y], planes[2, y]
            for x in range(width):
                r = _clamp(contrast * red[x] + from_mean)
                g = _clamp(contrast * green[x] + from_mean)
                b = _clamp(contrast * blue[x] + from_mean)
                from_gray = (np.float32(1) - saturation) * _gray(r, g, b)
                red[x] = _clamp(saturation * r + from_gray)
                green[x] = _clamp(saturation * g + from_gray)
                blue[x] = _clamp(saturation * b + from_gray)
            for c in range(3):
                line = planes[c, y]
                _power(line, gamma, whole, mantissa)
                first = y * width * pixel_step + c * channel_step
                for x in range(width):
                    out[first + x * pixel_step] = (line[x] - mean[c]) / std[c]


def look_up(
    pixels: Tensor,
    rows: Tensor,
    sources: Tensor,
    source_of: Tensor,
    levels: Tensor,
    level_of: Tensor,
    output: Tensor,
) -> None:
    """See :func:`cnnsp.augment.look_up`."""
    bits = _BITS[output.element_size()]
    arguments = (
        pixels.flatten(1), rows, sources, source_of, levels.view(bits), level_of,
        *_lines(levels), _flat(output).view(bits),
    )  # fmt: skip
    _run(_look_up, output, arguments)


def _lines(levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which tables are straight lines in fp32, their slopes and their first levels: ``[T, 3]``."""
    start = levels[:, :3, 0].float()
    slope = (levels[:, :3, 255].float() - start) / 255
    line = start[:, :, None] + slope[:, :, None] * torch.arange(256)
    straight = ((line - levels[:, :3]).abs() < 1e-6).flatten(1).all(1)
    return straight & (levels.dtype == torch.float32), slope, start


def draw(
    pixels: Tensor,
    rows: Tensor,
    numbers: Tensor,
    nearest: bool,
    mean: Tensor,
    std: Tensor,
    output: Tensor,
) -> None:
    """See :func:`cnnsp.augment.draw`."""
    # The compiled loop writes fp32: other dtypes are converted a few images at a time.
    part = len(output) if output.dtype == torch.float32 else 8 * torch.get_num_threads()
    for start in range(0, len(output), max(part, 1)):
        target = output[start : start + part]
        made = (
            target
            if target.dtype == torch.float32
            else torch.empty_like(target, dtype=torch.float32)
        )
        arguments = (
            pixels.flatten(1), rows[start : start + part], numbers[start : start + part], nearest,
            mean, std, _flat(made),
        )  # fmt: skip
        _run(_draw, made, arguments)
        if made is not target:
            target.copy_(made)


def _flat(output: Tensor) -> Tensor:
    """The numbers of each image in the order in which they lie in memory: ``[B, 3*H*W]``."""
    return output.flatten(1) if output.is_contiguous() else output.permute(0, 2, 3, 1).flatten(1)


def _run(function: Any, output: Tensor, tensors: tuple[Any, ...]) -> None:
    count, _, height, width = output.shape
    if count == 0:
        return
    steps = (1, height * width) if output.is_contiguous() else (3, 1)
    arrays = tuple(t.numpy() if isinstance(t, Tensor) else t for t in tensors)
    threads = min(torch.get_num_threads(), count)
    share_out(function, count, threads, (*arrays, *steps, width))
