"""Stochastic pooling as modules, beside `torch.nn.MaxPool2d`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import nn

from .functional import stochastic_pool1d, stochastic_pool2d


class _StochasticPool(nn.Module):
    """What the pools of every dimension share: the arguments, and sampling by mode."""

    _pool: ClassVar[Callable[..., torch.Tensor | tuple[torch.Tensor, torch.Tensor]]]

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        *,
        ceil_mode: bool = False,
        return_indices: bool = False,
        sample_in_eval: bool = False,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.dilation = dilation
        self.ceil_mode = ceil_mode
        self.return_indices = return_indices
        self.sample_in_eval = sample_in_eval

    def forward(
        self, input: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return type(self)._pool(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
            bias=bias,
            training=self.training or self.sample_in_eval,
        )

    def extra_repr(self) -> str:
        text = (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, ceil_mode={self.ceil_mode}"
        )
        return text + ", sample_in_eval=True" if self.sample_in_eval else text


class StochasticPool1d(_StochasticPool):
    """Stochastic pooling over `(N, C, L)` or `(C, L)`, with the arguments of `nn.MaxPool1d`.

    `forward(input, bias=None)`; see `stochastic_pool1d` for what it computes. It draws in training
    and gives the expectation in evaluation; with `sample_in_eval` it draws in both.
    """

    _pool = staticmethod(stochastic_pool1d)


class StochasticPool2d(_StochasticPool):
    """Stochastic pooling over `(N, C, H, W)` or `(C, H, W)`, with the arguments of `nn.MaxPool2d`.

    `forward(input, bias=None)`; see `stochastic_pool2d` for what it computes. It draws in training
    and gives the expectation in evaluation; with `sample_in_eval` it draws in both. ReLU is part of
    it, and `pool(conv_without_bias(x), bias=conv.bias)` fuses a convolution's bias too.
    """

    _pool = staticmethod(stochastic_pool2d)
