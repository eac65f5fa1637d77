"""Averages over several draws: what a network says, and how sure its pools let it be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from . import ops
from .modules import StochasticPool, check_model, nothing, sampled

_NO_DRAW = (
    "the model has no stochastic pool that draws here, so every draw would be the same: put some "
    "in, by hand (as modules: a function draws by its own argument alone) or with "
    "stochastic_pooling.replace_pooling(model); a model that was traced or exported in evaluation "
    "holds the expectation for good, so trace it within sampling(model)"
)


class Average(NamedTuple):
    """Mean and spread over the draws, of the output's shape."""

    mean: torch.Tensor
    std: torch.Tensor  # of a sample: the squares over draws - 1


@contextlib.contextmanager
def sampling(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context the stochastic pools of `model` draw in evaluation mode, too.

    It is the caller's context: other threads and tasks get the expectation, a new thread as well,
    and so does what a checkpoint computes again in a GPU's backward pass, which is another thread:
    set `sample_in_eval` there. A compiled model follows; one that was traced or exported keeps what
    it did then.

    Raises:
        TypeError: for a model that is no module.
        ValueError: if it has none.
    """
    check_model(model)
    pools = _pools(model)
    if not pools:
        raise ValueError(_NO_DRAW)
    sampled.set((*nothing.sampled, *pools))
    try:
        yield model
    finally:
        # Its own alone: contexts may overlap, and end in any order.
        left = list(nothing.sampled)
        for pool in pools:
            if pool in left:
                left.remove(pool)
        sampled.set(tuple(left) or nothing)


def _pools(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, StochasticPool)]


def average_draws(
    model: nn.Module,
    *inputs: Any,
    draws: int = 10,
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    **keywords: Any,
) -> Average:
    """Average a model's output over several draws of its stochastic pools.

    This is the model averaging that Zeiler & Fergus 2013 hold the expectation against (section
    3.2): each draw is another network of an exponential number that share their weights. The
    spread tells how much the output depends on the draw.

    Args:
        model: in evaluation mode, dropout apart, whose draws are then averaged too; it, or
            `transform`, gives one floating tensor. A traced or exported one must have been drawing.
        inputs, keywords: what it is called with; `draws` and `transform` are not passed on.
        draws: how many forward passes, at least 2.
        transform: applied to each output before it is averaged. Averaging probabilities is usually
            meant: `torch.exp` for a network that gives their logarithms.

    Returns:
        mean and standard deviation, in the output's dtype, but summed in fp64 (in fp32 where a
        device may lack it). `torch.manual_seed` reproduces them. No gradients.

    Raises:
        ValueError: for fewer than 2 draws, a model that is in training mode or has a part with
            buffers there (batch norm), or one in which no pool draws.
        TypeError: for a model that is no module, or where there is no floating tensor to average.
    """
    check_model(model)
    if draws < 2:
        raise ValueError(f"draws must be at least 2 for a spread, got {draws}")
    for name, module in model.named_modules():
        # Exported programs have no modes, but bare modules and, for `eval`, a refusal of their own.
        if not module.training or type(module) is nn.Module or "eval" in vars(module):
            continue
        if module is model:
            raise ValueError("the model is in training mode: call model.eval() first")
        if any(True for _ in module.buffers(recurse=False)):
            raise ValueError(
                f"{name}, a part of the model, is in training mode and has buffers, which draws "
                "would change as they do batch norm's: call model.eval() first, then train() of "
                "the dropouts alone"
            )
    context = sampling(model) if _pools(model) else contextlib.nullcontext()
    with torch.no_grad(), ops.observed() as drawn, context:
        for count in range(1, draws + 1):
            output = model(*inputs, **keywords)
            output = output if transform is None else transform(output)
            if not isinstance(output, torch.Tensor) or not output.is_floating_point():
                kind = getattr(output, "dtype", type(output).__name__)
                raise TypeError(
                    f"the draws are of {kind}, which has no mean: let transform make a floating "
                    "tensor of the model's output"
                )
            dtype = output.dtype
            # Squares of fp32 need more than its range; not every device has fp64.
            wide = torch.float64 if output.device.type in ("cpu", "cuda") else torch.float32
            output = output.to(torch.promote_types(dtype, wide))
            if count == 1:
                # A clone: the model may give the same memory every time (a buffer, CUDA graphs).
                mean, squares = output.clone(), torch.zeros_like(output)
                continue
            # Welford's way: no difference of large sums.
            step = torch.where(output == mean, 0, output - mean)  # of infinities, too
            mean = torch.where(mean.isinf() & output.isfinite(), mean, mean + step / count)
            squares = squares + step.square() * ((count - 1) / count)
    # The replay of a CUDA graph draws unobserved; then the outputs differ.
    if not drawn and not (mean.is_cuda and squares.any()):
        raise ValueError(_NO_DRAW)
    return Average(mean.to(dtype), (squares / (draws - 1)).sqrt().to(dtype))
