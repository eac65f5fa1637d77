"""Images for the benches: the photographs that are here, or files of synthetic flowers."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def photographs() -> Path | None:
    """Where the flower photographs may be, beside the project or in it."""
    for folder in (
        ROOT / "datasets",
        ROOT / "shared" / "flowers",
        ROOT.parent / "shared" / "flowers",
    ):
        if (folder / "train_data").is_dir() and (folder / "test_data").is_dir():
            return folder
    return None


def draw_flowers(folder: Path, per_class: int, suffix: str, **options: int) -> None:
    """Write synthetic flowers in the layout of the photographs.

    Args:
        folder: where train_data and test_data are made.
        per_class: images of each class, in each of the two.
        suffix: of the files, which names their format.
        options: of Pillow's writer of it.
    """
    from PIL import Image

    from cnnsp.data.synthetic import synthetic_flowers

    for split in ("train", "test"):
        drawn = synthetic_flowers(per_class, split=split, workers=os.cpu_count() or 1)
        for number, (pixels, label) in enumerate(zip(drawn.images, drawn.labels, strict=True)):
            path = folder / f"{split}_data" / drawn.classes[label] / f"{number}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path, **options)
