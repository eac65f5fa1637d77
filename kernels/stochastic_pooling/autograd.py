"""The derivatives of the operator: what `loss.backward()`, `torch.func` and forward mode use.

The fused ops of `ops.py` give values and first derivatives in reverse mode. What is asked for
rarely (forward mode, derivatives of derivatives) is composed from PyTorch's own operators, which
any transform can take further.

Drawing is linear in what is drawn from once the cells are known, so all its derivatives are
picking cells and sending back to them. The expectation y = sum w * w / S has the derivative
(2 w_l - y) / S by each live weight (Zeiler & Fergus 2013, of equation 3.2).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import Function

from . import ops, reference
from .window import Window


class StochasticSample(Function):
    """Training mode: `(input, bias, seed, window) -> (output, code)`.

    Keeps the code alone for backward: one byte per output for windows of up to 255 cells.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, bias: Tensor | None, seed: Tensor, window: Window
    ) -> tuple[Tensor, Tensor]:
        return ops.sample(input, bias, seed, *window.arguments(input.dim() - 2))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        input, _, _, ctx.window = inputs
        _, code = output
        ctx.mark_non_differentiable(code)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(code)
        ctx.save_for_forward(code)
        ctx.size = tuple(input.shape[2:])
        ctx.dtype = input.dtype
        ctx.backend = None  # that of an eager call

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: None) -> tuple:
        if grad_output is None:
            return None, None, None, None
        (code,) = ctx.saved_tensors
        with_bias = ctx.needs_input_grad[1]
        arguments = grad_output, code, ctx.size, ctx.window, with_bias
        if _eager(ctx, grad_output, code):
            grad_input, grad_bias = ctx.backend.sample_backward(*arguments)
        else:
            grad_input, grad_bias = StochasticSampleBackward.apply(*arguments)
        return grad_input, grad_bias if with_bias else None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, bias_tangent: Tensor | None, *_: None) -> tuple:
        (code,) = ctx.saved_tensors
        return _pick(tangent, bias_tangent, code, ctx.size, ctx.window).to(ctx.dtype), None


class StochasticSampleBackward(Function):
    """`(grad_output, code, size, window, with_bias) -> (grad_input, grad_bias)`: linear."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_output: Tensor, code: Tensor, size: Sequence[int], window: Window, with_bias: bool
    ) -> tuple[Tensor, Tensor]:
        return ops.sample_backward(grad_output, code, size, *window.arguments(len(size)), with_bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, code, *ctx.arguments = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(code)
        ctx.save_for_forward(code)

    @staticmethod
    def backward(ctx: Any, tangent: Tensor | None, bias_tangent: Tensor | None) -> tuple:
        (code,) = ctx.saved_tensors
        size, window, _ = ctx.arguments
        grad = None
        if tangent is not None or bias_tangent is not None:
            grad = _pick(tangent, bias_tangent, code, size, window)
        return grad, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple:
        (code,) = ctx.saved_tensors
        return StochasticSampleBackward.apply(tangent, code, *ctx.arguments)


class StochasticExpectation(Function):
    """Evaluation mode: `(input, bias, window) -> output`. Keeps the input if a gradient is due."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, bias: Tensor | None, window: Window) -> Tensor:
        return ops.expectation(input, bias, *window.arguments(input.dim() - 2))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, bias, ctx.window = inputs
        ctx.save_for_backward(input, bias)
        ctx.save_for_forward(input, bias)
        ctx.backend = None

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        input, bias = ctx.saved_tensors
        with_bias = ctx.needs_input_grad[1]
        arguments = grad_output, input, bias, ctx.window, with_bias
        if _eager(ctx, grad_output, input, bias):
            grad_input, grad_bias = ctx.backend.expectation_backward(*arguments)
        else:
            grad_input, grad_bias = StochasticExpectationBackward.apply(*arguments)
        return grad_input, grad_bias if with_bias else None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, bias_tangent: Tensor | None, _: None) -> Tensor:
        input, bias = ctx.saved_tensors
        return _expectation_tangent(input, bias, tangent, bias_tangent, ctx.window)


