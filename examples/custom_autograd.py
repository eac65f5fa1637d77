"""Draw forward, differentiate the expectation backward: a gradient of your own.

    python examples/custom_autograd.py

In training the operator sends a gradient to the cell that was drawn, as Zeiler & Fergus 2013 do.
On average a cell l of a window of sum S then gets w_l / S, as if the odds of the draw were fixed.
But the weights move the odds, too: the mean output y = sum w² / S has the derivative
(2 w_l - y) / S. The function below draws a cell and sends that derivative back, to every cell of
the window. The noise that regularises stays in the forward pass. The price: it keeps the input, not
one byte an output.

It calls the ops that the package registers, as an exported model does. Their arguments are those
of `stochastic_pool2d` as lists, for `(N, C, H, W)` tensors; the seed is an int64 tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import Function

from stochastic_pooling import stochastic_pool2d

ops = torch.ops.stochastic_pooling
WINDOW = ([3, 3], [2, 2], [1, 1], [1, 1], False)  # kernel, stride, padding, dilation, ceil_mode


class DrawWithMeanGradient(Function):
    """`(input, bias) -> output`: `(N, C, H, W)` and `(C,)` to `(N, C, OH, OW)`."""

    @staticmethod
    def forward(input: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        seed = torch.randint(-(2**63), 2**63 - 1, (), device=input.device)
        output, _ = ops.sample(input, bias, seed, *WINDOW)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        input, bias = ctx.saved_tensors
        grads = ops.expectation_backward(grad_output, input, bias, *WINDOW, True)
        return grads[0], grads[1].to(bias.dtype)


def drawn(input: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return stochastic_pool2d(input, 3, 2, 1, bias=bias)


def expected(input: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return stochastic_pool2d(input, 3, 2, 1, bias=bias, training=False)


def main(draws: int = 100) -> dict[str, tuple[float, float]]:
    """Return the error of the mean gradient and the spread of one, by the name of the pool."""
    torch.manual_seed(0)
    images, target = torch.randn(4, 3, 16, 16), torch.randn(4, 8, 8, 8)
    weight = (torch.randn(8, 3, 3, 3) / 27**0.5).requires_grad_()
    bias = torch.randn(8).requires_grad_()

    def gradient(pool: Callable[..., torch.Tensor]) -> torch.Tensor:
        """For a loss that is linear in the output, whose mean is then that of the mean output."""
        output = pool(F.conv2d(images, weight, padding=1), bias)
        grads = torch.autograd.grad((output * target).mean(), (weight, bias))
        return torch.cat([grad.flatten() for grad in grads])

    wanted = gradient(expected)
    results = {}
    print("the gradient is that of    error of the mean    spread over draws    (both relative)")
    for name, pool in {"the drawn cell": drawn, "the mean": DrawWithMeanGradient.apply}.items():
        found = torch.stack([gradient(pool) for _ in range(draws)])
        error = (found.mean(0) - wanted).norm() / wanted.norm()
        spread = found.std(0).norm() / wanted.norm()
        results[name] = error.item(), spread.item()
        print(f"{name:22}    {error:17.3f}    {spread:17.3f}")
    return results


if __name__ == "__main__":
    main()
