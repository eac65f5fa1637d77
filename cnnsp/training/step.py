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
from .recipe import TrainOptions


def seed_draws(seed: int, step: int, rank: int) -> None:
    """Set PyTorch's generators to a state that follows from these three numbers alone.

    Dropout and the pools then draw the same in a run that was interrupted, without a random state
    to keep, and differently in every step and process.
    """
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> np.uint64(1)))


class Learner:
    """Trains one CNN_SP, ``model``.

    Of a ``team`` of processes each has a learner, and gets a part of every batch.
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
        self._average = deepcopy(model) if options.ema > 0 else None
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
        return self._average or self.model

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

        Returns the mean loss of the whole batch, without label smoothing: float32 on the device,
        still to be computed there.
        """
        self._forward.train()  # an evaluation that was interrupted leaves another mode
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
            average_weights(self._average, self.model, self.options.ema, number)
        return self.team.sum(loss)

    def _backward(self, images: Tensor, labels: Tensor, batch_size: int) -> Tensor:
        """Add a part's gradients; its share of the batch's mean loss."""
        images, others, share = mixed(images, self.options)
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
        return {
            "model": self.model.state_dict(),
            "average": self._average.state_dict() if self._average else None,
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
            self._average.load_state_dict(state["average"] or state["model"])
        self._load_optimizer(state["optimizer"])
        if state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        # A checkpoint has all settings of the optimiser, those that fit its machine included.
        ours = self._optimizer.param_groups[0]
        settings = {name: value for name, value in ours.items() if name != "params"}
        groups = [{**group, **settings} for group in state["param_groups"]]
        self._optimizer.load_state_dict({**state, "param_groups": groups})
        for parameter, values in self._optimizer.state.items():
            for name, value in values.items():
                # Fused optimisers need a state that lies in memory as the weight does.
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    values[name] = torch.empty_like(parameter).copy_(value)


def mixed(images: Tensor, options: TrainOptions) -> tuple[Tensor, Tensor | None, float]:
    """Mix each image of a batch with another of it, if ``options`` ask for that.

    With the probability ``options.cutmix`` by a rectangle of the other (CutMix, Yun et al. 2019,
    arXiv 1905.04899), else by weights (mixup, Zhang et al. 2018, arXiv 1710.09412).

    Returns images, the others' numbers and the share of the first: mixed labels are
    ``share * labels + (1 - share) * labels[others]``. No others: the images are as they were.
    """
    # torchvision's transforms of these names leave channels_last on CUDA.
    if options.cutmix > 0 and float(torch.rand(())) < options.cutmix:
        others = torch.randperm(len(images), device=images.device)
        height, width = images.shape[2:]
        side = float(torch.rand(())) ** 0.5  # so its area is uniform
        high, wide = round(side * height), round(side * width)
        top = int(torch.randint(height - high + 1, ()))
        left = int(torch.randint(width - wide + 1, ()))
        images, box = images.clone(), (..., slice(top, top + high), slice(left, left + wide))
        images[box] = images[others][box]
        return images, others, 1 - high * wide / (height * width)
    if options.mixup >= 0.01:  # less mixes next to nothing, and PyTorch draws it wrong
        share = float(torch.distributions.Beta(options.mixup, options.mixup).sample())
        others = torch.randperm(len(images), device=images.device)
        return torch.lerp(images[others], images, share), others, share
    return images, None, 1.0


def smoothed(loss: Tensor, log_probabilities: Tensor, smoothing: float) -> Tensor:
    """Add label smoothing to a loss (Szegedy et al. 2016, arXiv 1512.00567, section 7).

    ``loss`` is the negative log-likelihood of ``log_probabilities``, ``[B, C]``, summed over the
    batch; ``smoothing`` the share of the target that is spread over all classes, from 0 to 1.
    """
    if smoothing == 0:
        return loss
    spread = -log_probabilities.float().mean(1).sum()
    return (1 - smoothing) * loss + smoothing * spread


def make_optimizer(
    parameters: Iterable[nn.Parameter], options: TrainOptions, device: torch.device
) -> torch.optim.Optimizer:
    """The optimiser of ``options.opt``; its learning rate is set anew at every step."""
    common: Any = {
        "lr": options.lr,
        "weight_decay": options.weight_decay,
        # It takes the gradient scaler's verdict on the device: no host synchronisation.
        "fused": device.type == "cuda",
    }
    if options.opt == "adam":
        return torch.optim.Adam(parameters, **common)
    if options.opt == "adamw":
        return torch.optim.AdamW(parameters, **common)
    momentum: Any = {"momentum": options.momentum, "nesterov": options.nesterov}
    sgd = torch.optim.SGD(parameters, **momentum, **common)
    if options.momentum > 0:
        # If the gradient scaler skips its first step, the fused optimiser would go on from memory
        # that nobody wrote.
        for parameter in sgd.param_groups[0]["params"]:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


@torch.no_grad()
def average_weights(average: nn.Module, model: nn.Module, decay: float, updates: int) -> None:
    """Take ``model``'s parameters into an exponential moving average of them.

    Early on it forgets faster, so that the random initial weights leave it soon: after ``n``
    updates the decay is ``min(decay, (1 + n) / (10 + n))``.
    """
    # torch.optim.swa_utils.AveragedModel counts its updates on the device, and reads the count at
    # every step.
    decay = min(decay, (1 + updates) / (10 + updates))
    torch._foreach_lerp_([*average.parameters()], [*model.parameters()], 1 - decay)
