"""16-bit floats, which numba lacks, as their bits: int16 for fp16, uint16 for bf16."""

from __future__ import annotations

import numpy as np
import torch
from numba.core import types
from numba.extending import overload

NUMBERS = {torch.float32: np.float32, torch.float16: np.int16, torch.bfloat16: np.uint16}
_BIAS = 112  # the exponent's bias is so much larger in fp32 than in fp16


def widen(stored):
    """A stored number in fp32."""


def narrow(number, like):
    """A number in fp32 as it is stored in arrays of `like`, rounded to nearest even."""


@overload(widen)
def _(stored):
    def from_bfloat16(stored):
        return np.uint32(np.uint32(stored) << 16).view(np.float32)

    def from_float16(stored):
        bits = np.int32((np.int32(stored) << 13) & -0x70002000)  # less copies of the sign
        # The product is exact, also where fp16 is subnormal.
        number = bits.view(np.float32) * np.float32(2.0**_BIAS)
        # Infinity and NaN have the largest exponent in both.
        special = np.int32(bits | 0x7F800000).view(np.float32)
        return special if stored & 0x7C00 == 0x7C00 else number

    from_bits = {types.int16: from_float16, types.uint16: from_bfloat16}
    return from_bits.get(stored, lambda stored: stored)


@overload(narrow)
def _(number, like):
    def to_bfloat16(number, like):
        bits = np.float32(number).view(np.int32)
        rounded = np.int32(bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.uint16(rounded if number == number else 0x7FC0)

    def to_float16(number, like):
        bits = np.float32(number).view(np.int32)
        magnitude = np.int32(bits & 0x7FFFFFFF)
        # Four times the number, or infinity beyond fp16's largest.
        scaled = np.float32(magnitude.view(np.float32) * np.float32(2.0**_BIAS))
        scaled = np.float32(scaled * np.float32(2.0 ** (2 - _BIAS)))
        # To add a power of 2 rounds to multiples of the last place that fp16 has for the number.
        power = np.int32(max(magnitude & 0x7F800000, 113 << 23) + (15 << 23))
        rounded = np.float32(scaled + power.view(np.float32)).view(np.int32)
        half = np.int32((rounded >> 13 & 0x7C00) + (rounded & 0xFFF))
        return np.int16((half if magnitude <= 0x7F800000 else 0x7E00) | (bits >> 16 & 0x8000))

    to_bits = {types.int16: to_float16, types.uint16: to_bfloat16}
    return to_bits.get(like.dtype, lambda number, like: number)
