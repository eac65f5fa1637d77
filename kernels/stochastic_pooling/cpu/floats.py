"""16-bit floats, which numba lacks, as their bits: uint16 for fp16, int16 for bf16."""

from __future__ import annotations

import numpy as np
from numba.core import types
from numba.extending import overload

_BIAS = 112  # the exponent's bias is so much larger in fp32 than in fp16


def widen(stored, like):
    """A stored number in fp32 if arrays of `like` are, else as it is."""


def narrow(number, like):
    """A number in fp32 as it is stored in arrays of `like`, rounded to nearest even; a stored one
    as it is."""


@overload(widen)
def _(stored, like):
    def from_bfloat16(stored, like):
        return np.uint32(np.uint32(np.uint16(stored)) << np.uint32(16)).view(np.float32)

    def from_float16(stored, like):
        bits = np.uint32(stored)
        magnitude = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
        # The product is exact, also where fp16 is subnormal.
        number = np.uint32(magnitude).view(np.float32) * np.float32(2.0**_BIAS)
        # Infinity and NaN have the largest exponent in both.
        special = np.uint32(magnitude | np.uint32(0x7F800000))
        wide = special if magnitude >= 0x7C00 << 13 else np.float32(number).view(np.uint32)
        sign = np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))
        return np.uint32(wide | sign).view(np.float32)

    from_bits = {types.int16: from_bfloat16, types.uint16: from_float16}
    which = stored if like.dtype == types.float32 else None
    return from_bits.get(which, lambda stored, like: stored)


@overload(narrow)
def _(number, like):
    def to_bfloat16(number, like):
        bits = np.float32(number).view(np.uint32)
        odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
        rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + odd)
        rounded = rounded if number == number else np.uint32(0x7FC00000)
        return np.int16(np.uint16(rounded >> np.uint32(16)))

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

    to_bits = {types.int16: to_bfloat16, types.uint16: to_float16}
    which = like.dtype if number == types.float32 else None
    return to_bits.get(which, lambda number, like: number)
