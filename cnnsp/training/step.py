"""The network with its optimiser: one step of training, and their state."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from copy import deepcopy
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..network import CNN_SP
from .devices import autocast
from .processes import Team
from .recipe import OPTIMIZERS, TrainOptions


def seed_draws(seed: int, step: int, rank: int) -> None:
    """Set PyTorch's generators to a state that follows from these three numbers alone.

    Dropout and the pools then draw the same in a run that was interrupted, without a random state
    to keep, and differently in every step and process.
    """
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> np.uint64(1)))


class Learner:
    """Trains one CNN_SP.

    Args:
        options: the recipe.
        num_classes: of the network.
        device: where it trains.
        team: the processes that train together; each has a learner and a part of every batch.

    Attributes:
        model: the network that is trained.
    """

    def __init__(
        self, options: TrainOptions, num_classes: int, device: torch.device, team: Team
    ) -> None:
        self.options, self.device, self.team = options, device, team
        self.amp_dtype = getattr(torch, options.amp_dtype) if options.amp_dtype else None

        torch.manual_seed(options.seed)
        model = CNN_SP(num_classes, options.pool, options.dropout).to(device)
        if options.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.model = model
        self._average = WeightAverage(model, options.ema) if options.ema > 0 else None
        self._optimizer = make_optimizer(model.parameters(), options, device)
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype == torch.float16)

        self._forward: nn.Module = model
        if team.size > 1:
            # Every process makes the same model; the gradients' mean keeps them the same.
            ids = [device.index] if device.type == "cuda" else None
            self._forward = DistributedDataParallel(model, device_ids=ids)
        if options.torchcompile is not None:
            mode = None if options.torchcompile == "default" else options.torchcompile
            self._forward = cast(nn.Module, torch.compile(self._forward, mode=mode))

    @property
    def network(self) -> nn.Module:
        """The network that the run is for: the average of the weights, where there is one."""
        return self.model if self._average is None else self._average.model

    def step(
        self, images: Tensor, labels: Tensor, *, batch_size: int, number: int, lr: float
    ) -> Tensor:
        """One step of the optimiser.

        Args:
            images: this process's part of the batch, ``[B, 3, 256, 256]``; may be empty.
            labels: int64 ``[B]``.
            batch_size: images in the whole batch.
            number: steps before this one, since the run began.
            lr: learning rate.

        Returns:
            The mean loss of the whole batch, without label smoothing: float32 on the device, still
            to be computed there.
        """
        self._forward.train()
        seed_draws(self.options.seed, number, self.team.rank)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        parts = max(1, min(self.options.accumulate, len(images)))
        for part, (x, y) in enumerate(
            zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True), start=1
        ):
            # The processes exchange their gradients once, after the last part.
            waits = part < parts and self.team.size > 1
            with self._forward.no_sync() if waits else nullcontext():  # type: ignore[operator]
                loss += self._backward(x, y, batch_size)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._average is not None:
            self._average.update(number)
        return self.team.sum(loss)

    def _backward(self, images: Tensor, labels: Tensor, batch_size: int) -> Tensor:
        """Add a part's gradients; its share of the batch's mean loss."""
        share, others = 1.0, None
        if self.options.mixup > 0:
            # Mixup (Zhang et al. 2018, arXiv 1710.09412), with partners of the same batch.
            alpha = self.options.mixup
            share = float(torch.distributions.Beta(alpha, alpha).sample())
            others = torch.randperm(len(images), device=self.device)
            images = torch.lerp(images[others], images, share)
        with autocast(self.device, self.amp_dtype):
            output = self._forward(images)
        loss = F.nll_loss(output.float(), labels, reduction="sum")
        if others is not None:
            other_loss = F.nll_loss(output.float(), labels[others], reduction="sum")
            loss = share * loss + (1 - share) * other_loss
        objective = smoothed(loss, output, self.options.label_smoothing)
        # DistributedDataParallel takes the mean over the processes, where the sum is wanted.
        self._scaler.scale(objective * (self.team.size / batch_size)).backward()
        return loss.detach() / batch_size

    def is_finite(self) -> bool:
        """Whether every weight is; waits for the device."""
        largest = torch._foreach_norm([*self.model.parameters()], torch.inf)
        return bool(torch.isfinite(torch.stack(largest)).all())

    def state(self) -> dict[str, Any]:
        """What :meth:`load` goes on from."""
        average = None if self._average is None else self._average.model.state_dict()
        return {
            "model": self.model.state_dict(),
            "average": average,
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a state; settings that the options give anew hold.

        Raises:
            RuntimeError, KeyError, TypeError, ValueError: when it is that of something else.
        """
        self.model.load_state_dict(state["model"])
        if self._average is not None:
            # A run that begins to average starts from the weights that there are.
            self._average.model.load_state_dict(state["average"] or state["model"])
        self._load_optimizer(state["optimizer"])
        if state["scaler"] and self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        # A checkpoint has all settings of the optimiser, those that fit its machine included.
        ours = self._optimizer.param_groups[0]
        settings = {name: value for name, value in ours.items() if name not in ("params", "lr")}
        groups = [{**group, **settings} for group in state["param_groups"]]
        self._optimizer.load_state_dict({**state, "param_groups": groups})
        for parameter, values in self._optimizer.state.items():
            for name, value in values.items():
                # Fused optimisers need a state that lies in memory as the weight does.
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    values[name] = torch.empty_like(parameter).copy_(value)


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
