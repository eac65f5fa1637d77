"""Every small window in Triton: drawn, expected and differentiated as the reference does.

On ordinary numbers, so that no strip is done again by the general code, and on special ones.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from _pytest.mark import ParameterSet

from stochastic_pooling import reference

from .test_kernels import TOLERANCE, draw_alike
from .windows import LAYOUTS, guarded, plane, sliding_windows

kernels = pytest.importorskip("stochastic_pooling.gpu.launch", exc_type=ImportError)

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),
]

# What decides which code of a kernel runs, besides the window: the format, whether columns come in
# pairs, whether rows fill the unrolled groups, and whether a strip begins inside a plane.
VARIANTS = list(itertools.product(LAYOUTS, (9, 8), (1, 0), (1, 2**20)))
DTYPES = (torch.float16, torch.float32, torch.bfloat16)


def cases() -> Iterator[ParameterSet]:
    """Each window on ordinary numbers, a third of them once more in another variant, and a quarter
    on special numbers, which take the general code; a seventh of all for a plain run."""
    windows = list(sliding_windows())
    random.Random(0).shuffle(windows)  # so that every fourth is no kind of its own
    for number, window in enumerate(windows):
        for turn, every, special in ((0, 1, False), (1, 3, False), (2, 4, True)):
            if number % every > 0:
                continue
            # Over the windows every variant has its turn.
            layout, width, odd, filling = VARIANTS[(5 * (number // every) + 13 * turn) % 16]
            rows = (5, 9) if special else (8, 14)
            height = rows[window.stride_h - 1] + odd + max(window.kernel_h - 3, 0)
            dtype = DTYPES[(number // every + turn) % 3]
            name = (
                f"{window.kernel_h}x{window.kernel_w}-stride{window.stride_h}{window.stride_w}"
                f"-padding{window.padding_h}{window.padding_w}{'-ceil' if window.ceil_mode else ''}"
                f"-{height}x{width}-{'strip' if filling == 1 else 'strips'}"
                f"-{str(layout).removeprefix('torch.')}-{str(dtype).removeprefix('torch.')}"
                f"{'-special' if special else ''}"
            )
            slow = number % (7 * every) > 0  # of seven, so that these have every variant, too
            yield pytest.param(
                window, (height, width), layout, filling, dtype, special,
                marks=[pytest.mark.slow] if slow else [], id=name,
            )  # fmt: skip


@pytest.mark.parametrize(("window", "size", "layout", "filling", "dtype", "special"), list(cases()))
def test_every_window(window, size, layout, filling, dtype, special, device, monkeypatch):
    monkeypatch.setattr(kernels, "SLIDING_BLOCK", 32)
    monkeypatch.setattr(kernels, "FILLING_THREADS", filling)
    monkeypatch.setattr(kernels, "_tile", None)  # all four slide
    # channels_last: one channel a lane, two, and a number of channels that is a constant.
    channels = (
        2 if layout == torch.contiguous_format else (3, 4, 8)[(window.kernel_h + size[1]) % 3]
    )
    shape = (1, channels, *size)
    if special:
        x = plane(shape, dtype, layout)
        x[0, 0, -1, -1] = torch.nan  # which some windows leave out
    else:
        x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
        x[0, 0, :5, :4] = -9  # dead windows
    x = guarded(x.to(device))
    bias = guarded(torch.randn(channels, device=device))

    output, code = draw_alike(kernels, x, bias, window)
    assert output.is_contiguous(memory_format=layout)

    # Sums of small integers are exact.
    grad = torch.randint(-8, 9, output.shape, device=device).to(output)
    grad, code = guarded(grad.contiguous(memory_format=layout)), guarded(code)
    got = kernels.sample_backward(grad, code, size, window, True)
    want = reference.sample_backward(grad, code, size, window, True)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])

    torch.testing.assert_close(
        kernels.expectation(x, bias, window),
        reference.expectation(x, bias, window),
        equal_nan=True,
        **TOLERANCE[dtype],
    )
    got = kernels.expectation_backward(grad, x, bias, window, True)
    want = reference.expectation_backward(grad, x, bias, window, True)
    # Of numbers about 8 that cancel each other, in each of the windows that hold the cell.
    atol = {"atol": 8 * TOLERANCE[dtype]["atol"] if dtype != torch.bfloat16 else 1e-5}
    torch.testing.assert_close(got[0], want[0], equal_nan=True, **{**TOLERANCE[dtype], **atol})
    torch.testing.assert_close(got[1], want[1], equal_nan=True, rtol=1e-4, atol=1e-3)
    assert got[0].is_contiguous(memory_format=layout)
