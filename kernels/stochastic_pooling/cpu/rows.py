"""Loops over the lanes of a row, which LLVM turns into vector instructions.

Places and lanes are unsigned: of a signed index numba asks whether it is negative, and no loop that
asks becomes vectors. No fast-math: the draw depends on the order of the sums. The cells of a window
are `rows[i] + columns[j]`, two tuples, whose lengths are known when a loop is compiled.
"""

from __future__ import annotations

import numpy as np

from .. import philox, reference
from .compiling import inlined
from .floats import narrow, widen

# Rows and columns of outputs that share a call of Philox.
GROUP, PAIR = 4, 2
ROUNDS = philox.ROUNDS

DEAD = np.uint8(255)
# A sum starts with the zero that LLVM need not add.
NOTHING = np.float32(-0.0)
# As a part of a cell's number: a row or a column that a window does not have.
NO_CELL = np.uint8(64)
# The bits of weights from which sums may overflow and below which their inverses may. Bits of
# numbers that are not negative are in the order of the numbers, those of NaN beyond.
TOO_LARGE = int(np.float32(2.0**120).view(np.uint32))
TOO_SMALL = int(np.float32(reference.SMALLEST_SUM).view(np.uint32))


@inlined
def convert(lanes, to, numbers, start, count):
    """Copy lanes, as fp32 if the others are."""
    for k in range(count):
        lanes[to + k] = widen(numbers[start + k], lanes)


@inlined
def rectify(weights, to, numbers, start, bias, bits, count):
    """max(x + bias, 0); NaN stays NaN, and no zero is negative. Keep the largest bits of weights,
    and the smallest of those above 0, less one."""
    zero = np.float32(0)
    top, low = bits[0], bits[1]
    for k in range(count):
        w = widen(numbers[start + k], weights)
        w = w + bias[k] if bias.size > 0 else w
        w = zero if w <= zero else w
        weights[to + k] = w
        number = np.float32(w).view(np.uint32)
        top = number if number > top else top
        below = np.uint32(number - np.uint32(1))
        low = below if below < low else low
    bits[0], bits[1] = top, low


@inlined
def number(pairs, lanes, step):
    """The pair of columns and the lane of a column of each call of Philox."""
    for k in range(pairs.size):
        pairs[k], lanes[k] = k // step, k % step


@inlined
def random_words(words, pairs, lanes, first_plane, group, seed):
    """Philox's four words for each pair of columns of each plane (see philox.py), in 64 bits for
    the sake of its products."""
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    count = np.uint64(pairs.size)
    for k in range(count):
        plane = np.uint64(first_plane) + lanes[k]
        c0, c1, c2, c3 = np.uint64(pairs[k]), np.uint64(group), plane & mask, plane >> half
        k0, k1 = np.uint64(seed) & mask, np.uint64(seed) >> half
        for _ in range(ROUNDS):
            product0 = np.uint64(0xD2511F53) * c0
            product1 = np.uint64(0xCD9E8D57) * c2
            c0, c1 = (product1 >> half) ^ c1 ^ k0, product1 & mask
            c2, c3 = (product0 >> half) ^ c3 ^ k1, product0 & mask
            k0 = (k0 + np.uint64(0x9E3779B9)) & mask
            k1 = (k1 + np.uint64(0xBB67AE85)) & mask
        words[k] = np.uint32(c0)
        words[count + k] = np.uint32(c1)
        words[count * np.uint64(2) + k] = np.uint32(c2)
        words[count * np.uint64(3) + k] = np.uint32(c3)


@inlined
def deal(halves, words, pairs, step):
    """Deal words to lanes: the low halves to even columns, the high halves to odd ones."""
    for pair in range(pairs):
        for k in range(step):
            word = words[pair * step + k]
            halves[np.uint64(PAIR) * pair * step + k] = np.uint16(word)
            halves[np.uint64(PAIR) * pair * step + step + k] = np.uint16(word >> np.uint32(16))


