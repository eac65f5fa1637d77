"""Averages over several draws: what a network says, and how sure its pools let it be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from .modules import StochasticPool


class Average(NamedTuple):
    """Mean and spread over the draws.

    Attributes:
        mean: of the outputs, of their shape.
        std: their standard deviation (of a sample: the squares over draws - 1).
    """

    mean: torch.Tensor
    std: torch.Tensor


@contextlib.contextmanager
def sampling(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context the stochastic pools of `model` draw in evaluation mode, too.

    Raises:
        ValueError: if it has none.
    """
    pools = [module for module in model.modules() if isinstance(module, StochasticPool)]
    if not pools:
        raise ValueError(
            "the model has no stochastic pool, so every draw would be the same: put some in, by "
            "hand or with stochastic_pooling.replace_pooling(model)"
        )
    before = [pool.sample_in_eval for pool in pools]
    try:
        for pool in pools:
            pool.sample_in_eval = True
        yield model
    finally:
        for pool, value in zip(pools, before, strict=True):
            pool.sample_in_eval = value


def average_draws(
    model: nn.Module,
    *inputs: Any,
    draws: int = 10,
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Average:
    """Average a model's output over several draws of its stochastic pools.

    This is the model averaging that Zeiler & Fergus 2013 hold the expectation against (section
    3.2): each draw is another network of an exponential number that share their weights. The
    spread tells how much the output depends on the draw.

    Args:
        model: in evaluation mode; it, or `transform`, gives one floating tensor.
        inputs: what it is called with.
        draws: how many forward passes, at least 2.
        transform: applied to each output before it is averaged. Averaging probabilities is usually
            meant: `torch.exp` for a network that gives their logarithms.

    Returns:
        mean and standard deviation, in the output's dtype (summed in fp32 for fp16 and bf16).
        `torch.manual_seed` reproduces them. No gradients.

    Raises:
        ValueError: for fewer than 2 draws, a model without stochastic pools or in training mode.
        TypeError: where there is no floating tensor to average.
    """
    if draws < 2:
        raise ValueError(f"draws must be at least 2 for a spread, got {draws}")
    if any(module.training for module in model.modules()):
        raise ValueError(
            "the model, or a part of it, is in training mode, where dropout and batch norm would "
            "change it from draw to draw: call model.eval() first"
        )
    with torch.no_grad(), sampling(model):
        for count in range(1, draws + 1):
            output = model(*inputs)
            output = output if transform is None else transform(output)
            if not isinstance(output, torch.Tensor) or not output.is_floating_point():
                kind = getattr(output, "dtype", type(output).__name__)
                raise TypeError(
                    f"the draws are of {kind}, which has no mean: let transform make a floating "
                    "tensor of the model's output"
                )
            dtype = output.dtype
            output = output.float() if dtype in (torch.float16, torch.bfloat16) else output
            if count == 1:
                # A clone: the model may give the same memory every time (a buffer, CUDA graphs).
                mean, squares = output.clone(), torch.zeros_like(output)
                continue
            # Welford's way: no difference of large sums.
            step = output - mean
            mean = mean + step / count
            squares = squares + step * (output - mean)
    return Average(mean.to(dtype), (squares / (draws - 1)).sqrt().to(dtype))
