"""What a run is made of: its options, and the optimiser, schedule and averages they stand for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("step", "cosine")
AUGMENTATIONS = ("paper", "random")


@dataclass(frozen=True)
class TrainOptions:
    """What a run is made of. The defaults are the recipe of the flower replication.

    Attributes:
        data_dir: folder of the photographs, or ``"synthetic"``; only recorded here.
        recipe: name in :data:`RECIPES` that the other options began from, or None; only recorded
            here.
        augment: ``"paper"`` (61 variants, each once an epoch) or ``"random"``; only recorded here.
        repeats: items that random augmentation makes of an image in an epoch; only recorded here.
        validate: the quarter of the training images that stands in for the test images, 0 to 3,
            or None; only recorded here.
        pool: pooling of :class:`cnnsp.CNN_SP`.
        dropout: probability of dropping one of fc1's outputs.
        epochs: epochs in all, those before a resumed checkpoint included.
        batch_size: images in an optimiser step, over all parts and processes.
        accumulate: parts that a batch is computed in, one after the other, to save memory.
        opt: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        lr: learning rate, before ``schedule`` and ``warmup_epochs`` scale it.
        momentum: of SGD.
        nesterov: whether SGD's momentum looks ahead.
        weight_decay: L2 penalty; for ``"adamw"`` decoupled.
        schedule: ``"step"`` (a tenth every ``lr_step`` epochs) or ``"cosine"`` (to 0 at the end).
        lr_step: epochs after which the learning rate is divided by 10, again and again.
        warmup_epochs: epochs over which the learning rate rises to its value, step by step.
        label_smoothing: share of the target that is spread over all classes.
        mixup: parameter of the Beta distribution that pairs of images are mixed by; 0 for none.
        ema: decay of an exponential moving average of the weights, which is then what is
            evaluated; 0 for none.
        amp_dtype: autocast type, or None for plain fp32.
        channels_last: memory format of images and weights.
        torchcompile: mode of ``torch.compile``, or None for eager.
        seed: of the weights, the order and augmentation of the images, dropout and the pools.
        max_steps: optimiser steps after which to evaluate and stop, or None.
        log_interval: optimiser steps between two reports of the loss.
        checkpoint_interval: seconds after which a checkpoint is written within an epoch.
    """

    data_dir: str = "synthetic"
    recipe: str | None = None
    augment: str = "paper"
    repeats: int = 61
    validate: int | None = None
    pool: str = "stochastic"
    dropout: float = 0.1
    epochs: int = 30
    batch_size: int = 256
    accumulate: int = 1
    opt: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    schedule: str = "step"
    lr_step: int = 10
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    ema: float = 0.0
    amp_dtype: str | None = None
    channels_last: bool = False
    torchcompile: str | None = None
    seed: int = 0
    max_steps: int | None = None
    log_interval: int = 10
    checkpoint_interval: float = 60.0


# What `--recipe` names: settings of TrainOptions.
RECIPES: dict[str, dict[str, object]] = {
    "paper": {},
    # Chosen on held-out quarters of the 300 training photographs, see docs/study.md.
    "best": {
        "augment": "random",
        "repeats": 20,
        "epochs": 15,
        "batch_size": 64,
        "lr": 0.02,
        "nesterov": True,
        "weight_decay": 1e-3,
        "schedule": "cosine",
        "warmup_epochs": 0.5,
        "label_smoothing": 0.1,
        "mixup": 0.4,
        "ema": 0.99,
        "dropout": 0.3,
    },
}


def learning_rate(options: TrainOptions, epoch: int, step: int, steps: int) -> float:
    """That of step ``step`` of ``steps`` in ``epoch``, both counted from 0."""
    done = epoch + step / steps
    if options.schedule == "step":
        lr = options.lr * 0.1 ** (epoch // options.lr_step)
    else:
        lr = options.lr * 0.5 * (1 + math.cos(math.pi * done / options.epochs))
    if done < options.warmup_epochs:
        # The first step is not lost: it takes the rate that the rise has at its end.
        lr *= min(1.0, (done + 1 / steps) / options.warmup_epochs)
    return lr


def smoothed(loss: Tensor, log_probabilities: Tensor, smoothing: float) -> Tensor:
    """Add label smoothing to a loss (Szegedy et al. 2016, arXiv 1512.00567, section 7).

    Args:
        loss: negative log-likelihood, summed over the batch.
        log_probabilities: what it was computed from, ``[B, C]``.
        smoothing: share of the target that is spread evenly over all classes, from 0 to 1.
    """
    if smoothing == 0:
        return loss
    spread = -log_probabilities.float().mean(1).sum()
    return (1 - smoothing) * loss + smoothing * spread


def make_optimizer(
    parameters: Iterable[nn.Parameter], options: TrainOptions, device: torch.device
) -> torch.optim.Optimizer:
    """The optimiser of ``options.opt``; its learning rate is set anew at every step."""
    # A fused optimiser takes the gradient scaler's verdict on the device: no host synchronisation.
    fused = device.type == "cuda"
    lr, weight_decay = options.lr, options.weight_decay
    if options.opt == "sgd":
        sgd = torch.optim.SGD(
            parameters,
            lr,
            options.momentum,
            weight_decay=weight_decay,
            nesterov=options.nesterov,
            fused=fused,
        )
        if options.momentum > 0:
            # If the gradient scaler skips its first step, the fused optimiser would go on from
            # memory that nobody wrote.
            for group in sgd.param_groups:
                for parameter in group["params"]:
                    sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    if options.opt == "adam":
        return torch.optim.Adam(parameters, lr, weight_decay=weight_decay, fused=fused)
    if options.opt == "adamw":
        return torch.optim.AdamW(parameters, lr, weight_decay=weight_decay, fused=fused)
    raise ValueError(f"opt must be one of {', '.join(OPTIMIZERS)}, got {options.opt!r}")


class WeightAverage:
    """An exponential moving average of a network's parameters.

    Early on the average forgets faster, so that the random initial weights leave it soon: after
    ``n`` updates the decay is ``min(decay, (1 + n) / (10 + n))``.

    :class:`torch.optim.swa_utils.AveragedModel` does the same, but counts its updates on the
    device and reads the count at every step.

    Args:
        model: the network that is averaged.
        decay: from 0 to 1.

    Attributes:
        model: a copy with the averaged parameters.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = deepcopy(model).requires_grad_(False)
        self._source, self._decay = model, decay

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the weights as they are now, after ``updates`` earlier updates."""
        decay = min(self._decay, (1 + updates) / (10 + updates))
        average: list[Tensor] = [*self.model.parameters()]
        source: list[Tensor] = [*self._source.parameters()]
        torch._foreach_lerp_(average, source, 1 - decay)