class StochasticExpectationBackward(Function):
    """`(grad_output, input, bias, window, with_bias) -> (grad_input, grad_bias)`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_output: Tensor, input: Tensor, bias: Tensor | None, window: Window, with_bias: bool
    ) -> tuple[Tensor, Tensor]:
        return ops.expectation_backward(
            grad_output, input, bias, *window.arguments(input.dim() - 2), with_bias
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        grad_output, input, bias, ctx.window, ctx.with_bias = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output, input, bias)
        ctx.save_for_forward(grad_output, input, bias)

    @staticmethod
    def backward(ctx: Any, tangent: Tensor | None, bias_tangent: Tensor | None) -> tuple:
        grad_output, input, bias = ctx.saved_tensors
        # grad_input and grad_bias are the gradient of <grad_output, y>, so what they are
        # contracted with is a tangent, and the contraction is <grad_output, tangent of y>.
        grad = _expectation_tangent(input, bias, tangent, bias_tangent, ctx.window)
        second, bias_second = _second_derivative(
            grad_output, input, bias, tangent, bias_tangent, ctx.window
        )
        return grad, second, bias_second, None, None

    @staticmethod
    def jvp(
        ctx: Any,
        grad_tangent: Tensor | None,
        tangent: Tensor | None,
        bias_tangent: Tensor | None,
        *_: None,
    ) -> tuple:
        grad_output, input, bias = ctx.saved_tensors
        grad_input = torch.zeros_like(input)
        dtype = reference.accumulation_dtype(grad_output.dtype)
        grad_bias = input.new_zeros(input.shape[1] if ctx.with_bias else 0, dtype=dtype)
        if grad_tangent is not None:
            grad_input, grad_bias = StochasticExpectationBackward.apply(
                grad_tangent, input, bias, ctx.window, ctx.with_bias
            )
        if tangent is not None or bias_tangent is not None:
            # Second derivatives commute: the tangent of a gradient is the gradient of a tangent.
            second, bias_second = _second_derivative(
                grad_output, input, bias, tangent, bias_tangent, ctx.window
            )
            grad_input = grad_input + second
            if bias_second is not None and ctx.with_bias:
                grad_bias = grad_bias + bias_second
        return grad_input, grad_bias


def sample(
    input: Tensor, bias: Tensor | None, seed: Tensor, window: Window
) -> tuple[Tensor, Tensor]:
    """`ops.sample`, differentiable by whatever transform runs it."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        if not _transforming():
            return ops.sample(input, bias, seed, *window.arguments(input.dim() - 2))
    elif not ops.wants_ops(input, bias):
        return _EagerSample.apply(input, bias, seed, window)
    elif not _nested_forward_mode():
        return StochasticSample.apply(input, bias, seed, window)
    still = None if bias is None else bias.detach()
    _, code = ops.sample(input.detach(), still, seed, *window.arguments(input.dim() - 2))
    w = reference.rectify(input, bias)
    return _pick(w, None, code, input.shape[2:], window).to(input.dtype), code


