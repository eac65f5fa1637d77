"""The operator as PyTorch sees it: registered ops, their autograd, and the choice of a backend.

The ops are opaque to `torch.compile` and pure: the seed comes in as a tensor, so two pools of one
tensor are two calls with different arguments and never merged, and recomputing one in backward
draws the same cells again.
"""

import importlib
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from . import reference
from .window import Window, memory_format

# Kernel size, stride, padding, dilation, ceil_mode: what `Window.of` takes.
WindowArguments = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int], bool]

_BACKENDS = ("torch", "triton", "numba")


def backend_for(device: torch.device) -> ModuleType:
    """The module whose four functions serve tensors on `device`.

    `STOCHASTIC_POOLING_BACKEND` forces one of torch, triton and numba.

    Raises:
        RuntimeError: if the one that is forced is unknown or cannot serve the device.
    """
    forced = os.environ.get("STOCHASTIC_POOLING_BACKEND")
    if not forced:
        return _default_backend(device.type)
    if forced not in _BACKENDS:
        raise RuntimeError(
            f"STOCHASTIC_POOLING_BACKEND={forced}: choose one of {', '.join(_BACKENDS)}"
        )
    if forced == "torch":
        return reference
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if forced == "triton" and device.type == "cpu" and not interpreted:
        raise RuntimeError(
            "STOCHASTIC_POOLING_BACKEND=triton cannot serve CPU tensors: set TRITON_INTERPRET=1 "
            "before Python starts to run the kernels in Triton's interpreter"
        )
    if forced == "numba" and device.type != "cpu":
        raise RuntimeError(
            f"STOCHASTIC_POOLING_BACKEND=numba serves CPU tensors, not those on {device}"
        )
    try:
        return _load(forced)
    except ImportError as error:
        raise RuntimeError(
            f"STOCHASTIC_POOLING_BACKEND={forced}: {forced} cannot be imported here ({error})"
        ) from error


def _default_backend(device_type: str) -> ModuleType:
    # Triton's drivers: CUDA and ROCm both call themselves "cuda", Intel GPUs "xpu".
    preferred = {"cpu": "numba", "cuda": "triton", "xpu": "triton"}.get(device_type)
    if preferred is None:
        return reference
    try:
        return _load(preferred)
    except ImportError:
        return reference


def _load(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}_kernels")


@torch.library.custom_op("stochastic_pooling::sample", mutates_args=())
def sample(
    input: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.sample` on the backend of the input's device."""
    window = Window.of(kernel_size, stride, padding, dilation, ceil_mode)
    return backend_for(input.device).sample(input, bias, seed, window)


@sample.register_fake
def _(input, bias, seed, kernel_size, stride, padding, dilation, ceil_mode):
    window = Window.of(kernel_size, stride, padding, dilation, ceil_mode)
    output = _empty_output(input, window)
    return output, torch.empty_like(output, dtype=window.code_dtype)


@torch.library.custom_op("stochastic_pooling::sample_backward", mutates_args=())
def sample_backward(
    grad_output: torch.Tensor,
    code: torch.Tensor,
    height: int,
    width: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    with_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.sample_backward` on the backend of the gradient's device."""
    window = Window.of(kernel_size, stride, padding, dilation, ceil_mode)
    backend = backend_for(grad_output.device)
    return backend.sample_backward(grad_output, code, height, width, window, with_bias)


@sample_backward.register_fake
def _(
    grad_output,
    code,
    height,
    width,
    kernel_size,
    stride,
    padding,
    dilation,
    ceil_mode,
    with_bias,
):
    batch, channels = grad_output.shape[:2]
    grad_input = grad_output.new_empty(batch, channels, height, width)
    grad_input = grad_input.contiguous(memory_format=memory_format(code))
    return grad_input, _empty_grad_bias(grad_output, with_bias)


@torch.library.custom_op("stochastic_pooling::expectation", mutates_args=())
def expectation(
    input: torch.Tensor,
    bias: torch.Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> torch.Tensor:
    """`reference.expectation` on the backend of the input's device."""
    window = Window.of(kernel_size, stride, padding, dilation, ceil_mode)
    return backend_for(input.device).expectation(input, bias, window)


@expectation.register_fake
def _(input, bias, kernel_size, stride, padding, dilation, ceil_mode):
    return _empty_output(input, Window.of(kernel_size, stride, padding, dilation, ceil_mode))


@torch.library.custom_op("stochastic_pooling::expectation_backward", mutates_args=())
def expectation_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    bias: torch.Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    with_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.expectation_backward` on the backend of the gradient's device."""
    window = Window.of(kernel_size, stride, padding, dilation, ceil_mode)
    backend = backend_for(grad_output.device)
    return backend.expectation_backward(grad_output, input, bias, window, with_bias)


@expectation_backward.register_fake
def _(grad_output, input, bias, kernel_size, stride, padding, dilation, ceil_mode, with_bias):
    grad_input = grad_output.new_empty(input.shape)
    grad_input = grad_input.contiguous(memory_format=memory_format(input))
    return grad_input, _empty_grad_bias(grad_output, with_bias)


def _empty_output(input: torch.Tensor, window: Window) -> torch.Tensor:
    height, width = window.output_size(*input.shape[-2:])
    output = input.new_empty(*input.shape[:2], height, width)
    return output.contiguous(memory_format=memory_format(input))


def _empty_grad_bias(grad_output: torch.Tensor, with_bias: bool) -> torch.Tensor:
    dtype = reference.accumulation_dtype(grad_output.dtype)
    return grad_output.new_empty(grad_output.shape[1] if with_bias else 0, dtype=dtype)


class StochasticSample(torch.autograd.Function):
    """Training mode: `(input, bias, seed, window) -> (output, code)`.

    Keeps the code alone for backward: one byte per output for windows of up to 255 cells.
    """

    @staticmethod
    def forward(
        input: torch.Tensor,
        bias: torch.Tensor | None,
        seed: torch.Tensor,
        window: WindowArguments,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return sample(input, bias, seed, *window)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        input, bias, _, ctx.window = inputs
        _, code = output
        ctx.mark_non_differentiable(code)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(code)
        ctx.height, ctx.width = input.shape[-2:]
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor | None, _: None) -> tuple:
        if grad_output is None:
            return None, None, None, None
        (code,) = ctx.saved_tensors
        with_bias = ctx.needs_input_grad[1]
        grad_input, grad_bias = sample_backward(
            grad_output, code, ctx.height, ctx.width, *ctx.window, with_bias
        )
        return grad_input, grad_bias.to(ctx.bias_dtype) if with_bias else None, None, None


class StochasticExpectation(torch.autograd.Function):
    """Evaluation mode: `(input, bias, window) -> output`. Keeps the input if a gradient is due."""

    @staticmethod
    def forward(
        input: torch.Tensor, bias: torch.Tensor | None, window: WindowArguments
    ) -> torch.Tensor:
        return expectation(input, bias, *window)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        input, bias, ctx.window = inputs
        ctx.save_for_backward(input, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple:
        input, bias = ctx.saved_tensors
        with_bias = ctx.needs_input_grad[1]
        grad_input, grad_bias = expectation_backward(
            grad_output, input, bias, *ctx.window, with_bias
        )
        return grad_input, grad_bias.to(bias.dtype) if with_bias else None, None
