"""Sets of synthetic flowers, which ``drawing.py`` draws; always the same ones."""

from __future__ import annotations

import numpy as np
import torch
from tqdm import tqdm

from .. import IMAGE_SIZE
from .augment import Variant
from .drawing import CLASSES, draw
from .images import ImageSet

# Enough for a run of minutes on two CPU cores (SHORT_RECIPE of recipe.py): images of each class,
# and the variants of those to train on.
PER_CLASS = {"train": 340, "test": 100}
VARIANTS = (Variant(), Variant(angle=-10), Variant(angle=10))


def synthetic_flowers(
    per_class: int, *, seed: int = 0, split: str = "train", size: int = IMAGE_SIZE
) -> ImageSet:
    """Draw ``per_class`` images of each class.

    Every image depends on ``seed``, ``split``, its class and its number only, so more images
    continue the same series. ``"train"`` and ``"test"`` share no image.

    Args:
        per_class: images of each class, at least 1.
        seed: not negative.
        split: ``"train"`` or ``"test"``.
        size: height and width in pixels.
    """
    part = ("train", "test").index(split)
    keys = [(label, number) for label in range(len(CLASSES)) for number in range(per_class)]
    bar = tqdm(keys, f"drawing {split}", unit="image", leave=False, disable=None)
    images = np.stack([draw(seed, part, label, number, size) for label, number in bar])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    names = tuple(f"{CLASSES[label]} {number}" for label, number in keys)
    return ImageSet(pixels, torch.tensor([label for label, _ in keys]), CLASSES, names)
