"""Sets of synthetic flowers, which ``drawing.py`` draws; always the same ones."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import suppress

import numpy as np
import torch
from tqdm import tqdm

from .. import IMAGE_SIZE
from ..interruption import end_with_parent
from .augment import Variant
from .drawing import CLASSES, draw
from .images import ImageSet

# Enough for a run of minutes on two CPU cores (SHORT_RECIPE of recipe.py): images of each class,
# and the variants of those to train on.
PER_CLASS = {"train": 340, "test": 100}
VARIANTS = (Variant(), Variant(angle=-10), Variant(angle=10))


def synthetic_flowers(
    per_class: int, *, seed: int = 0, split: str = "train", size: int = IMAGE_SIZE, workers: int = 2
) -> ImageSet:
    """Draw ``per_class`` images of each class.

    Every image depends on ``seed``, ``split``, its class and its number only, so more images
    continue the same series. ``"train"`` and ``"test"`` share no image.

    Args:
        per_class: images of each class, at least 1.
        seed: not negative.
        split: ``"train"`` or ``"test"``.
        size: height and width in pixels.
        workers: processes that draw, if it is worth their start.
    """
    same = (seed, ("train", "test").index(split))
    keys = [(label, number) for label in range(len(CLASSES)) for number in range(per_class)]
    images = _draw_all([(*same, *key, size) for key in keys], min(workers, len(keys) // 50))
    bar = tqdm(images, f"drawing {split}", len(keys), unit="image", leave=False, disable=None)
    pixels = torch.from_numpy(np.stack(list(bar))).permute(0, 3, 1, 2)
    names = tuple(f"{CLASSES[label]} {number}" for label, number in keys)
    return ImageSet(pixels, torch.tensor([label for label, _ in keys]), CLASSES, names)


def _draw_all(arguments: list[tuple[int, ...]], workers: int) -> Iterator[np.ndarray]:
    """What :func:`draw` makes of all ``arguments``, in processes where more than one can work."""
    done = 0
    # Processes, for threads would wait for each other: ImageDraw keeps the interpreter's lock.
    if (workers := min(workers, os.cpu_count() or 1)) > 1:
        with suppress(OSError, BrokenExecutor):  # where none can be started, or one is killed
            pool = ProcessPoolExecutor(
                workers, multiprocessing.get_context("spawn"), end_with_parent
            )
            try:
                for image in pool.map(draw, *zip(*arguments, strict=True), chunksize=10):
                    yield image
                    done += 1
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
    for places in arguments[done:]:
        yield draw(*places)