@inlined
def _total(weights, rows, columns, first):
    """The sum of a window, in the reference's order."""
    total = NOTHING
    for i in range(len(rows)):
        row = NOTHING
        for j in range(len(columns)):
            row += weights[rows[i] + columns[j] + first]
        total += row
    return total


@inlined
def draw(output, code, to, weights, rows, columns, stride, halves, start, runs, run):
    """Draw a cell for each lane, as the reference does."""
    for m in range(runs):
        for k in range(run):
            first, lane = m * stride + k, m * run + k
            total = _total(weights, rows, columns, first)
            threshold = np.float32(halves[start + lane]) * np.float32(2.0**-16) * total
            before_row, value, drawn = NOTHING, NOTHING, np.uint8(0)
            for i in range(len(rows)):
                before = NOTHING
                for j in range(len(columns)):
                    w = weights[rows[i] + columns[j] + first]
                    reached = before_row + before <= threshold
                    value = w if reached else value
                    drawn = np.uint8(i * len(columns) + j) if reached else drawn
                    before += w
                before_row += before
            output[to + lane] = narrow(value, output)
            code[to + lane] = DEAD if total <= threshold else drawn


@inlined
def _expectation(weights, rows, columns, first):
    """The inverse of the sum of a window, 0 of a dead one, and its expectation."""
    total = _total(weights, rows, columns, first)
    inverse = np.float32(1) / total
    inverse = np.float32(0) if total == np.float32(0) else inverse
    mean = np.float32(0)
    for i in range(len(rows)):
        for j in range(len(columns)):
            w = weights[rows[i] + columns[j] + first]
            mean += w * (w * inverse)
    return inverse, mean


@inlined
def expect(output, to, weights, rows, columns, stride, runs, run):
    """The expectation of the draw for each lane."""
    for m in range(runs):
        for k in range(run):
            _, mean = _expectation(weights, rows, columns, m * stride + k)
            output[to + m * run + k] = narrow(mean, output)


@inlined
def differentiate(slopes, offsets, to, grad, start, weights, rows, columns, stride, runs, run):
    """What a window's gradient is made of (reference.py): the number by which its weights are
    multiplied, and the one that is taken off."""
    for m in range(runs):
        for k in range(run):
            inverse, mean = _expectation(weights, rows, columns, m * stride + k)
            slope = widen(grad[start + m * run + k], slopes) * inverse
            slope = np.float32(0) if inverse == np.float32(0) else slope
            slopes[to + m * run + k] = slope
            offsets[to + m * run + k] = slope * mean


@inlined
def gather(grad_input, to, pitch, totals, grad, code, taps, cells, runs, run):
    """Sum for each lane the gradients of the windows that drew it, and add that to `totals`.
    `taps` are the places of the windows, `cells` the numbers of their cells, by row and column."""
    rows, columns = taps
    lone = len(rows) * len(columns) == 1  # a gradient as it is stored
    for m in range(runs):
        for k in range(run):
            total = np.float32(0)
            for i in range(len(rows)):
                for j in range(len(columns)):
                    place = rows[i] + columns[j] + m * run + k
                    drew = code[place] == np.uint8(cells[0][i] + cells[1][j])
                    g = grad[place] if drew else np.uint8(0)
                    total += widen(g, totals)
            if totals.size > 0:
                totals[m * run + k] += total
            if lone:
                grad_input[to + m * pitch + k] = narrow(g, grad_input)
            else:
                grad_input[to + m * pitch + k] = narrow(total, grad_input)


@inlined
def weigh(grad_input, to, pitch, totals, slopes, offsets, weights, start, stride, runs, run):
    """Likewise the gradients of the expectations, of the sums over the windows that hold a lane."""
    zero = np.float32(0)
    for m in range(runs):
        for k in range(run):
            w, slope = weights[start + m * stride + k], slopes[m * run + k]
            g = w * (slope + slope) - offsets[m * run + k]
            g = zero if w == zero else g
            if totals.size > 0:
                totals[m * run + k] += g
            grad_input[to + m * pitch + k] = narrow(g, grad_input)
