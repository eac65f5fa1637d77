"""CNN_SP by pooling: a training step and the use of the trained network, eager and compiled.

    python bench/bench_network.py [--pool POOL]

times what a training run adds to its steps: in turn some steps as train.py runs them, with the
paper's augmentation, reports and TensorBoard, and bare ones of the same network and optimiser.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import bench_data
import torch
from contest import Contestant, Makers

from cnnsp.data.augment import AS_IS, PAPER_VARIANTS
from cnnsp.data.batches import ImageBank
from cnnsp.network import IMAGE_SIZE, POOLINGS
from cnnsp.training.devices import autocast, choose_amp_dtype, keep_freed_memory
from cnnsp.training.processes import Team
from cnnsp.training.recipe import TrainOptions
from cnnsp.training.run import Trainer
from cnnsp.training.step import Learner

BATCH = {"cpu": 128, "cuda": 256}
CLASSES = 3
ROUNDS, STEPS = 4, 4  # of the script and bare, in turn


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


def main() -> None:
    parser = argparse.ArgumentParser(description="Time what a training run adds to its steps.")
    parser.add_argument("--pool", choices=POOLINGS, default="stochastic")
    options = TrainOptions(pool=parser.parse_args().pool, channels_last=True, max_steps=STEPS)
    keep_freed_memory()
    bare = contestant(options.pool, None, "training", torch.device("cpu"), options.batch_size)
    images, _ = bench_data.images()
    train, test = (ImageBank(images, made, channels_last=True) for made in (PAPER_VARIANTS, AS_IS))
    by_script, by_steps = [], []
    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(options, train, test, Path(output))
        for _ in range(ROUNDS):
            trainer.run()
            by_script.append(trainer.progress.history[-1].images_per_second)
            start = time.perf_counter()
            for _ in range(STEPS):
                bare.run()
            by_steps.append(STEPS * options.batch_size / (time.perf_counter() - start))
    # The first round is left out: it compiles, and gets memory from the system.
    script, alone = statistics.median(by_script[1:]), statistics.median(by_steps[1:])
    print(f"images/s by the script {script:.3g}, bare {alone:.3g}, ratio {script / alone:.3g}")


if __name__ == "__main__":
    main()
