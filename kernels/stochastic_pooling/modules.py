"""Stochastic pooling as modules, beside `torch.nn.MaxPool2d`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import fx, nn

from .functional import (
    Pooled,
    adaptive_stochastic_pool1d,
    adaptive_stochastic_pool2d,
    adaptive_stochastic_pool3d,
    stochastic_pool1d,
    stochastic_pool2d,
    stochastic_pool3d,
)

sampled: ContextVar[tuple[nn.Module, ...]] = ContextVar("sampled")


class Nothing(tuple[nn.Module, ...]):
    """Empty; `nothing.sampled` is `sampled.get(nothing)`.

    A property with a getter that is not Python is a plain attribute to `torch.compile`, which then
    guards on it, in the context of each call. PyTorch 2.11 cannot compile the call itself.
    """

    sampled: tuple[nn.Module, ...] = property(sampled.get)  # type: ignore[assignment]


nothing = Nothing()


def check_model(model: object) -> None:
    """Raise TypeError if it is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"argument 'model' must be an nn.Module, not {type(model).__name__}")


class StochasticPool(nn.Module):
    """What all pools share. It has no parameters and no state.

    Attributes:
        return_indices: `forward` gives a pair of the output and the indices.
        sample_in_eval: draw in evaluation too, for averages over several draws.
    """

    return_indices: bool
    sample_in_eval: bool
    _pool: ClassVar[Callable[..., Pooled]]
    _shown: ClassVar[tuple[str, ...]] = ()  # of its arguments, in its repr

    def forward(self, input: torch.Tensor, bias: torch.Tensor | None = None) -> Pooled:
        if isinstance(input, fx.Proxy) and getattr(input.tracer, "root", self) is not self:
            # A node, as `torch.nn` has them: a graph that holds what a pool does would draw, or
            # not, in the mode that it was traced in for good.
            keywords = {} if bias is None else {"bias": bias}
            path = input.tracer.path_of_module(self)
            return input.tracer.create_proxy("call_module", path, (input,), keywords)
        draws = self.draws
        return self._pooled(input, return_indices=self.return_indices, bias=bias, training=draws)

    def _pooled(self, input: torch.Tensor, **others: Any) -> Pooled:
        raise NotImplementedError

    def extra_repr(self) -> str:
        flags = ("return_indices", "sample_in_eval")
        shown = (*self._shown, *(name for name in flags if getattr(self, name, False)))
        return ", ".join(f"{name}={getattr(self, name)}" for name in shown)

    @property
    def draws(self) -> bool:
        """Whether `forward` draws, rather than takes the expectation."""
        return self.training or self.sample_in_eval or any(pool is self for pool in nothing.sampled)

    def _replicate_for_data_parallel(self) -> Any:
        """`nn.DataParallel` calls its replicas in threads, whose contexts are fresh."""
        replica: Any = super()._replicate_for_data_parallel()
        replica.sample_in_eval = self.draws
        return replica


class _WindowPool(StochasticPool):
    """A pool with the arguments of `nn.MaxPool2d`."""

    _shown = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")

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

    def _pooled(self, input: torch.Tensor, **others: Any) -> Pooled:
        window = self.kernel_size, self.stride, self.padding, self.dilation
        return type(self)._pool(input, *window, ceil_mode=self.ceil_mode, **others)


class StochasticPool1d(_WindowPool):
    """Stochastic pooling over `(N, C, L)` or `(C, L)`, with the arguments of `nn.MaxPool1d`.

    `forward(input, bias=None)`; see `stochastic_pool1d` for what it computes. It draws in training
    and gives the expectation in evaluation; with `sample_in_eval` it draws in both.
    """

    _pool = staticmethod(stochastic_pool1d)


class StochasticPool2d(_WindowPool):
    """Stochastic pooling over `(N, C, H, W)` or `(C, H, W)`, with the arguments of `nn.MaxPool2d`.

    `forward(input, bias=None)`; see `stochastic_pool2d` for what it computes. It draws in training
    and gives the expectation in evaluation; with `sample_in_eval` it draws in both. ReLU is part of
    it, and `pool(conv_without_bias(x), bias=conv.bias)` fuses a convolution's bias too.
    """

    _pool = staticmethod(stochastic_pool2d)


class StochasticPool3d(_WindowPool):
    """Stochastic pooling over `(N, C, D, H, W)` or `(C, D, H, W)`, with the arguments of
    `nn.MaxPool3d`; see `stochastic_pool3d` and `StochasticPool2d`."""

    _pool = staticmethod(stochastic_pool3d)


class _AdaptivePool(StochasticPool):
    """A pool with the arguments of `nn.AdaptiveMaxPool2d`."""

    _shown = ("output_size",)

    def __init__(
        self,
        output_size: int | Sequence[int | None] | None,
        *,
        return_indices: bool = False,
        sample_in_eval: bool = False,
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.return_indices = return_indices
        self.sample_in_eval = sample_in_eval

    def _pooled(self, input: torch.Tensor, **others: Any) -> Pooled:
        return type(self)._pool(input, self.output_size, **others)


class AdaptiveStochasticPool1d(_AdaptivePool):
    """Stochastic pooling to a given length, with the windows of `nn.AdaptiveMaxPool1d`; see
    `adaptive_stochastic_pool1d`."""

    _pool = staticmethod(adaptive_stochastic_pool1d)


class AdaptiveStochasticPool2d(_AdaptivePool):
    """Stochastic pooling to a given output size, with the windows of `nn.AdaptiveMaxPool2d`; see
    `adaptive_stochastic_pool2d`.

    Args:
        output_size: one int, or (height, width); None keeps the input's size.
    """

    _pool = staticmethod(adaptive_stochastic_pool2d)


class AdaptiveStochasticPool3d(_AdaptivePool):
    """Stochastic pooling to a given output size, with the windows of `nn.AdaptiveMaxPool3d`; see
    `adaptive_stochastic_pool3d`."""

    _pool = staticmethod(adaptive_stochastic_pool3d)
