"""16-bit floats, which numba lacks, as their bits."""

from __future__ import annotations

import numpy as np
import torch

from .compiling import inlined

_BIAS = 112  # the exponent's bias is so much larger in fp32 than in fp16

_same = inlined(lambda number: number)
_from_bfloat16 = inlined(lambda stored: np.uint32(np.uint32(stored) << 16).view(np.float32))


@inlined
def _to_bfloat16(number):
    bits = np.float32(number).view(np.int32)
    rounded = np.int32(bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.uint16(rounded if number == number else 0x7FC0)


@inlined
def _from_float16(stored):
    bits = np.int32((np.int32(np.int16(stored)) << 13) & -0x70002000)  # less copies of the sign
    # The product is exact, also where fp16 is subnormal.
    number = bits.view(np.float32) * np.float32(2.0**_BIAS)
    # Infinity and NaN have the largest exponent in both.
    special = np.int32(bits | 0x7F800000).view(np.float32)
    return special if stored & 0x7C00 == 0x7C00 else number


@inlined
def _to_float16(number):
    bits = np.float32(number).view(np.int32)
    magnitude = np.int32(bits & 0x7FFFFFFF)
    half = np.int32(magnitude - (_BIAS << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13
    half = half if half < 0x7C00 else 0x7C00
    # Adding 0.5 rounds to a multiple of 2**-24, fp16's smallest number.
    below = np.float32(magnitude.view(np.float32) + np.float32(0.5)).view(np.int32)
    half = below - (126 << 23) if magnitude < (_BIAS + 1) << 23 else half
    half = 0x7E00 if magnitude > 0x7F800000 else half
    return np.uint16(half | (bits >> 16 & 0x8000))


# How numba sees the numbers of each dtype, how they become fp32, and fp32 them, to nearest even.
FLOATS = {
    torch.float32: (np.float32, _same, _same),
    torch.float16: (np.uint16, _from_float16, _to_float16),
    torch.bfloat16: (np.uint16, _from_bfloat16, _to_bfloat16),
}
