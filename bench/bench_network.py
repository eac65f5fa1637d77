"""CNN_SP by pooling: a training step and the use of the trained network, eager and compiled."""

from __future__ import annotations

from functools import partial

import torch
from contest import Contestant, Makers

from cnnsp.network import IMAGE_SIZE, POOLINGS
from cnnsp.training.devices import autocast, choose_amp_dtype
from cnnsp.training.processes import Team
from cnnsp.training.recipe import TrainOptions
from cnnsp.training.step import Learner

BATCH = {"cpu": 128, "cuda": 256}
CLASSES = 3


def cases(device: torch.device) -> dict[str, Makers]:
    amp_dtype = choose_amp_dtype(True, None, device)  # none on a CPU that would be slower with it
    main, batch = amp_dtype if device.type == "cuda" else None, BATCH[device.type]
    found: dict[str, Makers] = {}
    for dtype in dict.fromkeys((None, amp_dtype)):
        for step in ("training", "evaluation"):
            names = list(POOLINGS)
            if dtype == main and step == "training":  # Inductor takes up to half a minute a network
                names += ["stochastic_compiled", "max_compiled"]
            found[f"network-batch{batch}-{dtype or 'float32'}-{step}"] = {
                name: partial(contestant, name, dtype, step, device, batch) for name in names
            }
    return found


def contestant(
    name: str, amp_dtype: str | None, step: str, device: torch.device, batch: int
) -> Contestant:
    """A step of the paper's recipe, optimiser included, or log-probabilities of a batch."""
    pool, _, compiled = name.partition("_")
    images = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    # The bank makes images in autocast's type.
    dtype = getattr(torch, amp_dtype or "float32")
    images = images.to(dtype, memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device) % CLASSES
    options = TrainOptions(
        pool=pool,
        batch_size=batch,
        amp_dtype=amp_dtype,
        channels_last=True,
        torchcompile="default" if compiled else None,
    )
    learner = Learner(options, CLASSES, device, Team())

    def train() -> torch.Tensor:
        return learner.step(images, labels, batch_size=batch, number=0, lr=options.lr)

    @torch.no_grad()
    def classify() -> torch.Tensor:
        with autocast(device, learner.amp_dtype):
            return learner.network.eval()(images)

    run = train if step == "training" else classify
    assert torch.isfinite(result := run()).all(), f"{name} gives {result}"
    return Contestant(run, images=batch)


def test_network(record) -> None:
    record()
