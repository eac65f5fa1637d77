"""Sets of synthetic flowers, which ``drawing.py`` draws; always the same ones."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .. import IMAGE_SIZE
from .augment import Variant
from .drawing import CLASSES, draw
from .images import ImageSet

# Enough for a run of minutes on two CPU cores (SHORT_RECIPE of recipe.py): training images of each
# class in these variants.
TRAIN_PER_CLASS, TEST_PER_CLASS = 340, 100
VARIANTS = (Variant(), Variant(angle=-10), Variant(angle=10))
_ROOT = str(Path(__file__).resolve().parents[2])


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
    return start(per_class, seed=seed, split=split, size=size, workers=workers)()


def start(
    per_class: int, *, seed: int = 0, split: str = "train", size: int = IMAGE_SIZE, workers: int = 2
) -> Callable[[], ImageSet]:
    """Begin what :func:`synthetic_flowers` does; what comes back waits for the images."""
    split_number = ("train", "test").index(split)
    keys = [(label, number) for label in range(len(CLASSES)) for number in range(per_class)]
    pixels = torch.empty(len(keys), size, size, 3, dtype=torch.uint8)
    left = set(range(len(keys)))
    bar = tqdm(total=len(keys), desc=f"drawing {split}", unit="image", leave=False, disable=None)

    def keep(place: int, image: np.ndarray) -> None:
        pixels[place] = torch.from_numpy(image)
        left.discard(place)
        bar.update()

    def receive(share: range) -> None:
        arguments = [seed, split_number, size, *(n for place in share for n in keys[place])]
        with subprocess.Popen(
            [sys.executable, "-m", "cnnsp.data.drawing", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([_ROOT, *sys.path])},
            start_new_session=True,  # Ctrl-C is for this process; it ends with the pipe
        ) as process:
            assert process.stdout is not None
            for place in share:
                content = process.stdout.read(3 * size**2)
                if len(content) == 3 * size**2:
                    keep(place, np.frombuffer(bytearray(content), np.uint8).reshape(size, size, 3))

    # Processes, for threads would wait for each other: ImageDraw keeps the interpreter's lock.
    parts = min(workers, os.cpu_count() or 1, len(keys) // 50)
    shares = [range(first, len(keys), parts) for first in range(parts)]
    threads = [threading.Thread(target=receive, args=[share], daemon=True) for share in shares]
    for thread in threads:
        thread.start()

    def finish() -> ImageSet:
        for thread in threads:
            thread.join()
        for place in sorted(left):  # few images, or a process that failed
            keep(place, draw(seed, split_number, *keys[place], size))
        bar.close()
        names = tuple(f"{CLASSES[label]} {number}" for label, number in keys)
        labels = torch.tensor([label for label, _ in keys])
        return ImageSet(pixels.permute(0, 3, 1, 2), labels, CLASSES, names)

    return finish


def begin(workers: int) -> Callable[[], tuple[ImageSet, ImageSet]]:
    """Begin to draw the training and the test images of the short recipe, always the same ones."""
    train = start(TRAIN_PER_CLASS, split="train", workers=workers)
    test = start(TEST_PER_CLASS, split="test", workers=workers)
    return lambda: (train(), test())


def blank() -> ImageSet:
    """Two images of nothing, of their kind."""
    black = torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    return ImageSet(black, torch.tensor([0, 1]), CLASSES)