def expectation(input: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """`ops.expectation`, differentiable by whatever transform runs it."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        if not _transforming() and not torch.onnx.is_in_onnx_export():
            return ops.expectation(input, bias, *window.arguments(input.dim() - 2))
    elif not ops.wants_ops(input, bias):
        return _EagerExpectation.apply(input, bias, window)
    elif not _nested_forward_mode():
        return StochasticExpectation.apply(input, bias, window)
    return _composed_expectation(input, bias, window)


def _transforming() -> bool:
    """Whether a transform of `torch.func` runs: `torch.compile` looks through a Function there, so
    that its derivatives would be lost."""
    return torch._C._are_functorch_transforms_active()


def _nested_forward_mode() -> bool:
    """Whether forward mode runs inside forward mode: PyTorch differentiates the `jvp` of a Function
    no further, and takes its outer tangents for zeros."""
    return eager_transforms.JVP_NESTING > 1


class _EagerSample(StochasticSample):
    """Without the ops, and without a second method for the context, whose arguments PyTorch matches
    by name at each call."""

    setup_context = Function.setup_context

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        ops.note_draw()
        backend = ops.backend_for(inputs[0].device, inputs[0].dim() == 5)
        output = backend.sample(*inputs)
        StochasticSample.setup_context(ctx, inputs, output)
        ctx.backend = backend
        return output


class _EagerExpectation(StochasticExpectation):
    """Likewise."""

    setup_context = Function.setup_context

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        backend = ops.backend_for(inputs[0].device, inputs[0].dim() == 5)
        output = backend.expectation(*inputs)
        StochasticExpectation.setup_context(ctx, inputs, output)
        ctx.backend = backend
        return output


def _eager(ctx: Any, *tensors: Tensor | None) -> bool:
    """Whether backward calls the backend that forward called."""
    unseen = ctx.backend is None or torch.compiler.is_compiling() or torch.is_grad_enabled()
    return not (unseen or ops.wants_ops(*tensors))


# A program that is compiled or exported calls the ops themselves, which know their gradients.


def _register(op: Any, function: Any, tensors: int) -> None:
    """`function` as the derivative of `op`, whose window is five arguments behind the tensors."""

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        window = Window.of(*inputs[tensors:])
        function.setup_context(ctx, (*inputs[:tensors], window), output)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        *gradients, _ = function.backward(ctx, *grads)
        return *gradients, None, None, None, None, None

    op.register_autograd(backward, setup_context=setup_context)


_register(ops.sample, StochasticSample, 3)
_register(ops.expectation, StochasticExpectation, 2)


def _pick(
    tangent: Tensor | None,
    bias_tangent: Tensor | None,
    code: Tensor,
    size: Sequence[int],
    window: Window,
) -> Tensor:
    """What lies in the drawn cells, `(N, C, OH, OW)`; 0 for a dead window."""
    picked: Any = 0
    if tangent is not None:
        index = window.flat_indices(code, *size)
        # `reshape`, for autograd's own batching of gradients has no `flatten`; no -1, for an empty
        # batch has no size to infer.
        cells = tangent.reshape(*code.shape[:2], math.prod(size))
        index = index.reshape(*code.shape[:2], math.prod(code.shape[2:]))
        picked = cells.gather(2, index).view(code.shape)
    if bias_tangent is not None:
        picked = picked + bias_tangent.view(bias_tangent.shape[0], *[1] * (code.dim() - 2))
    return torch.where(code == window.dead_code, 0, picked)


def _composed_expectation(input: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """The expectation in operators that every transform knows, and ONNX has.

    Squares of weights above 1e19 overflow in fp32.
    """
    kernel, stride, padding, dilation, ceil_mode = window.arguments(input.dim() - 2)
    w = reference.rectify(input, bias)
    if ceil_mode or max(dilation) > 1:
        cells = torch.stack(reference.cells(w, window))
        total, squares = cells.sum(0), cells.square().sum(0)
    else:
        # Both means have one divisor, which their quotient does not.
        mean = F.avg_pool2d if input.dim() == 4 else F.avg_pool3d
        total, squares = (mean(x, kernel, stride, padding) for x in (w, w * w))
    return _quotient(squares, total).to(input.dtype)


def composed_adaptive_expectation(
    input: Tensor, bias: Tensor | None, outputs: Sequence[int]
) -> Tensor:
    """`_composed_expectation` of adaptive windows, for ONNX: right at every size, though the
    windows' sizes follow it."""
    w = reference.rectify(input, bias)
    total, squares = w, w * w
    for dim, out in enumerate(outputs, 2):
        length = w.shape[dim]
        if out is length:
            continue
        cell = torch.arange(length, device=w.device)
        window = torch.arange(out, device=w.device)[:, None]
        # From floor(window * length / out) to ceil((window + 1) * length / out), [out, length].
        inside = ((cell + 1) * out > window * length) & (cell * out < (window + 1) * length)
        total, squares = (
            torch.where(inside, x.movedim(dim, -1)[..., None, :], 0).sum(-1).movedim(-1, dim)
            for x in (total, squares)
        )
    return _quotient(squares, total).to(input.dtype)


def _quotient(squares: Tensor, total: Tensor) -> Tensor:
    return squares / torch.where(total > 0, total, 1)  # of a dead window 0 / 1


def _expectation_tangent(
    input: Tensor,
    bias: Tensor | None,
    tangent: Tensor | None,
    bias_tangent: Tensor | None,
    window: Window,
) -> Tensor:
    """2 sum (w / S) t - (y / S) sum t, over the live cells with their tangents t.

    Not a number in a window with a NaN or an infinite cell.
    """
    w = reference.rectify(input, bias)
    t = torch.zeros_like(w) if tangent is None else tangent.to(w.dtype)
    if bias_tangent is not None:
        t = t + bias_tangent.view(bias_tangent.shape[0], *[1] * (w.dim() - 2))
    t = torch.where(w > 0, t, 0)
    # Sums that overflow are taken of smaller weights, as in the reference: w / S stays the same.
    cells = reference.cells(w, window)
    overflow = _sum(cells).isinf()
    scale = torch.where(overflow, reference.OVERFLOW_SCALE, w.new_ones(()))  # not the default dtype
    cells = [cell * scale for cell in cells]
    tangents = reference.cells(t, window)
    total = _sum(cells)
    live = ~(total < reference.SMALLEST_SUM)  # NaN lives
    divisor = torch.where(live, total, 1)
    shares = [cell / divisor for cell in cells]
    along = _sum(share * t_cell for share, t_cell in zip(shares, tangents, strict=True))
    # y / S is the sum of the squares of the shares.
    result = 2 * along - _sum(share * share for share in shares) * _sum(tangents)
    return torch.where(live, result, 0).to(input.dtype)


def _second_derivative(
    grad_output: Tensor,
    input: Tensor,
    bias: Tensor | None,
    tangent: Tensor | None,
    bias_tangent: Tensor | None,
    window: Window,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of <grad_output, tangent of the expectation> by input and bias."""
    inputs = (input,) if bias is None else (input, bias)

    def along(input: Tensor, bias: Tensor | None = None) -> Tensor:
        return _expectation_tangent(input, bias, tangent, bias_tangent, window)

    gradients = torch.func.vjp(along, *inputs)[1](grad_output)
    return gradients if bias is not None else (*gradients, None)


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)
