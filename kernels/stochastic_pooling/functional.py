"""Stochastic pooling as functions, beside `torch.nn.functional.max_pool2d`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .ops import StochasticExpectation, StochasticSample, WindowArguments
from .window import Window

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def stochastic_pool2d(
    input: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    ceil_mode: bool = False,
    return_indices: bool = False,
    bias: torch.Tensor | None = None,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Stochastic pooling over `(H, W)` planes, ReLU and an optional bias included.

    With w = max(input + bias, 0) in a window of sum S, training draws one cell with probability
    w / S and returns its w; evaluation returns the expectation of that draw, sum w² / S (Zeiler &
    Fergus 2013, equations 3.1 and 3.2). A window without a positive cell gives 0 and no gradient; a
    NaN gives NaN; +Inf beats every finite cell. The draw depends on the seed and on the output's
    coordinates alone, so it is the same on every device and in every memory format and dtype.

    Args:
        input: `(N, C, H, W)` or `(C, H, W)`, in fp16, bf16, fp32 or fp64. Arithmetic is in fp32 for
            the first three and in fp64 for the last.
        kernel_size: one int, or (height, width); the same for the three that follow.
        stride: `kernel_size` if None.
        padding: at most half of the kernel. Padding is never drawn.
        dilation: distance between the cells of a window.
        ceil_mode: round the output size up instead of down.
        return_indices: also return where each output came from, as int64 `h * W + w` indices that
            `F.max_unpool2d` takes; only in training. A dead window's is its first in-bounds cell.
        bias: `(C,)`, added to the input first; any floating dtype. Its gradient has its dtype.
        training: draw (True) or take the expectation (False).
        generator: on the input's device; its default generator if None.

    Returns:
        `(N, C, OH, OW)` or `(C, OH, OW)` in the input's dtype and memory format, shapes as
        `F.max_pool2d`; with `return_indices`, a pair of the output and the indices.

    Raises:
        RuntimeError, TypeError, NotImplementedError: where `F.max_pool2d` would, in its words.
    """
    window = (
        _pair(kernel_size, "kernel_size"),
        _pair(kernel_size if stride is None else stride, "stride"),
        _pair(padding, "padding"),
        _pair(dilation, "dilation"),
        bool(ceil_mode),
    )
    if input.dim() not in (3, 4) or 0 in input.shape[-3:]:
        raise RuntimeError(
            "Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input, "
            f"but got:{list(input.shape)}"
        )
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    _check(batched, bias, window)
    if return_indices and not training:
        raise RuntimeError(
            "return_indices: in evaluation no cell is drawn, so there are no indices; pass "
            "training=True (a module: sample_in_eval=True) or return_indices=False"
        )
    if training:
        output, code = StochasticSample.apply(
            batched, bias, _draw_seed(input.device, generator), window
        )
    else:
        output, code = StochasticExpectation.apply(batched, bias, window), None
    if batched is not input:
        output = output.squeeze(0)
    if not return_indices:
        return output
    indices = Window.of(*window).flat_indices(code, *input.shape[-2:])
    return output, indices if batched is input else indices.squeeze(0)


def stochastic_pool1d(
    input: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    ceil_mode: bool = False,
    return_indices: bool = False,
    bias: torch.Tensor | None = None,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Stochastic pooling over `(N, C, L)` or `(C, L)` signals; all else as `stochastic_pool2d`.

    It draws the cells that the 2-d pool draws for `(N, C, 1, L)`.
    """
    if input.dim() not in (2, 3) or 0 in input.shape[-2:]:
        raise RuntimeError(
            "Expected 2D or 3D (batch mode) tensor with optional 0 dim batch size for input, "
            f"but got:{list(input.shape)}"
        )
    pooled = stochastic_pool2d(
        input.unsqueeze(-2),
        (1, _single(kernel_size, "kernel_size")),
        None if stride is None else (1, _single(stride, "stride")),
        (0, _single(padding, "padding")),
        (1, _single(dilation, "dilation")),
        ceil_mode=ceil_mode,
        return_indices=return_indices,
        bias=bias,
        training=training,
        generator=generator,
    )
    if isinstance(pooled, tuple):
        output, indices = pooled
        return output.squeeze(-2), indices.squeeze(-2)
    return pooled.squeeze(-2)


def _draw_seed(device: torch.device, generator: torch.Generator | None) -> torch.Tensor:
    """A fresh 64-bit seed on the device: an aten op, so `torch.manual_seed` reproduces it, nothing
    waits for the device, and a captured CUDA graph draws anew at each replay."""
    return torch.randint(
        -(2**63), 2**63 - 1, (), dtype=torch.int64, device=device, generator=generator
    )


def _check(input: torch.Tensor, bias: torch.Tensor | None, arguments: WindowArguments) -> None:
    if input.dtype not in _DTYPES:
        raise NotImplementedError(
            f'"stochastic_pool2d" not implemented for {input.dtype}: '
            "it takes float16, bfloat16, float32 and float64"
        )
    window = Window.of(*arguments)
    channels, height, width = input.shape[-3:]
    out_height, out_width = window.output_size(height, width)
    if out_height < 1 or out_width < 1:
        raise RuntimeError(
            f"Given input size: ({channels}x{height}x{width}). Calculated output size: "
            f"({channels}x{out_height}x{out_width}). Output size is too small"
        )
    if bias is None:
        return
    if bias.shape != (channels,):
        raise RuntimeError(
            f"bias: expected one value per channel, shape ({channels},), "
            f"but got {tuple(bias.shape)}"
        )
    if bias.dtype not in _DTYPES:
        raise RuntimeError(f"bias: expected a floating dtype, but got {bias.dtype}")
    if bias.device != input.device:
        raise RuntimeError(
            f"bias: expected on the input's device {input.device}, but it is on {bias.device}"
        )


def _pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    values = _integers(value, name)
    if len(values) == 1:
        return values[0], values[0]
    if len(values) != 2:
        raise RuntimeError(
            f"stochastic_pool2d: {name} must either be a single int, or a tuple of two ints"
        )
    return values[0], values[1]


def _single(value: int | Sequence[int], name: str) -> int:
    if isinstance(value, int):
        return value
    values = _integers(value, name)
    if len(values) != 1:
        raise RuntimeError(
            f"stochastic_pool1d: {name} must either be a single int, or a tuple of one int"
        )
    return values[0]


def _integers(value: Sequence[int], name: str) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or not all(isinstance(item, int) for item in value):
        raise TypeError(f"argument '{name}' must be an int or a tuple of ints, not {value!r}")
    return tuple(value)
