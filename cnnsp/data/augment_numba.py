"""The batches of `augment.py` on the CPU, compiled by numba: one pass from bytes to numbers.

The compiled functions make the images `begin` to `end` of a batch and write them where they belong,
in either memory format: number `c` of pixel `p` lies at `p * pixel_step + c * channel_step`.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

# Where numba is missing or unusable, this import says so with an ImportError.
from stochastic_pooling.cpu.compiling import compiled, inlined

from .augment import IMAGENET_MEAN, IMAGENET_STD

# Table entries are moved as their bits, for numba has no 16-bit floats.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Positions are unsigned, for numba would test whether signed ones count from the end.
_place = np.uint64
_MEAN, _STD = np.float32(IMAGENET_MEAN), np.float32(IMAGENET_STD)
_BYTE, _EIGHT, _SIXTEEN = np.uint32(255), np.uint32(8), np.uint32(16)


@inlined
def _write(out, words, source, table, pixel_step, channel_step):
    red, green, blue = table[0], table[1], table[2]
    out_green, out_blue = out[channel_step:], out[2 * channel_step :]
    for p in range(source.size):
        word, to = words[np.uint32(source[p])], _place(p * pixel_step)
        out[to] = red[word & _BYTE]
        out_green[to] = green[(word >> _EIGHT) & _BYTE]
        out_blue[to] = blue[word >> _SIXTEEN]


@compiled
def _look_up(
    begin, end, pixels, rows, sources, source_of, levels, level_of, output, pixel_step,
    channel_step, width,
):  # fmt: skip
    # A pixel is moved as one word of its three bytes; word 0 is black.
    words = np.zeros(sources.shape[1] + 1, np.uint32)
    for n in range(begin, end):
        image, source, table = pixels[rows[n]], sources[source_of[n]], levels[level_of[n]]
        for p in range(source.size):
            red, green = np.uint32(image[3 * p]), np.uint32(image[3 * p + 1])
            words[p + 1] = red | green << _EIGHT | np.uint32(image[3 * p + 2]) << _SIXTEEN
        # Constant steps make faster loops.
        if pixel_step == 3:
            _write(output[n], words, source, table, 3, 1)
        else:
            _write(output[n], words, source, table, 1, channel_step)


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
def _locate_row(at, part_x, part_y, factor, y, height, width, numbers):
    """Where row `y` of the warped image comes from.

    Pixel `x` is `factor[x]` times what lies `part_x[x]` and `part_y[x]` of the way from the image's
    byte `at[x]` to its neighbours on the right and below.
    """
    one = np.float32(1)
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
        x0, y0 = min(np.int32(source_x), last_x), min(np.int32(source_y), last_y)
        at[x] = 3 * (y0 * width + x0)
        part_x[x], part_y[x] = source_x - np.float32(x0), source_y - np.float32(y0)
        factor[x] = unit * covered


@inlined
def _sample_row(line, channel, at, part_x, part_y, factor, height, width):
    """One channel of the row that is located so, its brightness adjusted."""
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
def _draw(begin, end, pixels, rows, numbers, output, pixel_step, channel_step, width):
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
            _locate_row(at, part_x, part_y, factor, y, height, width, numbers[n])
            for c in range(3):
                _sample_row(planes[c, y], image[c:], at, part_x, part_y, factor, height, width)
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
                    out[first + x * pixel_step] = (line[x] - _MEAN[c]) / _STD[c]


def look_up(pixels, rows, sources, source_of, levels, level_of, output) -> None:
    """See :func:`cnnsp.data.augment.look_up`."""
    bits = _BITS[output.element_size()]
    tables = sources, source_of, levels.view(bits), level_of
    _run(_look_up, output, pixels.flatten(1), rows, *tables, _flat(output).view(bits))


def draw(pixels, rows, numbers, output) -> None:
    """See :func:`cnnsp.data.augment.draw`."""
    # The compiled loop writes fp32: other dtypes are converted a few images at a time.
    part = len(output) if output.dtype == torch.float32 else 8 * torch.get_num_threads()
    for out, *some in zip(*(t.split(max(part, 1)) for t in (output, rows, numbers)), strict=True):
        made = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        _run(_draw, made, pixels.flatten(1), *some, _flat(made))
        if made is not out:
            out.copy_(made)


def _flat(output: Tensor) -> Tensor:
    """The numbers of each image in the order in which they lie in memory: ``[B, 3*H*W]``."""
    return output.flatten(1) if output.is_contiguous() else output.permute(0, 2, 3, 1).flatten(1)


def _run(function, output: Tensor, *arguments) -> None:
    count, _, height, width = output.shape
    if count == 0:
        return
    arrays = [t.numpy() if isinstance(t, Tensor) else t for t in arguments]
    arrays += [1, height * width, width] if output.is_contiguous() else [3, 1, width]
    threads = min(torch.get_num_threads(), count)
    step = math.ceil(count / (8 * threads))
    # Threads for this call alone: there is nothing that a fork or other threads could break, as
    # numba's own abort the process when two Python threads enter at once.
    with ThreadPoolExecutor(threads) as pool:
        parts = range(0, count, step)
        list(pool.map(lambda begin: function(begin, min(begin + step, count), *arrays), parts))
