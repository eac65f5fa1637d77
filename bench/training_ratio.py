"""Time training by the whole script against bare steps on random tensors, on the same cores.

    python bench/training_ratio.py --images FOLDER [--pool POOL] [--rounds N] [--steps N]

In turn, so that a drift of the machine hits both: some steps of the paper's recipe as train.py runs
them, with augmentation, reports and TensorBoard, and as many steps of the same network and
optimiser on one batch of random numbers. What is compared are medians of images per second.
OMP_NUM_THREADS sets the threads.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path

import bench_network
import torch

from cnnsp.data.augment import PAPER_VARIANTS
from cnnsp.data.batches import ImageBank
from cnnsp.data.images import load_folder
from cnnsp.network import POOLINGS
from cnnsp.training.devices import keep_freed_memory
from cnnsp.training.recipe import TrainOptions
from cnnsp.training.run import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--pool", choices=POOLINGS, default="stochastic")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="steps of 256 images in a round")
    args = parser.parse_args()
    keep_freed_memory()
    train, test = load_folder(args.images)
    bank = ImageBank(train, PAPER_VARIANTS, channels_last=True)
    test_bank = ImageBank(test, channels_last=True)
    options = TrainOptions(pool=args.pool, channels_last=True, max_steps=args.steps)
    cpu = torch.device("cpu")
    bare = bench_network.contestant(args.pool, None, "training", cpu, options.batch_size)
    by_script, by_steps = [], []
    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(options, bank, test_bank, Path(output))
        for _ in range(args.rounds + 1):
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.run()
            by_script.append(trainer.progress.history[-1].images_per_second)
            start = time.perf_counter()
            for _ in range(args.steps):
                bare.run(None)
            by_steps.append(args.steps * options.batch_size / (time.perf_counter() - start))
    # The first round is left out: it compiles, and gets memory from the system.
    script, alone = statistics.median(by_script[1:]), statistics.median(by_steps[1:])
    print(f"images/s by the script {script:.3g}, bare {alone:.3g}, ratio {script / alone:.3g}")


if __name__ == "__main__":
    main()
