"""Time training by the whole script against bare steps on random tensors, on the same cores.

    python bench/training_ratio.py --images FOLDER [--threads N] [--rounds N] [--output NAME]

In turn, so that a drift of the machine hits both: some steps of the paper's recipe as train.py runs
them, with augmentation, reports and TensorBoard, and as many steps of the same network and
optimiser on one batch of random numbers. What is compared are medians of images per second.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from cnnsp.data.augment import PAPER_VARIANTS
from cnnsp.data.batches import ImageBank
from cnnsp.data.images import load_folder
from cnnsp.network import POOLINGS
from cnnsp.training.devices import keep_freed_memory
from cnnsp.training.processes import Team
from cnnsp.training.recipe import TrainOptions
from cnnsp.training.run import Trainer
from cnnsp.training.step import Learner


def measure(images: Path, pool: str, steps: int, rounds: int) -> dict[str, float]:
    """Median images per second of both, and their ratio."""
    train, test = load_folder(images)
    options = TrainOptions(pool=pool, channels_last=True, max_steps=steps)
    bank = ImageBank(train, PAPER_VARIANTS, channels_last=True)
    test_bank = ImageBank(test, channels_last=True)
    batch = torch.randn(options.batch_size, 3, 256, 256).to(memory_format=torch.channels_last)
    labels = torch.randint(len(train.classes), (options.batch_size,))
    bare = Learner(options, len(train.classes), torch.device("cpu"), Team())
    by_script, by_steps = [], []
    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(options, bank, test_bank, Path(output))
        for _ in range(rounds + 1):
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.run()
            by_script.append(trainer.progress.history[-1].images_per_second)
            start = time.perf_counter()
            for number in range(steps):
                bare.step(batch, labels, batch_size=len(batch), number=number, lr=options.lr)
            by_steps.append(steps * len(batch) / (time.perf_counter() - start))
    # The first round is left out: it compiles, and gets memory from the system.
    script, alone = statistics.median(by_script[1:]), statistics.median(by_steps[1:])
    return {"script_images_per_s": script, "bare_images_per_s": alone, "ratio": script / alone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--pool", choices=POOLINGS, default="stochastic")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="steps of 256 images in a round")
    parser.add_argument(
        "--output", metavar="NAME", help="also write to results/training_ratio-NAME.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    result = measure(args.images, args.pool, args.steps, args.rounds)
    print(", ".join(f"{name} {value:.3g}" for name, value in result.items()))
    if args.output:
        conditions = {
            "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            **{name: vars(args)[name] for name in ("threads", "pool", "steps", "rounds")},
        }
        path = Path(__file__).with_name("results") / f"training_ratio-{args.output}.json"
        path.write_text(json.dumps({**conditions, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
