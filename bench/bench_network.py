"""CNN_SP by pooling: a training step and the use of the trained network, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from contest import Case, Contestant

from cnnsp.network import IMAGE_SIZE, POOLINGS
from cnnsp.training.devices import autocast, choose_amp_dtype
from cnnsp.training.processes import Team
from cnnsp.training.recipe import TrainOptions
from cnnsp.training.step import Learner

CLASSES = 3


def cases(device: torch.device) -> list[NetworkCase]:
    amp_dtype = choose_amp_dtype(True, None, device)  # none on a CPU that would be slower with it
    dtypes = [None] if amp_dtype is None else [None, amp_dtype]
    return [NetworkCase(dtype, training, device) for dtype in dtypes for training in (True, False)]


class NetworkCase(Case):
    """A step of the paper's recipe, optimiser included, or log-probabilities of a batch."""

    def __init__(self, amp_dtype: str | None, training: bool, device: torch.device) -> None:
        self.amp_dtype, self.training, self.device = amp_dtype, training, device
        self._results: dict[str, torch.Tensor] = {}
        self.batch = 256 if device.type == "cuda" else 128
        # Inductor takes up to half a minute a network.
        main = amp_dtype is not None if device.type == "cuda" else amp_dtype is None
        compiled = ("stochastic", "max") if main and training else ()
        self.names = (*POOLINGS, *(f"{pool}_compiled" for pool in compiled))

    def __str__(self) -> str:
        what = "training" if self.training else "evaluation"
        return f"network-batch{self.batch}-{self.amp_dtype or 'float32'}-{what}"

    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        shape = (self.batch, 3, IMAGE_SIZE, IMAGE_SIZE)
        images = torch.randn(shape, device=self.device)
        if self.amp_dtype is not None:  # the bank makes images in autocast's type
            images = images.to(getattr(torch, self.amp_dtype))
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.arange(self.batch, device=self.device) % CLASSES
        return {name: partial(self._contestant, name, images, labels) for name in self.names}

    def check(self, name: str, contestant: Contestant) -> None:
        """The first loss, or the log-probabilities; compiled they are those of eager."""
        result = contestant.run(None)
        assert torch.isfinite(result).all(), f"{self}: {name} gives {result}"
        expected = self._results.setdefault(name.partition("_")[0], result.float().cpu())
        relative = 1e-3 if self.amp_dtype is None else 3e-2
        torch.testing.assert_close(result.float().cpu(), expected, rtol=relative, atol=relative)

    def _contestant(self, name: str, images: torch.Tensor, labels: torch.Tensor) -> Contestant:
        pool, _, compiled = name.partition("_")
        options = TrainOptions(
            pool=pool,
            batch_size=self.batch,
            amp_dtype=self.amp_dtype,
            channels_last=True,
            torchcompile="default" if compiled and self.training else None,
        )
        learner = Learner(options, CLASSES, self.device, Team())

        def step(_: object) -> torch.Tensor:
            return learner.step(images, labels, batch_size=self.batch, number=0, lr=options.lr)

        network = learner.network.eval()
        forward = torch.compile(network) if compiled and not self.training else network

        @torch.no_grad()
        def classify(_: object) -> torch.Tensor:
            with autocast(self.device, learner.amp_dtype):
                return forward(images)

        return Contestant(step if self.training else classify, images=self.batch)


def test_network(contest: Callable[[Case, str], None], case: Case, contestant: str) -> None:
    contest(case, contestant)
