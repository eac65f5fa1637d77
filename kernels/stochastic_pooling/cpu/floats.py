"""16-bit floats, which numba lacks, as their bits: uint16 for fp16, int16 for bf16."""

from __future__ import annotations

import numpy as np
from numba.core import types
from numba.extending import overload

_BIAS = 112  # the exponent's bias is so much larger in fp32 than in fp16


def widen(stored):
    """A stored number in fp32."""


def narrow(number, like):
    """A number in fp32 as it is stored in arrays of `like`, rounded to nearest even."""


@overload(widen)
def _(stored):
    if stored == types.int16:

        def from_bfloat16(stored):
            return np.uint32(np.uint32(np.uint16(stored)) << np.uint32(16)).view(np.float32)

        return from_bfloat16
    if stored == types.uint16:

        def from_float16(stored):
            bits = np.uint32(stored)
            magnitude = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
            # The product is exact, also where fp16 is subnormal.
            number = np.uint32(magnitude).view(np.float32) * np.float32(2.0**_BIAS)
            # Infinity and NaN have the largest exponent in both.
            special = np.uint32(magnitude | np.uint32(0x7F800000))
            wide = special if magnitude >= 0x7C00 << 13 else np.float32(number).view(np.uint32)
            sign = np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))
            return np.uint32(wide | sign).view(np.float32)

        return from_float16
    return lambda stored: stored


@overload(narrow)
def _(number, like):
    if like.dtype == types.int16:

        def to_bfloat16(number, like):
            bits = np.float32(number).view(np.uint32)
            odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
            rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + odd)
            rounded = rounded if number == number else np.uint32(0x7FC00000)
            return np.int16(np.uint16(rounded >> np.uint32(16)))

        return to_bfloat16
    if like.dtype == types.uint16:

        def to_float16(number, like):
            bits = np.float32(number).view(np.uint32)
            magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
            odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
            half = np.uint32(magnitude - np.uint32((_BIAS << 23) - 0xFFF))
            half = np.uint32(np.uint32(half + odd) >> np.uint32(13))
            # Adding 0.5 rounds to a multiple of 2**-24, fp16's smallest number.
            below = np.float32(np.uint32(magnitude).view(np.float32) + np.float32(0.5))
            below = np.uint32(np.float32(below).view(np.uint32) - np.uint32(126 << 23))
            half = below if magnitude < (_BIAS + 1) << 23 else half
            half = half if half < 0x7C00 else np.uint32(0x7C00)
            half = np.uint32(0x7E00) if magnitude > 0x7F800000 else half
            sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
            return np.uint16(half | sign)

        return to_float16
    return lambda number, like: number
