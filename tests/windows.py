"""The grid of windows and planes on which every backend is held against the reference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from stochastic_pooling.window import Window

LAYOUTS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

# What the case is for: (shape of the input, window). Small, for Triton's interpreter: the large
# window's outputs are just a tile of the general kernels, those of the first dilated one are three.
CASES = {
    "overlapping, padded": ((2, 3, 7, 9), Window(3, 3, 1, 1, 1, 1, 1, 1, False)),
    "tiles side by side": ((1, 5, 4, 4), Window(2, 2, 2, 2, 0, 0, 1, 1, False)),
    "overlapping, stride 2": ((1, 5, 10, 6), Window(3, 3, 2, 2, 1, 1, 1, 1, False)),
    "stride beyond the kernel": ((1, 2, 11, 12), Window(2, 3, 3, 5, 1, 1, 1, 1, False)),
    "dilated, not square": ((1, 2, 24, 26), Window(3, 2, 2, 1, 1, 1, 2, 3, False)),
    "dilated, strided, not square": ((1, 2, 9, 14), Window(2, 4, 1, 3, 1, 2, 3, 1, True)),
    "ceil_mode, a last partial window": ((1, 2, 6, 8), Window(3, 3, 2, 2, 0, 0, 1, 1, True)),
    "ceil_mode, a last window dropped": ((1, 2, 5, 4), Window(2, 3, 3, 5, 1, 1, 1, 1, True)),
    "planes of one cell": ((2, 3, 1, 1), Window(3, 3, 1, 1, 1, 1, 1, 1, False)),
    "one row": ((2, 3, 1, 17), Window(1, 3, 1, 2, 0, 1, 1, 1, False)),
    "global": ((2, 3, 4, 5), Window(4, 5, 1, 1, 0, 0, 1, 1, False)),
    "more than 255 cells": ((1, 1, 15, 16), Window(16, 17, 1, 1, 8, 8, 1, 1, False)),
    "more positions than a tile": ((1, 1, 20, 30), Window(3, 3, 1, 1, 1, 1, 1, 1, False)),
    "more channels than a tile": ((1, 67, 3, 2), Window(2, 2, 1, 1, 1, 1, 1, 2, False)),
    "a window that steps over the input": ((1, 2, 1, 3), Window(2, 2, 1, 1, 1, 1, 2, 2, False)),
}

# Every window in fp32, those that train networks in the other dtypes too; in a plain run in fp16.
COMBINATIONS = [pytest.param(case, torch.float32) for case in CASES] + [
    pytest.param(case, dtype, marks=[] if dtype == torch.float16 else [pytest.mark.slow])
    for case in ("overlapping, padded", "tiles side by side")
    for dtype in DTYPES
    if dtype != torch.float32
]


def sliding_windows() -> Iterator[Window]:
    """Windows that Triton's sliding kernels serve: every one of 2 and 3 cells, some larger ones."""
    sides = itertools.product((2, 3), (1, 2), (0, 1))
    for pair in itertools.product(sides, repeat=2):
        kernel, stride, padding = zip(*pair, strict=True)
        for ceil_mode in (False, True) if 2 in stride else (False,):
            yield Window.of(kernel, stride, padding, (1, 1), ceil_mode)
    for kernel, stride, padding, ceil_mode in (
        ((4, 4), (1, 1), (2, 2), False),
        ((4, 4), (2, 2), (1, 0), True),
        ((5, 5), (1, 1), (0, 2), False),
        ((5, 5), (2, 2), (2, 1), False),
        ((5, 5), (2, 2), (0, 0), True),
        ((5, 2), (1, 2), (2, 1), False),
        ((4, 5), (2, 1), (2, 0), False),
        ((3, 4), (1, 2), (1, 2), True),
    ):
        yield Window.of(kernel, stride, padding, (1, 1), ceil_mode)


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """The same inside a larger storage, where a read beyond the tensor finds what changes a result:
    finite numbers above all others, but too small for a NaN's or an overflow's special treatment;
    the codes of the first cells, which have gradients.
    """
    margin = 1024
    storage = torch.randint(0, 4, (tensor.numel() + 2 * margin,), device=tensor.device)
    storage = storage.to(tensor.dtype)
    if tensor.is_floating_point():
        storage = storage + min(torch.finfo(tensor.dtype).max / 2, 2.0**100)
    inside = storage.as_strided(tensor.shape, tensor.stride(), margin)
    return inside.copy_(tensor)


def plane(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
    """A random input with every kind of window that the contract names, where there is room."""
    x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    if x[0, 0].numel() >= 12 and x.shape[1] >= 2:
        largest = torch.finfo(dtype).max
        x[0, 0, 0, 0] = float("nan")
        x[0, 1, -1, -1] = float("inf")
        x[0, 1, 0, 0:2] = largest  # two make the sum overflow in fp32 and fp64
        x[-1, 0, 2:] = -1  # dead windows
        # Subnormal weights; in bf16 the interpreter, not a GPU, takes those for zeros.
        below = 1 if dtype == torch.bfloat16 else 8
        x[-1, 1, 0, -2:] = torch.finfo(dtype).smallest_normal / below
    return x
