"""The operator as PyTorch sees it: registered ops, their batching, and the choice of a backend.

The ops are opaque to `torch.compile` and pure: the seed comes in as a tensor, so two pools of one
tensor are two calls with different arguments and never merged, and recomputing one in backward
draws the same cells again.
"""

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch

from . import reference
from .window import Window, memory_format

_MODULES = {"torch": "reference", "triton": "gpu.launch", "numba": "cpu"}

_PLAIN = (torch.Tensor, torch.nn.Parameter)

_observers: ContextVar[tuple[list[None], ...]] = ContextVar("observers", default=())


@contextlib.contextmanager
def observed() -> Iterator[list[None]]:
    """A list that gets an entry at each draw in the caller's context."""
    draws: list[None] = []
    token = _observers.set((*_observers.get(), draws))
    try:
        yield draws
    finally:
        _observers.reset(token)


def note_draw() -> None:
    """Tell those who observe draws of one."""
    for draws in _observers.get():
        draws.append(None)


def backend_for(device: torch.device, volumes: bool = False) -> ModuleType:
    """The module whose four functions serve planes, or volumes, on `device`.

    `STOCHASTIC_POOLING_BACKEND` forces one of torch, triton and numba.

    Raises:
        RuntimeError: if the one that is forced is unknown or cannot serve the device.
    """
    forced = os.environ.get("STOCHASTIC_POOLING_BACKEND")
    if not forced:
        return _default_backend(device.type, volumes)
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
    if forced not in _MODULES:
        why = f": choose one of {', '.join(_MODULES)}"
    elif forced == "triton" and device.type == "cpu" and not interpreted:
        why = (
            " cannot serve CPU tensors: set TRITON_INTERPRET=1 before Python starts to run the "
            "kernels in Triton's interpreter"
        )
    elif forced == "numba" and device.type != "cpu":
        why = f" serves CPU tensors, not those on {device}"
    elif forced == "numba" and volumes:
        why = " serves planes, not (N, C, D, H, W) volumes: unset it, or set it to torch"
    else:
        try:
            return _load(forced)
        except ImportError as error:
            why = f": {forced} cannot be imported here ({error})"
    raise RuntimeError(f"STOCHASTIC_POOLING_BACKEND={forced}{why}")


@functools.cache
def _default_backend(device_type: str, volumes: bool) -> ModuleType:
    # Triton's drivers: CUDA and ROCm both call themselves "cuda", Intel GPUs "xpu".
    preferred = {"cpu": "numba", "cuda": "triton", "xpu": "triton"}.get(device_type)
    if preferred is None or (preferred == "numba" and volumes):
        return reference
    try:
        return _load(preferred)
    except ImportError:
        return reference


@functools.cache
def _load(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{_MODULES[name]}")


def wants_ops(*tensors: torch.Tensor | None) -> bool:
    """Whether, in code that is neither compiled nor traced, something may want to see the ops
    rather than what a backend does for these tensors: a transform, a mode, a subclass.

    Eager code on plain tensors calls the backend itself, for a small pool takes no longer than the
    dispatch of an op that is written in Python.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(map(_is_special, tensors))
    )


def _is_special(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and (
        type(tensor) not in _PLAIN
        or tensor.is_meta
        or tensor.is_neg()
        or tensor._is_zerotensor()
        # Autograd's own batches (`is_grads_batched`), and functionalized tensors: of plain type.
        or torch._C._functorch.is_legacy_batchedtensor(tensor)
        or torch._is_functional_tensor(tensor)
    )


# Any layout will do, so that Inductor copies no tensor into the one that it traced.
_op = functools.partial(torch.library.custom_op, mutates_args=(), tags=(torch.Tag.flexible_layout,))
# The arguments of `Window.of`, which every op has.
_WINDOW = (
    "SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool ceil_mode"
)


@_op(
    "stochastic_pooling::sample",
    schema=f"(Tensor input, Tensor? bias, Tensor seed, {_WINDOW}) -> (Tensor, Tensor)",
)
def sample(input, bias, seed, *window):
    """`reference.sample` on the backend of the input's device."""
    note_draw()
    backend = backend_for(input.device, input.dim() == 5)
    return backend.sample(input, bias, seed, Window.of(*window))


@sample.register_fake
def _(input, bias, seed, *arguments):
    window = Window.of(*arguments)
    return tuple(_empty_output(input, window, dtype) for dtype in (input.dtype, window.code_dtype))


@_op(
    "stochastic_pooling::sample_backward",
    schema=f"(Tensor grad_output, Tensor code, SymInt[] size, {_WINDOW}, bool with_bias) "
    "-> (Tensor, Tensor)",
)
def sample_backward(grad_output, code, size, *rest):
    """`reference.sample_backward` on the backend of the gradient's device."""
    *window, with_bias = rest
    backend = backend_for(grad_output.device, grad_output.dim() == 5)
    return backend.sample_backward(grad_output, code, size, Window.of(*window), with_bias)


@sample_backward.register_fake
def _(grad_output, code, size, *rest):
    return _empty_gradients(grad_output, size, code, with_bias=rest[-1])


@_op("stochastic_pooling::expectation", schema=f"(Tensor input, Tensor? bias, {_WINDOW}) -> Tensor")
def expectation(input, bias, *window):
    """`reference.expectation` on the backend of the input's device."""
    backend = backend_for(input.device, input.dim() == 5)
    return backend.expectation(input, bias, Window.of(*window))


@expectation.register_fake
def _(input, bias, *arguments):
    return _empty_output(input, Window.of(*arguments), input.dtype)


@_op(
    "stochastic_pooling::expectation_backward",
    schema=f"(Tensor grad_output, Tensor input, Tensor? bias, {_WINDOW}, bool with_bias) "
    "-> (Tensor, Tensor)",
)
def expectation_backward(grad_output, input, bias, *rest):
    """`reference.expectation_backward` on the backend of the gradient's device."""
    *window, with_bias = rest
    backend = backend_for(grad_output.device, grad_output.dim() == 5)
    return backend.expectation_backward(grad_output, input, bias, Window.of(*window), with_bias)


@expectation_backward.register_fake
def _(grad_output, input, bias, *rest):
    return _empty_gradients(grad_output, input.shape[2:], input, with_bias=rest[-1])


@sample.register_vmap
def _(info, in_dims, input, bias, seed, *window):
    """Examples become channels of one call, and so draw differently, as `vmap` wants it with
    `randomness="different"`. With "same" the one seed draws the same cells in each example."""
    dims, size = in_dims[:3], info.batch_size
    if dims[2] is None and size:
        examples = (
            sample(_example(input, dims[0], n), _example(bias, dims[1], n), seed, *window)
            for n in range(size)
        )
        output, code = (torch.stack(results) for results in zip(*examples, strict=True))
        return (output, code), (0, 0)
    output, code = sample(
        _fold(input, dims[0], size),
        _fold(bias, dims[1], size),
        seed if dims[2] is None else seed[:1].sum(),  # also of no example
        *window,
    )
    shape = _shape(input, dims[0], size)
    return (output.unflatten(1, shape), code.unflatten(1, shape)), (1, 1)


@sample_backward.register_vmap
def _(info, in_dims, grad_output, code, *rest):
    return _map_backward(sample_backward, info, in_dims, (grad_output, code), rest)


@expectation.register_vmap
def _(info, in_dims, input, bias, *window):
    output = expectation(
        _fold(input, in_dims[0], info.batch_size), _fold(bias, in_dims[1], info.batch_size), *window
    )
    return output.unflatten(1, _shape(input, in_dims[0], info.batch_size)), 1


@expectation_backward.register_vmap
def _(info, in_dims, grad_output, input, bias, *rest):
    return _map_backward(expectation_backward, info, in_dims, (grad_output, input, bias), rest)


def _map_backward(op: Any, info: Any, in_dims: tuple, tensors: tuple, rest: tuple) -> tuple:
    """An op for gradients, on examples as channels; `rest` are its arguments after the tensors."""
    size, with_bias = info.batch_size, rest[-1]
    folded = [_fold(*of, size) for of in zip(tensors, in_dims, strict=False)]
    grad_input, grad_bias = op(*folded, *rest)
    shape = _shape(tensors[0], in_dims[0], size)
    if with_bias:
        grad_bias = grad_bias.unflatten(0, shape)
    return (grad_input.unflatten(1, shape), grad_bias), (1, 0 if with_bias else None)


def _example(tensor: Any, dim: int | None, number: int) -> Any:
    return tensor if dim is None else tensor.select(dim, number)


def _fold(tensor: Any, dim: int | None, size: int) -> Any:
    """The examples of a `vmap` as channels: `(N, size * C, …)`; those of a bias, `(size * C,)`."""
    if tensor is None:
        return None
    channel = int(tensor.dim() - (dim is not None) > 1)
    if dim is None:
        return tensor.repeat(*[1] * channel, size, *[1] * (tensor.dim() - channel - 1))
    return tensor.movedim(dim, channel).flatten(channel, channel + 1)


def _shape(tensor: torch.Tensor, dim: int | None, size: int) -> tuple[int, int]:
    """`(size, C)`: of no example no number of channels says how many each has."""
    return size, tensor.shape[1] if dim is None else tensor.movedim(dim, 0).shape[2]


def _empty_output(input: torch.Tensor, window: Window, dtype: torch.dtype) -> torch.Tensor:
    size = (*input.shape[:2], *window.output_size(*input.shape[2:]))
    return input.new_empty(size, dtype=dtype).clone(memory_format=memory_format(input))


def _empty_gradients(
    grad_output: torch.Tensor, size: Sequence[int], like: torch.Tensor, with_bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_input = grad_output.new_empty(*grad_output.shape[:2], *size)
    dtype = reference.accumulation_dtype(grad_output.dtype)
    grad_bias = grad_output.new_empty(grad_output.shape[1] if with_bias else 0, dtype=dtype)
    return grad_input.clone(memory_format=memory_format(like)), grad_bias
